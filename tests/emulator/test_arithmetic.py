"""Each family of opcodes against a scalar model in Python's own integers and fractions."""

import math
from fractions import Fraction

import numpy as np
import pytest
from snippets import FLOATS, INTEGERS, apply, combinations, exact, rounded

BITS = (16, 32, 64)


def _signed(x: int, bits: int) -> int:
    return x - (1 << bits) if x >> (bits - 1) & 1 else x


def _check(opcode, model, sources, bits, result, extra=""):
    """model: from Python integers of the sources' bits to the result's bits, whatever their width."""
    got = apply(opcode, sources, result, extra)
    wanted = [model(*(int(x) for x in row)) & ((1 << result) - 1) for row in zip(*sources, strict=True)]
    wrong = [i for i, (a, b) in enumerate(zip(got.tolist(), wanted, strict=True)) if a != b]
    assert not wrong, (
        f"{opcode}{[hex(int(x[wrong[0]])) for x in sources]}: {got[wrong[0]]:#x}, not {wanted[wrong[0]]:#x}"
    )


def _truncated(a: int, b: int) -> int:
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("kind", ["u", "s"])
def test_integer_arithmetic(bits, kind):
    two = combinations([INTEGERS[bits]] * 2, [bits] * 2)

    def typed(function):
        return lambda *x: function(*(_signed(n, bits) if kind == "s" else n for n in x))

    for name, function in {
        "add": lambda a, b: a + b, "sub": lambda a, b: a - b, "mul.lo": lambda a, b: a * b, "min": min, "max": max,
        "div": lambda a, b: _truncated(a, b) if b else -1, "rem": lambda a, b: a - b * _truncated(a, b) if b else a,
    }.items():  # fmt: skip
        _check(f"{name}.{kind}{bits}", typed(function), two, bits, bits)
    three = combinations([INTEGERS[bits]] * 3, [bits] * 3)
    _check(f"mad.lo.{kind}{bits}", typed(lambda a, b, c: a * b + c), three, bits, bits)
    for name, function in {
        "lt": lambda a, b: a < b, "le": lambda a, b: a <= b, "gt": lambda a, b: a > b, "ge": lambda a, b: a >= b,
        "eq": lambda a, b: a == b, "ne": lambda a, b: a != b,
    }.items():  # fmt: skip
        _check(f"setp.{name}.{kind}{bits}", typed(function), two, bits, 32)


@pytest.mark.parametrize("bits", BITS)
def test_bits_and_shifts(bits):
    two = combinations([INTEGERS[bits]] * 2, [bits] * 2)
    for name, function in {"and": lambda a, b: a & b, "or": lambda a, b: a | b, "xor": lambda a, b: a ^ b}.items():
        _check(f"{name}.b{bits}", function, two, bits, bits)
    _check(f"not.b{bits}", lambda a: ~a, two[:1], bits, bits)
    _check(f"neg.s{bits}", lambda a: -a, two[:1], bits, bits)
    _check(f"abs.s{bits}", lambda a: abs(_signed(a, bits)), two[:1], bits, bits)
    shifts = combinations([INTEGERS[bits], INTEGERS[32]], [bits, 32])
    _check(f"shl.b{bits}", lambda a, n: a << n if n < bits else 0, shifts, bits, bits)
    _check(f"shr.u{bits}", lambda a, n: a >> n if n < bits else 0, shifts, bits, bits)
    _check(f"shr.s{bits}", lambda a, n: _signed(a, bits) >> min(n, bits), shifts, bits, bits)
    chosen = combinations([INTEGERS[bits][:4], INTEGERS[bits], [0, 1]], [bits, bits, 32])
    _check(f"selp.b{bits}", lambda a, b, p: a if p else b, chosen, bits, bits)


def test_wide_products_fields_and_permutations():
    two = combinations([INTEGERS[32]] * 2, [32, 32])
    three = combinations([INTEGERS[32], INTEGERS[32], INTEGERS[64]], [32, 32, 64])
    for kind in "us":
        read = (lambda x: _signed(x, 32)) if kind == "s" else (lambda x: x)
        _check(f"mul.hi.{kind}32", lambda a, b, r=read: r(a) * r(b) >> 32, two, 32, 32)
        _check(f"mul.wide.{kind}32", lambda a, b, r=read: r(a) * r(b), two, 32, 64)
        _check(f"mad.wide.{kind}32", lambda a, b, c, r=read: r(a) * r(b) + c, three, 32, 64)

        def field(a, start, length, kind=kind):
            start, length = start & 255, length & 255
            last = min(start + length - 1, 31)
            sign = kind == "s" and length > 0 and a >> last & 1
            return sum((a >> start + i & 1 if start + i <= 31 and i < length else sign) << i for i in range(32))

        fields = combinations([INTEGERS[32], [0, 1, 5, 31, 32, 200, 256], [0, 1, 8, 31, 32, 33, 255]], [32] * 3)
        _check(f"bfe.{kind}32", field, fields, 32, 32)

    def permute(a, b, selector):
        data = [(a | b << 32) >> 8 * i & 255 for i in range(8)]
        out = 0
        for i in range(4):
            nibble = selector >> 4 * i & 15
            byte = data[nibble & 7]
            out |= (byte if nibble < 8 else 255 * (byte >> 7)) << 8 * i
        return out

    values = [0x01020384, 0xFFEEDDCC, 0x80FF7F00]
    selectors = [0x5410, 0x7632, 0x3340, 0x0123, 0xBA98, 0xFEDC, 0x4210, 0xF070]
    _check("prmt.b32", permute, combinations([values, values, selectors], [32] * 3), 32, 32)
    for selector in selectors:
        _check("prmt.b32", lambda a, b, s=selector: permute(a, b, s), combinations([values] * 2, [32] * 2), 32, 32,
               f", {selector:#x}U")  # fmt: skip


