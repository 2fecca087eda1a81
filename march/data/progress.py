"""Progress on stderr: a bar on a terminal, elsewhere a line every half minute."""

import sys
import threading
import time

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 30


class _Lines:
    """What a bar is where there is no terminal. A thread speaks, for work that moves nothing for minutes."""

    def __init__(self, description: str, unit: str):
        self._description, self._unit = description, unit
        self._count, self._postfix, self._begin = 0, "", time.monotonic()
        self._closed = threading.Event()
        threading.Thread(target=self._speak, daemon=True).start()

    def _speak(self) -> None:
        while not self._closed.wait(SECONDS_BETWEEN_LINES):
            seconds = time.monotonic() - self._begin
            parts = [f"{self._description}: {self._count:,} {self._unit}", self._postfix, f"{seconds:.0f} s"]
            print(", ".join(filter(None, parts)), file=sys.stderr, flush=True)

    def set_postfix_str(self, text: str) -> None:
        self._postfix = text

    def update(self, count: int) -> None:
        self._count += count

    def __enter__(self) -> "_Lines":
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()


def bar(description: str, total: int | None, unit: str, least: int = 0) -> tqdm | _Lines:
    """A bar over `total` units (None: unknown); on a terminal none at all for fewer than `least`."""
    if not sys.stderr.isatty():
        return _Lines(description, unit)
    hidden = total is not None and total < least
    return tqdm(
        desc=description, total=total, unit=unit, unit_scale=True, disable=hidden, file=sys.stderr, dynamic_ncols=True
    )
