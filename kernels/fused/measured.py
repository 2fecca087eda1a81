"""Tiles that `python -m kernels.tune` measured, by architecture: they come before the tables chosen by compile report.

One file an architecture, measured/sm_86.json, is written by the tuner and committed, so that all ranks read the same
tiles; nothing is measured when a model runs. `trying` replaces one entry while the tuner measures it.
"""

import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Tile:
    """Of a kernel with products: blocks of rows, of columns and of the inner dimension; warps, pipeline stages; how
    float32 operands multiply."""

    m: int
    n: int
    k: int
    warps: int
    stages: int
    precision: str = "ieee"

    def options(self, without: str = "") -> dict[str, object]:
        """As keyword arguments of a launch; `without` "k" where the whole inner dimension is in a tile."""
        blocks = {"BLOCK_M": self.m, "BLOCK_N": self.n, "BLOCK_K": self.k, "PRECISION": self.precision}
        if without:
            del blocks[f"BLOCK_{without.upper()}"]
        return {**blocks, "num_warps": self.warps, "num_stages": self.stages}


DIRECTORY = Path(__file__).parent / "measured"
_trying: dict[str, dict[str, Any]] = {}


@cache
def _file(arch: str) -> dict[str, dict[str, Any]]:
    path = DIRECTORY / f"{arch}.json"
    if not path.exists():
        return {}
    return {name: entry["tile"] for name, entry in json.loads(path.read_text())["entries"].items()}


def tile(arch: str, name: str) -> dict[str, Any] | None:
    """Fields of the measured tile `name` on `arch`, None where none was measured."""
    return _trying.get(name) or _file(arch).get(name)


def product_tile(arch: str, name: str, default: Mapping[Any, Tile], own: Mapping[str, Mapping], key: Any) -> Tile:
    """The tile `key` of a kernel with products: measured as `name`, else the architecture's own, else the default."""
    found = tile(arch, name)
    if found is not None:
        return Tile(**found)
    return own.get(arch, {}).get(key) or default[key]


@contextlib.contextmanager
def trying(name: str, fields: dict[str, Any]) -> Iterator[None]:
    """Within it, entry `name` is `fields` on every architecture."""
    _trying[name] = fields
    try:
        yield
    finally:
        del _trying[name]


def tried() -> dict[str, dict[str, Any]]:
    """The entries that are replaced now."""
    return dict(_trying)


def forget() -> None:
    """Reads the files again."""
    _file.cache_clear()