@pytest.mark.parametrize("to", BITS)
@pytest.mark.parametrize("source", BITS)
def test_integer_conversions(to, source):
    (values,) = combinations([INTEGERS[source]], [source])
    for target_kind in "us":
        for kind in "us":
            if (target_kind, to) != (kind, source):
                read = (lambda x: _signed(x, source)) if kind == "s" else (lambda x: x)
                _check(f"cvt.{target_kind}{to}.{kind}{source}", read, [values], source, to)


# ---------------------------------------------------------------- floats


def _same(got: int, wanted: int | None, kind: str) -> bool:
    """wanted None: any NaN."""
    return isinstance(exact(got, kind), float) and math.isnan(exact(got, kind)) if wanted is None else got == wanted


def _check_floats(opcode, model, kinds, result):
    sources = combinations([FLOATS[16 if k != "f32" else 32] for k in kinds], [16 if k != "f32" else 32 for k in kinds])
    got = apply(opcode, sources, 16 if result != "f32" else 32)
    for i, row in enumerate(zip(*(x.tolist() for x in sources), strict=True)):
        wanted = model(*row)
        assert _same(int(got[i]), wanted, result), f"{opcode}{[hex(x) for x in row]}: {int(got[i]):#x}, not {wanted}"


def _formula(kind, function):
    """Bits of function(exact values) rounded once; special values as IEEE's arithmetic of Python floats has them."""

    top = 31 if kind == "f32" else 15

    def model(*bits):
        values = [exact(b, kind) for b in bits]
        if any(isinstance(v, float) for v in values):  # infinite or NaN: no rounding is involved
            try:
                out = function(
                    *(float(v) if isinstance(v, float) or abs(v) < 2**127 else math.copysign(1e300, v) for v in values)
                )
            except ZeroDivisionError:
                return NotImplemented
            if math.isnan(out):
                return None
            infinite = {"f32": 0x7F800000, "f16": 0x7C00, "bf16": 0x7F80}[kind]
            if math.isinf(out):
                return infinite | (0 if out > 0 else 1 << top)
            return rounded(Fraction(out), kind) if out else None
        out = function(*values)
        if out == 0:  # the sign of a zero is what float64 gives: these products do not underflow there
            signed = [math.copysign(float(v), -1 if b >> top else 1) for b, v in zip(bits, values, strict=True)]
            return (1 << top) if math.copysign(1, function(*signed)) < 0 else 0
        return rounded(out, kind)

    return model


@pytest.mark.parametrize("kind", ["f32", "f16"])
def test_float_arithmetic(kind):
    for name, function in {"add": lambda a, b: a + b, "sub": lambda a, b: a - b, "mul": lambda a, b: a * b}.items():
        _check_floats(f"{name}.{kind}", _formula(kind, function), [kind] * 2, kind)
    _check_floats(f"fma.rn.{kind}", _formula(kind, lambda a, b, c: a * b + c), [kind] * 3, kind)


def test_a_fused_product_is_rounded_once():
    """(1 + 2^-23)(1 + 2^-23) + 2^-60: float64 rounds the sum to a tie of float32, which alone would go to even."""
    one = 0x3F800001
    a, b, c = (np.array([x] * 2, np.uint32) for x in (one, 0x3F800000 | 1 << 22, 0x21800000))
    c[1] |= 1 << 31
    got = apply("fma.rn.f32", [a, b, c], 32)
    for i in range(2):
        value = exact(int(a[i]), "f32") * exact(int(b[i]), "f32") + exact(int(c[i]), "f32")
        assert got[i] == rounded(value, "f32")


