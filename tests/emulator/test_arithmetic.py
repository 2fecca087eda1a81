"""Every arithmetic opcode of the white list against its scalar model: special values, their pairs, random bits."""

import numpy as np
import pytest
import torch
from integer_models import MODELS, width
from models import CANONICAL, NAN, Near, formula, is_nan
from snippets import EDGES, NUMBERS, apply, combinations, exact, run

from kernels.emulator.instructions import COMPARISONS, RULES

PERMUTATIONS = [0x5410, 0x7632, 0x3340, 0x0123, 0xBA98, 0xFEDC, 0x4210, 0xF070]


def _sources(opcode: str) -> list[np.ndarray]:
    """Combinations of special values, then random bits, and random floats of like size so that sums cancel."""
    kinds = MODELS[opcode].sources
    values = [NUMBERS[kind] for kind in kinds]
    if opcode.startswith("prmt"):
        values[2] = PERMUTATIONS
    if opcode.startswith("cvt") and kinds[0] == "f32":
        values = [value + EDGES for value in values]
    sizes = [32 if kind == "pred" else width(kind) for kind in kinds]
    special = combinations(values, sizes)
    rng = np.random.default_rng(len(opcode))
    n = max(64, -(-len(special[0]) // 32) * 32 + 128 - len(special[0]))
    drawn = []
    for kind, size in zip(kinds, sizes, strict=True):
        x = rng.integers(0, 2 if kind == "pred" else 1 << size, n, dtype=np.uint64)
        if kind[-3:] in ("f16", "f32", "6x2"):
            near = {"f32": 0x3F800000, "f16": 0x3C00, "bf16": 0x3F80}[kind.removesuffix("x2")]
            spread = {"f32": 0xC0FFFFFF, "f16": 0x87FF, "bf16": 0x81FF}[kind.removesuffix("x2")]
            if kind.endswith("x2"):
                near, spread = near | near << 16, spread | spread << 16
            x[n // 2 :] = near ^ (x[n // 2 :] & spread)
        drawn.append(x.astype(f"u{size // 8}"))
    return [np.concatenate(both) for both in zip(special, drawn, strict=True)]


def _agrees(got: int, wanted: object, kind: str) -> bool:
    if wanted is NAN:
        return is_nan(got, kind)
    if isinstance(wanted, Near):
        return abs(float(exact(got, kind)) - wanted.value) <= abs(wanted.value) * wanted.relative + wanted.absolute
    if isinstance(wanted, tuple):
        return all(_agrees(got >> 16 * i & 0xFFFF, w, kind.removesuffix("x2")) for i, w in enumerate(wanted))
    return got == wanted & ((1 << width(kind)) - 1)


def _check(opcode: str, sources: list[np.ndarray]) -> None:
    kinds, kind, function = MODELS[opcode]
    predicates = [i for i, source in enumerate(kinds) if source == "pred"]
    got = apply(opcode, sources, width(kind), predicates=predicates).tolist()
    for row, bits in zip(zip(*(x.tolist() for x in sources), strict=True), got, strict=True):
        wanted = function(*row)
        assert _agrees(bits, wanted, kind), f"{opcode} of {[hex(x) for x in row]}: {bits:#x}, not {wanted}"


def test_every_rule_has_a_model():
    assert set(RULES) == set(MODELS)


@pytest.mark.parametrize("opcode", RULES)
def test_against_the_scalar_model(opcode):
    sources = _sources(opcode)
    for first in range(0, len(sources[0]), 992):
        _check(opcode, [x[first : first + 992] for x in sources])


@pytest.mark.parametrize("bits", [16, 32, 64])
def test_shifts_by_a_constant(bits):
    (x,) = combinations([NUMBERS[f"u{bits}"]], [bits])
    for opcode in (f"shl.b{bits}", f"shr.u{bits}", f"shr.s{bits}"):
        for count in (0, 1, bits - 1, bits, bits + 1, 255):
            wanted = [MODELS[opcode].function(v, count) & ((1 << bits) - 1) for v in x.tolist()]
            assert apply(opcode, [x], bits, f", {count}").tolist() == wanted, (opcode, count)


def test_permutations_by_a_constant():
    two = combinations([[0x01020384, 0xFFEEDDCC, 0x80FF7F00]] * 2, [32] * 2)
    for selector in PERMUTATIONS:
        wanted = [MODELS["prmt.b32"].function(a, b, selector) for a, b in zip(*(x.tolist() for x in two), strict=True)]
        assert apply("prmt.b32", two, 32, f", {selector:#x}U").tolist() == wanted


@pytest.mark.parametrize("kind", ["f32", "f16", "bf16"])
def test_a_fused_product_is_rounded_once(kind):
    """Sums that float64 would round to halfway between two results, normal and subnormal: the least bit decides."""
    fraction = {"f32": 23, "f16": 10, "bf16": 7}[kind]
    bias = 15 if kind == "f16" else 127
    one, rows = bias << fraction, []
    for sign in (0, 1):
        top = sign << (31 if kind == "f32" else 15)
        for low in (1, 2, 3):  # (1 + 2^-f)(1 + 2^-1) or the like, plus or minus almost nothing
            rows += [(one | low, one | 1 << fraction - 1, top | exponent << fraction) for exponent in (1, 3, bias // 2)]
        half = -bias - fraction  # the power of half a subnormal place, shared between the factors
        first, second = half // 2 + bias << fraction, half - half // 2 + bias << fraction
        for c in (1, 2, (1 << fraction) - 2, (1 << fraction) - 1):
            for k in (1, fraction // 2 + 1, fraction - 1):  # (1 + 2^-k)(1 - 2^-k) and (1 + 2^-k) of that half
                plus, minus = first | 1 << fraction - k, second - (1 << fraction - k + 1)
                rows += [(top | plus, factor, addend) for factor in (minus, second) for addend in (c, top | c)]
    size = 32 if kind == "f32" else 16
    sources = [np.array(x, f"u{size // 8}") for x in zip(*rows, strict=True)]
    got = apply(f"fma.rn.{kind}", sources, size).tolist()
    model = formula(kind, lambda a, b, c: a * b + c)
    assert got == [model(*row) for row in rows]


def test_the_canonical_nan():
    """Of max and min, and of conversions to 16 bits, whatever the payloads and signs of their sources."""
    for kind, payloads in (("f32", (0x7FC00001, 0xFF800002)), ("f16", (0x7E01, 0xFC02))):
        size = width(kind)
        two = [np.array([x] * 2, f"u{size // 8}") for x in payloads]
        for name in ("max", "min", "max.NaN", "min.NaN"):
            assert apply(f"{name}.{kind}", two, size).tolist() == [CANONICAL[kind]] * 2
    nan = [np.array([0xFF800001], np.uint32)] * 2
    for kind in ("f16", "bf16"):
        assert apply(f"cvt.rn.{kind}.f32", nan[:1], 16).tolist() == [0x7FFF]
        assert apply(f"cvt.rn.{kind}x2.f32", nan, 32).tolist() == [0x7FFF7FFF]


@pytest.mark.parametrize("name", COMPARISONS)
def test_pairs_are_compared_into_two_predicates(name):
    """p | q: the lower halves' in p, the upper halves' in q."""
    two = combinations([NUMBERS["f16x2"]] * 2, [32] * 2)
    model = MODELS[f"setp.{name}.f16"].function
    loads = "".join(
        f"ld.param.b64 %rd{i}, [k_param_{i}]\nmad.wide.u32 %rd{i}, %r1, 4, %rd{i}\n"
        + (f"ld.global.b32 {{ %r1{i} }}, [ %rd{i} + 0 ]\n" if i < 2 else "")
        for i in range(3)
    )
    body = f"""
        mov.u32 %r1, %tid.x
        {loads}
        setp.{name}.f16x2 %p1|%p2, %r10, %r11
        selp.b32 %r2, 1, 0, %p1
        selp.b32 %r3, 2, 0, %p2
        or.b32 %r2, %r2, %r3
        st.global.b32 [ %rd2 + 0 ], {{ %r2 }}
        ret
    """
    n = -(-len(two[0]) // 32) * 32
    tensors = [torch.from_numpy(np.pad(x, (0, n - len(x))).view(np.int32)) for x in two]
    out = torch.zeros(n, dtype=torch.int32)
    assert not run(body, [*tensors, out], threads=n)[0]
    for a, b, got in zip(*(x.tolist() for x in two), out.tolist(), strict=False):
        assert got == model(a & 0xFFFF, b & 0xFFFF) | model(a >> 16, b >> 16) << 1
