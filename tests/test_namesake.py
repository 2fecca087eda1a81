"""Hugging Face's package `kernels` beside ours: whichever Python finds, one line says what to do."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def _namesake(site: Path, package: bool = True) -> Path:
    """What `pip install kernels` leaves in a directory."""
    info = site / "kernels-0.17.2.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 0.17.2\n")
    if package:
        (site / "kernels").mkdir()
        (site / "kernels" / "__init__.py").write_text("def get_kernel(): ...\n")
    return site


def _python(code: str, cwd: Path, *path: Path) -> tuple[int, str]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, path)), "PYTHONSAFEPATH": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True)
    return done.returncode, done.stderr


def test_ours_is_found_first(tmp_path):
    status, text = _python("import kernels; kernels.attention", tmp_path, ROOT, _namesake(tmp_path))
    assert status == 0, text
    assert "expected no other package of this name, got Hugging Face's package of that name, version 0.17.2" in text
    assert "pip uninstall kernels" in text


def test_both_in_one_directory(tmp_path):
    """Both installed by pip: the last one's files lie over the first one's."""
    site = _namesake(tmp_path, package=False)
    for name in ("kernels", "march"):
        (site / name).mkdir()
        for source in (ROOT / name).rglob("*.py"):
            target = site / name / source.relative_to(ROOT / name)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(source.read_bytes())
    status, text = _python("import kernels", tmp_path, site)
    assert status != 0
    assert text.strip().splitlines()[-1].startswith(f"ImportError: kernels: expected march's package alone in {site}")


@pytest.mark.parametrize("code", ["import march", "import march.model", "import march.training.engine"])
def test_theirs_is_found_first(tmp_path, code):
    status, text = _python(code, tmp_path, _namesake(tmp_path), ROOT)
    assert status != 0
    last = text.strip().splitlines()[-1]
    assert last.startswith(f"ImportError: march: expected its own package kernels, got {tmp_path}/kernels/__init__.py")
    assert last.endswith("pip uninstall kernels, then install march again")


def test_without_it_nothing_is_said(tmp_path):
    status, text = _python("import kernels, march", tmp_path, ROOT)
    assert (status, text) == (0, "")
