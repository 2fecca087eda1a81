"""A Python function for each basic block: registers are local names, each instruction one line or two.

A register's value may have several names at once, one for each form that reads it (u32, f32, ...): views of one array.
The function comes in two versions: `whole` for all lanes, and `masked`, in which memory takes the mask and, at the end,
registers that waiting lanes still need are merged. Names are deleted after their last use: blocks have thousands.
"""

import re
from collections.abc import Callable
from typing import Any

import numpy as np

from kernels.emulator import analysis, arithmetic
from kernels.emulator.instructions import COMPARISONS, RULES, SPECIAL
from kernels.emulator.machine import Site
from kernels.emulator.parse import (
    Instruction,
    Kernel,
    Memory,
    Operand,
    UnsupportedPtx,
    immediate,
    is_register,
    width_of,
)  # fmt: skip

_DTYPES = {
    "b": np.dtype(bool), "u16": arithmetic.U2, "s16": arithmetic.S2, "f16": arithmetic.F2, "u32": arithmetic.U4,
    "s32": arithmetic.S4, "f32": arithmetic.F4, "u64": arithmetic.U8, "s64": arithmetic.S8, "f64": arithmetic.F8,
}  # fmt: skip


class Code:
    """The functions of a kernel's blocks, made when they first run."""

    def __init__(self, kernel: Kernel):
        self.kernel = kernel
        names = sorted({name for one in kernel.instructions() for name in one.reads + one.writes})
        self.numbers = {name: i for i, name in enumerate(names)}
        self.undefined = kernel.blocks[0].live_in
        self.sites: dict[int, Site] = {}
        for one in kernel.instructions():
            if one.opcode not in RULES and one.opcode not in SPECIAL:
                raise UnsupportedPtx(f"{kernel.name}: {one}: this opcode is not in the emulator's white list")
            if (site := _site(one, len(self.sites))) is not None:
                self.sites[id(one)] = site
        shared = [s.size for s in self.sites.values() if "shared" in s.instruction.opcode]
        self.shared_granule = min(shared, default=16)
        self.reached = analysis.reached_arguments(kernel)
        self.undefined_reads = analysis.undefined_reads(kernel)
        self._blocks: dict[tuple[int, bool], Callable] = {}

    def canonical(self, register: str) -> np.dtype:
        return _DTYPES["b" if width_of(register) == 1 else f"u{width_of(register)}"]

    def block(self, number: int, masked: bool) -> Callable:
        """Its function of (machine, registers), and (mask, names to merge) if masked; returns who takes the branch."""
        if (number, masked) not in self._blocks:
            self._blocks[number, masked] = _Emitter(self, number, masked).compile()
        return self._blocks[number, masked]


def _site(one: Instruction, index: int) -> Site | None:
    opcode = one.opcode
    if match := re.match(r"(?:ld|st)\.(?:global|shared)\.(?:v(\d)\.)?[bus](\d+)$", opcode):
        count, width = int(match[1] or 1), int(match[2]) // 8
    elif match := re.match(r"ldmatrix\..*\.x(\d)", opcode):
        address = one.operands[1]
        assert isinstance(address, Memory)
        return Site(index, one, 16, 4, int(match[1]), address.offset)
    elif opcode.startswith("cp.async.c") and "shared.global" in opcode:
        count, width = 1, immediate(str(one.operands[2]))
        if width not in (4, 8, 16):
            raise UnsupportedPtx(f"{one}: {width} bytes")
    else:
        return None
    address = one.operands[0 if opcode.startswith(("st", "cp")) else 1]
    assert isinstance(address, Memory)
    return Site(index, one, count * width, width, count, address.offset)


