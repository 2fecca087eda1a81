"""A group of a launch's programs in lockstep: control flow, what a block's generated function calls, findings, counts.

Lanes that part at a branch wait at their blocks; those in the innermost loop run first (`Kernel.priority`), which
brings Triton's control flow together again. A block runs for all lanes, or under a mask of those that are there.
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from kernels.emulator.memory import GlobalMemory
from kernels.emulator.parse import Instruction, Location, UnsupportedPtx
from kernels.emulator.shared import SharedMemory, Sync

if TYPE_CHECKING:
    from kernels.emulator.codegen import Code

Array = np.ndarray


@dataclass(frozen=True)
class Finding:
    """What a check found at one instruction; program, thread: the first; lanes: how many."""

    kind: str
    kernel: str
    program: tuple[int, int, int]
    thread: int
    line: int
    opcode: str
    source: Location
    message: str
    lanes: int = 1

    def __str__(self) -> str:
        where = f"{self.kernel} at {self.source} (PTX line {self.line}, {self.opcode})"
        return f"{self.kind}: {where}: {self.message}; program {self.program}, thread {self.thread}, {self.lanes} lanes"


@dataclass
class Counts:
    """What one launch executed.

    warps: executions by a warp, by PTX line; of a predicated instruction those too whose lanes are all off. shared:
    wavefronts and the fewest that their bytes need, by PTX line. sectors: 32-byte sectors fetched or written, bytes
    asked for and requests of a warp, by PTX line. opcodes, sources: what each line is and where it comes from.
    """

    warps: dict[int, int] = field(default_factory=dict)
    shared: dict[int, list[int]] = field(default_factory=dict)
    sectors: dict[int, list[int]] = field(default_factory=dict)
    opcodes: dict[int, str] = field(default_factory=dict)
    sources: dict[int, Location] = field(default_factory=dict)

    def by_source(self) -> dict[Location, int]:
        """Warp instructions by line of Python."""
        out: dict[Location, int] = {}
        for line, n in self.warps.items():
            out[self.sources[line]] = out.get(self.sources[line], 0) + n
        return out

    def by_opcode(self) -> dict[str, int]:
        out: dict[str, int] = {}
        for line, n in self.warps.items():
            out[self.opcodes[line]] = out.get(self.opcodes[line], 0) + n
        return out


@dataclass
class Site:
    """A memory instruction: `count` elements of `width` bytes a lane, `size` in all, at `offset` from its register."""

    index: int
    instruction: Instruction
    size: int
    width: int
    count: int
    offset: int


class Lanes:
    """Which (program, thread) each position of a flat access is."""

    def __init__(self, shape: tuple[int, int], positions: Array | None):
        self.shape, self.positions = shape, positions
        self._pairs: tuple[Array, Array] | None = None

    def programs_and_threads(self) -> tuple[Array, Array]:
        if self._pairs is None:
            flat = np.arange(self.shape[0] * self.shape[1]) if self.positions is None else self.positions
            program, thread = np.divmod(flat, self.shape[1])
            self._pairs = program, thread
        return self._pairs


class Machine:
    """Programs `numbers` [P] of a launch. grid: its three sizes; parameters: [1, 1] arrays by name."""

    def __init__(self, code: "Code", numbers: Array, grid: tuple[int, int, int], parameters: dict[str, Array],
                 memory: GlobalMemory, shared_bytes: int, findings: dict, *, checks: bool, profile: bool):  # fmt: skip
        self.code, self.kernel, self.grid = code, code.kernel, grid
        self.program_numbers, self.parameters, self.memory = numbers, parameters, memory
        self.programs, self.threads = len(numbers), code.kernel.threads
        self.shape = (self.programs, self.threads)
        self.checks, self.profile, self.findings = checks, profile, findings
        self.sync = Sync(*self.shape)
        self.shared = SharedMemory(self, shared_bytes, code.shared_granule)
        thread, x = np.arange(self.threads, dtype=np.uint32)[None], numbers.astype(np.uint32)[:, None]
        one = np.ones((1, 1), np.uint32)
        self.specials = {
            "%tid.x": thread, "%tid.y": one - 1, "%tid.z": one - 1, "%ntid.x": one * self.threads,
            "%laneid": thread % 32,
            "%ctaid.x": x % grid[0], "%ctaid.y": x // grid[0] % grid[1], "%ctaid.z": x // (grid[0] * grid[1]),
            "%nctaid.x": one * grid[0], "%nctaid.y": one * grid[1], "%nctaid.z": one * grid[2],
        }  # fmt: skip
        self.registers: list[Array | None] = [None] * len(code.numbers)
        for name in code.undefined:
            self.registers[code.numbers[name]] = np.full((1, 1), -1, np.int64).astype(code.canonical(name))
        self.warps_run = np.zeros(len(code.kernel.blocks), np.int64)
        self.shared_counts: dict[int, list[int]] = {}
        self.global_counts: dict[int, list[int]] = {}

    # ---------------------------------------------------------------- control flow

    def run(self) -> None:
        warps = self.programs * (self.threads // 32)
        waiting: dict[int, Array | None] = {0: None}
        while waiting:
            number = min(waiting, key=self.kernel.priority.__getitem__)
            mask = waiting.pop(number)
            block = self.kernel.blocks[number]
            function = self.code.block(number, mask is not None)
            if mask is None:
                self.warps_run[number] += warps
                taken = function(self, self.registers)
            else:
                active = mask if mask.shape[1] == 1 else mask.reshape(len(mask), -1, 32).any(axis=2)
                self.warps_run[number] += int(active.sum()) * (self.threads // 32 if mask.shape[1] == 1 else 1)
                keep = frozenset().union(*(self.kernel.blocks[n].live_in for n in waiting))
                taken = function(self, self.registers, mask, keep)
            if len(block.targets) == 2:
                self._part(waiting, block.targets, taken, mask)
            elif block.targets:
                self._join(waiting, block.targets[0], mask)

    def _part(self, waiting: dict, targets: tuple[int, ...], taken: Array, mask: Array | None) -> None:
        if targets[0] == targets[1] or (taken.all() if mask is None else (taken | ~mask).all()):
            self._join(waiting, targets[0], mask)
        elif not (taken.any() if mask is None else (taken & mask).any()):
            self._join(waiting, targets[1], mask)
        else:
            for target, chosen in zip(targets, (taken, ~taken), strict=True):
                part = chosen if mask is None else chosen & mask
                self._join(waiting, target, np.broadcast_to(part, (self.programs, part.shape[1])))

    def _join(self, waiting: dict, target: int, mask: Array | None) -> None:
        if mask is not None and target in waiting:
            other = waiting[target]
            assert other is not None
            mask = mask | other
        if mask is not None and mask.all():
            mask = None
        elif mask is not None and mask.shape[1] > 1 and (mask == mask[:, :1]).all():
            mask = mask[:, :1]
        waiting[target] = mask

    def converged(self, instruction: Instruction, mask: Array | None, whole_program: bool = False) -> None:
        """Reports warps (programs) of which only some lanes are at an instruction that all must execute."""
        if mask is None or mask.shape[1] == 1:
            return
        groups = mask.reshape(self.programs, 1 if whole_program else -1, self.threads if whole_program else 32)
        bad = groups.any(axis=2) & ~groups.all(axis=2)
        if bad.any():
            program, thread = np.nonzero(mask & np.repeat(bad, groups.shape[2], axis=1))
            what = "not all threads arrive" if whole_program else "not all lanes of the warp take part"
            self._report("divergent barrier" if whole_program else "divergent warp", instruction, program, thread, what)

    def barrier(self, instruction: Instruction, mask: Array | None) -> None:
        self.converged(instruction, mask, whole_program=True)
        self.sync.pass_barrier(mask)
        self.shared.settle()

    def warp_barrier(self, instruction: Instruction, mask: Array | None) -> None:
        self.converged(instruction, mask)
        self.sync.pass_warp(mask)

    # ---------------------------------------------------------------- lanes

    def flatten(self, address: Array, mask: Array | None, whole: bool = False) -> tuple[tuple[int, int], Array, Lanes]:
        """(shape of the result, addresses of the active lanes, lanes). whole: of all lanes even if uniform."""
        if mask is not None and mask.all():
            mask = None
        shape = address.shape if mask is None else np.broadcast_shapes(address.shape, mask.shape)
        if whole or self.profile:
            shape = self.shape
        full = np.broadcast_to(address, shape)
        if mask is None:
            return shape, full.reshape(-1), Lanes(shape, None)
        positions = np.flatnonzero(np.broadcast_to(mask, shape))
        return shape, full.reshape(-1)[positions], Lanes(shape, positions)

    def shuffle(self, instruction: Instruction, how: str, value: Array, by: Array, mask: Array | None) -> Array:
        self.converged(instruction, mask)
        lane = np.arange(self.threads) % 32
        first = np.arange(self.threads) - lane
        by = by.astype(np.int64)
        if how == "bfly":
            source = lane ^ (by & 31)
        elif how == "idx":
            source = by & 31
        else:
            source = lane - (by & 31) if how == "up" else lane + (by & 31)
            source = np.where((source < 0) | (source > 31), lane, source)
        if value.shape[1] == 1:
            return value
        source = source + first
        if source.shape[0] == 1:
            return value.take(source[0], axis=1)
        return np.take_along_axis(np.broadcast_to(value, (len(source), self.threads)), source, axis=1)

    def reduce(self, instruction: Instruction, how: str, value: Array, mask: Array | None) -> Array:
        self.converged(instruction, mask)
        full = np.broadcast_to(value, (value.shape[0], self.threads)).reshape(value.shape[0], -1, 32)
        function = {"add": np.add, "min": np.minimum, "max": np.maximum}[how]
        return np.repeat(function.reduce(full, axis=2, dtype=value.dtype), 32, axis=1)

    def async_copy(self, site: Site, target: Array, source: Array, given: Array | None, mask: Array | None) -> None:
        """cp.async: `given` bytes of each lane come from memory, the rest of its `size` are zeros."""
        asked = mask
        if given is not None:
            if not ((given == 0) | (given == site.size)).all():
                raise UnsupportedPtx(f"{self.kernel.name}: {site.instruction}: a source size other than none or all")
            some = given != 0
            asked = some if mask is None else mask & some
        values = self.memory.load(self, site, source, asked)
        self.shared.store(site, target, mask, values, group=True)

    # ---------------------------------------------------------------- products

    def _quads(self, x: Array) -> Array:
        """A register of a fragment as [programs, warps, 8, 4]: lane 4 g + t at [g, t]."""
        x = x if x.shape == self.shape else np.broadcast_to(x, self.shape)
        return x.reshape(self.programs, -1, 8, 4)

    def _halves(self, x: Array, kind: str) -> tuple[Array, Array]:
        if kind == "bf16":
            return (x << np.uint32(16)).view(np.float32), (x & np.uint32(0xFFFF0000)).view(np.float32)
        return (x & np.uint32(0xFFFF)).astype(np.uint16).view(np.float16), (x >> np.uint32(16)).astype(np.uint16).view(
            np.float16
        )

    def fragment(self, kind: str, *registers: Array) -> Array:
        """An operand of mma as matrices [programs, warps, 16 or 8, k]: A by rows (4 registers), B by columns (2).

        Register r holds row g + 8 (r % 2) of A, or column g of B, and of k: 2 t and 2 t + 1 (tf32: t), plus half of k
        in the upper half of the registers.
        """
        rows = len(registers) // 2
        pair = 1 if kind == "tf32" else 2
        out = np.empty((self.programs, self.threads // 32, rows, 8, 2, 4, pair), np.float32)
        for r, register in enumerate(registers):
            if kind == "tf32":  # the tensor core ignores the lowest 13 bits
                out[:, :, r % rows, :, r // rows, :, 0] = self._quads(register & np.uint32(0xFFFFE000)).view(np.float32)
            else:
                for half, values in enumerate(self._halves(register, kind)):
                    out[:, :, r % rows, :, r // rows, :, half] = self._quads(values)
        return out.reshape(self.programs, self.threads // 32, 8 * rows, 8 * pair)

    def mma(self, a: Array, b: Array, *sums: Array) -> list[Array]:
        """Registers of A B + C: register r holds row g + 8 (r // 2), column 2 t + r % 2."""
        product = np.matmul(a, b.swapaxes(-1, -2)).reshape(self.programs, -1, 2, 8, 4, 2)
        return [
            np.add(product[:, :, r // 2, :, :, r % 2], self._quads(c)).reshape(self.shape) for r, c in enumerate(sums)
        ]

    # ---------------------------------------------------------------- findings and counts

    def _report(self, kind: str, instruction: Instruction, programs: Array, threads: Array, message: str) -> None:
        key = (kind, instruction.line)
        if key in self.findings:
            before = self.findings[key]
            self.findings[key] = Finding(**{**before.__dict__, "lanes": before.lanes + len(programs)})
            return
        x, y, _ = self.grid
        number = int(self.program_numbers[programs[0]])
        at = (number % x, number // x % y, number // (x * y))
        self.findings[key] = Finding(
            kind, self.kernel.name, at, int(threads[0]), instruction.line, instruction.opcode, instruction.source,
            message, len(programs),
        )  # fmt: skip

    def report(self, kind: str, site: Site, lanes: Lanes, positions: Array, message: str) -> None:
        if self.checks:
            program, thread = lanes.programs_and_threads()
            self._report(kind, site.instruction, program[positions], thread[positions], message)

    def report_pairs(self, kind: str, site: Site, programs: Array, threads: Array, message: str) -> None:
        if self.checks:
            self._report(kind, site.instruction, programs, threads, message)

    def report_threads(self, kind: str, site: Site, threads: Array, programs: Array | None, message: str) -> None:
        """The same threads of all programs, or of `programs`."""
        who = np.arange(self.programs) if programs is None else programs
        self.report_pairs(kind, site, np.repeat(who, len(threads)), np.tile(threads, len(who)), message)

    def report_undefined(self) -> None:
        """Reads of registers that nothing wrote, in blocks that ran."""
        zero = np.zeros(1, np.int64)
        for block, one, name in self.code.undefined_reads if self.checks else ():
            if self.warps_run[block]:
                self._report("uninitialised register", one, zero, zero, f"{name} may never have been written")

    def count_shared(self, site: Site, access, programs: Array | None) -> None:
        entry = self.shared_counts.setdefault(site.instruction.line, [0, 0])
        passes, least = access.count(site.size)
        times = 1 if access.per_pair else (self.programs if programs is None else len(programs))
        entry[0] += passes * times
        entry[1] += least * times

    def count_global(self, site: Site, flat: Array, lanes: Lanes) -> None:
        """Sectors by warp: distinct 32-byte pieces among a warp's lanes."""
        program, thread = lanes.programs_and_threads()
        warp = (program * (self.threads // 32) + thread // 32).astype(np.int64)
        sectors = np.unique((warp << 48) ^ (flat >> np.uint64(5)).view(np.int64))
        entry = self.global_counts.setdefault(site.instruction.line, [0, 0, 0])
        entry[0] += len(sectors)
        entry[1] += len(flat) * site.size
        entry[2] += len(np.unique(warp))

    def add_counts(self, counts: Counts) -> None:
        for block, n in zip(self.kernel.blocks, self.warps_run.tolist(), strict=True):
            for one in block.instructions if n else ():
                counts.warps[one.line] = counts.warps.get(one.line, 0) + n
                counts.opcodes[one.line], counts.sources[one.line] = one.opcode, one.source
        for mine, theirs in ((self.shared_counts, counts.shared), (self.global_counts, counts.sectors)):
            for line, values in mine.items():
                before = theirs.get(line, [0] * len(values))
                theirs[line] = [a + b for a, b in zip(before, values, strict=True)]
