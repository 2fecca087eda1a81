"""Files of a run: written so that a reader finds the old content or the new, read as what a stranger may have left.

Every JSON file of a run is read here, and nowhere trusted: it may be cut, of another run, a link or a device.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from pathlib import Path
from typing import Any

from march.training.errors import UsageError

# A checkpoint's state holds a run's metrics, 200 bytes a step; nothing of ours comes near.
MAX_JSON = 2**30


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file of any origin.

    Raises:
        UsageError: no plain file, unreadable, or no JSON object; one line.
    """
    try:
        if path.is_symlink() or not path.is_file():
            raise ValueError("a link" if path.is_symlink() else "no file")
        if path.stat().st_size > MAX_JSON:
            raise ValueError(f"{path.stat().st_size:,} bytes")
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError(f"a {type(content).__name__}")
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"expected a JSON object in {path.name}, got {first_line(error)}; it is damaged") from error
    return content


def write_text(path: Path, text: str) -> None:
    """Replace `path` in one move, flushed to the disk; on an OSError the old file stands and nothing is left over."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.unlink(missing_ok=True)  # never through a link that lies there
        with open(temporary, "x", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        flush_directory(path.parent)
    except OSError:
        with contextlib.suppress(OSError):  # the first error is the one to tell
            temporary.unlink(missing_ok=True)
        raise


def write_json(path: Path, content: Any) -> None:
    write_text(path, json.dumps(content, indent=2, default=str) + "\n")


def flush_directory(path: Path) -> None:
    """A rename is on the disk only when its directory is."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
