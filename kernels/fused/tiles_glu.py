"""Tile configurations of the glu kernels: data, chosen by the compile report (docs/kernels/glu.md)."""

from kernels.fused import measured
from kernels.fused.measured import Tile

# class -> tile. pair: two products (gated, mixed); bits of an element. float32 by multiply-adds: 1133 issue slots for
# 1024 of them, and where a tensor core's tf32 is but twice as fast as they are, three tf32 products are slower
_DEFAULT: dict[tuple[bool, int], Tile] = {
    (False, 16): Tile(128, 128, 32, 4, 3),
    (True, 16): Tile(128, 64, 32, 4, 3),
    (False, 32): Tile(64, 128, 16, 4, 3, "ieee"),
    (True, 32): Tile(64, 64, 16, 4, 3, "ieee"),
}
# A100, H100 and B200: tf32 at 8 times and more the rate of float32 multiply-adds
_TF32X3: dict[tuple[bool, int], Tile] = {
    (False, 32): Tile(64, 64, 32, 4, 2, "tf32x3"),
    (True, 32): Tile(64, 32, 32, 4, 2, "tf32x3"),
}
# a plain relu's gradients: (product, bits). Blocks of the hidden dimension are whole words of 32 bits: k of dx, m of dw
_GRADIENT: dict[tuple[str, int], Tile] = {
    ("dx", 16): Tile(128, 128, 64, 4, 2),
    # blocks of 64 rows spill 16 to 39 in two loops, one for whole blocks
    ("dw", 16): Tile(128, 128, 32, 4, 2),
    ("dx", 32): Tile(64, 128, 32, 4, 2),
    ("dw", 32): Tile(64, 128, 16, 4, 3),
}
_GRADIENT_TF32X3: dict[tuple[str, int], Tile] = {
    # 64 x 64 spills 5 registers where rows are 380 and 1365 wide
    ("dx", 32): Tile(64, 32, 32, 4, 2, "tf32x3"),
    ("dw", 32): Tile(64, 64, 16, 4, 2, "tf32x3"),
}
# architecture -> its own choices. wgmma of 4 warps spills 10 to 14 registers in dw at widths that do not fill the tiles
GRADIENT_TABLE: dict[str, dict[tuple[str, int], Tile]] = {
    "sm_80": _GRADIENT_TF32X3,
    "sm_90": _GRADIENT_TF32X3 | {("dw", 16): Tile(128, 128, 64, 8, 2)},
    "sm_100": _GRADIENT_TF32X3,
}
# rows aligned to less than 8 bytes are read 2 or 4 bytes at a time: 128 x 128 spills up to 154 registers there
_NARROW = Tile(64, 64, 32, 4, 2)
# programs of dw that run at a time, two on each of 64 SMs: fewer tiles split the rows. From the shape alone, never from
# the device: the partial sums are as many everywhere
PROGRAMS = 128
# architecture -> its own choices; what is not named takes the default
TABLE: dict[str, dict[tuple[bool, int], Tile]] = dict.fromkeys(("sm_80", "sm_90", "sm_100"), _TF32X3)

# rows, columns and warps of a program that maps elements: 16 rows share a column's dropout key
ELEMENTWISE = (16, 256, 4)


def product_tile(arch: str, pair: bool, bits: int) -> Tile:
    """Configuration of the kernels with products."""
    return measured.product_tile(arch, f"glu.{'pair' if pair else 'plain'}.{bits}", _DEFAULT, TABLE, (pair, bits))


def gradient_tile(arch: str, product: str, bits: int, align: int) -> Tile:
    """Configuration of a plain relu's gradients, product dx or dw, where `align` elements divide the rows' strides."""
    if bits == 16 and align < 4:
        return _NARROW
    return measured.product_tile(arch, f"glu.{product}.{bits}", _GRADIENT, GRADIENT_TABLE, (product, bits))


def splits(programs: int, rows: int, block: int) -> tuple[int, int]:
    """(splits of the rows, rows of a split): a multiple of `block` each, for `programs` programs a split."""
    wanted = max(1, min(PROGRAMS // programs, rows // (16 * block)))
    share = -(-rows // (wanted * block)) * block
    return -(-rows // share), share
