"""Where in a computation the first value appears that is not finite: it is done again, one operation after the other, and each result is looked at."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend import core

# Operations that are a list of others, by the names that they have in jax 0.7 to 0.12; what else holds a list of its own is done as a whole.
_CALLS = ("jit", "pjit", "closed_call", "core_call", "checkpoint", "remat", "remat2", "custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr")


class Origin(NamedTuple):
    """The operation that made something NaN or infinite of what was finite, or the argument that came so."""

    number: int  # of the operation, in order; arguments come before
    what: str  # "NaN" or "Inf"
    bad: int  # values that are not finite
    shape: tuple[int, ...]
    dtype: str
    first: tuple[int, ...]  # place of the first of them
    operation: str  # name of the primitive; of an argument the argument's name
    line: str  # of the source, "jaxlm/models/layers.py:120 (function)"; of an argument ""
    loops: tuple[str, ...]  # the turns of loops that it lies in, outermost first
    backward: bool  # a gradient's
    largest: float  # magnitude of what it was made from

    def __str__(self) -> str:
        where = f"{self.bad:,} of {int(np.prod(self.shape)):,} values {'are' if self.bad > 1 else 'is'} {self.what}, the first at {list(self.first)}"
        if not self.line:
            return f"{self.operation}: {where}"
        place = ", ".join([*self.loops, "the gradient" if self.backward else "the forward pass"])
        return (f"{place}: {self.operation} at {self.line} makes {self.dtype}{list(self.shape)}, of which {where}, from finite values of at most "
                f"{self.largest:.3g}")


def find(f: Callable, arguments: Sequence[Any], names: Sequence[str], loop: Callable[[str, int, int], str]) -> Origin | None:
    """What made an output of `f(*arguments)` not finite; None: all are finite when it is computed in this way.

    What is not finite and ends nowhere (a mask's -inf, a logarithm that is not chosen) is no fault: the output is followed back to where it began.

    Args:
      arguments: of `f`, pytrees of arrays.
      names: of all leaves of the arguments, in order.
      loop: (line of a loop, turn, turns) -> what to call the turn.
    """
    closed = jax.make_jaxpr(f)(*arguments)
    leaves = jax.tree.leaves(list(arguments))
    given = [(leaf, _argument(leaf, name)) for leaf, name in zip(leaves, names, strict=True)]
    outs = _Walk(loop).run(closed.jaxpr, [(c, None) for c in closed.consts], given, ())
    origins = [origin for value, origin in outs if origin is not None and _bad(value) is not None]
    return min(origins, key=lambda origin: origin.number, default=None)


def _bad(value: Any) -> np.ndarray | None:
    """Where an array is not finite; None: nowhere."""
    if not jax.numpy.issubdtype(getattr(value, "dtype", np.int32), np.inexact):
        return None
    bad = ~np.isfinite(np.asarray(value))
    return bad if bad.any() else None


def _nan(value: Any) -> bool:
    return bool(np.isnan(np.asarray(value)).any())


def _argument(leaf: Any, name: str) -> Origin | None:
    bad = _bad(leaf)
    return None if bad is None else _origin(0, leaf, bad, name, "", (), False, 0.0)


def _origin(number: int, value: Any, bad: np.ndarray, operation: str, line: str, loops: tuple[str, ...], backward: bool, largest: float) -> Origin:
    first = tuple(int(i) for i in np.unravel_index(int(np.argmax(bad)), bad.shape)) if bad.ndim else ()
    return Origin(number, "NaN" if _nan(value) else "Inf", int(bad.sum()), tuple(bad.shape), str(value.dtype), first, operation, line, loops, backward, largest)


Tracked = tuple[Any, Origin | None]  # a value, and what made it not finite


class _Walk:
    """Does the operations of a jaxpr."""

    def __init__(self, loop: Callable[[str, int, int], str]):
        self._loop, self._numbers = loop, itertools.count(1)

    def run(self, jaxpr: Any, consts: Sequence[Tracked], arguments: Sequence[Tracked], loops: tuple[str, ...]) -> list[Tracked]:
        held: dict[Any, Tracked] = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *arguments], strict=True))
        last = {var: number for number, eqn in enumerate(jaxpr.eqns) for var in eqn.invars if not isinstance(var, core.Literal)}
        kept = {var for var in jaxpr.outvars if not isinstance(var, core.Literal)}
        read = lambda var: (var.val, None) if isinstance(var, core.Literal) else held[var]
        for number, eqn in enumerate(jaxpr.eqns):
            held.update(zip(eqn.outvars, self._apply(eqn, [read(var) for var in eqn.invars], loops), strict=True))
            for var in {var for var in eqn.invars if not isinstance(var, core.Literal)}:
                if last[var] == number and var not in kept:
                    del held[var]
        return [read(var) for var in jaxpr.outvars]

    def _apply(self, eqn: Any, inputs: list[Tracked], loops: tuple[str, ...]) -> list[Tracked]:
        name, params = eqn.primitive.name, eqn.params
        if name == "scan":
            return self._scan(eqn, inputs, loops)
        if name == "cond":
            branch = params["branches"][int(inputs[0][0])]
            return self.run(branch.jaxpr, [(c, None) for c in branch.consts], inputs[1:], loops)
        if name in _CALLS:
            jaxpr, consts = _open(next(value for value in params.values() if isinstance(value, (core.ClosedJaxpr, core.Jaxpr))))
            return self.run(jaxpr, [(c, None) for c in consts], inputs, loops)
        found = eqn.primitive.bind(*(value for value, _ in inputs), **params)
        return self._tracked(eqn, inputs, list(found) if eqn.primitive.multiple_results else [found], loops)

    def _scan(self, eqn: Any, inputs: list[Tracked], loops: tuple[str, ...]) -> list[Tracked]:
        params, (jaxpr, own) = eqn.params, _open(eqn.params["jaxpr"])
        fixed, carried = params["num_consts"], params["num_carry"]
        consts, carry, rows = inputs[:fixed], inputs[fixed:fixed + carried], inputs[fixed + carried:]
        turns = range(params["length"])
        stacks: list[list[Tracked]] = []
        for turn in reversed(turns) if params["reverse"] else turns:
            mine = [(value[turn], origin if _bad(value[turn]) is not None else None) for value, origin in rows]
            inside = (*loops, self._loop(_line(eqn), turn, params["length"]))
            found = self.run(jaxpr, [(c, None) for c in own], [*consts, *carry, *mine], inside)
            carry = found[:carried]
            stacks.append(found[carried:])
        if params["reverse"]:
            stacks.reverse()
        joined = []
        for number, var in enumerate(eqn.outvars[carried:]):
            parts = [stack[number] for stack in stacks]
            value = jax.numpy.stack([part for part, _ in parts]) if parts else jax.numpy.zeros(var.aval.shape, var.aval.dtype)
            joined.append((value, min((origin for _, origin in parts if origin is not None), key=lambda origin: origin.number, default=None)))
        return [*carry, *joined]

    def _tracked(self, eqn: Any, inputs: list[Tracked], outputs: list[Any], loops: tuple[str, ...]) -> list[Tracked]:
        number, found = next(self._numbers), []
        for value in outputs:
            bad, origin = _bad(value), None
            if bad is not None:
                earlier = [one for given, one in inputs if one is not None and _bad(given) is not None]
                came = [given for given, _ in inputs if _bad(given) is not None]
                if earlier:
                    origin = min(earlier, key=lambda one: one.number)
                elif not came or _nan(value) and not any(map(_nan, came)):  # an infinity that was written into the program is none of its faults
                    sizes = [np.abs(np.asarray(given, np.float64)) for given, _ in inputs if jax.numpy.issubdtype(given.dtype, np.floating)]
                    largest = max((float(size.max(initial=0)) for size in sizes), default=0.0)
                    backward = "transpose" in str(eqn.source_info.name_stack)
                    origin = _origin(number, value, bad, eqn.primitive.name, _line(eqn), loops, backward, largest)
            found.append((value, origin))
        return found


def _open(jaxpr: Any) -> tuple[Any, Sequence[Any]]:
    return (jaxpr.jaxpr, jaxpr.consts) if isinstance(jaxpr, core.ClosedJaxpr) else (jaxpr, ())


def _line(eqn: Any) -> str:
    """Line of jaxlm's source that an operation comes from."""
    from jax._src import source_info_util  # jax has no public name for it

    text = source_info_util.summarize(eqn.source_info)
    return text[text.rfind("jaxlm/"):] if "jaxlm/" in text else text
