"""The classes of head widths and their tiles: the whole table, and what each class compiles to at both its ends."""

import pytest
from test_attention_compiled import PAPER, compiled

from kernels.compile_only import ARCHITECTURES
from kernels.compile_only.limits import ARCHITECTURE_DATA
from kernels.fused import tiles_attention
from kernels.fused.tiles_attention import head_dim_class, key_directions, parts_of
from kernels.packed import head_stride

# last width of a class: parts in forward, in dQ, in dK and dV (one kernel, or "+": two)
CLASSES = {
    16: {
        16: ((16,), (16,), (16,)),
        32: ((32,), (32,), (32,)),
        48: ((32, 16), (32, 16), (64,)),
        64: ((64,), (64,), (64,)),
        80: ((64, 16), (64, 16), (128,)),
        96: ((64, 32), (64, 32), (128,)),
        112: ((64, 32, 16), (64, 32, 16), (128,)),
        128: ((128,), (128,), (128,)),
        144: ((128, 16), (128, 64), ("+", 128, 64)),
        160: ((128, 32), (128, 64), ("+", 128, 64)),
        176: ((128, 32, 16), (128, 64), ("+", 128, 64)),
        192: ((128, 64), (128, 64), ("+", 128, 64)),
        208: ((128, 64, 16), (128, 128), ("+", 128, 128)),
        224: ((128, 64, 32), (128, 128), ("+", 128, 128)),
        256: ((128, 128), (128, 128), ("+", 128, 128)),
        320: ((256, 64), (256, 64), ("+", 256, 64)),
        384: ((256, 128), (256, 128), ("+", 256, 128)),
        448: ((256, 128, 64), (256, 128, 64), ("+", 256, 128, 64)),
        512: ((512,), (512,), ("+", 512)),
    }
}
# float32 differs up to 128
CLASSES[32] = {
    16: ((16,), (16,), (16,)),
    32: ((32,), (32,), (32,)),
    64: ((64,), (64,), (64,)),
    128: ((128,), (128,), ("+", 128)),
} | {last: parts for last, parts in CLASSES[16].items() if last > 128}


def _class_of(width, bits):
    directions = key_directions(width, width, bits)
    (keys,) = {parts_of(direction, width, bits) for direction in directions}
    return *(parts_of(direction, width, bits) for direction in ("forward", "dq")), ("+",) * (len(directions) - 1) + keys


@pytest.mark.parametrize("bits", [16, 32])
def test_every_head_width_maps_to_its_class(bits):
    for width in range(1, 513):
        last = next(last for last in CLASSES[bits] if width <= last)
        assert _class_of(width, bits) == CLASSES[bits][last], width
    for width in (0, 513):
        with pytest.raises(ValueError, match=f"from 1 to 512, got {width}"):
            head_dim_class(width)


@pytest.mark.parametrize("bits", [16, 32])
def test_parts_cover_every_width_and_every_width_has_tiles(bits):
    for width in range(1, 513):
        for direction in ("forward", "dq", "forward_extra", "dq_extra", *key_directions(width, width, bits)):
            parts = parts_of(direction, width, bits)
            assert all(part >= 16 and part & (part - 1) == 0 for part in parts)
            assert list(parts) == sorted(parts, reverse=True)
            # only the last part may be cut: loads of the others are not masked
            assert 0 <= sum(parts) - width < max(parts[-1], 16)
            for p in (False, True):
                assert tiles_attention.tile(direction, "sm_86", width, width, False, p, bits).warps in (4, 8)


def _ends(bits):
    """First and last width of each class, as the kernels get them: 33 is filled up to 48, so that both ends are one."""
    lasts = list(CLASSES[bits])
    ends = [width for first, last in zip([0, *lasts], lasts, strict=False) for width in (first + 1, last)]
    return [(bits, width) for width in dict.fromkeys(head_stride(width) for width in ends)]


VARIANTS = [
    {"dropout": True, "padding": "lengths"},
    {"padding": "lengths"},
    {"dropout": True, "causal": True},
    {"dropout": True, "padding": "mask"},
    {"padding": "mask"},
    {"segments": 2, "dropout": True, "padding": "lengths"},
    {"segments": 2, "dropout": True, "padding": "mask"},
    {"segments": 2, "padding": "mask"},
    {"dropout": True, "bank": True},
    {"dropout": True, "bank": True, "causal": True},
    {"bank": True},
    {"bank": True, "causal": True},
]


def _cases(bits, width, variants, arch="sm_86"):
    case = {"arch": arch, "width": width, "dtype": "bfloat16" if bits == 16 else "float32", "sizes": PAPER}
    return [case | variant for variant in variants]


def _judge(rows, arch="sm_86"):
    fits = ARCHITECTURE_DATA[arch].shared_memory_block
    assert not [row["failures"] for row in rows if row["shared"] > fits or row["blocks_per_sm"] == 0]
    assert not any(row["atomics"] for row in rows)
    failures = [f"{row['kernel']} {row['configuration']}: {row['failures']}" for row in rows if row["failures"]]
    assert not failures, "\n".join(failures)


@pytest.mark.slow
@pytest.mark.parametrize(("bits", "width"), _ends(16) + _ends(32))
def test_every_class_keeps_the_limits_at_both_ends(bits, width):
    """Shared memory and no atomics everywhere; up to 128 no spills, no repeated products, resident warps."""
    _judge(compiled(*_cases(bits, width, VARIANTS)))


@pytest.mark.slow
@pytest.mark.parametrize("arch", [arch for arch in ARCHITECTURES if arch != "sm_86"])
@pytest.mark.parametrize(("bits", "width"), _ends(16) + _ends(32))
def test_every_class_fits_the_other_targets_at_both_ends(bits, width, arch):
    _judge(compiled(*_cases(bits, width, (VARIANTS[0], VARIANTS[6], VARIANTS[8]), arch)), arch)


def test_rows_of_odd_widths_and_strides_do_not_spill():
    """Unaligned, dQ at 49 spilt 161 registers: heads are filled up, and rows that start elsewhere are copied."""
    variants = ({"dropout": True, "bank": True}, {"dropout": True, "causal": True})
    rows = compiled(*({"width": width, "sizes": PAPER, "offset": 1} | one for width in (1, 49) for one in variants))
    assert not [row["failures"] for row in rows if row["failures"]]
    # 16 bytes a load of a head's rows, by cp.async where the loop is pipelined; 4: of what has one number a row
    for row in rows:
        assert set(row["loads"]) | set(row["async_copies"]) <= {"128", "32", "8", "64"}, row["kernel"]


def test_classes_short_of_registers_or_shared_memory_keep_the_limits():
    sizes = ((16, 96, 0), (16, 512, 0), (32, 64, 0), (16, 64, -1))
    _judge(compiled(*(one for *size, variant in sizes for one in _cases(*size, [VARIANTS[variant]]))))
