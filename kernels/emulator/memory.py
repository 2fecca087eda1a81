"""Global memory: every pointer argument is an address range of its own over its tensor's storage.

Argument i begins at (i + 1) << 40, so an address names the argument that it came from: a pointer to q cannot reach k,
though both are views of one storage. The 40 bits below are the byte offset in the storage, which gives the alignment
that a GPU's allocation would have. Bytes between the elements of a strided view are out of bounds.
"""

import math
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from kernels.emulator.machine import Machine, Site

Array = np.ndarray
SHIFT = 40
# the dtype of one access of a lane, by its bytes; 16 bytes: what numpy gathers at once
ACCESS = {n: np.dtype(t) for n, t in ((1, "u1"), (2, "u2"), (4, "u4"), (8, "u8"), (16, "c16"))}
_CODE_THREAD, _CODE_CLOCK = 11, 32  # bits of a code below the clock, and below the program
_CLOCK_MASK = (1 << (_CODE_CLOCK - _CODE_THREAD)) - 1
_PROGRAMS, _THREADS = 1 << 62, 1 << 61  # several programs, or threads of one program, read a place


def address_of(index: int, tensor: Tensor) -> int:
    """The address that a launch gives its pointer argument number `index`."""
    return ((index + 1) << SHIFT) + int(tensor.storage_offset()) * tensor.element_size()


def split(values: Array, width: int, count: int) -> list[Array]:
    """Lanes' accesses as `count` arrays of `width` bytes an element."""
    if count == 1:
        return [values]
    parts = values.view(ACCESS[width]).reshape(*values.shape, count)
    return [np.ascontiguousarray(parts[..., i]) for i in range(count)]


def join(values: list[Array], size: int) -> Array:
    """The inverse of `split`: one element of `size` bytes a lane."""
    if len(values) == 1:
        return values[0]
    stacked = np.stack(np.broadcast_arrays(*values), axis=-1)
    return stacked.view(ACCESS[size])[..., 0]


