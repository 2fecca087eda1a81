"""Kernel tests run in Triton's interpreter on the CPU, or on a GPU with KERNEL_TEST_DEVICE=cuda.

The variable of the interpreter is set before anything imports Triton: its own library functions are decorated at
import, and would be compiled ones otherwise. Tests of compilation run in subprocesses without it.
"""

import os
import sys

ON_GPU = os.environ.get("KERNEL_TEST_DEVICE", "cpu") == "cuda"

if not ON_GPU:
    if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError(
            "tests/kernels: expected triton to be imported by these tests first, it was imported before without "
            "TRITON_INTERPRET=1; run `TRITON_INTERPRET=1 pytest ...`"
        )
    os.environ["TRITON_INTERPRET"] = "1"

import harness  # noqa: E402
import pytest  # noqa: E402


@pytest.fixture
def poisoned():
    """Uninitialised memory is NaN, writes outside an allocation fail the test."""
    with harness.poisoned_allocations():
        yield


@pytest.fixture
def shuffled(request):
    """The interpreter runs a grid's programs in a random order; the seed is printed."""
    with harness.shuffled_programs(harness.seed_of(request.node.nodeid)) as seed:
        print(f"program order seed: {seed}")
        yield seed


def pytest_collection_modifyitems(items):
    if not ON_GPU:
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs KERNEL_TEST_DEVICE=cuda"))
