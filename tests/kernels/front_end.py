"""Takes the shapes that the interpreter's tests use through Triton's front end; a program of its own, since the kernels
beside those tests are interpreted, and the interpreter specialises nothing: an integer of 1 stays an integer there.

    python front_end.py [--all] TEST_FILE ...

Every test runs on meta tensors with its launches recorded, and what it asserts is ignored: nothing has values. Each
call of `harness.check` is recorded again with each of its sizes set to 1. Output: the number of calls, launches and
programs, and what the front end refuses, as JSON. Programs that differ in widths or tiles alone are taken once, unless
--all is given: what compiles at 40 columns compiles at 48, but what is 1 or absent is a constant.
"""

import json
import re
import sys
from dataclasses import replace

import harness
import pytest
import torch

from kernels import calls
from kernels.compile_only.front_end import problems
from kernels.compile_only.record import recording
from kernels.dropout import Dropout
from kernels.operators import OPERATORS

harness.DEVICE = "meta"
COUNTS, SEEN = {"calls": 0, "refused": []}, set()


def _run(call, unused=()):
    COUNTS["calls"] += 1
    try:
        inputs, kwargs = call.draw(torch.device("meta"))
        calls.results(call.operator, calls.fused_function(call.operator), inputs, kwargs, call.upstream)
    except (ValueError, IndexError, ZeroDivisionError) as error:  # a size that the operator has not
        COUNTS["refused"].append(f"{call.operator}: {error}")


def _check(operator, inputs, kwargs=None, dtype=torch.float32, *, layout="padded", unused=(), **_):
    """In place of harness.check: the call, and the same with each of its sizes 1."""
    given = dict(kwargs or {})
    for name, x in given.items():
        if isinstance(x, torch.Tensor):
            given[name] = x.to("meta")
        elif isinstance(x, Dropout):
            given[name] = replace(x, rng=x.rng.to("meta"))
    leaves = {n: x if x is None else x.to(dtype if x.dtype.is_floating_point else x.dtype) for n, x in inputs.items()}
    placed = {n: x if x is None else harness.place(x.to("meta"), layout) for n, x in leaves.items()}
    for x in placed.values():
        if x is not None and x.dtype.is_floating_point:
            x.requires_grad_()
    tensors = [placed.get(name) for name in OPERATORS[operator].contract.tensors]
    call = calls.call_of(operator, tensors, DEFAULTS[operator] | given)
    # of one call in two dtypes the sizes of 1 are taken once
    form = re.sub(r"torch\.float\d+", "", repr(call))
    if repr(call) not in SEEN:
        _run(call)
    if form in SEEN:
        return
    SEEN.update((repr(call), form))
    halves = 1 if given.get("kind") in (None, "plain") else 2
    for axis in {axis for argument in call.contract.arguments.values() for axis in argument.axes} - {"2", "3"}:
        ones = {"B": ("B", "B|1", "B'|1"), "H": ("H", "G", "G'"), "P": ("P", "L")}.get(axis, (axis,))
        one = halves if axis == "rows" else 1
        _run(call.resized(lambda name, n, ones=ones, one=one: one if name in ones else n))


# what the public function adds to a call
DEFAULTS = {
    "attention": {"scale": 1.0, "causal": False, "key_lengths": None, "key_mask": None, "dropout": None},
    "glu": {"activation": "relu", "factor": 1.0, "dropout": None, "gate_dropout": None},
    "residual_norm": {"dropout": None, "eps": 1e-6},
    "linear_cross_entropy": {"scale": 1.0, "ignore_index": -100},
    "embedding": {"combine": "average", "dropout": None, "position_dropout": None},
}


def _representatives(launches):
    """Launches that together have each argument of each kernel as a constant 1, as absent and as neither, under each
    setting of the kernel's switches."""
    seen, found = set(), []
    for launch in sorted(launches, key=lambda x: x.program):
        numbers = [x for x in launch.constants.items() if isinstance(x[1], bool | str | None)]
        switches = (launch.kernel, *numbers)
        constants = [(x, n) for x, n in launch.source()[2].items() if n == 1 or n is None]
        new = {(switches, key) for key in (*constants, None)} - seen
        if new:
            seen |= new
            found.append(launch)
    return found


def main(arguments):
    everything = "--all" in arguments
    harness.check = _check
    with recording(compile=False) as launches:
        pytest.main(
            ["-q", "--tb=no", "-r", "", "-p", "no:cacheprovider", "-n0", *(a for a in arguments if a != "--all")]
        )
    programs = {x.program: x for x in launches}
    distinct = list(programs.values()) if everything else _representatives(programs.values())
    found = problems(distinct)
    counts = {"launches": len(launches), "programs": len(programs), "compiled": len(distinct), "problems": found}
    print(json.dumps(COUNTS | counts))


if __name__ == "__main__":
    main(sys.argv[1:])