class Storage:
    """One torch storage during one launch: its bytes, which are initialised, and who touched what.

    granule: bytes that share an entry of `writers` and `readers`: the smallest access of the kernel to it.
    """

    def __init__(self, tensor: Tensor, initialised: Array | None):
        flat = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
        self.bytes = flat.numpy()
        self._views: dict[int, Array] = {}
        self._initialised_views: dict[int, Array] = {}
        self.initialised = initialised
        self.granule = 16
        self.writers: Array | None = None
        self.readers: Array | None = None

    @staticmethod
    def _typed(data: Array, size: int) -> Array:
        return data[: len(data) // size * size].view(ACCESS[size])

    def view(self, size: int) -> Array:
        if size not in self._views:
            self._views[size] = self._typed(self.bytes, size)
        return self._views[size]

    def initialised_view(self, size: int) -> Array:
        assert self.initialised is not None
        if size not in self._initialised_views:
            self._initialised_views[size] = self._typed(self.initialised, size)
        return self._initialised_views[size]

    def track(self, written: bool, read: bool) -> None:
        entries = len(self.bytes) // self.granule + 1
        if written:
            self.writers = np.zeros(entries, np.int64)
            self.readers = np.zeros(entries, np.int64) if read else None


class Region:
    """One pointer argument: bytes [low, high) of its storage; valid: which `unit`s of bytes in between belong to it,
    None if all do."""

    def __init__(self, name: str, index: int, tensor: Tensor, storage: Storage):
        self.name, self.storage, self.unit = name, storage, tensor.element_size()
        self.base = (index + 1) << SHIFT
        self.low = int(tensor.storage_offset()) * self.unit
        sizes = [(n, s) for n, s in zip(tensor.shape, tensor.stride(), strict=True) if n != 1 and s != 0]
        extent = 1 + sum((n - 1) * s for n, s in sizes) if tensor.numel() else 0
        self.high = self.low + extent * self.unit
        self.valid: Array | None = None
        if extent != math.prod(n for n, _ in sizes) and tensor.numel():
            valid = torch.zeros(len(storage.bytes) // self.unit + 1, dtype=torch.bool)
            valid.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()).fill_(True)
            self.valid = valid.numpy()

    def describe(self, offset: int) -> str:
        return f"{self.name} holds bytes {self.low} to {self.high - 1} of its storage, got byte {offset}"


class GlobalMemory:
    """The pointer arguments of one launch, and loads and stores of all lanes at once."""

    def __init__(self, regions: dict[int, Region], checks: bool):
        self.regions, self.checks = regions, checks
        self.marks = {n: np.full(n, 1, np.uint8).view(t)[0] for n, t in ACCESS.items()}

    # Lanes are flat here: addresses [n] of the active ones. `lanes` maps a position back to (program, thread).

    def _resolve(self, m: "Machine", site: "Site", addresses: Array, lanes) -> list[tuple[Region, Array | None, Array]]:
        """(region, which positions or None for all, byte offsets) of the accesses that are in bounds."""
        size = site.size
        region = self.regions.get(int(addresses[0] >> np.uint64(SHIFT)))
        if region is not None and region.high - region.low >= size:
            inside = addresses - np.uint64(region.base + region.low)
            aligned = int(np.bitwise_or.reduce(addresses, axis=None)) & (size - 1) == 0
            if aligned and int(inside.max()) <= region.high - region.low - size:
                offsets = (addresses - np.uint64(region.base)).view(np.int64)
                if region.valid is None or self._covered(region, offsets, size).all():
                    return [(region, None, offsets)]
        found = []
        numbers = addresses >> np.uint64(SHIFT)
        for number in np.unique(numbers):
            (positions,) = np.nonzero(numbers == number)
            region = self.regions.get(int(number))
            if region is None:
                what = f"address {int(addresses[positions[0]]):#x} belongs to no pointer argument"
                m.report("out of bounds", site, lanes, positions, what)
                continue
            offsets = (addresses[positions] - np.uint64(region.base)).view(np.int64)
            bad = offsets % size != 0
            if bad.any():
                what = f"byte {offsets[bad][0]} of {region.name} is not a multiple of {size}"
                m.report("misaligned", site, lanes, positions[bad], what)
            outside = (offsets < region.low) | (offsets > region.high - size)
            if region.valid is not None:
                outside[~outside] = ~self._covered(region, offsets[~outside], size)
            if outside.any():
                m.report("out of bounds", site, lanes, positions[outside], region.describe(int(offsets[outside][0])))
            good = ~(bad | outside)
            if good.any():
                found.append((region, positions[good], offsets[good]))
        return found

    @staticmethod
    def _covered(region: Region, offsets: Array, size: int) -> Array:
        assert region.valid is not None
        units = offsets[:, None] // region.unit + np.arange(max(1, size // region.unit))
        return np.all(region.valid[units], axis=1)

    def load(self, m: "Machine", site: "Site", address: Array, mask: Array | None) -> list[Array]:
        """`site.count` arrays of `site.width` bytes an element; lanes outside `mask` get zeros."""
        shape, flat, lanes = m.flatten(address, mask)
        out = np.zeros(shape, ACCESS[site.size])
        if flat.size:
            values = self._gather(m, site, flat, lanes)
            if lanes.positions is None:
                out = values.reshape(shape)
            else:
                out.reshape(-1)[lanes.positions] = values
        return split(out, site.width, site.count)

    def _gather(self, m: "Machine", site: "Site", flat: Array, lanes) -> Array:
        shift = site.size.bit_length() - 1
        if m.profile:
            m.count_global(site, flat, lanes)
        parts = self._resolve(m, site, flat, lanes)
        if len(parts) == 1 and parts[0][1] is None:
            region, _, offsets = parts[0]
            if self.checks:
                self._check_load(m, site, region, offsets, lanes, None)
            return region.storage.view(site.size)[offsets >> shift]
        values = np.full(len(flat) * site.size, 0xFF, np.uint8).view(ACCESS[site.size])
        for region, chosen, offsets in parts:
            self._check_load(m, site, region, offsets, lanes, chosen)
            values[chosen] = region.storage.view(site.size)[offsets >> shift]
        return values

    def store(self, m: "Machine", site: "Site", address: Array, mask: Array | None, values: list[Array]) -> None:
        shape, flat, lanes = m.flatten(address, mask, whole=True)
        if not flat.size:
            return
        if m.profile:
            m.count_global(site, flat, lanes)
        data = np.broadcast_to(join(values, site.size), shape).reshape(-1)
        if lanes.positions is not None:
            data = data[lanes.positions]
        shift = site.size.bit_length() - 1
        for region, chosen, offsets in self._resolve(m, site, flat, lanes):
            storage, index = region.storage, offsets >> shift
            storage.view(site.size)[index] = data if chosen is None else data[chosen]
            if storage.initialised is not None:
                storage.initialised_view(site.size)[index] = self.marks[site.size]
            if self.checks and storage.writers is not None:
                self._check_store(m, site, region, offsets, lanes, chosen)

    # ---------------------------------------------------------------- checks

    def _check_load(self, m, site, region: Region, offsets: Array, lanes, chosen: Array | None) -> None:
        storage = region.storage
        if storage.initialised is not None:
            seen = storage.initialised_view(site.size)[offsets >> (site.size.bit_length() - 1)]
            bad = seen != self.marks[site.size]
            if bad.any():
                what = f"byte {offsets[bad][0]} of {region.name} was never written"
                m.report("uninitialised", site, lanes, _pick(chosen, bad), what)
        if storage.writers is None or storage.readers is None:
            return
        places, codes = self._places(m, site, storage, offsets, lanes, chosen)
        written = storage.writers[places]
        self._report_races(m, site, region, "read after write", written, codes, offsets, lanes, chosen)
        readers, program = storage.readers, lanes.programs_and_threads()[0]
        before, barrier = readers[places], m.sync.since_barrier(program if chosen is None else program[chosen])
        recent = (before >> _CODE_THREAD) & _CLOCK_MASK >= barrier[:, None]
        flags = (before & _PROGRAMS) | np.where(recent, before & _THREADS, 0) | self._differing(before, codes, recent)
        readers[places] = codes | flags
        readers[places] |= self._differing(readers[places], codes, True)

    @staticmethod
    def _differing(old: Array, codes: Array, recent: Array | bool) -> Array:
        """Flags of an entry that another program, or another thread since the last barrier, left."""
        differ = (old & ~(_PROGRAMS | _THREADS)) ^ codes
        programs = (old != 0) & (differ >> _CODE_CLOCK != 0)
        threads = (old != 0) & ~programs & recent & (differ & ((1 << _CODE_THREAD) - 1) != 0)
        return np.where(programs, _PROGRAMS, 0) | np.where(threads, _THREADS, 0)

    def _check_store(self, m, site, region: Region, offsets: Array, lanes, chosen: Array | None) -> None:
        storage = region.storage
        assert storage.writers is not None
        places, codes = self._places(m, site, storage, offsets, lanes, chosen)
        written = storage.writers[places]
        if written.any():
            self._report_races(m, site, region, "two writes", written, codes, offsets, lanes, chosen)
        storage.writers[places] = codes
        bad = (storage.writers[places] != codes).any(axis=1)
        if bad.any():
            what = f"two lanes of one instruction write byte {offsets[bad][0]} of {region.name}"
            m.report("race in global memory", site, lanes, _pick(chosen, bad), what)
        if storage.readers is not None:
            read = storage.readers[places]
            self._report_races(m, site, region, "write after read", read, codes, offsets, lanes, chosen)

    def _places(self, m, site, storage: Storage, offsets: Array, lanes, chosen: Array | None) -> tuple[Array, Array]:
        """Granules [n, k] of the accesses, and the codes [n, 1] of who makes them."""
        granule = storage.granule
        places = offsets[:, None] // granule + np.arange(max(1, site.size // granule))
        program, thread = lanes.programs_and_threads()
        codes = (m.program_numbers[program] + 1 << _CODE_CLOCK) | (m.sync.clock << _CODE_THREAD) | thread
        return places, (codes if chosen is None else codes[chosen])[:, None]

    def _report_races(self, m, site, region, what: str, before: Array, codes: Array, offsets, lanes, chosen) -> None:
        """before: codes of earlier accesses, 0 for none. Within a program a barrier in between makes it right."""
        old = before & ~(_PROGRAMS | _THREADS)
        across = (old != 0) & ((old ^ codes) >> _CODE_CLOCK != 0) | (before & _PROGRAMS != 0)
        clock = (old >> _CODE_THREAD) & _CLOCK_MASK
        thread, own = old & ((1 << _CODE_THREAD) - 1), codes & ((1 << _CODE_THREAD) - 1)
        program, _ = lanes.programs_and_threads()
        program = program if chosen is None else program[chosen]
        since_barrier = m.sync.since_barrier(program)[:, None]
        since_warp = m.sync.since_warp(program, own[:, 0])[:, None]
        recent = np.where(thread >> 5 == own >> 5, clock >= since_warp, clock >= since_barrier)
        several = (before & _THREADS != 0) & (clock >= since_barrier)
        within = (old != 0) & ~across & (several | (thread != own) & recent)
        for bad, who in ((across, "another program"), (within, "another thread of the program without a barrier")):
            rows = bad.any(axis=1)
            if rows.any():
                text = f"{what}: byte {offsets[rows][0]} of {region.name} was touched by {who}"
                m.report("race in global memory", site, lanes, _pick(chosen, rows), text)


def _pick(chosen: Array | None, bad: Array) -> Array:
    return np.flatnonzero(bad) if chosen is None else chosen[bad]
