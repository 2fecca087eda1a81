"""Progress on stderr: a bar on a terminal, elsewhere a line every half minute."""

import sys
import time

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 30


def bar(description: str, total: int | None, unit: str, least: int = 0) -> tqdm:
    """A bar over `total` units (None: unknown); none at all for fewer than `least`."""
    hidden = total is not None and total < least
    kind = tqdm if sys.stderr.isatty() else _Lines
    return kind(
        desc=description, total=total, unit=unit, unit_scale=True, disable=hidden, file=sys.stderr, dynamic_ncols=True
    )


class _Lines(tqdm):
    """What takes less than half a minute says nothing."""

    def display(self, *_, **__) -> None:
        now = time.monotonic()
        self._said = getattr(self, "_said", now)
        if now - self._said >= SECONDS_BETWEEN_LINES:
            self._said = now
            print(str(self), file=sys.stderr, flush=True)

    def close(self) -> None:
        self.disable = True
