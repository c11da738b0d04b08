"""A power cut right after an acknowledged save, on a file system of its own: tools/chaos.py power. Needs root and loop devices."""

import contextlib
import pathlib
import random
import shutil
import subprocess
import time
from collections.abc import Iterator

from tools.chaos_lab import PATIENCE, Broken, Lab, Life, Tally

MIB = 48


def call(*command: str) -> str:
    """Runs a command of the system; what it printed."""
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@contextlib.contextmanager
def mounted(image: pathlib.Path, folder: pathlib.Path) -> Iterator[str]:
    """Mounts an image; the name of its loop device."""
    folder.mkdir(exist_ok=True)
    device = call("losetup", "--find", "--show", str(image))
    try:
        call("mount", device, str(folder))
        try:
            yield device
        finally:
            call("umount", str(folder))
    finally:
        call("losetup", "--detach", device)


def written(device: str) -> list[str]:
    """What the kernel says of a device's writes so far and of those on their way."""
    numbers = pathlib.Path(f"/sys/block/{pathlib.Path(device).name}/stat").read_text().split()
    return [*numbers[4:7], numbers[8]]


def cut(device: str, image: pathlib.Path, copy: pathlib.Path) -> None:
    """Copies an image as it is at one moment: what the file system holds in memory and has not yet written to its device is not in it."""
    for _ in range(50):
        before = written(device)
        shutil.copyfile(image, copy)
        if before == written(device) and before[-1] == "0":
            return
        time.sleep(0.01)
    raise Broken("the device is never at rest")


def power(lab: Lab, trials: int, draw: random.Random, tally: Tally) -> None:
    """The run stops dead at an acknowledgement, the device is copied as it is, the copy is mounted: its journal is replayed as after a power cut. The
    acknowledged step must be what the run goes on from, with the state that was saved."""
    image, copy, folder = lab.folder / "disk", lab.folder / "copy", lab.folder / "mounted"
    while tally.trials < trials and len(tally.broken) < 4:
        image.unlink(missing_ok=True)
        with open(image, "wb") as file:
            file.truncate(MIB * 2**20)
        call("mkfs.ext4", "-q", "-F", str(image))
        name = f"power{tally.trials}"
        with mounted(image, folder) as device:
            call("sync", "-f", str(folder))
            life = Life(lab, folder / "run", [{"point": "save.after", "hit": draw.randint(1, 12), "do": "SIGSTOP"}], name=name)
            stopped = life.wait(PATIENCE, until=lambda: life.rows("fault"))
            if stopped:
                cut(device, image, copy)
            life.kill()
        acknowledged = max((row["step"] for row in life.rows("acknowledged")), default=0)
        if not stopped or not acknowledged:
            tally.fail("ext4", f"no acknowledgement: {life.codes} {life.printed()[-500:]}")
            continue
        sums = {row["step"]: row["sum"] for row in life.rows("saving")}
        with mounted(copy, folder):
            again = Life(lab, folder / "run", [{}], name=f"{name}-again")
            again.wait(PATIENCE, until=lambda: again.rows("stepped"))
            again.kill()
        found = [(row["step"], row["sum"]) for row in again.rows("restored")]
        if found == [(acknowledged, sums[acknowledged])] and again.rows("stepped"):
            tally.add("ext4", **{"seconds to recover": again.rows("stepped")[0]["time"] - again.begun})
        else:
            tally.fail("ext4", f"step {acknowledged} was acknowledged, restored was {[step for step, _ in found]}: {again.printed()[-800:]}")