@pytest.mark.parametrize("kind", ["f32", "f16"])
def test_float_extremes_and_comparisons(kind):
    top = 31 if kind == "f32" else 15

    def extreme(greatest, spread):
        def model(a, b):
            x, y = (float(exact(v, kind)) for v in (a, b))
            if math.isnan(x) or math.isnan(y):
                return None if spread or (math.isnan(x) and math.isnan(y)) else b if math.isnan(x) else a
            if x == y == 0:
                return (a & b if greatest else a | b) & 1 << top
            return a if (x >= y) == greatest else b if x != y else a

        return model

    for name, greatest in (("max", True), ("min", False)):
        _check_floats(f"{name}.{kind}", extreme(greatest, False), [kind] * 2, kind)
        _check_floats(f"{name}.NaN.{kind}", extreme(greatest, True), [kind] * 2, kind)
    comparisons = {
        "eq": lambda a, b: a == b, "ne": lambda a, b: a != b, "lt": lambda a, b: a < b, "le": lambda a, b: a <= b,
        "gt": lambda a, b: a > b, "ge": lambda a, b: a >= b,
    }  # fmt: skip
    bits = 32 if kind == "f32" else 16
    sources = combinations([FLOATS[bits]] * 2, [bits] * 2)

    def compare(function, unordered):
        def model(a, b):
            x, y = float(exact(a, kind)), float(exact(b, kind))
            return unordered if math.isnan(x) or math.isnan(y) else function(x, y)

        return model

    for name, function in comparisons.items():
        _check(f"setp.{name}.{kind}", compare(function, False), sources, bits, 32)
        _check(f"setp.{name}u.{kind}", compare(function, True), sources, bits, 32)
    _check(f"setp.num.{kind}", compare(lambda a, b: True, False), sources, bits, 32)
    _check(f"setp.nan.{kind}", compare(lambda a, b: False, True), sources, bits, 32)


def test_float_conversions():
    for kind in ("f16", "bf16"):

        def widen(a, kind=kind):
            value = exact(a, kind)
            return (
                None
                if value != value
                else a << 16
                if kind == "bf16"
                else int(np.uint16(a).view(np.float16).astype(np.float32).view(np.uint32))
            )

        def narrow(a, kind=kind):
            value = exact(a, "f32")
            if isinstance(value, float):
                return None if math.isnan(value) else (0x7F80 if kind == "bf16" else 0x7C00) | (a >> 31 << 15)
            return rounded(value, kind) if value else a >> 16

        _check_floats(f"cvt.f32.{kind}", widen, [kind], "f32")
        _check_floats(f"cvt.rn.{kind}.f32", narrow, ["f32"], kind)
        sources = combinations([FLOATS[32]] * 2, [32] * 2)
        got = apply(f"cvt.rn.{kind}x2.f32", sources, 32)
        for i, (a, b) in enumerate(zip(*(x.tolist() for x in sources), strict=True)):
            assert _same(int(got[i]) >> 16, narrow(a), kind)
            assert _same(int(got[i]) & 0xFFFF, narrow(b), kind)


def test_rounding_to_tf32_goes_away_from_zero_at_ties():
    bits = np.array([0x3F801000, 0x3F800FFF, 0xBF801000, 0x3F803000, 0x7F800000, 0xFF800000], np.uint32)
    wanted = [0x3F802000, 0x3F800000, 0xBF802000, 0x3F804000, 0x7F800000, 0xFF800000]
    assert apply("cvt.rna.tf32.f32", [bits], 32).tolist() == wanted


@pytest.mark.parametrize("kind", ["bf16", "f16"])
def test_pairs(kind):
    """A pair's halves are computed as what they are: not as one 32-bit number."""
    pairs = [FLOATS[16][i] | FLOATS[16][-i - 1] << 16 for i in range(len(FLOATS[16]))]
    two = combinations([pairs] * 2, [32] * 2)
    for name, function in {
        "add": lambda a, b: a + b, "mul": lambda a, b: a * b, "max": max, "min": min,
    }.items():  # fmt: skip
        got = apply(f"{name}.{kind}x2", two, 32)
        for i, (a, b) in enumerate(zip(*(x.tolist() for x in two), strict=True)):
            for shift in (0, 16):
                halves = a >> shift & 0xFFFF, b >> shift & 0xFFFF
                if name in ("max", "min") and any(
                    exact(h, kind) != exact(h, kind) or exact(h, kind) == 0 for h in halves
                ):
                    continue
                wanted = _formula(kind, function)(*halves)
                assert _same(int(got[i]) >> shift & 0xFFFF, wanted, kind), (name, hex(a), hex(b), shift)


def test_approximate_functions():
    """Within two units in the last place of float32; .ftz reads and gives zeros for subnormal numbers."""
    x = np.array([0.0, 1.0, -3.25, 10.5, -120.0, 0.3], np.float32)
    ulps = {
        "ex2.approx.ftz.f32": np.exp2,
        "rsqrt.approx.ftz.f32": lambda v: 1 / np.sqrt(v),
        "lg2.approx.ftz.f32": np.log2,
    }
    for opcode, function in ulps.items():
        y = np.abs(x[1:]) if not opcode.startswith("ex2") else x
        got = apply(opcode, [y.view(np.uint32)], 32).view(np.float32)
        wanted = function(y.astype(np.float64))
        assert np.all(np.abs(got - wanted) <= 2 * np.spacing(np.abs(wanted).astype(np.float32)))
    small = np.array([1, 0x80000001], np.uint32)
    assert apply("ex2.approx.ftz.f32", [small], 32).tolist() == [0x3F800000] * 2
    low = np.array([-140.0], np.float32).view(np.uint32)
    assert apply("ex2.approx.ftz.f32", [low], 32)[0] == 0
    assert apply("ex2.approx.f32", [low], 32)[0] == 1 << 9
