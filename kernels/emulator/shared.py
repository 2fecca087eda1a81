"""Shared memory of a group of programs, and the shadow that finds races, uninitialised reads and asynchronous copies
that nobody waited for.

Addresses seldom depend on the program: those of one instruction are then one row for all programs, what follows from
them is kept by their bytes, and the shadow is one row as well until programs part. Every granule (the kernel's smallest
access) has the last writer and the last reader, with the clock of `Sync` at that time: a hazard is an access by another
thread since the last barrier, or by another lane of the warp since the last bar.warp.sync. An asynchronous copy counts
as written when its thread has waited for its group.
"""

from typing import TYPE_CHECKING

import numpy as np

from kernels.emulator.memory import ACCESS, join, split

if TYPE_CHECKING:
    from kernels.emulator.machine import Machine, Site

Array = np.ndarray
_THREAD_BITS = 12
# who read a granule: one lane; several lanes of a warp; all lanes of a warp by one instruction; several warps
_SINGLE, _LANES, _WHOLE, _WARPS = (state << 10 for state in range(4))
_THREAD = (1 << 10) - 1
_PENDING = 1 << 40


class Access:
    """One instruction at one row of addresses [T'], of `threads`: where the data lies, which granules it touches."""

    per_pair = False

    def __init__(self, memory: "SharedMemory", site: "Site", address: Array, threads: Array, collective: bool):
        size, granule = site.size, memory.granule
        self.threads, self.problem = threads, None
        inside = (address >= 0) & (address <= memory.size - size) & (address % size == 0)
        self.good = None if inside.all() else np.flatnonzero(inside)
        if self.good is not None:
            first = int(address[~inside][0])
            kind = "misaligned" if 0 <= first <= memory.size - size else "out of bounds"
            self.problem = kind, np.flatnonzero(~inside), f"byte {first} of {memory.size} bytes of shared memory"
            address, self.threads = address[inside], threads[inside]
        self.index = address // size
        k = max(1, size // granule)
        self.granules = (address[:, None] // granule + np.arange(k)).reshape(-1)
        self.low, self.high = _range(self.granules)
        self.owners = np.repeat(self.threads, k).astype(np.int32)
        order = np.argsort(self.granules, kind="stable")
        sorted_granules, sorted_owners = self.granules[order], self.owners[order]
        same = sorted_granules[1:] == sorted_granules[:-1]
        self.duplicate = order[1:][same & (sorted_owners[1:] != sorted_owners[:-1])]
        self.readers = self.owners.copy()
        if len(self.duplicate):
            shared = np.isin(self.granules, self.granules[self.duplicate])
            several = np.isin(
                self.granules, sorted_granules[1:][same & (sorted_owners[1:] >> 5 != sorted_owners[:-1] >> 5)]
            )
            self.readers |= np.where(several, _WARPS, np.where(shared, _LANES, _SINGLE)).astype(np.int32)
        if collective:  # every lane of the warp has read by the end of the instruction
            self.readers = _as_whole(self.readers)
        self.initialised = False
        self.address = address
        self._count: tuple[int, int] | None = None

    def count(self, size: int) -> tuple[int, int]:
        if self._count is None:
            self._count = wavefronts(self.address, self.threads, size)
        return self._count


def wavefronts(address: Array, threads: Array, size: int) -> tuple[int, int]:
    """(passes that the banks need, fewest that the bytes need), over all warps: 32 banks of 4 bytes; requests of 8 and
    16 bytes a lane go by halves and quarters of a warp."""
    lanes = 32 // max(1, size // 4)
    words = (address[:, None] // 4 + np.arange(max(1, size // 4))).reshape(-1)
    parts = np.repeat(threads // lanes, max(1, size // 4))
    pairs = np.unique(np.stack([parts, words % 32, words]), axis=1)
    _, conflicts = np.unique(pairs[0] * 32 + pairs[1], return_counts=True)
    banks = np.unique(pairs[0] * 32 + pairs[1])
    groups = np.unique(pairs[0])
    total = sum(int(conflicts[banks // 32 == group].max()) for group in groups)
    least = sum(-(-int((pairs[0] == group).sum()) // 32) for group in groups)
    return total, least


class Sync:
    """Barriers so far. clock: counts those of every program; barrier, warp: the clock after a lane's last bar.sync and
    its last bar.warp.sync or bar.sync: an int, or arrays [P, 1] and [P, T] once programs or warps part."""

    def __init__(self, programs: int, threads: int):
        self.shape = (programs, threads)
        self.clock = 1
        self.barrier: Array = np.ones((1, 1), np.int64)
        self.warp: Array = np.ones((1, 1), np.int64)
        self.floor = 1  # the earliest of `barrier`

    def pass_barrier(self, mask: Array | None) -> None:
        self.clock += 1
        if mask is None:
            self.barrier = self.warp = np.full((1, 1), self.clock, np.int64)
        else:
            self.barrier = np.where(mask.any(axis=1, keepdims=True), self.clock, self.barrier)
            self.warp = np.where(mask, self.clock, self.warp)
        self.floor = int(self.barrier.min())

    def pass_warp(self, mask: Array | None) -> None:
        self.clock += 1
        self.warp = np.full((1, 1), self.clock, np.int64) if mask is None else np.where(mask, self.clock, self.warp)

    def since_barrier(self, program: Array) -> Array:
        return np.broadcast_to(self.barrier, (self.shape[0], 1))[program, 0]

    def since_warp(self, program: Array, thread: Array) -> Array:
        return np.broadcast_to(self.warp, self.shape)[program, thread]


class SharedMemory:
    """`size` bytes for each of the machine's programs."""

    def __init__(self, m: "Machine", size: int, granule: int):
        self.m, self.size, self.granule = m, size, granule
        self.data = np.zeros((m.programs, -(-size // 16) * 16), np.uint8)
        self.views = {n: self.data.view(t) for n, t in ACCESS.items()}
        entries = max(1, -(-size // granule))
        self.written = np.zeros((1, entries), bool)
        self.writers = np.zeros((1, entries), np.int32)
        self.readers = np.zeros((1, entries), np.int32)
        self.groups = np.zeros((1, entries), np.int32)  # asynchronous group of the last write, 0 for a plain one
        self.committed = np.zeros((1, 1), np.int64)
        self.finished = np.full((1, 64), _PENDING, np.int64)  # clock at which each group was waited for
        self.finished[:, 0] = 0
        self.last_write = self.last_read = 0
        self.asynchronous = False
        self.pending: dict[tuple, tuple] = {}  # reads since the last barrier that are not in `readers` yet
        self.cache: dict[tuple, Access] = {}

    # ---------------------------------------------------------------- which lanes, which bytes

    def _expand(self) -> None:
        """From one row of shadow for all programs to one for each."""
        for name in ("written", "writers", "readers", "groups", "committed", "finished"):
            if len(getattr(self, name)) != self.m.programs:
                setattr(self, name, np.repeat(getattr(self, name), self.m.programs, axis=0))

    def _access(self, site: "Site", address: Array, mask: Array | None, lanes: Array | None, collective: bool = False):
        """(access, programs): programs None for all, else their numbers [r]; an access of pairs of program and thread
        where addresses or mask depend on both. lanes: the threads that give an address, of ldmatrix."""
        programs = None
        if mask is not None and mask.shape[1] == 1 and mask.shape[0] > 1:
            programs, mask = np.flatnonzero(mask[:, 0]), None
        address = _one_row(address, programs)
        mask = None if mask is None else _one_row(mask, None)
        if address.shape[0] > 1 or (mask is not None and mask.shape[0] > 1):
            return self._general(site, address, mask, programs, lanes, collective)
        key = (site.index, address.tobytes(), None if mask is None else mask.tobytes())
        found = self.cache.get(key)
        if found is None:
            threads = np.arange(self.m.threads) if lanes is None else lanes
            row = np.broadcast_to(address, (1, self.m.threads))[0].astype(np.int64)[threads] + site.offset
            if mask is not None:
                chosen = np.broadcast_to(mask, (1, self.m.threads))[0][threads]
                row, threads = row[chosen], threads[chosen]
            found = self.cache[key] = Access(self, site, row, threads, collective)
            if found.problem is not None:
                kind, bad, what = found.problem
                self.m.report_threads(kind, site, threads[bad], programs, what)
        return found, programs

    def _general(self, site, address, mask, programs, lanes, collective):
        m = self.m
        active = np.ones((m.programs, m.threads), bool) if mask is None else np.broadcast_to(mask, m.shape).copy()
        if programs is not None:
            active &= np.isin(np.arange(m.programs), programs)[:, None]
        if lanes is not None:
            active &= np.isin(np.arange(m.threads), lanes)
        program, thread = np.nonzero(active)
        row = np.broadcast_to(address, m.shape)[program, thread].astype(np.int64) + site.offset
        bad = (row < 0) | (row > self.size - site.size) | (row % site.size != 0)
        if bad.any():
            what = f"byte {int(row[bad][0])} of {self.size} bytes of shared memory"
            kind = "misaligned" if 0 <= row[bad][0] <= self.size - site.size else "out of bounds"
            m.report_pairs(kind, site, program[bad], thread[bad], what)
            program, thread, row = program[~bad], thread[~bad], row[~bad]
        return _Pairs(self, site, program, thread, row, collective), None

    # ---------------------------------------------------------------- data

    def load(self, site: "Site", address: Array, mask: Array | None) -> list[Array]:
        access, programs = self._access(site, address, mask, None)
        values = self._read(site, access, self.m.threads)
        self._check_read(site, access, programs)
        return split(values, site.width, site.count)

    def _read(self, site, access, threads: int) -> Array:
        view = self.views[site.size]
        if isinstance(access, _Pairs):
            values = np.zeros((self.m.programs, threads), view.dtype)
            values[access.program, access.threads] = view[access.program, access.index]
            return values
        if len(access.index) == threads:
            return view.take(access.index, axis=1)
        values = np.zeros((self.m.programs, threads), view.dtype)
        values[:, access.threads] = view.take(access.index, axis=1)
        return values

    def load_matrix(self, site: "Site", address: Array, mask: Array | None, transposed: bool) -> list[Array]:
        """ldmatrix: thread 8 i + r of a warp points to row r, 8 16-bit numbers, of matrix i; lane l gets numbers
        2 (l % 4) and the next of row l // 4, transposed: of column l // 4."""
        m, count = self.m, site.count
        lanes = np.arange(m.threads).reshape(-1, 32)[:, : 8 * count].reshape(-1)
        access, programs = self._access(site, address, mask, lanes, collective=True)
        values = self._read(site, access, m.threads)
        self._check_read(site, access, programs)
        rows = values.reshape(m.programs, m.threads // 32, 32)[:, :, : 8 * count].reshape(m.programs, -1, count, 8)
        if transposed:
            numbers = rows.view(np.uint16).reshape(*rows.shape, 8)
            pairs = np.ascontiguousarray(numbers.swapaxes(-1, -2)).view(np.uint32)
        else:
            pairs = rows.view(np.uint32).reshape(*rows.shape, 4)
        return [np.ascontiguousarray(pairs[:, :, i]).reshape(m.shape) for i in range(count)]

    def store(self, site: "Site", address: Array, mask: Array | None, values: list[Array], group: bool = False) -> None:
        access, programs = self._access(site, address, mask, None)
        data = np.broadcast_to(join(values, site.size), self.m.shape)
        view = self.views[site.size]
        if isinstance(access, _Pairs):
            places: tuple = (access.program, access.index)
            chosen = data[access.program, access.threads]
        else:
            chosen = data if len(access.index) == self.m.threads else data[:, access.threads]
            places = (slice(None), access.index)
            if programs is not None:
                places, chosen = (programs[:, None], access.index), chosen[programs]
        view[places] = chosen
        if self.m.checks and len(access.duplicate):
            self._check_duplicates(site, access, programs, view[places], chosen)
        self._check_write(site, access, programs, group)

    def _check_duplicates(self, site, access, programs, stored: Array, given: Array) -> None:
        """Lanes of one instruction may write one place if they agree: Triton's replicated layouts do."""
        numbers = np.uint8 if site.size == 1 else np.uint16 if site.size == 2 else np.uint32
        differ = np.ascontiguousarray(stored).view(numbers) != np.ascontiguousarray(given).view(numbers)
        if differ.any():
            differ = differ.reshape(*stored.shape, -1).any(axis=-1)
            bad = np.repeat(differ, max(1, site.size // self.granule), axis=-1)
            self._report(site, access, programs, bad, "two lanes of one instruction write it with different values")

    # ---------------------------------------------------------------- asynchronous copies

    def commit(self, mask: Array | None) -> None:
        active = self._programs(mask)
        self.committed = self.committed + (1 if active is None else active)
        if int(self.committed.max()) + 2 >= self.finished.shape[1]:
            self.finished = np.concatenate([self.finished, np.full_like(self.finished, _PENDING)], axis=1)

    def wait(self, left: int, mask: Array | None) -> None:
        """All groups but the `left` latest are there for the threads that wait."""
        active = self._programs(mask)
        done = np.arange(self.finished.shape[1]) <= self.committed - left
        if active is not None:
            done = done & active
        self.finished = np.where(done & (self.finished == _PENDING), self.m.sync.clock, self.finished)

    def _programs(self, mask: Array | None) -> Array | None:
        if mask is None:
            return None
        self._expand()
        return np.broadcast_to(mask.any(axis=1, keepdims=True), (self.m.programs, 1))

    def settle(self) -> None:
        """After a barrier: copies that everybody has waited for are like plain writes from before it."""
        if self.m.sync.floor == self.m.sync.clock:
            self.pending.clear()
        if self.asynchronous and (self.finished[:, 1 : int(self.committed.max()) + 2] < self.m.sync.floor).all():
            self.asynchronous = False
            self.groups.fill(0)
        if len(self.writers) > 1 and self.m.sync.floor == self.m.sync.clock and not self.asynchronous:
            self._collapse()

    def _collapse(self) -> None:
        """Back to one row where programs that parted are together again: who touched what before a barrier of all no
        longer matters."""
        if (self.committed == self.committed[:1]).all():
            self.writers, self.readers, self.groups = self.writers[:1], self.readers[:1], self.groups[:1]
            self.committed, self.finished = self.committed[:1], self.finished.max(axis=0, keepdims=True)
            self.writers.fill(0)
            self.readers.fill(0)

    # ---------------------------------------------------------------- checks

    def _places(self, access, programs: Array | None):
        """(index into the shadow, programs whose rows it takes or None, index into `finished`'s rows)."""
        if isinstance(access, _Pairs):
            self._expand()
            return (access.owners_program, access.granules), access.owners_program
        if programs is not None:
            self._expand()
            return (programs[:, None], access.granules[None, :]), programs[:, None]
        return (slice(None), access.granules), None

    def _stamps(self, places, rows, written: Array) -> tuple[Array, Array]:
        """(clock at which each granule's last write was done, _PENDING if it is under way; whether asynchronous)."""
        stamp = (written >> _THREAD_BITS).astype(np.int64)
        if not self.asynchronous:
            return stamp, np.zeros((), bool)
        group = self.groups[places]
        rows = np.arange(len(self.finished))[:, None] if rows is None else rows
        finished = self.finished[rows, group]
        return np.where(group > 0, finished, stamp), group > 0

    def _since(self, rows, owners: Array) -> tuple[Array, Array]:
        sync = self.m.sync
        barrier = sync.barrier if len(sync.barrier) == 1 or rows is None else sync.barrier[rows, 0]
        if sync.warp.size == 1:
            return barrier, sync.warp
        warp = np.broadcast_to(sync.warp, sync.shape)
        return barrier, warp[:, owners] if rows is None else warp[rows, owners]

    def _settled(self) -> bool:
        """Nothing was written since the last barrier of every program."""
        return self.last_write < self.m.sync.floor and not self.asynchronous

    def _check_read(self, site, access, programs) -> None:
        m = self.m
        if m.profile:
            m.count_shared(site, access, programs)
        if not m.checks:
            return
        if not (access.initialised and self._arrived(access)):
            places, rows = self._places(access, programs)
            self._judge(site, access, programs, "read after write", places, rows)
            written = self.written[places]
            if not written.all():
                self._report(site, access, programs, ~written, "never written", kind="uninitialised")
            access.initialised = not access.per_pair and programs is None and bool(written.all())
        if len(self.pending) > 1000:
            self._note_reads(None)
        key = id(access), None if programs is None else programs.tobytes()
        self.pending.pop(key, None)  # in the order of their clocks
        self.pending[key] = access, programs, m.sync.clock

    def _arrived(self, access) -> bool:
        """Everything in the access was written before the last barrier of every program; False where it takes longer to
        know. Groups are waited for in their order, so that the latest speaks for all."""
        if self.last_write >= self.m.sync.floor:
            return False
        if not self.asynchronous:
            return True
        if access.per_pair or len(self.finished) > 1:
            return False
        if not access.granules.size:  # every lane was out of bounds
            return True
        return bool(self.finished[0, self.groups[0].take(access.granules).max()] < self.m.sync.floor)

    def _note_reads(self, write) -> None:
        """Enters the reads that may overlap with `write` (None: all) into the shadow. Most never need to be."""
        for key, (access, programs, clock) in list(self.pending.items()):
            if write is None or (access.low <= write.high and write.low <= access.high):
                del self.pending[key]
                if clock >= self.m.sync.floor:
                    self._note_read(access, programs, clock)

    def _note_read(self, access, programs, clock: int) -> None:
        places, rows = self._places(access, programs)
        entry = (clock << _THREAD_BITS) | access.readers
        if self.last_read >= self.m.sync.floor:
            old = self.readers[places]
            barrier, warp = self._since(rows, access.owners)
            before = old >> _THREAD_BITS
            both = (before >= barrier) & (clock >= barrier)
            same_warp = ((old ^ access.readers) & _THREAD < 32) & (old & _WARPS != _WARPS)
            same_warp &= access.readers & _WARPS != _WARPS
            # lanes of a warp: what came before its last bar.warp.sync no longer matters, nor what all read at once
            mine, yours = access.readers & _WARPS, old & _WARPS
            keep_old = both & same_warp & ((clock < warp) & (before >= clock) | (before >= warp) & (mine == _WHOLE))
            keep_old |= (before >= barrier) & ~both
            lanes = both & same_warp & (before >= warp) & (clock >= warp) & (mine != _WHOLE) & (yours != _WHOLE)
            lanes &= (mine | yours != _SINGLE) | ((old ^ access.readers) & _THREAD != 0)
            latest = np.maximum(before, clock) << _THREAD_BITS
            entry = np.where(both, latest | access.readers, entry)
            entry = np.where(keep_old, latest | old & ((1 << _THREAD_BITS) - 1), entry)
            entry = np.where(lanes, latest | access.readers & _THREAD | _LANES, entry)
            entry = np.where(both & ~same_warp, latest | access.readers & _THREAD | _WARPS, entry).astype(np.int32)
        self.readers[places] = entry
        self.last_read = max(self.last_read, clock)

    def _check_write(self, site, access, programs, group: bool) -> None:
        m = self.m
        if m.profile:
            m.count_shared(site, access, programs)
        if not m.checks:
            return
        places, rows = self._places(access, programs)
        if not self._settled():
            self._judge(site, access, programs, "two writes", places, rows)
        self._note_reads(access)
        if self.last_read >= m.sync.floor:
            old = self.readers[places]
            barrier, warp = self._since(rows, access.owners)
            stamp, reader, state = old >> _THREAD_BITS, old & _THREAD, old & _WARPS
            same_warp = (reader >> 5 == access.owners >> 5) & (state != _WARPS)
            lane = (state == _LANES) | (state == _SINGLE) & (reader != access.owners)
            hazard = np.where(same_warp, lane & (stamp >= warp), stamp >= barrier)
            if hazard.any():
                self._report(site, access, programs, hazard, "written after another thread read it, no barrier between")
        self.written[places] = True
        self.writers[places] = (m.sync.clock << _THREAD_BITS) | access.owners
        if group:
            self.asynchronous = True
            committed = self.committed if len(self.committed) == 1 or rows is None else self.committed[rows, 0]
            self.groups[places] = committed + 1
        else:
            self.last_write = m.sync.clock
            if self.asynchronous:
                self.groups[places] = 0

    def _judge(self, site, access, programs, what: str, places, rows) -> None:
        written = self.writers[places]
        stamp, asynchronous = self._stamps(places, rows, written)
        barrier, warp = self._since(rows, access.owners)
        thread = written & _THREAD
        others = thread != access.owners
        same_warp = thread >> 5 == access.owners >> 5
        pending = asynchronous & (stamp == _PENDING)
        if pending.any():
            self._report(site, access, programs, pending, f"{what}: an asynchronous copy that was not waited for")
        hazard = others & np.where(same_warp, stamp >= warp, stamp >= barrier) & ~pending
        if hazard.any():
            self._report(site, access, programs, hazard, f"{what} of another thread, no barrier between")

    def _report(self, site, access, programs, bad: Array, what: str, kind: str = "race in shared memory") -> None:
        bad = np.broadcast_to(bad, np.broadcast_shapes(bad.shape, access.granules.shape))
        byte = lambda position: int(access.granules[position]) * self.granule  # noqa: E731
        if isinstance(access, _Pairs):
            position = np.flatnonzero(bad)
            text = f"{what}: byte {byte(position[0])} of shared memory"
            self.m.report_pairs(kind, site, access.owners_program[position], access.owners[position], text)
            return
        position = np.flatnonzero(bad.reshape(-1, bad.shape[-1]).any(axis=0))
        some = programs
        if bad.ndim == 2 and len(bad) > 1:
            row = np.flatnonzero(bad.any(axis=1))
            some = row if programs is None else programs[row]
        text = f"{what}: byte {byte(position[0])} of shared memory"
        self.m.report_threads(kind, site, access.owners[position], some, text)


class _Pairs:
    """An access whose addresses or lanes differ between programs: flat pairs of program and thread."""

    per_pair = True

    def __init__(self, memory: SharedMemory, site, program: Array, thread: Array, address: Array, collective: bool):
        k = max(1, site.size // memory.granule)
        self.program, self.threads, self.index = program, thread, address // site.size
        self.granules = (address[:, None] // memory.granule + np.arange(k)).reshape(-1)
        self.low, self.high = _range(self.granules)
        self.owners = np.repeat(thread, k).astype(np.int32)
        self.owners_program = np.repeat(program, k)
        flat = self.owners_program * (memory.size // memory.granule + 1) + self.granules
        order = np.argsort(flat, kind="stable")
        ordered, owners = flat[order], self.owners[order]
        same = ordered[1:] == ordered[:-1]
        several = same & (owners[1:] != owners[:-1])
        self.duplicate = order[1:][several]
        self.readers = self.owners.copy()
        if len(self.duplicate):
            shared = np.isin(flat, ordered[1:][several])
            warps = np.isin(flat, ordered[1:][same & (owners[1:] >> 5 != owners[:-1] >> 5)])
            self.readers |= np.where(warps, _WARPS, np.where(shared, _LANES, _SINGLE)).astype(np.int32)
        if collective:
            self.readers = _as_whole(self.readers)
        self.initialised = False
        self.address = address
        self.all_threads = memory.m.threads

    def count(self, size: int) -> tuple[int, int]:
        return wavefronts(self.address, self.program * self.all_threads + self.threads, size)


def _as_whole(readers: Array) -> Array:
    return np.where(readers & _WARPS == _WARPS, readers, (readers & _THREAD) | _WHOLE).astype(np.int32)


def _range(granules: Array) -> tuple[int, int]:
    return (int(granules.min()), int(granules.max())) if len(granules) else (1, 0)


def _one_row(x: Array, programs: Array | None) -> Array:
    """One row if all programs' rows (those of `programs`) are equal."""
    if x.shape[0] == 1:
        return x
    rows = x if programs is None else x[programs]
    return rows[:1] if (rows == rows[:1]).all() else x
