"""Hand-written PTX for the emulator: a body with its registers, run on tensors."""

import itertools
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import torch

from kernels.emulator.codegen import Code
from kernels.emulator.machine import Counts, Finding
from kernels.emulator.parse import parse
from kernels.emulator.session import execute

COUNTS = {"p": 64, "rs": 64, "r": 64, "rd": 64}
TYPES = {"p": "pred", "rs": "b16", "r": "b32", "rd": "b64"}


def ptx(body: str, parameters: int, threads: int = 32) -> str:
    declared = ",\n".join(f"\t.param .u64 .ptr .global .align 1 k_param_{i}" for i in range(parameters))
    registers = "\n".join(f"\t.reg .{TYPES[p]} %{p}<{n}>;" for p, n in COUNTS.items())
    lines = "\n".join(
        line if line.endswith(":") else f"\t{line};" for line in filter(None, map(str.strip, body.split("\n")))
    )
    head = f".version 8.8\n.target sm_86\n.visible .entry k(\n{declared}\n)\n.reqntid {threads}"
    return f"{head}\n{{\n{registers}\n{lines}\n}}\n"


def run(
    body: str, tensors: Sequence[torch.Tensor], threads: int = 32, programs: int = 1, shared: int = 0, **options
) -> tuple[list[Finding], Counts]:
    """Runs `body`; k_param_i points to tensor i."""
    code = Code(parse(ptx(body, len(tensors), threads)))
    with np.errstate(all="ignore"):
        arguments = [(i, f"argument {i}", x) for i, x in enumerate(tensors)]
        return execute(code, (programs, 1, 1), arguments, shared, **options)


def loads(register: str, number: int, bits: int, to: str = "%rd1") -> str:
    """Loads element `tid` of argument `number` into a register."""
    return f"""
        ld.param.b64 {to}, [k_param_{number}]
        mov.u32 %r1, %tid.x
        mad.wide.u32 {to}, %r1, {bits // 8}, {to}
        ld.global.b{bits} {{ {register} }}, [ {to} + 0 ]
    """


