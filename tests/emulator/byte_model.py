"""A plain model of synchronisation: every granule of shared memory, every thread, one program at a time.

It is given what a run did (`recorded`: accesses, barriers, commits, waits, in order) and may leave out or change one
instruction, then says whether two threads meet without a barrier or a copy is read that nobody waited for. It shares
nothing with the emulator's shadow, is some hundred times slower, and has no case in which it knows better.
"""

from collections.abc import Callable
from dataclasses import dataclass
from unittest import mock

import numpy as np

from kernels.emulator import codegen, machine, shared

NEVER, PENDING = -1, 1 << 60


@dataclass
class Event:
    """One instruction, of all programs. threads, addresses: [P, T] bytes, with `mask` [P, T]; left: of a wait."""

    what: str  # read, matrix, write, copy, barrier, warp barrier, commit, wait
    line: int
    mask: np.ndarray
    addresses: np.ndarray | None = None
    size: int = 0
    left: int = 0


@dataclass
class Recorded:
    events: list[Event]
    threads: int
    bytes: int
    granule: int

    def programs(self) -> list[tuple[int, list[tuple[Event, np.ndarray]]]]:
        """(number, its events with their lanes) of each program that does not do what an earlier one did."""
        found = {}
        for program in range(len(self.events[0].mask) if self.events else 0):
            mine = [(e, np.flatnonzero(e.mask[program])) for e in self.events if e.mask[program].any()]
            places = [b"" if e.addresses is None else e.addresses[program, lanes].tobytes() for e, lanes in mine]
            key = tuple((e.line, lanes.tobytes(), place) for (e, lanes), place in zip(mine, places, strict=True))
            found.setdefault(hash(key), (program, mine))
        return list(found.values())


def recorded(execute: Callable[[], object]) -> Recorded:
    """What `execute()` does; it runs one group of programs."""
    out = Recorded([], 0, 0, 16)
    patches = []

    def full(m, mask):
        return np.broadcast_to(np.True_ if mask is None else mask, m.shape).copy()

    def access(method, what):
        original = getattr(shared.SharedMemory, method)

        def noted(self, site, address, mask, *rest, **options):
            kind = "copy" if options.get("group") else what
            lanes = full(self.m, mask)
            if what == "matrix":
                lanes &= np.arange(self.m.threads) % 32 < 8 * site.count
            places = np.broadcast_to(address, self.m.shape).astype(np.int64) + site.offset
            out.events.append(Event(kind, site.instruction.line, lanes, places, site.size))
            out.threads, out.bytes, out.granule = self.m.threads, self.size, self.granule
            return original(self, site, address, mask, *rest, **options)

        patches.append(mock.patch.object(shared.SharedMemory, method, noted))

    for method, what in (("load", "read"), ("load_matrix", "matrix"), ("store", "write")):
        access(method, what)
    barrier, warp_barrier = machine.Machine.barrier, machine.Machine.warp_barrier

    def on_barrier(self, instruction, mask):
        out.events.append(Event("barrier", instruction.line, full(self, mask)))
        return barrier(self, instruction, mask)

    def on_warp_barrier(self, instruction, mask):
        out.events.append(Event("warp barrier", instruction.line, full(self, mask)))
        return warp_barrier(self, instruction, mask)

    def on_commit(self, one, guard):
        self.space["noted"] = lambda m, mask, line: out.events.append(Event("commit", line, full(m, mask)))
        self.lines.append(f"noted(m, {self.mask(guard)}, {one.line})")
        self.lines.append(f"m.shared.commit({self.mask(guard)})")

    def on_wait(self, one, guard):
        left = int(str(one.operands[0]))
        self.space["waited"] = lambda m, mask, line, left: out.events.append(
            Event("wait", line, full(m, mask), left=left)
        )
        self.lines.append(f"waited(m, {self.mask(guard)}, {one.line}, {left})")
        self.lines.append(f"m.shared.wait({left}, {self.mask(guard)})")

    patches += [
        mock.patch.object(machine.Machine, "barrier", on_barrier),
        mock.patch.object(machine.Machine, "warp_barrier", on_warp_barrier),
        mock.patch.object(codegen._Emitter, "commit", on_commit),
        mock.patch.object(codegen._Emitter, "wait", on_wait),
    ]
    for patch in patches:
        patch.start()
    try:
        execute()
    finally:
        for patch in patches:
            patch.stop()
    return out


def hazard(run: Recorded, without: int | None = None, raised: int | None = None) -> str | None:
    """The first hazard of any program, with the PTX line where it shows. without: a PTX line that is left out; raised:
    one whose wait leaves one group more."""
    for program, mine in run.programs():
        found = _Program(run).follow(program, mine, without, raised)
        if found is not None:
            return found
    return None


