"""What a launch with products executes beyond its main loop, counted by the emulator and kept in emulated.json.

The static issue slots are those of one loop. What they miss is here, for each mma of a launch at its full size: `all`,
instructions of warps, and `loop`, those of the cheapest innermost loop with products. Both are PTX; their difference is
added to the loop's slots in SASS. A launch is known by its kernel, target, programs, sizes and a hash of what it
compiled to: a change of a kernel loses its counts, and `python -m bench.projection --count` makes them anew.
"""

import functools
import hashlib
import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from bench.cache import write
from kernels import emulator
from kernels.compile_only import Launch
from kernels.compile_only.sass import innermost
from march.cost.counter import launch_event

FILE = Path(__file__).with_name("emulated.json")
MMA_FLOPS = 4096
# mma that a launch's sample is to execute, and its fewest and most programs: a second or a few
ENOUGH, PROGRAMS = 200_000, (2, 64)
# integers that decide nothing: where rows are, and which elements are dropped
_PLACES = re.compile(r"stride|site|threshold")


def sampled(programs: int, mma: float) -> np.ndarray:
    """Numbers of the programs that are executed of a launch with `mma` in all: spread by the golden ratio over any
    order of tiles, heads and sequences."""
    wanted = int(np.clip(ENOUGH * programs / mma, *PROGRAMS))
    if wanted >= programs:
        return np.arange(programs)
    return np.unique((np.arange(wanted) * (5**0.5 - 1) / 2 % 1 * programs).astype(int))


@functools.lru_cache(256)
def _fingerprint(ptx: str) -> str:
    """Of the instructions, whatever their place in our files."""
    code = re.sub(r"//.*|^\s*\.(loc|file)\b.*|^\$L__(tmp|func)\w+:", "", ptx.partition(".section")[0], flags=re.M)
    return hashlib.sha256("".join(code.split()).encode()).hexdigest()[:12]


def name_of(launch: Launch) -> str:
    """Key of a compiled launch in emulated.json."""
    sizes = [
        f"{a.name}={a.value}"
        for a in launch.arguments
        if isinstance(a.value, int) and not isinstance(a.value, bool) and not _PLACES.search(a.name)
    ]
    kernel = launch.kernel.strip("_").removesuffix("_kernel")
    return " ".join([kernel, launch.arch, f"x{launch.programs}", *sizes, _fingerprint(launch.compiled.asm["ptx"])])


def count(launch: Launch, numbers: np.ndarray | None = None) -> dict[str, float]:
    """Executes a sample of a compiled launch's programs. ValueError where they multiply nothing."""
    if numbers is None:
        numbers = sampled(launch.programs, max(1.0, launch_event(launch).flops / MMA_FLOPS))
    done = emulator.sample(launch, numbers)
    mma = sum(n for opcode, n in done.counts.by_opcode().items() if opcode.startswith("mma"))
    if not mma:
        raise ValueError(f"{launch.kernel}: expected products, got none executed; give it inputs that reach its loop")
    blocks = done.kernel.blocks
    loops = [
        [x.opcode for n in body for x in blocks[n].instructions] for body in innermost([b.targets for b in blocks])
    ]
    products = [sum(opcode.startswith("mma") for opcode in loop) for loop in loops]
    loop = min(len(loop) / n for loop, n in zip(loops, products, strict=True) if n)
    return {"loop": round(loop, 3), "all": round(sum(done.counts.warps.values()) / mma, 3)}


@functools.cache
def known(file: Path = FILE) -> dict[str, dict[str, float]]:
    """The counts in `file`."""
    return json.loads(file.read_bytes()) if file.exists() else {}


def beyond(launch: Launch) -> float | None:
    """Instructions for each mma beyond those of the main loop; None where emulated.json does not have the launch."""
    found = known(FILE).get(name_of(launch))
    return None if found is None else found["all"] - found["loop"]


def save(launches: Iterable[Launch], progress: Callable[[str], None], file: Path = FILE) -> None:
    """Writes the counts of compiled launches to `file`: those that it has as they are, others counted, no others.
    What was stopped goes on where it was."""
    kept, wanted = dict(known(file)), {}
    for launch in launches:
        name = name_of(launch)
        if name not in kept:
            progress(f"executing {name}")
            kept[name] = count(launch)
            _write(file, kept)
        wanted[name] = kept[name]
    _write(file, wanted)
    known.cache_clear()


def _write(file: Path, counts: dict[str, dict[str, float]]) -> None:
    lines = (f" {json.dumps(name)}: {json.dumps(found)}" for name, found in sorted(counts.items()))
    write(file, ("{\n" + ",\n".join(lines) + "\n}\n").encode())
