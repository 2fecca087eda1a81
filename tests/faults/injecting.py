"""Ways to damage what lies on a disk, and small disks to fill."""

import contextlib
import json
import os
import subprocess
from pathlib import Path

import pytest

from march.training.files import sha256


def flip(path: Path, count: int = 40) -> None:
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle : middle + count] = bytes(byte ^ 0xFF for byte in data[middle : middle + count])
    path.write_bytes(data)


def rehash(checkpoint: Path) -> None:
    """A manifest that vouches for the files as they are now: the work of bad hardware before the hash, or of a hand."""
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)}
        for path in sorted(checkpoint.iterdir())
        if path.name != "manifest.json"
    }
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    (checkpoint / "manifest.json").write_text(json.dumps({**manifest, "files": files}))


def edit_json(path: Path, **changes) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@contextlib.contextmanager
def small_disk(where: Path, size: str = "8m", *options: str):
    """A file system of `size` at `where`; skips the test where mounting is not permitted."""
    where.mkdir(exist_ok=True)
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", ",".join([f"size={size}", *options]), "none", str(where)], capture_output=True
    )
    if done.returncode:
        pytest.skip(f"no permission to mount: {done.stderr.decode().strip()}")
    try:
        yield where
    finally:
        subprocess.run(["umount", "-l", str(where)], check=True)


def fill(disk: Path) -> Path:
    """A file that takes what is free on the disk."""
    path = disk / "filler"
    with open(path, "ab", buffering=0) as file:
        size = 2**16
        while size:
            try:
                file.write(bytes(size))
            except OSError:
                size //= 2
    return path


def free(disk: Path) -> None:
    (disk / "filler").unlink()


def is_root() -> bool:
    return os.geteuid() == 0
