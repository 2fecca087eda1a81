"""Triton's PTX as data: parameters, basic blocks, instructions with their source lines, and which registers live where.

Only the PTX that Triton 3.9 writes is understood; anything else raises `UnsupportedPtx` with its line.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path


class UnsupportedPtx(NotImplementedError):
    """PTX that the emulator has no rule for."""


@dataclass(frozen=True)
class Memory:
    """An address operand [base + offset]; base: a register, a parameter's name, or "" (offset alone)."""

    base: str
    offset: int


Operand = str | Memory | tuple[str, ...]


@dataclass(frozen=True)
class Location:
    """A line of Python: what Triton's .loc says."""

    file: str
    line: int

    def __str__(self) -> str:
        return f"{Path(self.file).name}:{self.line}"


UNKNOWN = Location("?", 0)


@dataclass
class Instruction:
    """`@guard opcode operands`; line: its line in the PTX, from 1; source: the innermost line that is not Triton's."""

    opcode: str
    operands: list[Operand]
    line: int
    source: Location
    guard: str | None = None
    guard_negated: bool = False
    writes: tuple[str, ...] = ()
    reads: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"line {self.line}: {self.opcode}"


@dataclass
class Block:
    """Instructions without a jump into or out of their middle. targets: (taken, not taken) of a conditional branch,
    (next,) of any other end, () of ret."""

    index: int
    instructions: list[Instruction] = field(default_factory=list)
    label: str | None = None
    targets: tuple[int, ...] = ()
    live_in: frozenset[str] = frozenset()
    live_out: frozenset[str] = frozenset()


@dataclass
class Kernel:
    """One entry of a PTX module. parameters: type by name, in order."""

    name: str
    parameters: dict[str, str]
    threads: int
    blocks: list[Block]
    target: str
    # by block: who runs first of lanes that wait at several
    priority: list[int]

    def instructions(self) -> Iterator[Instruction]:
        for block in self.blocks:
            yield from block.instructions


_REGISTER = re.compile(r"%(?:p|rs|r|rd)\d+$")
_ENTRY = re.compile(r"\.visible \.entry (\w+)\((.*?)\)(.*?)\n\{(.*?)\n\}", re.S)
_LOC = re.compile(r"\.loc\s+(\d+) (\d+) (\d+)(?:, function_name \S+, inlined_at (\d+) (\d+) (\d+))?")
_GUARD = re.compile(r"@(!?)(%p\d+)\s+(.*)", re.S)
# instructions whose first operand is read, not written
_NO_RESULT = ("st.", "bar.", "bra", "ret", "cp.async")


def is_register(operand: object) -> bool:
    return isinstance(operand, str) and _REGISTER.match(operand) is not None


def width_of(register: str) -> int:
    """Its bits, by its name."""
    return {"p": 1, "rs": 16, "r": 32, "rd": 64}[register[1:].rstrip("0123456789")]


def immediate(text: str) -> int:
    """The bits of an immediate operand."""
    if text.startswith(("0f", "0F")) and len(text) == 10:
        return int(text[2:], 16)
    if text.startswith(("0d", "0D")) and len(text) == 18:
        return int(text[2:], 16)
    return int(text.rstrip("U"), 0)


def _operand(text: str, where: str) -> Operand:
    text = text.strip()
    if text.startswith("{"):
        return tuple(part.strip() for part in text[1:-1].split(","))
    if text.startswith("["):
        match = re.fullmatch(r"\[\s*([%\w$]*)\s*(?:\+?\s*(-?\d+))?\s*\]", text)
        if match is None:
            raise UnsupportedPtx(f"{where}: address {text!r}")
        return Memory(match[1], int(match[2] or 0))
    if "|" in text:
        return tuple(part.strip() for part in text.split("|"))
    return text


def _names(operand: Operand) -> tuple[str, ...]:
    names = operand if isinstance(operand, tuple) else (operand.base if isinstance(operand, Memory) else operand,)
    return tuple(name for name in names if is_register(name))


def _instruction(text: str, line: int, source: Location) -> Instruction:
    where = f"PTX line {line}"
    guard, negated = None, False
    if match := _GUARD.match(text):
        negated, guard, text = match[1] == "!", match[2], match[3].strip()
    opcode, _, rest = text.partition(" ")
    if "\t" in opcode:
        opcode, _, rest = text.partition("\t")
    operands = [_operand(part, where) for part in re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s][^,]*", rest)]
    made = Instruction(opcode, operands, line, source, guard, negated)
    first_read = 0 if opcode.startswith(_NO_RESULT) or not operands else 1
    made.writes = _names(operands[0]) if first_read else ()
    made.reads = tuple(name for operand in operands[first_read:] for name in _names(operand))
    made.reads += (guard,) if guard else ()
    return made