def apply(opcode: str, sources: Sequence[np.ndarray], bits: int, extra: str = "", predicates: Sequence[int] = ()):
    """`opcode` on arrays of bits (unsigned, by width), elementwise. predicates: which sources are predicates (uint32 0
    or 1); bits 1: the result is one. extra: further operands."""
    registers = {16: "%rs", 32: "%r", 64: "%rd"}
    n = len(sources[0])
    threads = -(-n // 32) * 32
    body, names = "", []
    for i, x in enumerate(sources):
        width = 8 * x.dtype.itemsize
        names.append(f"{registers[width]}{10 + i}")
        body += loads(names[-1], i, width)
        if i in predicates:
            body += f"setp.ne.b32 %p{i}, {names[-1]}, 0\n"
            names[-1] = f"%p{i}"
    result = "%p9" if bits == 1 else f"{registers[bits]}9"
    body += f"{opcode} {result}, {', '.join(names)}{extra}\n"
    if bits == 1:
        result, bits = "%r9", 32
        body += "selp.b32 %r9, 1, 0, %p9\n"
    body += f"""
        ld.param.b64 %rd2, [k_param_{len(sources)}]
        mov.u32 %r1, %tid.x
        mad.wide.u32 %rd2, %r1, {bits // 8}, %rd2
        st.global.b{bits} [ %rd2 + 0 ], {{ {result} }}
        ret
    """
    padded = [np.pad(x, (0, threads - n)) for x in sources]
    out = np.zeros(threads, f"u{bits // 8}")
    findings, _ = run(body, [torch.from_numpy(x.view(f"i{x.dtype.itemsize}")) for x in (*padded, out)], threads)
    assert not findings
    return out[:n]


# ---------------------------------------------------------------- numbers

NUMBERS = {
    "f16": [0, 0x8000, 1, 0x8001, 0x3FF, 0x400, 0x3C00, 0xBC00, 0x3C01, 0x7BFF, 0xFBFF, 0x7C00, 0xFC00, 0x7E00, 0xFD01,
            0x3555, 0x4248],
    "bf16": [0, 0x8000, 1, 0x8001, 0x7F, 0x80, 0x3F80, 0xBF80, 0x3F81, 0x7F7F, 0xFF7F, 0x7F80, 0xFF80, 0x7FC0, 0xFF81,
             0x3EAB, 0x4049],
    "f32": [0, 1 << 31, 1, 0x807FFFFF, 0x800000, 0x3F800000, 0xBF800000, 0x3F800001, 0x7F7FFFFF, 0xFF7FFFFF, 0x7F800000,
            0xFF800000, 0x7FC00001, 0xFFC00002, 0x40490FDB, 0xC2F6E979, 0x4B800001, 0x3F008000, 0x3F018000, 0x33D6BF95,
            0x7E800001],
}  # fmt: skip
# what conversions turn on: halves of integers, the ends of 32 and 64 bits, ties of float16, bfloat16 and tf32
EDGES = [
    int(np.float32(sign * (base + step)).view(np.uint32))
    for sign in (1, -1) for base in (0.5, 1.5, 2.5, 7.0, 2.0**23 - 0.5) for step in (0, 1e-3, 0.25)
] + [
    int(np.float32(sign * 2.0**power).view(np.uint32)) + step
    for sign in (1, -1) for power in (-25, -24, -15, -14, 15, 16, 31, 32, 63, 64) for step in (-1, 0, 1)
] + [
    tie + step for step in (-1, 0, 1)
    for tie in (0x3F801000, 0x3F803000, 0x477FF000, 0x7F7F8000, 0x38801000, 0x00008000, 0x00018000, 0x33000000,
                0x33C00000, 0x7F7FF000)
]  # fmt: skip
for _bits in (16, 32, 64):
    _top = 1 << _bits - 1
    _ends = [0, 1, 2, 5, 15, 16, 31, 32, 33, 63, 64, _top, _top - 1, 2 * _top - 1, 2 * _top - 7]
    NUMBERS |= {f"{kind}{_bits}": _ends for kind in "usb"}
NUMBERS["pred"] = [0, 1]
for _kind in ("f16", "bf16"):
    NUMBERS[f"{_kind}x2"] = [a | b << 16 for a, b in zip(NUMBERS[_kind], NUMBERS[_kind][::-1], strict=True)]


def combinations(values: Sequence[Sequence[int]], bits: Sequence[int], most: int = 960) -> list[np.ndarray]:
    """All combinations of the operands' values, or an even share of them."""
    every = list(itertools.product(*values))
    every = every[:: -(-len(every) // most)]
    return [np.array([row[i] & ((1 << b) - 1) for row in every], f"u{b // 8}") for i, b in enumerate(bits)]


def exact(bits: int, kind: str) -> Fraction | float:
    """A finite float's value exactly; inf, -inf or nan as Python has it. kind: f16, bf16, f32."""
    exponent_bits, fraction_bits = {"f16": (5, 10), "bf16": (8, 7), "f32": (8, 23)}[kind]
    sign = -1 if bits >> (exponent_bits + fraction_bits) & 1 else 1
    exponent, fraction = bits >> fraction_bits & ((1 << exponent_bits) - 1), bits & ((1 << fraction_bits) - 1)
    if exponent == (1 << exponent_bits) - 1:
        return float("nan") if fraction else sign * float("inf")
    bias = (1 << exponent_bits - 1) - 1
    mantissa, power = (fraction, 1 - bias) if exponent == 0 else (fraction | 1 << fraction_bits, exponent - bias)
    return sign * Fraction(mantissa) * Fraction(2) ** (power - fraction_bits)


def rounded(value: Fraction, kind: str) -> int:
    """Bits of the nearest float, ties to even; of a value that is not zero."""
    exponent_bits, fraction_bits = {"f16": (5, 10), "bf16": (8, 7), "f32": (8, 23)}[kind]
    bias = (1 << exponent_bits - 1) - 1
    sign, size = (1 if value < 0 else 0) << (exponent_bits + fraction_bits), abs(value)
    power = size.numerator.bit_length() - size.denominator.bit_length()
    power -= Fraction(2) ** power > size
    power = max(power, 1 - bias)
    whole = round(size / Fraction(2) ** (power - fraction_bits))  # Fraction rounds half to even
    out = whole if power == 1 - bias and whole < 1 << fraction_bits else whole + (power + bias - 1 << fraction_bits)
    return sign | min(out, (1 << exponent_bits) - 1 << fraction_bits)
