"""A scalar model of every opcode of floats and conversions of the white list, in Python's integers and fractions.

Added to integer_models.MODELS. Wanted bits may also be NAN (any NaN) or a `Near` (a value and its tolerance, of approx
functions). Nothing here comes from the emulator. Source: "PTX ISA 8.8", sections 9.7.3, 9.7.4 and 9.7.9.
"""

import math
from collections.abc import Callable
from fractions import Fraction
from typing import NamedTuple

from integer_models import COMPARE, add, typed, width
from snippets import exact, rounded

NAN = object()
TOP = {"f32": 31, "f16": 15, "bf16": 15}
INFINITE = {"f32": 0x7F800000, "f16": 0x7C00, "bf16": 0x7F80}
CANONICAL = {"f32": 0x7FFFFFFF, "f16": 0x7FFF, "bf16": 0x7FFF}
TINY = {"f32": Fraction(2) ** -126}


class Near(NamedTuple):
    """Within `relative` of value, plus `absolute`."""

    value: float
    relative: float
    absolute: float = 0.0


# ---------------------------------------------------------------- floats


def is_nan(bits: int, kind: str) -> bool:
    return exact(bits, kind) != exact(bits, kind)


def _zero(bits: int, kind: str) -> bool:
    return bits & ~(1 << TOP[kind]) == 0


def formula(kind: str, function: Callable) -> Callable:
    """Bits of function(exact values) rounded once; infinite and NaN sources, and the sign of a zero, as the formula has
    them in Python's floats, in which no product of these values underflows."""
    top = TOP[kind]

    def model(*bits):
        values = [exact(b, kind) for b in bits]
        if any(isinstance(v, float) for v in values):  # no rounding is involved: only signs and zeros of the others
            plain = [v if isinstance(v, float) else math.copysign(float(v != 0), -1 if b >> top else 1)
                     for b, v in zip(bits, values, strict=True)]  # fmt: skip
            out = function(*plain)
            if math.isnan(out):
                return NAN
            if math.isinf(out):
                return INFINITE[kind] | (0 if out > 0 else 1 << top)
            return (1 << top) if math.copysign(1, out) < 0 else 0
        out = function(*values)
        if out != 0:
            return rounded(out, kind)
        signed = [math.copysign(float(v), -1 if b >> top else 1) for b, v in zip(bits, values, strict=True)]
        return (1 << top) if math.copysign(1, function(*signed)) < 0 else 0

    return model


def flushed(model: Callable, result: str = "f32") -> Callable:
    """.ftz: subnormal sources and results are zeros of their sign."""

    def flush(b):
        return b & 1 << 31 if b & 0x7F800000 == 0 else b

    def out(*bits):
        got = model(*map(flush, bits))
        if isinstance(got, Near) and abs(got.value) < 2.0**-126:
            return 1 << 31 if math.copysign(1, got.value) < 0 else 0
        return flush(got) if isinstance(got, int) and result == "f32" else got

    return out


def in_pairs(kind: str, model: Callable) -> Callable:
    """A pair's halves, each by itself: a tuple of what is wanted of the lower and of the upper."""
    return lambda *x: tuple(model(*(v >> shift & 0xFFFF for v in x)) for shift in (0, 16))


def extreme(kind: str, greatest: bool, spread: bool) -> Callable:
    """max, min: NaN gives way to a number, or (spread) wins; two NaN, or one that wins, are the canonical NaN."""

    def model(a, b):
        nan = is_nan(a, kind), is_nan(b, kind)
        if all(nan) or (spread and any(nan)):
            return CANONICAL[kind]
        if any(nan):
            return b if nan[0] else a
        if _zero(a, kind) and _zero(b, kind):
            return a & b if greatest else a | b
        return a if (exact(a, kind) >= exact(b, kind)) == greatest else b

    return model


def comparison(kind: str, name: str) -> Callable:
    def model(a, b):
        unordered = is_nan(a, kind) or is_nan(b, kind)
        if name in ("num", "nan"):
            return int(unordered == (name == "nan"))
        if unordered:
            return int(len(name) == 3)
        return int(COMPARE[name[:2]](exact(a, kind), exact(b, kind)))

    return model


def divided(a: int, b: int) -> object:
    sign = (a ^ b) & 1 << 31
    if is_nan(a, "f32") or is_nan(b, "f32"):
        return NAN
    infinite = [abs(x) == float("inf") for x in (exact(a, "f32"), exact(b, "f32"))]
    zero = [_zero(a, "f32"), _zero(b, "f32")]
    if all(infinite) or all(zero):
        return NAN
    if infinite[0] or zero[1]:
        return sign | INFINITE["f32"]
    if zero[0] or infinite[1]:
        return sign
    return rounded(exact(a, "f32") / exact(b, "f32"), "f32")


