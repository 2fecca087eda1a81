"""What is installed: the wheel has every module, the measured tiles, and asks for versions that were compiled with."""

import json
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
def test_the_wheel_has_every_module_and_the_measured_tiles(tmp_path):
    source = tmp_path / "source"
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, tracked.split("\0")):
        if (ROOT / name).exists():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, source / name)
    table = source / "kernels" / "fused" / "measured" / "sm_99.json"
    table.parent.mkdir(exist_ok=True)
    table.write_text(json.dumps({"entries": {}}))
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        ".",
        "--no-deps",
        "--no-build-isolation",
        "-q",
        "-w",
        str(tmp_path),
    ]
    subprocess.run(command, cwd=source, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("march-*.whl")
    inside = set(zipfile.ZipFile(wheel).namelist())
    expected = {str(x.relative_to(source)) for name in ("kernels", "march") for x in (source / name).rglob("*.py")}
    assert expected - inside == set()
    assert "kernels/fused/measured/sm_99.json" in inside
    assert {"kernels/py.typed", "march/py.typed"} <= inside
    assert not any(name.startswith(("tests", "bench")) for name in inside)


def test_the_compiler_that_is_tested_is_one_that_is_asked_for():
    (floor,) = re.findall(r'"triton>=([\d.]+);', (ROOT / "setup.py").read_text())
    (pinned,) = re.findall(r"^triton==([\d.]+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert tuple(map(int, floor.split("."))) <= tuple(map(int, pinned.split(".")))
