"""Reads a compiled program: its disassembly, the loops in it, and what the cubin says of its resources.

Loops are found in the control-flow graph (natural loops of back edges whose target dominates their source), since
ptxas moves cold blocks behind the code that jumps back from them. All instructions of a loop's blocks count as issued,
those under a predicate or in a block that is seldom entered too.
"""

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import networkx as nx


@dataclass(frozen=True)
class Instruction:
    opcode: str
    predicated: bool
    target: str | None
    text: str

    @property
    def name(self) -> str:
        return self.opcode.split(".", 1)[0]

    @property
    def bits(self) -> int:
        """Width of a memory access per thread."""
        for width in ("128", "64", "U16", "S16", "U8", "S8"):
            if f".{width}" in self.opcode:
                return int(width.lstrip("US"))
        return 32


# sub-core cycles of an access of a whole warp on the SM's shared-memory pipe, 128 bytes a cycle for four sub-cores
_SHARED_CYCLES = {128: 16, 64: 8, 32: 4, 16: 4, 8: 4}
# sub-core cycles on the tensor pipe of consumer Ampere, from 111 TFLOP/s dense at 64 SMs
_TENSOR_CYCLES = {"16816": 16, "1688": 8}


@dataclass(frozen=True)
class Loop:
    """An innermost loop: what one pass over all its blocks issues."""

    instructions: tuple[Instruction, ...] = field(repr=False)
    # HMMA of it that the products need, had each tile been computed once
    useful_hmma: float = 0.0

    def count(self, *names: str) -> int:
        return sum(instruction.name in names for instruction in self.instructions)

    @property
    def issue_slots(self) -> int:
        return len(self.instructions)

    @property
    def hmma(self) -> int:
        return self.count("HMMA")

    @property
    def issue_per_hmma(self) -> float:
        return self.issue_slots / self.useful_hmma if self.useful_hmma else float("nan")

    @property
    def tensor_cycles(self) -> float:
        """Sub-core cycles of the useful products on the tensor pipe."""
        cycles = 0
        for instruction in self.instructions:
            if instruction.name == "HMMA":
                shape = re.search(r"\.(\d{4,5})\.", instruction.opcode + ".")
                cycles += _TENSOR_CYCLES.get(shape.group(1) if shape else "", 16)
        return cycles * (self.useful_hmma / self.hmma if self.hmma else 0.0)

    @property
    def shared_cycles(self) -> int:
        """Sub-core cycles on the shared-memory pipe of reads and stores; LDSM.x4 takes 16."""
        cycles = 0
        for instruction in self.instructions:
            if instruction.name == "LDSM":
                cycles += {"4": 16, "2": 8}.get(instruction.opcode.rsplit(".", 1)[-1], 4)
            elif instruction.name in ("LDS", "STS"):
                cycles += _SHARED_CYCLES[instruction.bits]
        return cycles

    @property
    def fill_cycles(self) -> int:
        """The same for cp.async writing into shared memory."""
        return sum(_SHARED_CYCLES[i.bits] for i in self.instructions if i.name == "LDGSTS")

    @property
    def shared_per_tensor(self) -> float:
        return self.shared_cycles / self.tensor_cycles if self.tensor_cycles else float("nan")


_LINE = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:\{\s*)?(@!?U?P[T0-9]\s+)?([A-Z][A-Z0-9_.]*)\s*([^;]*);")
_LABEL = re.compile(r"^(\.L_x?_?\w+):")
_TARGET = re.compile(r"`\((\.L\w+)\)")
_TERMINATORS = ("EXIT", "RET", "BRX", "JMX", "KILL")


