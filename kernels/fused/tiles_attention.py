"""Tile configurations of the attention kernels: data, chosen by the compile report (docs/kernels/attention.md)."""

from dataclasses import dataclass, replace

from kernels.fused import measured

MAX_HEAD_DIM = 512


@dataclass(frozen=True)
class Tile:
    """One configuration: block of queries, block of keys, warps, stages of the software pipeline, and a cap on the
    registers of a thread where that buys another resident block (0: none)."""

    m: int
    n: int
    warps: int
    stages: int
    registers: int = 0

    def options(self) -> dict[str, int]:
        """As keyword arguments of a launch."""
        options = {"BLOCK_M": self.m, "BLOCK_N": self.n, "num_warps": self.warps, "num_stages": self.stages}
        return options | ({"maxnreg": self.registers} if self.registers else {})


def head_dim_class(width: int) -> tuple[int, ...]:
    """Parts of a head width: at most three powers of two from 16 on, none larger than the one before.

    The sum is the least such sum that is at least `width`, above 256 in steps of 64: 112 = 64 + 32 + 16,
    190 -> 128 + 64, 380 -> 256 + 128. Tiles of wide heads have few rows, and warps that find no columns in a part of
    16 or 32 repeat each other's products (dK at 272 as 256 + 16: 12.7 issue slots a product, 430 spilt registers).
    256 is 128 + 128: a product [128, 256] of 8 warps gives them columns, and each then computes all scores again (10.0
    issue slots a product and 127 spilt registers, against 4.5 and 7).
    """
    if not 1 <= width <= MAX_HEAD_DIM:
        raise ValueError(f"head_dim_class: expected a width from 1 to {MAX_HEAD_DIM}, got {width}; use narrower heads")
    units = -(-width // 16) if width <= 256 else -(-width // 64) * 4
    while units.bit_count() > 3:
        units += units & -units
    if units == 16:
        return 128, 128
    return tuple(16 << bit for bit in range(units.bit_length() - 1, -1, -1) if units >> bit & 1)


def parts_of(direction: str, width: int, bits: int) -> tuple[int, ...]:
    """Parts of a head width in one kernel, of elements of `bits`: `head_dim_class`, with three exceptions.

    float32 takes up to 128 as one part: in tiles of 16 or 32 rows a part of 16 is computed by several warps (K 112 as
    64 + 32 + 16 forward: twice, and 286 spilt registers; as 128 none).
    dkdv takes 33 to 64 and 65 to 128 as one part: two accumulators and two resident operands in several parts each
    spill (K 112 in three parts, 32 x 128 by 8 warps: 4 to 31 stores; as 128 none, for an eighth more products).
    Above 128 backward has steps of 64, for the reason given there (dK at 224 as 128 + 64 + 32: 11.9 slots).
    """
    if direction in ("dq", "dq_extra", "dk", "dv") and 128 < width <= 256:
        return (128, 64) if width <= 192 else (128, 128)
    if width <= 128 and (bits == 32 or (direction.startswith("dkdv") and width > 32)):
        return (max(16, 1 << (width - 1).bit_length()),)
    return head_dim_class(width)


def key_directions(width: int, value_width: int, bits: int) -> tuple[str, ...]:
    """One kernel for dK and dV, or above 128 (float32: 64) two, of two and three products: their accumulators do not
    fit together (float32, K 128 with dropout: 4 spilt registers in one kernel, none in two)."""
    return ("dkdv",) if max(width, value_width) <= (64 if bits == 32 else 128) else ("dk", "dv")


# For each kernel, without and with dropout: (largest sum of parts, tile), the first row that is wide enough counts.
# Chosen for sm_86 from what docs/kernels/attention.md lists.
Table = dict[bool, tuple[tuple[int, Tile], ...]]

FORWARD: Table = {
    False: (
        (32, Tile(64, 64, 4, 2, 168)),
        (112, Tile(128, 64, 8, 2)),
        (128, Tile(128, 32, 8, 2)),
        (192, Tile(128, 32, 8, 1)),
        (256, Tile(128, 16, 8, 1)),
        (384, Tile(32, 32, 4, 1)),
        (512, Tile(32, 16, 4, 1)),
    ),
    True: (
        (32, Tile(128, 64, 8, 2, 128)),
        (64, Tile(128, 32, 8, 2, 128)),
        (96, Tile(128, 32, 8, 2)),
        (112, Tile(128, 64, 8, 2)),
        (128, Tile(128, 32, 8, 2)),
        (192, Tile(128, 32, 8, 1)),
        (256, Tile(128, 16, 8, 1)),
        (384, Tile(32, 32, 4, 1)),
        (512, Tile(32, 16, 4, 1)),
    ),
}
DQ_WIDE = (
    # in three parts: 128 x 32 by 8 warps spills one or two registers without dropout, seventeen with two segments
    (112, Tile(64, 32, 4, 2)),
    (128, Tile(128, 32, 8, 2)),
    (192, Tile(64, 16, 4, 2)),
    (384, Tile(32, 32, 4, 1)),
    (512, Tile(32, 16, 4, 1)),
)
DQ: Table = dict.fromkeys((False, True), ((64, Tile(128, 32, 8, 2, 128)), *DQ_WIDE))
NARROW_KEYS = (32, Tile(32, 64, 4, 2, 168))
DKDV: Table = {
    False: (NARROW_KEYS, (64, Tile(64, 64, 4, 2)), (128, Tile(16, 128, 8, 2))),
    True: (NARROW_KEYS, (64, Tile(32, 64, 4, 2)), (128, Tile(16, 128, 8, 2))),
}
# an outer loop over the query heads that share the keys: with dropout 32 x 64 by 4 warps spills five (causal), without
# it 64 x 64 by 4 warps four and 64 x 128 by 8 thirteen (causal)
DKDV_SHARED: Table = dict.fromkeys((False, True), (NARROW_KEYS, (64, Tile(32, 128, 8, 2)), DKDV[True][2]))
DK: Table = dict.fromkeys(
    (False, True), ((192, Tile(16, 64, 4, 2)), (384, Tile(32, 32, 4, 1)), (512, Tile(16, 32, 4, 1)))
)
DV: Table = dict.fromkeys(
    (False, True), ((192, Tile(16, 64, 4, 2)), (384, Tile(32, 32, 4, 1)), (512, Tile(16, 32, 4, 1)))
)
# Two segments, or a key mask, hold more pointers: under the cap of 128 registers three spill. dQ has none under 168;
# forward with both spills one there, and none at 8 resident warps.
EXTRA = (64, Tile(64, 32, 4, 2, 168))
EXTRA_112 = Tile(64, 32, 4, 2)
EXTRA_WIDE = ((96, Tile(128, 32, 8, 2)), (112, EXTRA_112), (128, Tile(128, 32, 8, 1)), *FORWARD[False][3:])
FORWARD_EXTRA: Table = {
    False: ((32, Tile(64, 64, 4, 2)), (64, Tile(128, 64, 8, 2)), *EXTRA_WIDE),
    # 128 x 64 by 8 warps spills seven with a key mask
    True: ((32, Tile(64, 64, 4, 2)), (64, Tile(128, 32, 8, 2)), *EXTRA_WIDE),
}
DQ_EXTRA: Table = {
    # a key mask without dropout spills two under the cap: its keys and values are loaded by it
    False: ((64, EXTRA_112), *DQ[False][1:]),
    True: (EXTRA, DQ_WIDE[0], (128, Tile(128, 16, 8, 2)), *DQ_WIDE[2:]),
}
TABLES = {
    "forward": FORWARD,
    "dq": DQ,
    "dkdv": DKDV,
    "dkdv_shared": DKDV_SHARED,
    "dk": DK,
    "dv": DV,
    "forward_extra": FORWARD_EXTRA,
    "dq_extra": DQ_EXTRA,
}

# float32, with dropout or without: no spills and no repeated product up to 128, above what fits 99 KiB and spills
# least; a block of 8 is padded to 16 in the product
# ptxas by itself stops at 128 or 168 registers and spills for the sake of a third or fourth block: the caps allow more
NARROW_32 = ((16, Tile(64, 32, 4, 1, 168)), (32, Tile(64, 32, 4, 1, 255)))
WIDE_32 = ((256, Tile(16, 16, 4, 1)), (512, Tile(8, 16, 4, 1)))
TABLES_32 = {
    "forward": (*NARROW_32, (64, Tile(32, 32, 4, 1)), (128, Tile(16, 32, 4, 1)), (512, Tile(16, 16, 4, 1))),
    # at 32 x 32 one register spills in a packed gradient, two under masked columns and a key mask together
    "dq": (*NARROW_32, (64, Tile(16, 32, 4, 1)), (128, Tile(16, 32, 4, 2)), *WIDE_32),
    "dkdv": ((16, Tile(32, 64, 4, 1)), (64, Tile(32, 16, 4, 1, 255))),
    "dk": ((128, Tile(32, 16, 4, 1)), (256, Tile(16, 16, 4, 1)), (512, Tile(16, 8, 4, 1))),
    "dv": ((128, Tile(32, 16, 4, 1)), (512, Tile(16, 16, 4, 1))),
}
# ptxas needs a few registers more there: under the cap of 128 forward and dQ at K 64 spill 5 to 9, without it none
UNCAPPED = ("sm_100", "sm_120")
TABLES_32 |= {"forward_extra": TABLES_32["forward"], "dq_extra": TABLES_32["dq"], "dkdv_shared": TABLES_32["dkdv"]}


def tile(direction: str, arch: str, width: int, value_width: int, causal: bool, dropout: bool, bits: int) -> Tile:
    """Configuration of one launch. direction: a key of TABLES; widths of q and v; bits of an element.

    causal chooses nothing yet, the architecture one cap: tiles of sm_86 serve every architecture and mask.
    """
    widest = max(sum(parts_of(direction, n, bits)) for n in (width, value_width))
    table = TABLES_32[direction] if bits == 32 else TABLES[direction][dropout]
    found = measured.tile(arch, f"attention.{direction}.{widest}.{'dropout' if dropout else 'plain'}.{bits}")
    if found is not None:
        return Tile(**found)
    chosen = next(tile for limit, tile in table if widest <= limit)
    return replace(chosen, registers=0) if arch in UNCAPPED and chosen.registers == 128 else chosen
