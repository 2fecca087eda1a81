"""The interpreter's tests of tests/kernels, as tests of what the kernels compile to.

Here `harness.check` judges every case in bfloat16 and float16, on contiguous tensors where the case names no layout: so
training has them, and the emulator sees a stray access without poison. Tiles are the table's own, programs run in an
order drawn from the test's name. Tests of mutations (of the harness), of refusals and of torch.compile are left out.
"""

import re
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))
import harness

from kernels import emulator

harness.INTERPRETED = False
harness.DTYPES = [torch.float16]  # what a test says once for each dtype is said once: `check` takes both
_judge = harness.check
WITHOUT = (
    "mutat|spoiled|wrong_combination|wrong_shapes|follows|bounded|rounding|flops|saved|unsupported|refus|registered|checkpoint|compile|seam|self_test|satisfy|saves_"
    "|choice|copied|portable|is_a_view"
)


SESSIONS: list[emulator.Session] = []  # that of the running test


def check(operator: str, inputs: dict, kwargs: Any = None, dtype: Any = None, *, layout: Any = None, **options: Any):
    """harness.check in both types of 16 bits, whatever was asked; the result in float16.

    Where a softmax has one key, or one that matters, dS is a difference of equal numbers of size 1, known to 16 bits:
    their last place is left of it. Sums of a few sixteenths, scaled by dropout, are 0 but for rounding in embedding.
    """
    before = len(SESSIONS[-1].launches)
    if operator == "embedding":
        options["cancelling"] = ("table", "positions")
    for chosen in (torch.bfloat16, torch.float16):
        cancelled = torch.finfo(chosen).eps if "attention" in operator else 1e-5
        result = _judge(operator, inputs, kwargs, chosen, layout=layout, cancelled=cancelled, **options)
    empty = any(x is not None and x.numel() == 0 for x in inputs.values())
    assert len(SESSIONS[-1].launches) > before or empty, f"{operator}: no kernel ran"
    return result


harness.check = check


def take(namespace: dict[str, Any], module: ModuleType, without: str = "$^") -> None:
    """Puts the tests of a module of tests/kernels into `namespace`; without: names that are not taken."""
    prefix = module.__name__.removeprefix("test_")
    for name, value in vars(module).items():
        if name.startswith("test_") and not re.search(f"{WITHOUT}|{without}", name):
            namespace[f"test_{prefix}_{name.removeprefix('test_')}"] = value


@pytest.fixture(autouse=True)
def session(request: pytest.FixtureRequest) -> Iterator[None]:
    with emulator.active("sm_86", seed=zlib.crc32(request.node.name.encode())) as session:
        SESSIONS[:] = [session]
        yield


@pytest.fixture
def small_tiles() -> None:
    """In place of the interpreter's small blocks: the table's own."""