def _loosely(model: Callable, ulps: int) -> Callable:
    """A finite result may be off by that many units in its last place."""

    def out(*bits):
        got = model(*bits)
        if not isinstance(got, int) or got & 0x7FFFFFFF in (0, INFINITE["f32"]):
            return got
        return Near(float(exact(got, "f32")), ulps * 2.0**-23, ulps * 2.0**-149)

    return out


def _divided_approx(a: int, b: int) -> object:
    """For 2^126 < |b| < 2^128 the reciprocal is flushed: NaN of an infinite a, else zero. Otherwise within 2 ulp."""
    size = exact(b, "f32")
    if not isinstance(size, float) and abs(size) > Fraction(2) ** 126:
        value = exact(a, "f32")
        return NAN if isinstance(value, float) else (a ^ b) & 1 << 31
    return _loosely(divided, 2)(a, b)


def _root(a: int) -> object:
    value = exact(a, "f32")
    if isinstance(value, float) or _zero(a, "f32") or value < 0:
        return a if _zero(a, "f32") or value == float("inf") else NAN
    scaled = value * 4**200  # a bit below the last says whether something was cut off
    whole = math.isqrt(scaled.numerator // scaled.denominator)
    return rounded(Fraction(2 * whole + (whole * whole != scaled), 2**201), "f32")


def _approximate(function: Callable, domain: str, relative: float, absolute: float = 0.0) -> Callable:
    """function: of Python's floats. domain: what may be negative ("all") or gives NaN ("positive")."""

    def model(a):
        value = exact(a, "f32")
        if value != value or (domain == "positive" and value < 0):
            return NAN
        if _zero(a, "f32"):
            return {"exp2": 0x3F800000, "log2": 0xFF800000}.get(function.__name__, (a & 1 << 31) | 0x7F800000)
        if value == float("inf"):
            return 0 if function.__name__ == "_rsqrt" else 0x7F800000
        if value == float("-inf"):
            return 0
        try:
            out = function(float(value))
        except OverflowError:
            return 0x7F800000
        if out >= 2.0**128 * (1 - 2.0**-25):
            return 0x7F800000
        return Near(out, relative, absolute)

    return model


def _rsqrt(x: float) -> float:
    return 1 / math.sqrt(x)


def _both(opcode: str, sources: int, model: Callable, result: str = "f32") -> None:
    """An opcode of float32 and its .ftz, which stands where {} is."""
    for name, function in (("", model), (".ftz", flushed(model, result))):
        add(opcode.format(name), " ".join(["f32"] * sources), result, function)


def _floats() -> None:
    two: dict[str, Callable] = {"add": lambda a, b: a + b, "sub": lambda a, b: a - b, "mul": lambda a, b: a * b}

    def fused(a, b, c):
        return a * b + c

    for name, function in two.items():
        for suffix in ("", ".rn"):
            _both(f"{name}{suffix}{{}}.f32", 2, formula("f32", function))
            for kind in ("f16", "bf16"):
                pair = f"{kind}x2"
                add(f"{name}{suffix}.{pair}", f"{pair} {pair}", pair, in_pairs(kind, formula(kind, function)))
        add(f"{name}.f16", "f16 f16", "f16", formula("f16", function))
    _both("fma.rn{}.f32", 3, formula("f32", fused))
    for kind in ("f16", "bf16"):
        add(f"fma.rn.{kind}", f"{kind} {kind} {kind}", kind, formula(kind, fused))
    for kind in ("f16", "bf16"):
        pair = f"{kind}x2"
        add(f"fma.rn.{pair}", f"{pair} {pair} {pair}", pair, in_pairs(kind, formula(kind, fused)))
        add(f"neg.{pair}", pair, pair, lambda a: a ^ 0x80008000)
        add(f"abs.{pair}", pair, pair, lambda a: a & 0x7FFF7FFF)
    for name, greatest in (("max", True), ("min", False)):
        for suffix in ("", ".NaN"):
            _both(f"{name}{{}}{suffix}.f32", 2, extreme("f32", greatest, suffix != ""))
            add(f"{name}{suffix}.f16", "f16 f16", "f16", extreme("f16", greatest, suffix != ""))
            for kind in ("f16", "bf16"):
                pair, model = f"{kind}x2", in_pairs(kind, extreme(kind, greatest, suffix != ""))
                add(f"{name}{suffix}.{pair}", f"{pair} {pair}", pair, model)
    _both("neg{}.f32", 1, lambda a: NAN if is_nan(a, "f32") else a ^ 1 << 31)
    add("neg.f16", "f16", "f16", lambda a: NAN if is_nan(a, "f16") else a ^ 1 << 15)
    _both("abs{}.f32", 1, lambda a: NAN if is_nan(a, "f32") else a & ~(1 << 31))
    add("copysign.f32", "f32 f32", "f32", lambda a, b: (a & 1 << 31) | (b & ~(1 << 31)))
    _both("div.rn{}.f32", 2, divided)
    _both("div.full{}.f32", 2, _loosely(divided, 2))
    _both("div.approx{}.f32", 2, _divided_approx)
    _both("rcp.rn{}.f32", 1, lambda a: divided(0x3F800000, a))
    _both("rcp.approx{}.f32", 1, _loosely(lambda a: divided(0x3F800000, a), 1))
    _both("sqrt.rn{}.f32", 1, _root)
    _both("sqrt.approx{}.f32", 1, _loosely(_root, 1))
    # ex2: 2 ulp; lg2: 2^-22 absolute near 1, else relative; rsqrt: 2^-22.9 relative; half an ulp for float32 itself
    _both("ex2.approx{}.f32", 1, _approximate(math.exp2, "all", 2.0**-22, 2.0**-149))
    _both("lg2.approx{}.f32", 1, _approximate(math.log2, "positive", 2.0**-22, 2.0**-22))
    _both("rsqrt.approx{}.f32", 1, _approximate(_rsqrt, "positive", 2.0**-22.9))
    for name in (*COMPARE, "num", "nan", *(f"{name}u" for name in COMPARE)):
        _both(f"setp.{name}{{}}.f32", 2, comparison("f32", name), "pred")
        add(f"setp.{name}.f16", "f16 f16", "pred", comparison("f16", name))
    add("selp.f32", "f32 f32 pred", "f32", lambda a, b, p: a if p else b)


# ---------------------------------------------------------------- conversions


def narrowed(kind: str) -> Callable:
    def model(a):
        value = exact(a, "f32")
        if value != value:
            return CANONICAL[kind]
        if _zero(a, "f32") or isinstance(value, float):
            return (a >> 31 << 15) | (0 if value == 0 else INFINITE[kind])
        return rounded(value, kind)

    return model


def _widened(kind: str) -> Callable:
    def model(a):
        value = exact(a, kind)
        if value != value:
            return NAN
        if _zero(a, kind) or isinstance(value, float):
            return (a >> 15 << 31) | (0 if value == 0 else INFINITE["f32"])
        return rounded(value, "f32")

    return model


def _tf32(a: int) -> object:
    """10 bits of fraction, ties away from zero."""
    value = exact(a, "f32")
    if isinstance(value, float):
        return NAN if value != value else a
    size = a & 0x7FFFFFFF
    return (a & 1 << 31) | (size + 0x1000) // 0x2000 * 0x2000


_ROUND: dict[str, Callable] = {"rzi": math.trunc, "rni": round, "rmi": math.floor, "rpi": math.ceil}


def _to_integer(how: str, kind: str) -> Callable:
    """Saturates; NaN gives 0, in 64 bits the highest bit alone."""
    size = width(kind)
    low, high = (-(1 << size - 1), (1 << size - 1) - 1) if kind[0] == "s" else (0, (1 << size) - 1)

    def model(a):
        value = exact(a, "f32")
        if value != value:
            return 1 << 63 if size == 64 else 0
        if isinstance(value, float):
            return high if value > 0 else low
        return min(max(_ROUND[how](value), low), high)

    return model


def _whole(how: str) -> Callable:
    def model(a):
        value = exact(a, "f32")
        if isinstance(value, float):
            return NAN if value != value else a
        whole = _ROUND[how](value)
        return rounded(Fraction(whole), "f32") if whole else a & 1 << 31

    return model


def _saturated(a: int) -> int:
    value = exact(a, "f32")
    return a if 0 < value < 1 else 0x3F800000 if value >= 1 else 0


def _conversions() -> None:
    for kind in ("f16", "bf16"):
        add(f"cvt.f32.{kind}", kind, "f32", _widened(kind))
        add(f"cvt.rn.{kind}.f32", "f32", kind, narrowed(kind))
        # the first source goes to the upper half
        add(f"cvt.rn.{kind}x2.f32", "f32 f32", f"{kind}x2", lambda a, b, k=kind: (narrowed(k)(b), narrowed(k)(a)))
    add("cvt.rna.tf32.f32", "f32", "f32", _tf32)
    for bits in (16, 32, 64):
        for kind in (f"u{bits}", f"s{bits}"):
            add(f"cvt.rn.f32.{kind}", kind, "f32", typed(kind, lambda a: rounded(Fraction(a), "f32") if a else 0))
            for how in _ROUND if bits > 16 else ():
                add(f"cvt.{how}.{kind}.f32", "f32", kind, _to_integer(how, kind))
    for how in _ROUND:
        _both(f"cvt.{how}{{}}.f32.f32", 1, _whole(how))
    _both("cvt{}.sat.f32.f32", 1, _saturated)


_floats()
_conversions()