class _Sources:
    """Follows .loc directives: the innermost location that is not in Triton's own files."""

    def __init__(self, text: str):
        self.files = {int(n): name for n, name in re.findall(r'\.file\s+(\d+) "([^"]*)"', text)}
        self.parents: dict[tuple[int, int, int], tuple[int, int, int]] = {}
        self.current = UNKNOWN
        self._inline = 0

    def inline(self, raw: str) -> None:
        """LLVM counts the lines of inline assembly on from its first: only the first is a line of ours."""
        if "// begin inline asm" in raw:
            self._inline = 1
        elif "// end inline asm" in raw:
            self._inline = 0

    def follow(self, match: re.Match) -> None:
        if self._inline > 1:
            return
        self._inline += self._inline
        at = (int(match[1]), int(match[2]), int(match[3]))
        if match[4]:
            self.parents[at] = (int(match[4]), int(match[5]), int(match[6]))
        else:
            self.parents.pop(at, None)
        seen = set()
        while "/triton/language/" in self.files.get(at[0], "?") and at in self.parents and at not in seen:
            seen.add(at)
            at = self.parents[at]
        self.current = Location(self.files.get(at[0], "?"), at[1])


def parse(text: str) -> Kernel:
    """The one entry of a module that Triton compiled."""
    entry = _ENTRY.search(text)
    target = re.search(r"\.target (sm_\d+)", text)
    if entry is None or target is None:
        raise UnsupportedPtx("PTX: expected one .visible .entry and a .target")
    name, parameters, directives, body = entry.groups()
    threads = re.search(r"\.(?:reqntid|maxntid) (\d+)", directives)
    if threads is None:
        raise UnsupportedPtx(f"{name}: expected .reqntid")
    declared = re.findall(r"\.param \.(\w+)(?: \.ptr \.global)?(?: \.align \d+)? (\w+)", parameters)
    sources = _Sources(text)
    blocks = [Block(0)]
    labels: dict[str, int] = {}
    first = text[: entry.start(4)].count("\n") + 1

    def new_block() -> Block:
        if blocks[-1].instructions or blocks[-1].label:
            blocks.append(Block(len(blocks)))
        return blocks[-1]

    for number, raw in enumerate(body.split("\n"), first):
        sources.inline(raw)
        line = raw.split("//")[0].strip()
        if match := _LOC.match(line):
            sources.follow(match)
        elif match := re.match(r"(\$L__BB\w+):$", line):
            block = new_block()
            block.label = match[1]
            labels[match[1]] = block.index
        elif line.startswith("$") or line.startswith("."):
            if not line.endswith(":") and not line.startswith((".reg", ".pragma")):
                raise UnsupportedPtx(f"{name}: PTX line {number}: {line!r}")
        else:
            for statement in filter(None, (part.strip() for part in line.split(";"))):
                made = _instruction(statement, number, sources.current)
                blocks[-1].instructions.append(made)
                if made.opcode.startswith(("bra", "ret")):
                    new_block()
    if not blocks[-1].instructions:
        blocks.pop()
    _connect(name, blocks, labels)
    _liveness(blocks)
    return Kernel(name, {n: t for t, n in declared}, int(threads[1]), blocks, target[1], _priority(blocks))


def _connect(name: str, blocks: list[Block], labels: dict[str, int]) -> None:
    for block in blocks:
        last = block.instructions[-1] if block.instructions else None
        following = (block.index + 1,)
        if last is not None and last.opcode.startswith("bra"):
            taken = labels[str(last.operands[0])]
            block.targets = (taken, *following) if last.guard else (taken,)
        elif last is not None and last.opcode == "ret":
            if last.guard:
                raise UnsupportedPtx(f"{name}: {last} under a predicate")
        else:
            block.targets = following
        if any(target >= len(blocks) for target in block.targets):
            raise UnsupportedPtx(f"{name}: block {block.index} runs off the end")


def _distance(blocks: list[Block], start: int, end: int) -> float:
    """Jumps from block `start` to block `end`; infinite where no path leads."""
    seen, front, steps = {start}, [start], 0
    while front:
        if end in front:
            return steps
        front = [n for n in {t for block in front for t in blocks[block].targets} if n not in seen]
        seen.update(front)
        steps += 1
    return float("inf")


def _priority(blocks: list[Block]) -> list[int]:
    """Reverse post-order in which what leads back soonest comes first: a loop's blocks before what follows it, so that
    lanes which left an inner loop, or passed it by, wait for those in it."""
    order: list[int] = []
    seen = {0}

    def following(number: int) -> list[int]:
        return sorted(blocks[number].targets, key=lambda target: _distance(blocks, target, number))

    stack = [(0, following(0))]
    while stack:
        number, left = stack[-1]
        if left:
            target = left.pop()  # the farthest first: it is then last
            if target not in seen:
                seen.add(target)
                stack.append((target, following(target)))
        else:
            order.append(number)
            stack.pop()
    rank = {number: i for i, number in enumerate(reversed(order))}
    return [rank.get(block.index, len(rank)) for block in blocks]


def _liveness(blocks: list[Block]) -> None:
    uses: list[set[str]] = []
    kills: list[set[str]] = []
    for block in blocks:
        used: set[str] = set()
        killed: set[str] = set()
        for one in block.instructions:
            used.update(name for name in one.reads if name not in killed)
            if one.guard is None:
                killed.update(one.writes)
            else:  # lanes outside the guard keep what the register held
                used.update(name for name in one.writes if name not in killed)
        uses.append(used)
        kills.append(killed)
    changed = True
    while changed:
        changed = False
        for block in reversed(blocks):
            out = frozenset().union(*(blocks[target].live_in for target in block.targets))
            live = frozenset(uses[block.index] | (out - kills[block.index]))
            if out != block.live_out or live != block.live_in:
                block.live_out, block.live_in, changed = out, live, True
