"""What the checkpoint tests need in processes of their own: one that holds the lock, savers that are killed, two that save together."""

import os
import random
import signal
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxlm.train import checkpoint
from jaxlm.train.lock import Lock, Locked
from jaxlm.train.state import State


def make_state(step: int, mesh=None) -> State:
    """A state whose every bit follows from `step`, split over the first axis of `mesh` (else on one device)."""
    random_bits = np.random.default_rng(step)
    whole = lambda *shape: random_bits.standard_normal(shape, np.float32)
    place = lambda x, *axes: jnp.array(x)
    if mesh:
        place = lambda x, *axes: jax.make_array_from_callback(x.shape, NamedSharding(mesh, PartitionSpec(*axes)), lambda index: x[index])
    axis = mesh.axis_names[0] if mesh else None
    params = {"embed": {"tokens": place(whole(64, 16), axis)}, "layers": {"q": place(whole(2, 16, 8), None, axis)}}
    moments = {name: place(np.full((64, 16), step, jnp.bfloat16), axis) for name in ("mu", "nu")}, None, ()
    return State(place(np.int32(step)), params, moments, None, place(np.array([0, step], np.uint32)))


def target(state: State) -> State:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def same(a, b) -> bool:
    """Bitwise, types and structure included."""
    bits = lambda x: (x.dtype, x.shape, np.asarray(jax.device_get(x)).tobytes())
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b))
    return jax.tree.structure(a) == jax.tree.structure(b) and all(bits(x) == bits(y) for x, y in pairs)


def hold(workdir: str) -> None:
    """Holds the lock, has a child that outlives it, prints both process ids."""
    with Lock(workdir):
        child = os.fork()
        if child:
            print(os.getpid(), child, flush=True)
        time.sleep(60)


def save_for_ever(workdir: str, acknowledged: str, ready: int) -> None:
    """One life of a run: takes the lock, checks that nothing acknowledged is lost, says so, then saves until it is killed."""
    with Lock(workdir) as lock:
        found = checkpoint.newest(workdir)
        with open(acknowledged, "a+") as file:
            file.seek(0)
            last = max(map(int, file.read().split()), default=None)
            if (found or 0) < (last or 0):
                raise AssertionError(f"step {last} was acknowledged, but the newest is {found}")
            if found is not None:
                wanted = make_state(found)
                assert same(checkpoint.restore(workdir, found, target(wanted)), wanted), found
            os.write(ready, b"!")
            with checkpoint.Checkpoints(lock, keep_last=2, keep_best=0, keep_every=0) as checkpoints:
                for step in range((found or 0) + 1, 10**6):
                    checkpoints.save(step, make_state(step), {"data.json": b"%d" % step})
                    if random.random() < 0.5:  # else the next save waits
                        file.write(f"{checkpoints.wait()}\n")
                        file.flush()


def kill(workdir: str, acknowledged: str, times: str, seed: str) -> None:
    """Lives of `save_for_ever`, each ended by SIGKILL at a random moment. Forked before jax starts its devices: that saves the imports."""
    dice = random.Random(int(seed))
    for i in range(int(times)):
        read, write = os.pipe()
        child = os.fork()
        if not child:
            random.seed(f"{seed}/{i}")
            save_for_ever(workdir, acknowledged, write)
        os.close(write)
        if i % 4 != 3:  # every fourth dies while it starts
            os.read(read, 1)
        time.sleep(dice.uniform(0, 0.7))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if status != signal.SIGKILL:
            sys.exit(f"life {i} ended by itself: {status}")
        os.close(read)


def together(workdir: str, port: str, index: str) -> None:
    """One of two processes with four devices each."""
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{port}", 2, int(index))
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(AxisType.Auto,))
    with jax.set_mesh(mesh), Lock(workdir) as lock:
        try:
            with Lock(workdir):
                raise AssertionError("locked twice")
        except (Locked, OSError) as error:
            print("refused:", error, flush=True)
        assert checkpoint.newest(workdir) is None
        with checkpoint.Checkpoints(lock, keep_last=2, keep_best=0, keep_every=0) as checkpoints:
            for step in (1, 2, 3):
                checkpoints.save(step, make_state(step, mesh), {"data.json": b"%d" % step})
            assert checkpoints.wait() == 3
            checkpoints.save(3, make_state(3, mesh), {})
        assert checkpoint.steps(workdir) == [2, 3], checkpoint.steps(workdir)
        if index == "0":
            with open(f"{workdir}/checkpoints/3/params/_METADATA", "r+b") as file:
                file.write(b"?")
        lines = []
        found = checkpoint.newest(workdir, log=lines.append)
        assert found == 2 and len(lines) == (index == "0"), (found, lines)
        wanted = make_state(2, mesh)
        got = checkpoint.restore(workdir, 2, target(wanted))
        shards = lambda tree: [(s.index, np.asarray(s.data).tobytes()) for x in jax.tree.leaves(tree) for s in x.addressable_shards]
        assert str(shards(got)) == str(shards(wanted))
        try:
            checkpoint.restore(workdir, 3, target(wanted))
            raise AssertionError("a damaged checkpoint was restored")
        except (ValueError, OSError) as error:
            print("damaged:", error, flush=True)
    print("done", flush=True)


if __name__ == "__main__":
    {f.__name__: f for f in (hold, kill, together)}[sys.argv[1]](*sys.argv[2:])
