"""The operator that CONTRIBUTING adds, added as it says to a copy, and asked by everything that knows operators."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
BLOCKS = [
    (f"kernels/{name}", code)
    for name, code in re.findall(r"^```python (\S+)\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)
]

HOPS = re.findall(r"^\| \d `(\w+)` (\S+) \|", TEXT, re.MULTILINE)

ASK = """
import os
import torch
import kernels
from kernels import dispatch, emulator, selftest, tune
from kernels.calls import fused_function, generic_calls
from kernels.compile_only import recording
from kernels.compile_only.limits import limits_of
from kernels.operators import OPERATORS
from march.cost.counter import launch_event

assert kernels.__file__.startswith(os.getcwd())
record, cpu = OPERATORS["scale_add"], torch.device("cpu")
inputs = record.inputs(2, 5, 12)
expected = inputs["x"] + 0.5 * inputs["y"]
for impl, close in (("reference", 0), ("torch", 0), ("triton", 1e-6)):
    x, y = (t.to(torch.float32 if impl == "triton" else t.dtype).requires_grad_() for t in inputs.values())
    with emulator.active("sm_86"):
        out = kernels.scale_add(x, y, scale=0.5, impl=impl)
    torch.testing.assert_close(out.double(), expected, rtol=close, atol=close)
    gradients = torch.autograd.grad(out.sum(), (x, y))
    assert [g.mean().item() for g in gradients] == [1.0, 0.5], impl
call = generic_calls("scale_add", torch.bfloat16)[0]
with emulator.active("sm_86"):
    assert selftest.disagreements(call, fused_function("scale_add"), cpu) == []
assert selftest.disagreements(call, lambda x, y, scale: x + y, cpu) != []
try:
    kernels.scale_add(inputs["x"], inputs["y"][:1])
except ValueError as error:
    assert str(error) == "scale_add: expected y as [2, 5, 12], got [1, 5, 12]; both have one shape", error
else:
    raise AssertionError("a wrong shape was taken")
assert kernels.parse_impl("scale_add=torch") == {"scale_add": "torch"}
assert kernels.self_test("torch", cpu, torch.float32, ("scale_add",))["scale_add"].startswith("torch")
x, y = (torch.empty(2, 5, 12, device="meta", dtype=torch.bfloat16) for _ in range(2))
with recording("sm_86", compile=False) as launches:
    kernels.scale_add(x, y, impl="triton")
(launch,) = launches
event = launch_event(launch)
assert (event.reads, event.writes, event.flops) == (480, 240, 0), event
assert [limit.no_spills for limit in limits_of(launch.kernel, launch.constants, "sm_86")] == [True]
assert tune.entries()
print("asked")
"""


def _copy(folder: Path) -> None:
    for name in ("kernels", "march"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for path, code in BLOCKS:
        target = folder / path
        old = target.read_text(encoding="utf-8") + "\n\n" if target.exists() else ""
        target.write_text(old + code, encoding="utf-8")


def _ask(folder: Path) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(folder), "TRITON_INTERPRET": "0", "PYTHONSAFEPATH": "1"}
    return subprocess.run([sys.executable, "-c", ASK], cwd=folder, env=environment, capture_output=True, text=True)


def test_it_takes_five_places_at_most():
    places = [path for path, _ in BLOCKS]
    assert len(places) == len(set(places)) <= 5
    assert sum((ROOT / path).exists() for path in places) == 2, "files of the repository that it touches"


def test_the_hops_are_there():
    assert len(HOPS) == 12
    missing = [hop for hop in HOPS if not re.search(rf"def {hop[0]}\(", (ROOT / hop[1]).read_text(encoding="utf-8"))]
    assert not missing


def test_everything_knows_it(tmp_path):
    _copy(tmp_path)
    done = _ask(tmp_path)
    assert done.stdout.endswith("asked\n"), done.stderr[-2000:]


@pytest.mark.slow
@pytest.mark.parametrize("path", [path for path, _ in BLOCKS])
def test_no_place_is_superfluous(tmp_path, path):
    _copy(tmp_path)
    target = tmp_path / path
    if (ROOT / path).exists():
        shutil.copy(ROOT / path, target)
    else:
        target.unlink()
    assert _ask(tmp_path).returncode != 0