class Program:
    """A disassembly as `nvdisasm -c` prints it."""

    def __init__(self, listing: str):
        self.instructions: list[Instruction] = []
        self._labels: dict[str, int] = {}
        for line in listing.splitlines():
            label = _LABEL.match(line)
            if label:
                self._labels[label.group(1)] = len(self.instructions)
                continue
            match = _LINE.search(line)
            if match:
                predicate, opcode, operands = match.groups()
                target = _TARGET.search(operands)
                always = predicate is None or predicate.strip() in ("@PT", "@UPT")
                jump = target.group(1) if target and opcode.split(".")[0] in ("BRA", "JMP") else None
                # `BRA P0, label` and `BRA.DIV` are conditional by their operand
                conditional = not always or (jump is not None and not operands.strip().startswith("`"))
                self.instructions.append(Instruction(opcode, conditional, jump, operands.strip()))

    def count(self, *names: str) -> int:
        return sum(instruction.name in names for instruction in self.instructions)

    def widths(self, name: str) -> dict[int, int]:
        """Accesses called `name` by bits a thread moves."""
        return dict(sorted(Counter(i.bits for i in self.instructions if i.name == name).items(), reverse=True))

    @cached_property
    def _blocks(self) -> list[range]:
        starts = {0, *self._labels.values()}
        starts |= {
            index + 1
            for index, instruction in enumerate(self.instructions)
            if instruction.target is not None or instruction.name in _TERMINATORS
        }
        ordered = sorted(start for start in starts if start < len(self.instructions))
        return [range(a, b) for a, b in zip(ordered, [*ordered[1:], len(self.instructions)], strict=True)]

    @cached_property
    def _successors(self) -> list[set[int]]:
        block_at = {block.start: number for number, block in enumerate(self._blocks)}
        successors: list[set[int]] = []
        for number, block in enumerate(self._blocks):
            last = self.instructions[block[-1]]
            after: set[int] = set()
            if last.target is not None and self._labels.get(last.target) in block_at:
                after.add(block_at[self._labels[last.target]])
            falls = last.predicated or (last.target is None and last.name not in _TERMINATORS)
            if falls and number + 1 < len(self._blocks):
                after.add(number + 1)
            successors.append(after)
        return successors

    def innermost_loops(self) -> list[tuple[Instruction, ...]]:
        """Instructions of every innermost loop, in the order of the program."""
        loops = []
        for body in innermost(self._successors):
            instructions = tuple(self.instructions[i] for number in sorted(body) for i in self._blocks[number])
            if len(instructions) > 1:  # the padding behind EXIT is one jump to itself
                loops.append(instructions)
        return loops


def innermost(successors: Sequence[Collection[int]]) -> list[set[int]]:
    """Blocks of every innermost loop of a flow graph whose entry is block 0, in the order of their headers."""
    graph = nx.DiGraph((source, target) for source, targets in enumerate(successors) for target in targets)
    graph.add_node(0)
    dominator = nx.immediate_dominators(graph, 0)
    bodies: dict[int, set[int]] = {}
    for source, header in graph.edges:
        above, known = source, source in dominator or source == 0
        while above != header and above in dominator:
            above = dominator[above]
        # a back edge: the loop is what reaches its source without passing its header
        if above == header and known:
            inside = nx.ancestors(graph.subgraph(set(graph) - {header}), source) if source != header else set()
            bodies.setdefault(header, {header}).update(inside | {source})
    return [body for header, body in sorted(bodies.items()) if not any(h in body for h in bodies if h != header)]


def tool(name: str) -> str:
    """Path of a binary utility that Triton bundles."""
    import triton

    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


@dataclass(frozen=True)
class Resources:
    """What the cubin itself declares."""

    registers: int
    stack: int
    local: int
    static_shared: int


def disassemble(cubin: bytes) -> tuple[str, Resources]:
    """The listing of a cubin, and its declared resources."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        listing = _output(tool("nvdisasm"), "-c", file.name)
        usage = _output(tool("cuobjdump"), "-res-usage", file.name)
    found = dict(re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", usage))
    if "REG" not in found:
        raise RuntimeError(f"cuobjdump: expected resource usage, got {usage!r}; check the tools that Triton bundles")
    return listing, Resources(*(int(found[key]) for key in ("REG", "STACK", "LOCAL", "SHARED")))


def _output(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
