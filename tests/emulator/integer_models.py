"""A scalar model of every opcode of integers and predicates of the white list, in Python's integers.

`MODELS[opcode]` is (kinds of the sources, kind of the result, function from the sources' bits to the result's bits), of
floats too (models.py). Nothing here comes from the emulator. Source: "PTX ISA 8.8", sections 9.7.1 and 9.7.9.
"""

from collections.abc import Callable
from typing import NamedTuple


class Model(NamedTuple):
    sources: tuple[str, ...]
    result: str
    function: Callable


MODELS: dict[str, Model] = {}


def width(kind: str) -> int:
    return 1 if kind == "pred" else 32 if kind.endswith("x2") else int("".join(c for c in kind if c.isdigit()))


def add(opcode: str, sources: str, result: str, function: Callable) -> None:
    MODELS[opcode] = Model(tuple(sources.split()), result, function)


def read(bits: int, kind: str) -> int:
    size = width(kind)
    return bits - (1 << size) if kind[0] == "s" and bits >> (size - 1) & 1 else bits


# ---------------------------------------------------------------- integers


def typed(kinds: str, function: Callable) -> Callable:
    return lambda *bits: int(function(*(read(b, k) for b, k in zip(bits, kinds.split(), strict=True))))


def _quotient(a: int, b: int) -> int:
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


COMPARE: dict[str, Callable] = {
    "eq": lambda a, b: a == b, "ne": lambda a, b: a != b, "lt": lambda a, b: a < b, "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b, "ge": lambda a, b: a >= b,
}  # fmt: skip
_BITWISE: dict[str, Callable] = {"and": lambda a, b: a & b, "or": lambda a, b: a | b, "xor": lambda a, b: a ^ b}
_TWO: dict[str, Callable] = {
    "add": lambda a, b: a + b, "sub": lambda a, b: a - b, "mul.lo": lambda a, b: a * b, "min": min, "max": max,
    "div": lambda a, b: _quotient(a, b) if b else -1, "rem": lambda a, b: a - b * _quotient(a, b) if b else a,
}  # fmt: skip


def _field(kind: str, a: int, start: int, length: int) -> int:
    start, length = start & 255, length & 255
    sign = kind == "s" and length > 0 and a >> min(start + length - 1, 31) & 1
    return sum((a >> start + i & 1 if start + i <= 31 and i < length else sign) << i for i in range(32))


def _permuted(a: int, b: int, selector: int) -> int:
    data, out = [(a | b << 32) >> 8 * i & 255 for i in range(8)], 0
    for i in range(4):
        nibble = selector >> 4 * i & 15
        byte = data[nibble & 7]
        out |= (byte if nibble < 8 else 255 * (byte >> 7)) << 8 * i
    return out


def _integers() -> None:
    for bits in (16, 32, 64):
        for k in (f"u{bits}", f"s{bits}"):
            for name, function in _TWO.items():
                add(f"{name}.{k}", f"{k} {k}", k, typed(f"{k} {k}", function))
            add(f"mad.lo.{k}", f"{k} {k} {k}", k, typed(f"{k} {k} {k}", lambda a, b, c: a * b + c))
            add(f"shr.{k}", f"{k} u32", k, typed(f"{k} u32", lambda a, n, w=bits: a >> min(n, w)))
        for k in (f"u{bits}", f"s{bits}", f"b{bits}"):
            for name, function in COMPARE.items():
                if k[0] != "b" or name in ("eq", "ne"):
                    add(f"setp.{name}.{k}", f"{k} {k}", "pred", typed(f"{k} {k}", function))
            add(f"selp.{k}", f"{k} {k} pred", k, lambda a, b, p: a if p else b)
        b, s = f"b{bits}", f"s{bits}"
        for name, function in _BITWISE.items():
            add(f"{name}.{b}", f"{b} {b}", b, function)
        add(f"not.{b}", b, b, lambda a: ~a)
        add(f"shl.{b}", f"{b} u32", b, lambda a, n, w=bits: a << n if n < w else 0)
        add(f"neg.{s}", s, s, typed(s, lambda a: -a))
        add(f"abs.{s}", s, s, typed(s, abs))
    for k, wide in (("s32", "s64"), ("u32", "u64"), ("s16", "s32"), ("u16", "u32")):
        add(f"mul.wide.{k}", f"{k} {k}", wide, typed(f"{k} {k}", lambda a, b: a * b))
        kinds = f"{k} {k} {wide}"
        add(f"mad.wide.{k}", kinds, wide, typed(kinds, lambda a, b, c: a * b + c))
    for k in ("u32", "s32"):
        add(f"mul.hi.{k}", f"{k} {k}", k, typed(f"{k} {k}", lambda a, b: a * b >> 32))
        add(f"bfe.{k}", f"{k} u32 u32", k, lambda a, n, m, k=k: _field(k[0], a, n, m))
    add("prmt.b32", "b32 b32 b32", "b32", _permuted)
    for name, function in _BITWISE.items():
        add(f"{name}.pred", "pred pred", "pred", function)
    add("not.pred", "pred", "pred", lambda a: a ^ 1)
    for source in (16, 32, 64):
        for to in (16, 32, 64):
            for target in "us":
                for kind in "us":
                    if (target, to) != (kind, source):
                        k = f"{kind}{source}"
                        add(f"cvt.{target}{to}.{k}", k, f"{target}{to}", typed(k, lambda a: a))
    for to in (16, 32, 64):  # an 8-bit source lies in the lowest bits of a wider register
        add(f"cvt.u{to}.u8", "u16", f"u{to}", lambda a: a & 255)
        add(f"cvt.s{to}.s8", "u16", f"s{to}", lambda a: read(a & 255, "s8"))


_integers()
