"""What catches a mutant: a finding, results that differ in a bit, or that it never ends; or why nothing does.

The reasons are computed, not written by hand. Of barriers, waits and commits by `byte_model`, which follows every byte
of shared memory and knows no shadow; of the others from the values of all registers in both runs, and where the last
difference between them disappears.
"""

import contextlib
import re
import zlib
from unittest import mock

import byte_model
import numpy as np
import torch
from mutants import SYNCHRONISATION, EndlessError, Launched, Mutant, counted

from kernels import emulator
from kernels.emulator import codegen
from kernels.emulator.parse import Kernel, parse


class Judge:
    """Says of a launch's mutants what catches them, or why nothing does."""

    def __init__(self, launch: Launched):
        self.launch = launch
        self.run = byte_model.recorded(lambda: launch.execute(launch.text))
        assert byte_model.hazard(self.run) is None, launch.name
        self.registers: dict | None = None

    def caught(self, mutant: Mutant) -> str | None:
        """The kind of a finding, "results", "never ends", "refused" (no rule of the emulator's), or None."""
        try:
            with counted(3 * self.launch.blocks + 200):
                findings, results = self.launch.execute(mutant.text)
        except EndlessError:
            return "never ends"
        except emulator.UnsupportedPtx:  # such as a copy of 17 bytes
            return "refused"
        if findings:
            return findings[0].kind
        same = all(torch.equal(x, self.launch.results[address]) for address, x in results.items())
        return None if same else "results"

    def outcome(self, mutant: Mutant) -> tuple[bool, str]:
        """(caught, by what or why not). AssertionError where the emulator and the model of bytes do not agree."""
        by = self.caught(mutant)
        if mutant.kind in SYNCHRONISATION:
            line = mutant.one.line
            hazard = byte_model.hazard(self.run, **{"raised" if "raised" in mutant.kind else "without": line})
            assert (hazard is None) == (by is None), (
                f"{self.launch.case}: {self.launch.name}: {mutant.kind}, {mutant.one}: {by or 'no finding'}; "
                f"by the model of bytes: {hazard or 'no hazard'}"
            )
            return by is not None, by or byte_model.harmless(self.run, mutant.kind, line)
        if by is None and self.registers is None:
            self.registers = _registers(self.launch, self.launch.text)[0]
        return by is not None, by or explained(self.launch, mutant, self.registers or {})


# ---------------------------------------------------------------- why a change of values changes nothing


def _registers(launch: Launched, text: str) -> tuple[dict, Kernel]:
    """By (PTX line, register): [checksum of all that it was given, in order; of booleans whether it was true in every
    active lane, whether in any]. A guard is noted under (line, "guard")."""
    seen: dict[tuple[int, str], list] = {}
    put = codegen._Emitter.put

    def note(key, value, mask):
        value = np.broadcast_to(value, np.broadcast_shapes(value.shape, (1, 1) if mask is None else mask.shape))
        crc, every, some = seen.get(key, (0, True, False))
        if value.dtype == bool:
            lanes = value if mask is None else value[np.broadcast_to(mask, value.shape)]
            every, some = every and bool(lanes.all()), some or bool(lanes.any())
        if mask is not None:
            value = np.where(mask, value, value.dtype.type(0))
        for axis in (1, 0):  # whether it was kept once for all lanes, or for each, does not matter
            first = value[:, :1] if axis else value[:1]
            value = first if (value == first).all() else value
        seen[key] = [zlib.crc32(np.ascontiguousarray(value).tobytes(), crc), every, some]

    def traced(self, register, form, expression, guard):
        put(self, register, form, expression, guard)
        if register != "_":
            name = self.get(register, self.canonical_form(register))
            self.lines.append(f"note(({self.at.line}, {register!r}), {name}, {'M' if self.masked else None})")

    def located(original):
        def emit(self, one, guard):
            self.at, self.space["note"] = one, note
            if guard is not None:
                self.lines.append(f"note(({one.line}, 'guard'), {guard}, {'M' if self.masked else None})")
            return original(self, one, guard)

        return emit

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(codegen._Emitter, "put", traced))
        for emitter in {"simple", *codegen.SPECIAL.values()}:
            changed = located(getattr(codegen._Emitter, emitter))
            stack.enter_context(mock.patch.object(codegen._Emitter, emitter, changed))
        stack.enter_context(counted(3 * launch.blocks + 200))
        launch.execute(text, checks=False)
    return seen, parse(text)


def explained(launch: Launched, mutant: Mutant, original: dict) -> str:
    """original: `_registers` of the launch's own text."""
    one = mutant.one
    seen, kernel = _registers(launch, mutant.text)
    ran = {line for line, _ in original}
    block = next(block for block in parse(launch.text).blocks if any(x.line == one.line for x in block.instructions))
    if not any(x.line in ran for x in block.instructions):
        return "not reached by this case"
    differ = {
        key for key in seen.keys() | original.keys()
        if key[1] != "guard" and seen.get(key, [0])[0] != original.get(key, [0])[0]
    }  # fmt: skip
    if not differ:
        _, every, some = original.get((one.line, "guard"), (0, None, None))
        on, off = (not some, every) if one.guard_negated else (every, not some)
        if mutant.kind.startswith("guard"):
            return "its guard is on for every lane" if on else "lanes with its guard off do what those with it on do"
        if one.guard and off:
            return "its guard is off for every lane"
        if any(line == one.line for line, _ in original):
            return "computes the same of all that it meets"
        return "moves bytes that nothing depends on"
    lines, names = {line for line, _ in differ}, {register for _, register in differ}
    ends = sorted({x.opcode for x in kernel.instructions() if x.line not in lines and names & set(x.reads)})
    if not ends:
        return "computes what nothing reads"
    if all(re.match(MASKS, opcode) for opcode in ends):
        return "differs only in lanes or elements that are masked later"
    return "differs by less than a later rounding, or times zero, or is masked later"


# what takes one of two values, or none
MASKS = r"selp|(and|or|xor|not)\.pred|setp|bra|ld\.|st\.|cp\.async|bar|and|or|shfl"
