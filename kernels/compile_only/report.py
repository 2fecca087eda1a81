"""One row a compiled kernel and configuration, and its verdict against the limits (limits.py)."""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from kernels.compile_only.limits import ARCHITECTURE_DATA, Limit, limits_of
from kernels.compile_only.products import products, useful_fraction
from kernels.compile_only.record import Launch
from kernels.compile_only.sass import Loop, Program, Resources, disassemble

ATOMICS = ("RED", "ATOM", "ATOMG", "ATOMS", "REDG", "REDAS", "ATOMICS")


@dataclass(frozen=True)
class Report:
    """What a compiled kernel shows. Bytes for shared memory; counts of instructions otherwise, of the whole program
    unless the name says loop."""

    kernel: str
    arch: str
    configuration: str
    dtype: str
    num_warps: int
    num_stages: int
    launches: int
    programs: int
    registers: int
    stack: int
    local: int
    spill_stores: int
    spill_loads: int
    shared: int
    blocks_per_sm: int
    warps_per_sm: int
    hmma: int
    duplicated: float
    loops: tuple[Loop, ...]
    loads: dict[int, int]
    stores: dict[int, int]
    async_copies: dict[int, int]
    ldsm: int
    atomics: int
    failures: tuple[str, ...] = ()

    @property
    def main_loop(self) -> Loop | None:
        """The innermost loop with products that spends fewest issue slots on each."""
        return min((loop for loop in self.loops if loop.hmma), key=lambda loop: loop.issue_per_hmma, default=None)

    @property
    def passed(self) -> bool:
        return not self.failures

    def row(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        row = {name: getattr(self, name) for name in self.__dataclass_fields__}
        for name in ("loads", "stores", "async_copies"):
            row[name] = {str(width): n for width, n in row[name].items()}
        return row | {"loops": [_loop_row(loop) for loop in self.loops], "passed": self.passed}


def _loop_row(loop: Loop) -> dict[str, Any]:
    row = {"issue_slots": loop.issue_slots, "hmma": loop.hmma, "useful_hmma": round(loop.useful_hmma, 2)}
    row |= {"ldsm": loop.count("LDSM"), "ldgsts": loop.count("LDGSTS")}
    ratios = dict.fromkeys(("issue_per_hmma", "shared_per_tensor", "fill_per_tensor"))
    if loop.hmma:
        ratios = {
            "issue_per_hmma": round(loop.issue_per_hmma, 2),
            "shared_per_tensor": round(loop.shared_per_tensor, 3),
            "fill_per_tensor": round(loop.fill_cycles / loop.tensor_cycles, 3),
        }
    return row | ratios


@cache
def _disassembled(cubin: bytes) -> tuple[Program, Resources, str]:
    listing, resources = disassemble(cubin)
    return Program(listing), resources, listing


def listing(launch: Launch) -> str:
    """The disassembly that the report's counts come from."""
    return _disassembled(launch.compiled.asm["cubin"])[2]


def report(launch: Launch, same: Iterable[Launch] = ()) -> Report:
    """Report of a compiled launch; `same`: all launches of the same binary, counted and summed."""
    assert launch.compiled is not None, "record with compile=True"
    same = list(same) or [launch]
    program, resources, _ = _disassembled(launch.compiled.asm["cubin"])
    ttgir = launch.compiled.asm["ttgir"]
    shared = launch.compiled.metadata.shared + _static_shared(resources, launch.arch)
    blocks = ARCHITECTURE_DATA[launch.arch].resident_blocks(resources.registers, shared, launch.num_warps)
    unchecked = Report(
        kernel=launch.kernel,
        arch=launch.arch,
        configuration=launch.configuration,
        dtype=next((a.dtype for a in launch.arguments if a.is_tensor and "float" in a.dtype), "-"),
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
        launches=len(same),
        programs=sum(one.programs for one in same),
        registers=resources.registers,
        stack=resources.stack,
        local=resources.local,
        spill_stores=program.count("STL"),
        spill_loads=program.count("LDL"),
        shared=shared,
        blocks_per_sm=blocks,
        warps_per_sm=blocks * launch.num_warps,
        hmma=program.count("HMMA", "HGMMA", "UTCHMMA"),
        duplicated=max((p.duplicates for p in products(ttgir)), default=1.0),
        loops=_loops(program, useful_fraction(ttgir)),
        loads=program.widths("LDG"),
        stores=program.widths("STG"),
        async_copies=program.widths("LDGSTS"),
        ldsm=program.count("LDSM"),
        # those of sm_100 in shared memory give out its tensor memory
        atomics=program.count(*(name for name in ATOMICS if (name, launch.arch) != ("ATOMS", "sm_100"))),
    )
    limits = limits_of(launch.kernel, launch.constants, launch.arch)
    failures = [*_failures(unchecked, limits), *_imprecise(launch.compiled.asm["ttir"])]
    return replace(unchecked, failures=tuple(failures))


def _imprecise(ttir: str) -> Iterable[str]:
    """Products of float32 in plain tf32, Triton's default, which the interpreter hides."""
    found = len(re.findall(r"tt\.dot .*inputPrecision = tf32 : tensor<[\dx]+xf32", ttir))
    if found:
        yield f"{found} float32 products in plain tf32"


def _static_shared(resources: Resources, arch: str) -> int:
    # ptxas counts the driver's 1 KiB as static from sm_90 on
    return max(0, resources.static_shared - (1024 if int(arch.removeprefix("sm_")) >= 90 else 0))


def _loops(program: Program, fractions: list[float]) -> tuple[Loop, ...]:
    """Innermost loops, those with products paired with the compiler's in order, else with its worst."""
    found = [Loop(instructions) for instructions in program.innermost_loops()]
    with_products = [loop for loop in found if loop.hmma]
    paired = fractions if len(fractions) == len(with_products) else [min(fractions, default=1.0)] * len(with_products)
    useful = {id(loop): fraction for loop, fraction in zip(with_products, paired, strict=True)}
    return tuple(Loop(loop.instructions, loop.hmma * useful.get(id(loop), 0.0)) for loop in found)


def _failures(row: Report, limits: list[Limit]) -> Iterable[str]:
    allowed = ARCHITECTURE_DATA[row.arch].shared_memory_block
    if row.shared > allowed:
        yield f"shared memory {row.shared} > {allowed}"
    if row.blocks_per_sm == 0:
        yield "no block fits an SM"
    if row.atomics:
        yield f"{row.atomics} atomics"
    for limit in limits:
        if limit.no_spills and (row.spill_stores or row.spill_loads or row.local):
            yield f"spills: {row.spill_stores} STL, {row.spill_loads} LDL, {row.local} bytes"
        if limit.resident_warps is not None and row.warps_per_sm < limit.resident_warps:
            yield f"{row.warps_per_sm} resident warps < {limit.resident_warps}"
        if limit.no_duplicates and row.duplicated > 1:
            yield f"products computed {row.duplicated:g} times"
        if "float32" in row.dtype or limit.issue_per_hmma is limit.shared_per_tensor is None:
            continue
        main = row.main_loop
        loops = [main] if limit.loop == "main" and main else [loop for loop in row.loops if loop.hmma]
        if not loops:
            yield "no HMMA in an innermost loop"
        for loop in loops:
            if limit.issue_per_hmma is not None and not loop.issue_per_hmma < limit.issue_per_hmma:
                yield f"{loop.issue_per_hmma:.2f} issue slots per HMMA, limit {limit.issue_per_hmma:g}"
            if limit.shared_per_tensor is not None and not loop.shared_per_tensor <= limit.shared_per_tensor:
                yield f"shared-memory pipe {loop.shared_per_tensor:.2f} of tensor, limit {limit.shared_per_tensor:g}"


def reports(launches: Iterable[Launch]) -> list[Report]:
    """One report a distinct compiled program, in the order of first launch."""
    groups: dict[str, list[Launch]] = {}
    for launch in launches:
        groups.setdefault(launch.program, []).append(launch)
    return [report(group[0], group) for group in groups.values()]


def _widths(widths: dict[int, int]) -> str:
    return " ".join(f"{n}x{width}" for width, n in widths.items()) or "-"


def _cells(row: Report) -> dict[str, str]:
    """A row of `table` by column."""
    loops = [loop for loop in row.loops if loop.hmma]
    return {
        "kernel": row.kernel,
        "configuration": row.configuration,
        "dtype": row.dtype,
        "regs": str(row.registers),
        "STL/LDL": f"{row.spill_stores}/{row.spill_loads}",
        "smem": str(row.shared),
        "blk/SM": str(row.blocks_per_sm),
        "warps/SM": str(row.warps_per_sm),
        "HMMA loop": ",".join(str(loop.hmma) for loop in loops) or "-",
        "slots/HMMA": ",".join(f"{loop.issue_per_hmma:.2f}" for loop in loops) or "-",
        "smem/tensor": ",".join(f"{loop.shared_per_tensor:.2f}" for loop in loops) or "-",
        "LDSM": str(row.ldsm),
        "LDGSTS": _widths(row.async_copies),
        "LDG": _widths(row.loads),
        "STG": _widths(row.stores),
        "atomics": str(row.atomics),
        "verdict": "pass" if row.passed else "FAIL: " + "; ".join(row.failures),
    }


def table(rows: Iterable[Report]) -> str:
    """The reports as text, one line each. slots/HMMA and smem/tensor list every innermost loop with products."""
    cells = [_cells(row) for row in rows]
    sizes = {name: max(len(name), *(len(line[name]) for line in cells)) for name in cells[0]} if cells else {}
    lines = [{name: name for name in sizes}, *cells]
    return "\n".join("  ".join(line[name].ljust(n) for name, n in sizes.items()).rstrip() for line in lines)


def save(launches: Iterable[Launch], directory: Path) -> None:
    """Writes each distinct program's cubin, disassembly, PTX, TTGIR and launch to `directory`."""
    directory.mkdir(parents=True, exist_ok=True)
    seen: set[str] = set()
    for launch in launches:
        if launch.program in seen:
            continue
        seen.add(launch.program)
        name = re.sub(r"\W+", "_", f"{launch.kernel.strip('_')}_{launch.arch}_{launch.compiled.hash[:12]}")
        (directory / f"{name}.cubin").write_bytes(launch.compiled.asm["cubin"])
        (directory / f"{name}.sass").write_text(listing(launch))
        for kind in ("ptx", "ttgir"):
            (directory / f"{name}.{kind}").write_text(launch.compiled.asm[kind])
        (directory / f"{name}.json").write_text(json.dumps(report(launch).row(), indent=1) + "\n")
