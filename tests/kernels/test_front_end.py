"""Every shape that the interpreter's tests use compiles, with the specialisation of a real launch: see front_end.py."""

import json
import subprocess
import sys

import pytest
from compiling import ROOT, compiled, environment

FILES = [
    f"tests/kernels/test_{name}.py"
    for name in (
        "attention",
        "unified_attention",
        "every_operator",
        "packed",
        "glu",
        "residual_norm",
        "linear_cross_entropy",
        "embedding",
    )
]


def _front_end(*arguments):
    # the tests believe in a device, so that nothing is interpreted; front_end.py says that it is meta
    device = environment() | {"KERNEL_TEST_DEVICE": "cuda"}
    command = [sys.executable, "tests/kernels/front_end.py", *arguments]
    result = subprocess.run(command, cwd=ROOT, env=device, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout.splitlines()[-1])


def _assert_compiles(*arguments):
    found = _front_end(*arguments)
    assert found["problems"] == []
    # an operator that refuses a size of 1 would hide it
    assert found["refused"] == []
    return found


def test_every_shape_and_every_size_of_one_compiles():
    found = _assert_compiles(*FILES)
    # nothing is skipped in silence: every file's calls come here
    assert found["calls"] > 1000
    assert found["compiled"] > 200


@pytest.mark.slow
def test_every_program_of_them_compiles():
    found = _assert_compiles("--all", *FILES)
    assert found["compiled"] == found["programs"] > 800


WRONG = """
import json
import torch, triton
import triton.language as tl
from kernels.compile_only import front_end_only

@triton.jit
def kernel(x_ptr, n, BLOCK: tl.constexpr):
    tl.store(x_ptr + tl.arange(0, BLOCK), n.to(tl.float32))

results = []
for n in (16, 3, 1):
    try:
        with front_end_only() as launches:
            kernel[(1,)](torch.empty(64, device="meta"), n, BLOCK=64)
        results.append(len(launches))
    except RuntimeError as error:
        results.append(str(error))
print(json.dumps(results))
"""


def test_an_integer_that_is_one_is_a_constant(tmp_path):
    """What the interpreter hides, seen without ptxas."""
    script = tmp_path / "wrong.py"
    script.write_text(WRONG)
    sixteen, three, one = compiled(f"import runpy; runpy.run_path({str(script)!r})")
    assert (sixteen, three) == (1, 1)
    assert "kernel" in one
    assert "has no attribute 'to'" in one
