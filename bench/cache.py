"""What was counted, kept on disk by a hash of the sources that it follows from: other sources are another file."""

import functools
import hashlib
import importlib.metadata
import os
import pickle
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
LENGTHS = ENCODER_LENGTH, DECODER_LENGTH = 921, 206


@functools.cache
def sources_hash(*places: str) -> str:
    """Of the Python sources and JSON files in files and folders of the repository, and of what dispatches and
    compiles."""
    digest = hashlib.sha256("".join(map(importlib.metadata.version, ("torch", "triton"))).encode())
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


def kept(*sources: str) -> Callable[[Callable], Callable]:
    """Decorates a function of plain arguments whose result follows from `sources`: it runs once, which standard error
    says, and its result lies in a file under $MARCH_COUNTS, else build/counts."""

    def decorate(function: Callable) -> Callable:
        @functools.wraps(function)
        def call(*arguments: Any) -> Any:
            folder = Path(os.environ.get("MARCH_COUNTS") or ROOT / "build" / "counts")
            words = re.findall(r"[\w.-]+", " ".join(map(str, arguments)))
            label = "_".join([function.__name__, *words])
            path = folder / f"{label}_{sources_hash(*sources)}.pickle"
            if not path.exists():
                print(f"counting {label}", file=sys.stderr, flush=True)
                write(path, pickle.dumps(function(*arguments)))
            return pickle.loads(path.read_bytes())

        return call

    return decorate
