"""Tile configurations of residual_norm, embedding and linear_cross_entropy: data, chosen by the compile report
(docs/kernels/residual_norm.md, embedding.md, linear_cross_entropy.md)."""

from dataclasses import dataclass

from kernels.fused import measured
from kernels.fused.measured import Tile


@dataclass(frozen=True)
class RowTile:
    """Rows of a tile and warps, for rows padded to `block` features (a power of two)."""

    rows: int
    block: int
    warps: int


# Elements of a tile that a thread holds, at most; more threads up to 16 warps before more elements.
# stream: residual_norm and the lookup of embedding. runs: the gradients of embedding's tables, which have one tensor
# in registers and a key a row to compute: 32 elements spread it.
ELEMENTS = {"stream": 8, "runs": 32}
MAX_ROWS = 16
# features of a row that one program holds
MAX_WIDTH = 16384

# Programs that walk the rows, at 4 warps each: 8 blocks, 32 warps an SM of 64 SMs. From the shape alone, never from the
# device: the partial sums of a gain's gradient are as many everywhere.
PROGRAMS = 512


def block_of(width: int) -> int:
    """Smallest power of two from 32 on that holds a row."""
    return max(32, 1 << (width - 1).bit_length())


def row_tile(arch: str, kind: str, width: int) -> RowTile:
    """Tile of a kernel that holds whole rows of `width` features. kind: of ELEMENTS."""
    block = block_of(width)
    held = (measured.tile(arch, f"rows.{kind}") or {"elements": ELEMENTS[kind]})["elements"]
    warps = min(16, max(4, block // (32 * held)))
    return RowTile(max(1, min(MAX_ROWS, 32 * warps * held // block)), block, warps)


def programs(rows: int, tile: RowTile) -> int:
    """Programs for `rows` rows: a fixed number of warps, or one tile each."""
    return max(1, min(PROGRAMS * 4 // tile.warps, -(-rows // tile.rows)))


# (kernel, bits of an element) -> tile
_DEFAULT: dict[tuple[str, int], Tile] = {
    ("forward", 16): Tile(64, 128, 64, 4, 3),
    ("dlogits", 16): Tile(128, 128, 32, 4, 4),
    # own rows, other rows; features are in one tile, as wide as `parts_of` says
    ("gradient", 16): Tile(64, 32, 512, 8, 2),
    ("gradient", 32): Tile(32, 32, 256, 4, 2),
    ("forward", 32): Tile(64, 128, 16, 4, 3),
    ("dlogits", 32): Tile(64, 128, 16, 4, 3),
}
# A100, H100 and B200 multiply tf32 8 times as fast as float32 and more, and win with three products for one; A5000 and
# its kin twice at most
_TF32X3: dict[tuple[str, int], Tile] = {
    ("forward", 32): Tile(64, 64, 32, 4, 2, "tf32x3"),
    ("dlogits", 32): Tile(64, 64, 32, 4, 2, "tf32x3"),
    ("gradient", 32): Tile(32, 32, 256, 4, 2, "tf32x3"),
}
# architecture -> its own choices; what is not named takes the default
TABLE: dict[str, dict[tuple[str, int], Tile]] = dict.fromkeys(("sm_80", "sm_90", "sm_100"), _TF32X3)


def product_tile(arch: str, kernel: str, bits: int) -> Tile:
    """Configuration of linear_cross_entropy's products. kernel: forward, dlogits or gradient."""
    return measured.product_tile(arch, f"linear_cross_entropy.{kernel}.{bits}", _DEFAULT, TABLE, (kernel, bits))


def parts_of(width: int) -> tuple[int, ...]:
    """One or two powers of two that cover a row of up to 512 features, the first at most 256: 380 features cost 384,
    not 512."""
    first = min(256, max(16, 1 << (width - 1).bit_length()))
    return (first,) if width <= first else (first, max(16, 1 << (width - first - 1).bit_length()))