def harmless(run: Recorded, kind: str, line: int) -> str:
    """Why leaving out (raising) the barrier, wait or commit of a PTX line makes no hazard."""
    accesses = ("read", "matrix", "write", "copy")
    reached, alone, idle = False, True, True
    for _, mine in run.programs():
        whats = [event.what for event, _ in mine]
        outstanding, copies = 0, 0
        for i, (event, _) in enumerate(mine):
            copies += event.what == "copy"
            if event.line == line:
                reached = True
                before = next((i - j for j in range(1, i + 1) if whats[i - j] == "barrier"), -1)
                after = next((j for j in range(i + 1, len(mine)) if whats[j] == "barrier"), len(mine))
                alone &= not (set(accesses) & set(whats[before + 1 : i]) and set(accesses) & set(whats[i + 1 : after]))
                idle &= outstanding <= event.left if event.what == "wait" else copies == 0
            if event.what == "commit":
                outstanding, copies = outstanding + (copies > 0), 0
            elif event.what == "wait":
                outstanding = min(outstanding, event.left)
    if not reached:
        return "not reached by this case"
    if kind == "barrier dropped":
        return (
            "no access to shared memory between it and a neighbouring barrier" if alone
            else "what threads touch on its two sides is not the same bytes, or only read"
        )  # fmt: skip
    if kind == "commit_group dropped":
        return (
            "its group is empty, and no wait counts on it" if idle
            else "its copies join the next group, which is waited for before they are read"
        )  # fmt: skip
    if kind.startswith("wait_group"):
        return (
            "no copies are outstanding" if idle else "its copies are waited for again before they are read, or not read"
        )
    return "lanes of a warp touch different bytes on its two sides, or only read"


class _Program:
    def __init__(self, run: Recorded):
        self.run = run
        granules = -(-run.bytes // run.granule) + 1
        self.reads = np.full((run.threads, granules), NEVER, np.int64)  # when each thread read each granule by itself
        self.matrix_reads = np.full((run.threads // 32, granules), NEVER, np.int64)  # when each warp did by ldmatrix
        self.writer = np.full(granules, NEVER, np.int64)
        self.written = np.full(granules, NEVER, np.int64)  # when
        self.group = np.zeros(granules, np.int64)  # of a copy, 0 of a plain write
        self.done = {0: 0}
        self.groups = 0
        self.barrier, self.warp = 0, np.zeros(run.threads // 32, np.int64)

    def follow(self, program: int, events: list, without: int | None, raised: int | None) -> str | None:
        for now, (event, lanes) in enumerate(events, 1):
            if event.line == without:
                continue
            if event.what == "barrier":
                self.barrier = now
                self.warp[:] = now
            elif event.what == "warp barrier":
                self.warp[np.unique(lanes // 32)] = now
            elif event.what == "commit":
                self.groups += 1
            elif event.what == "wait":
                for group in range(1, self.groups - event.left - (event.line == raised) + 1):
                    self.done.setdefault(group, now)
            else:
                found = self.access(event, lanes, event.addresses[program, lanes], now)
                if found:
                    return f"{found} at line {event.line}"
        return None

    def since(self, one: np.ndarray, other: np.ndarray) -> np.ndarray:
        """When threads `one` and `other` met last."""
        return np.where(one // 32 == other // 32, self.warp[one // 32], self.barrier)

    def access(self, event: Event, lanes: np.ndarray, addresses: np.ndarray, now: int) -> str | None:
        k = max(1, event.size // self.run.granule)
        places = (addresses[:, None] // self.run.granule + np.arange(k)).reshape(-1)
        threads = np.repeat(lanes, k)
        groups, inverse = np.unique(self.group[places], return_inverse=True)
        done = np.array([self.done.get(int(g), PENDING) for g in groups])[inverse]
        if (done == PENDING).any():
            return "a copy that was not waited for"
        time = np.where(self.group[places] > 0, done, self.written[places])
        writer = self.writer[places]
        if ((writer != threads) & (time >= self.since(threads, writer)) & (time > 0)).any():
            return "another thread wrote it"
        if event.what == "read":
            self.reads[threads, places] = now
        elif event.what == "matrix":
            self.matrix_reads[threads // 32, places] = now
        else:
            everybody = np.arange(self.run.threads)[:, None]
            times = self.reads[:, places]
            if ((times != NEVER) & (everybody != threads) & (times >= self.since(everybody, threads[None]))).any():
                return "another thread read it"
            warps = np.arange(len(self.warp))[:, None]
            times = self.matrix_reads[:, places]
            if ((times != NEVER) & (warps != threads // 32) & (times >= self.barrier)).any():
                return "another warp read it"
            self.writer[places], self.written[places] = threads, now
            self.group[places] = self.groups + 1 if event.what == "copy" else 0
        return None
