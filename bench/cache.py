"""Counts on disk, in files named by a hash of the sources that they follow from: other sources are another file."""

import functools
import hashlib
import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LENGTHS = ENCODER_LENGTH, DECODER_LENGTH = 921, 206


@functools.cache
def sources_hash(*places: str, versions: str = "") -> str:
    """Of the Python sources and measured tiles (JSON) in files and folders of the repository."""
    digest = hashlib.sha256(versions.encode())
    for place in places:
        path = ROOT / place
        for file in [path] if path.is_file() else sorted(path.rglob("*")):
            if file.suffix in (".py", ".json"):
                digest.update(str(file.relative_to(ROOT)).encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def write(path: Path, content: bytes) -> None:
    """Whole or not at all, whoever else writes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}")
    partial.write_bytes(content)
    partial.replace(path)
