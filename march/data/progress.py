"""Progress bars on stderr, silent when it is not a terminal."""

import sys

from tqdm import tqdm


def bar(description: str, total: int | None, unit: str, least: int = 0) -> tqdm:
    """A bar over `total` units (None: unknown); none at all for fewer than `least`, or without a terminal."""
    hidden = not sys.stderr.isatty() or (total is not None and total < least)
    return tqdm(
        desc=description, total=total, unit=unit, unit_scale=True, disable=hidden, file=sys.stderr, dynamic_ncols=True
    )