class _Emitter:
    def __init__(self, code: Code, number: int, masked: bool):
        self.code, self.block, self.masked = code, code.kernel.blocks[number], masked
        self.lines: list[str] = []
        self.names: dict[str, dict[str, str]] = {}
        self.written: set[str] = set()
        self.constants: dict[tuple[int, str], str] = {}
        self.space: dict[str, Any] = {"np": np, "A": arithmetic}
        self.fragments: dict[tuple, str] = {}
        self.counter = 0
        self.result = "None"

    # ---------------------------------------------------------------- names

    def new(self, expression: str) -> str:
        self.counter += 1
        self.lines.append(f"v{self.counter} = {expression}")
        return f"v{self.counter}"

    def keep(self, value: Any, prefix: str = "k") -> str:
        """A name for an object that the function refers to."""
        name = f"{prefix}{len(self.space)}"
        self.space[name] = value
        return name

    def canonical_form(self, register: str) -> str:
        return "b" if width_of(register) == 1 else f"u{width_of(register)}"

    def get(self, operand: Operand, form: str) -> str:
        """Name of an operand's value in `form`."""
        assert isinstance(operand, str), operand
        if not is_register(operand):
            return self.constant(operand, form)
        names = self.names.get(operand)
        if names is None:
            first = self.new(f"R[{self.code.numbers[operand]}]")
            names = self.names[operand] = {self.canonical_form(operand): first}
        if form not in names:
            if width_of(operand) != (1 if form == "b" else int(form[1:])):
                raise UnsupportedPtx(f"{operand} read as {form}")
            names[form] = self.new(f"{next(iter(names.values()))}.view({self.dtype(form)})")
        return names[form]

    def dtype(self, form: str) -> str:
        return "bool" if form == "b" else f"A.{form[0].upper()}{int(form[1:]) // 8}"

    def constant(self, text: str, form: str) -> str:
        if text in ("global_smem", "WARP_SZ") or not re.match(r"-?\d", text):
            if text != "global_smem":
                raise UnsupportedPtx(f"operand {text!r}")
            text = "0"
        value, dtype = immediate(text), _DTYPES[form]
        key = (value, form)
        if key not in self.constants:
            if form == "b":
                made = np.full((1, 1), value != 0)
            else:
                bits = arithmetic.constant(value, np.dtype(f"u{dtype.itemsize}"))
                made = bits.view(dtype)
            self.constants[key] = self.keep(made)
        return self.constants[key]

    def put(self, register: Operand, form: str, expression: str, guard: str | None) -> None:
        """Assigns; under a guard, lanes outside keep what was there."""
        assert isinstance(register, str)
        if register == "_":
            return
        if not is_register(register):
            raise UnsupportedPtx(f"result {register!r}")
        if width_of(register) != (1 if form == "b" else int(form[1:])):
            raise UnsupportedPtx(f"{register} written as {form}")
        name = self.new(expression)
        if guard is not None:
            old = self.get(register, form)
            name = self.new(f"np.where({guard}, {name}, {old})")
        self.names[register] = {form: name}
        self.written.add(register)

    # ---------------------------------------------------------------- a block

    def compile(self) -> Callable:
        for one in self.block.instructions:
            guard = None
            if one.guard is not None:
                guard = self.get(one.guard, "b")
                if one.guard_negated:
                    guard = self.new(f"~{guard}")
            try:
                if one.opcode in RULES:
                    self.simple(one, guard)
                else:
                    getattr(self, SPECIAL[one.opcode])(one, guard)
            except UnsupportedPtx as error:
                raise UnsupportedPtx(f"{self.code.kernel.name}: {one}: {error}") from None
        for name in sorted(self.written & self.block.live_out):
            number, value = self.code.numbers[name], self.get(name, self.canonical_form(name))
            if self.masked:
                self.lines.append(f"R[{number}] = np.where(M, {value}, R[{number}]) if {name!r} in K else {value}")
            else:
                self.lines.append(f"R[{number}] = {value}")
        if not self.masked:
            self.lines += [f"R[{self.code.numbers[name]}] = None" for name in self.block.live_in - self.block.live_out]
        arguments = "m, R, M, K" if self.masked else "m, R"
        body = "\n    ".join(_with_deletions(self.lines, self.result))
        text = f"def block({arguments}):\n    {body}\n    return {self.result}\n"
        exec(compile(text, f"<{self.code.kernel.name} block {self.block.index}>", "exec"), self.space)
        return self.space["block"]

    def simple(self, one: Instruction, guard: str | None) -> None:
        rule = RULES[one.opcode]
        result, *sources = one.operands
        if len(sources) != len(rule.sources):
            raise UnsupportedPtx(f"expected {len(rule.sources)} sources, got {len(sources)}")
        values = [self.get(source, form) for source, form in zip(sources, rule.sources, strict=True)]
        expression = rule.expression
        shift = one.opcode.startswith(("shl", "shr")) and not is_register(sources[1])
        if shift and immediate(str(sources[1])) < int(rule.result[1:]):  # numpy's own shift is right below the width
            values[1] = self.constant(str(sources[1]), rule.sources[0])
            expression = "{0} << {1}" if one.opcode.startswith("shl") else "{0} >> {1}"
        self.put(result, rule.result, expression.format(*values), guard)

    def compare_pairs(self, one: Instruction, guard: str | None) -> None:
        """setp of f16x2: a predicate for the lower halves, one for the upper."""
        results, *sources = one.operands
        expression = COMPARISONS[one.opcode.split(".")[1]]
        pairs = [self.new(f"A.halves({self.get(source, 'u32')})") for source in sources]
        for i, register in enumerate(self._several(results)):
            self.put(register, "b", expression.format(*(f"{pair}[{i}].view(A.F2)" for pair in pairs)), guard)

    def mask(self, guard: str | None) -> str:
        """The lanes of a memory instruction: an expression."""
        if not self.masked:
            return guard or "None"
        return f"M & {guard}" if guard else "M"

    def site(self, one: Instruction) -> str:
        return self.keep(self.code.sites[id(one)], "s")

    def _several(self, operand: Operand) -> list[str]:
        return list(operand) if isinstance(operand, tuple) else [str(operand)]

    # ---------------------------------------------------------------- moves and memory

    def move(self, one: Instruction, guard: str | None) -> None:
        result, source = one.operands
        if isinstance(source, tuple):
            bits = width_of(str(result)) // len(source)
            parts = [self.get(part, f"u{bits}") for part in source]
            wide = f"u{bits * len(parts)}"
            shifted = [
                f"({part}.astype({self.dtype(wide)}) << {self.constant(str(i * bits), wide)})"
                for i, part in enumerate(parts)
            ]
            self.put(result, wide, " | ".join(shifted), guard)
        elif isinstance(result, tuple):
            bits = width_of(str(source)) // len(result)
            value, wide = self.get(source, f"u{bits * len(result)}"), f"u{bits * len(result)}"
            for i, part in enumerate(result):
                moved = f"({value} >> {self.constant(str(i * bits), wide)})" if i else value
                self.put(part, f"u{bits}", f"{moved}.astype({self.dtype(f'u{bits}')})", guard)
        elif str(source).startswith("%") and not is_register(source):
            if str(source) not in (f"%{name}" for name in _SPECIALS):
                raise UnsupportedPtx(f"register {source}")
            self.put(result, "u32", f"m.specials[{source!r}]", guard)
        else:
            form = self.canonical_form(str(result))
            self.put(result, form, self.get(source, form), guard)

    def parameter(self, one: Instruction, guard: str | None) -> None:
        result, source = one.operands
        assert isinstance(source, Memory)
        if source.offset or source.base not in self.code.kernel.parameters:
            raise UnsupportedPtx(f"parameter {source}")
        kind = one.opcode.rsplit(".", 1)[1]
        form = f"{'s' if kind[0] == 's' else 'u'}{kind[1:]}"
        width = width_of(str(result))
        value = f"m.parameters[{source.base!r}][:, :{int(form[1:]) // 8}].view({self.dtype(form)})"
        self.put(result, f"{form[0]}{width}", f"{value}.astype({self.dtype(f'{form[0]}{width}')})", guard)

    def load(self, one: Instruction, guard: str | None) -> None:
        results, address = self._several(one.operands[0]), one.operands[1]
        site, mask = self.site(one), self.mask(guard)
        kind = one.opcode.rsplit(".", 1)[1]
        value = self.address(one, address)
        memory = "m.memory.load(m, " if ".global." in one.opcode else "m.shared.load("
        got = self.new(f"{memory}{site}, {value}, {mask})")
        for i, register in enumerate(results):
            if register == "_":
                continue
            bits, width = int(kind[1:]), width_of(register)
            form = f"{'s' if kind[0] == 's' else 'u'}{bits}"
            expression = f"{got}[{i}]"
            if bits != width:
                signed = f".view({self.dtype(form)})" if form[0] == "s" else ""
                expression += f"{signed}.astype({self.dtype(f'{form[0]}{width}')})"
            self.put(register, f"{form[0] if bits != width else 'u'}{width}", expression, guard)

    def address(self, one: Instruction, operand: Operand) -> str:
        """Name of the address: 64 bits with the offset added for global, 32 without it for shared memory."""
        assert isinstance(operand, Memory)
        is_shared = ".shared." in one.opcode and not one.opcode.startswith("cp.async")
        if is_shared:
            return self.get(operand.base, "u32") if is_register(operand.base) else self.constant("0", "u32")
        base = self.get(operand.base, "u64")
        return self.new(f"{base} + {self.constant(str(operand.offset), 'u64')}") if operand.offset else base

    def store(self, one: Instruction, guard: str | None) -> None:
        address, sources = one.operands[0], self._several(one.operands[1])
        bits = int(one.opcode.rsplit(".", 1)[1][1:])
        values = []
        for source in sources:
            width = width_of(source) if is_register(source) else bits
            name = self.get(source, f"u{width}") if width != 8 else self.constant(source, "u16")
            values.append(name if width == bits else f"{name}.astype({self.dtype(f'u{bits}')})")
        memory = "m.memory.store(m, " if ".global." in one.opcode else "m.shared.store("
        target = self.address(one, address)
        self.lines.append(f"{memory}{self.site(one)}, {target}, {self.mask(guard)}, [{', '.join(values)}])")

    def async_copy(self, one: Instruction, guard: str | None) -> None:
        target, source = one.operands[:2]
        assert isinstance(target, Memory)
        given = self.get(one.operands[3], "u32") if len(one.operands) > 3 else "None"
        destination, origin = self.get(target.base, "u32"), self.address(one, source)
        self.lines.append(f"m.async_copy({self.site(one)}, {destination}, {origin}, {given}, {self.mask(guard)})")

    def commit(self, one: Instruction, guard: str | None) -> None:
        self.lines.append(f"m.shared.commit({self.mask(guard)})")

    def wait(self, one: Instruction, guard: str | None) -> None:
        self.lines.append(f"m.shared.wait({immediate(str(one.operands[0]))}, {self.mask(guard)})")

    # ---------------------------------------------------------------- warps

    def barrier(self, one: Instruction, guard: str | None) -> None:
        if one.operands != ["0"]:
            raise UnsupportedPtx("a barrier other than 0")
        self.lines.append(f"m.barrier({self.keep(one)}, {self.mask(guard)})")

    def warp_barrier(self, one: Instruction, guard: str | None) -> None:
        self._whole_warp(one.operands[0])
        self.lines.append(f"m.warp_barrier({self.keep(one)}, {self.mask(guard)})")

    def _whole_warp(self, operand: Operand) -> None:
        if is_register(operand):
            return  # Triton's redux takes the mask of all lanes in a register
        if immediate(str(operand)) & 0xFFFFFFFF != 0xFFFFFFFF:
            raise UnsupportedPtx("a member mask other than the whole warp")

    def shuffle(self, one: Instruction, guard: str | None) -> None:
        result, value, by, clamp, members = one.operands
        how = one.opcode.split(".")[2]
        if immediate(str(clamp)) != (0 if how == "up" else 31):
            raise UnsupportedPtx("a segment other than the whole warp")
        self._whole_warp(members)
        call = (
            f"m.shuffle({self.keep(one)}, {how!r}, {self.get(value, 'u32')}, {self.get(by, 'u32')}, {self.mask(guard)})"
        )
        self.put(result, "u32", call, guard)

    def reduce(self, one: Instruction, guard: str | None) -> None:
        result, value, members = one.operands
        self._whole_warp(members)
        how, form = one.opcode.split(".")[2:4]
        call = f"m.reduce({self.keep(one)}, {how!r}, {self.get(value, form)}, {self.mask(guard)})"
        self.put(result, form, call, guard)

    def load_matrix(self, one: Instruction, guard: str | None) -> None:
        address = self.address(one, one.operands[1])
        if self.masked:
            self.lines.append(f"m.converged({self.keep(one)}, {self.mask(guard)})")
        transposed = ".trans." in one.opcode
        got = self.new(f"m.shared.load_matrix({self.site(one)}, {address}, {self.mask(guard)}, {transposed})")
        for i, register in enumerate(self._several(one.operands[0])):
            self.put(register, "u32", f"{got}[{i}]", guard)

    def mma(self, one: Instruction, guard: str | None) -> None:
        results, a, b, c = (self._several(operand) for operand in one.operands)
        kind = one.opcode.split(".")[-2]
        if self.masked:
            self.lines.append(f"m.converged({self.keep(one)}, {self.mask(guard)})")
        matrices = []
        for registers in (a, b):
            values = [self.get(register, "u32") for register in registers]
            key = (kind, *values)
            if key not in self.fragments:
                self.fragments[key] = self.new(f"m.fragment({kind!r}, {', '.join(values)})")
            matrices.append(self.fragments[key])
        sums = [self.get(register, "f32") for register in c]
        got = self.new(f"m.mma({', '.join(matrices + sums)})")
        for i, register in enumerate(results):
            self.put(register, "f32", f"{got}[{i}]", guard)

    def branch(self, one: Instruction, guard: str | None) -> None:
        if guard is not None:
            self.result = guard


_SPECIALS = [f"{name}.{axis}" for name in ("tid", "ctaid", "nctaid") for axis in "xyz"] + ["ntid.x", "laneid"]


def _with_deletions(lines: list[str], result: str) -> list[str]:
    """`del` of every name after the line that uses it last."""
    last: dict[str, int] = {}
    for i, line in enumerate(lines):
        for name in re.findall(r"\bv\d+\b", line):
            last[name] = i
    last.pop(result, None)
    dead: dict[int, list[str]] = {}
    for name, i in last.items():
        dead.setdefault(i, []).append(name)
    out = []
    for i, line in enumerate(lines):
        out.append(line)
        if i in dead:
            out.append(f"del {', '.join(dead[i])}")
    return out or ["pass"]
