"""What the fused kernels execute in a training step, counted by the emulator of their PTX: no GPU, no speeds.

    python -m bench.emulated [--exp Baseline] [--kernel PATTERN] [--arch sm_86] [--micro-batch 1] [--encoder 921]
        [--decoder 206] [--set FIELD=VALUE] [--top 5] [--checks] [--json]

One forward and backward with dropout of a model with random weights, on random tokens without padding. For each kernel:
instructions of warps by class (PTX, which ptxas turns into other but about as many instructions), products of the
tensor cores beside the formula's, passes of shared memory beside the fewest that the bytes need (conflicts), sectors a
request and bytes fetched beside bytes asked of global memory, and the lines of Python with most instructions. All that
ran counts: loops, prologue and epilogue. Half a minute for Baseline on one core; progress on standard error.

--json prints an object: what ran, and "kernels", a list of the fields of `Profile`. Exit status 1 where --checks finds
something, 2 where an argument is wrong.
"""

import argparse
import collections
import fnmatch
import json
import linecache
import sys
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NoReturn

import torch

import march
from bench.cache import LENGTHS
from bench.compiled import implementations, training_step
from bench.tables import markdown, table
from kernels import dropout_state, emulator
from kernels.compile_only.sass import innermost
from kernels.dispatch import triton_interpreted
from kernels.emulator import EmulatedLaunch
from kernels.emulator.instructions import kind_of
from kernels.emulator.parse import Kernel
from kernels.emulator.session import EMULATED
from march import experiments
from march.config import ConfigError, parse_overrides
from march.cost.counter import launch_event
from march.cost.step import DTYPES

WIDTH = 100
# line 0: LLVM moved it, out of a loop or together from several places
MOVED = "moved by the compiler, no line of its own"
# FLOPs of one instruction of a warp
MMA_FLOPS = {"m16n8k16": 4096, "m16n8k8": 2048}


@dataclass
class Traffic:
    """Of global memory. asked: bytes, of every lane; requests: of warps; sectors: 32 bytes each, of each request."""

    asked: int = 0
    requests: int = 0
    sectors: int = 0


@dataclass
class Line:
    """A line of Python. slots: instructions of warps; in_loops: of them in innermost loops; passes, least: of shared
    memory."""

    source: str
    code: str
    slots: int = 0
    in_loops: int = 0
    passes: int = 0
    least: int = 0

    @property
    def conflicts(self) -> float:
        return self.passes / self.least if self.least else 1.0


@dataclass
class Profile:
    """What the launches of one kernel executed. slots: instructions of warps, in_loops: of them in innermost loops;
    classes: by kind; mma: those of the tensor cores, formula: as many as the formula's FLOPs need; passes, least: of
    shared memory. read, written: global memory. lines: of Python, most instructions first."""

    kernel: str
    launches: int = 0
    programs: int = 0
    slots: int = 0
    in_loops: int = 0
    mma: int = 0
    formula: float = 0.0
    passes: int = 0
    least: int = 0
    read: Traffic = field(default_factory=Traffic)
    written: Traffic = field(default_factory=Traffic)
    classes: dict[str, int] = field(default_factory=dict)
    lines: list[Line] = field(default_factory=list)


def loop_lines(kernel: Kernel) -> set[int]:
    """PTX lines of the innermost loops."""
    blocks = set().union(*innermost([block.targets for block in kernel.blocks]))
    return {one.line for number in blocks for one in kernel.blocks[number].instructions}


def _mma_flops(opcode: str) -> int:
    return MMA_FLOPS[opcode.split(".")[3]] if opcode.startswith("mma") else 0


def profile(launches: Iterable[EmulatedLaunch]) -> Profile:
    """Of launches of one kernel, executed with profile=True."""
    launches = list(launches)
    out = Profile(launches[0].recorded.kernel)
    lines: dict[Any, Line] = {}
    classes: collections.Counter[str] = collections.Counter()
    for launch in launches:
        counts, loops = launch.counts, loop_lines(launch.kernel)
        flops = {_mma_flops(opcode) for opcode in counts.opcodes.values()} - {0}
        out.launches += 1
        out.programs += launch.recorded.programs
        if flops:
            out.formula += launch_event(launch.recorded).flops / max(flops)
        for number, slots in counts.warps.items():
            where, opcode = counts.sources[number], counts.opcodes[number]
            code = linecache.getline(where.file, where.line).strip() if where.line else MOVED
            line = lines.setdefault(where, Line(str(where), code))
            inside = slots if number in loops else 0
            passes, least = counts.shared.get(number, (0, 0))
            classes[kind_of(opcode)] += slots
            for total in (out, line):
                total.slots += slots
                total.in_loops += inside
                total.passes += passes
                total.least += least
            if number in counts.sectors:
                traffic = out.written if opcode.startswith("st") else out.read
                sectors, asked, requests = counts.sectors[number]
                traffic.sectors += sectors
                traffic.asked += asked
                traffic.requests += requests
    out.mma = classes["mma"]
    out.classes = dict(classes.most_common())
    out.lines = sorted(lines.values(), key=lambda line: -line.slots)
    return out


def profiles(launches: Iterable[EmulatedLaunch]) -> list[Profile]:
    """One a kernel, most instructions first."""
    groups: dict[str, list[EmulatedLaunch]] = {}
    for launch in launches:
        groups.setdefault(launch.recorded.kernel, []).append(launch)
    return sorted(map(profile, groups.values()), key=lambda one: -one.slots)


def emulated_step(
    name: str,
    arch: str = "sm_86",
    *,
    micro_batch: int = 1,
    lengths: tuple[int, int] = LENGTHS,
    done: Callable[[EmulatedLaunch], None] = lambda _: None,
    checks: bool = False,
    profile: bool | Callable[[str], bool] = True,
    **overrides: Any,
) -> emulator.Session:
    """One forward and backward of experiment `name`; overrides: fields of march.config.ModelConfig."""
    config = experiments.configuration(name, **overrides)
    model = march.build_model(name, impl=implementations(), seed=0, **overrides).to(DTYPES[config.precision]).train()
    generator = torch.Generator().manual_seed(0)

    def ids(length: int) -> torch.Tensor:
        return torch.randint(config.vocab_size, (micro_batch, length), generator=generator)

    inputs = {"input_ids": ids(lengths[0]), "decoder_input_ids": ids(lengths[1]), "labels": ids(lengths[1])}
    options: dict[str, Any] = {"checks": checks, "profile": profile, "raises": False, "done": done}
    with emulator.active(arch, **options) as session:
        loss = model(**inputs, dropout_state=dropout_state(42, 1, 0, "cpu")).loss
        assert loss is not None
        loss.backward()
    return session


# ---------------------------------------------------------------- tables


def short(kernel: str) -> str:
    return kernel.strip("_").removesuffix("_kernel")


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def overview(found: Sequence[Profile]) -> str:
    """Two tables with one line a kernel: instructions and shared memory, global memory."""
    columns = "kernel | launches | instructions | in loops | mma | of formula | conflicts"
    cells = "{name} | {p.launches} | {p.slots:.2M} M | {loops:.0%} | {p.mma:.2M} M | {mma:.2f} | {conflicts:.2f}"
    memory = "kernel | reads MB | fetched | a read | stores MB | written | a store"
    moved = (
        "{name} | {p.read.asked:.1M} | {fetched:.2f} | {sectors:.1f} | {p.written.asked:.1M} | {stored:.2f} | "
        "{stored_sectors:.1f}"
    )
    items = [
        {
            "p": p,
            "name": short(p.kernel),
            "loops": _ratio(p.in_loops, p.slots),
            "mma": _ratio(p.mma, p.formula),
            "conflicts": _ratio(p.passes, p.least),
            "fetched": _ratio(32 * p.read.sectors, p.read.asked),
            "sectors": _ratio(p.read.sectors, p.read.requests),
            "stored": _ratio(32 * p.written.sectors, p.written.asked),
            "stored_sectors": _ratio(p.written.sectors, p.written.requests),
        }
        for p in found
    ]
    return "\n".join(
        [markdown(table(columns, cells, items)), INSTRUCTIONS, "", markdown(table(memory, moved, items)), MEMORY]
    )


INSTRUCTIONS = """\
instructions: of warps, PTX; in loops: innermost ones. mma: of the tensor cores; of formula: over as
many as the formula's FLOPs need. conflicts: passes of shared memory over the fewest for its bytes."""
MEMORY = """\
reads, stores: bytes that all lanes ask of global memory; fetched, written: bytes of its sectors of
32 over them (below 1: lanes ask for the same); a read, a store: sectors of a warp's. No cache yet."""


def details(p: Profile, top: int) -> str:
    """Classes, and the lines with most instructions."""
    classes = ", ".join(f"{kind} {n / p.slots:.1%}" for kind, n in p.classes.items())
    lines = [f"{short(p.kernel)}: {p.slots:,} instructions of warps, {p.mma:,} mma, {p.programs:,} programs"]
    lines += textwrap.wrap(classes, WIDTH, initial_indent="  ", subsequent_indent="  ")
    lines.append("   slots  loop  conflicts  line")
    for line in p.lines[:top]:
        share = f"{line.slots / p.slots:8.1%} {line.in_loops / line.slots:5.0%} "
        conflicts = f"{line.conflicts:10.2f}" if line.least else f"{'-':>10}"
        lines.append(f"{share}{conflicts}  {line.source} {line.code}"[:WIDTH])
    return "\n".join(lines)


# ---------------------------------------------------------------- the command


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1, got {text!r}; one is the smallest")
    return int(text)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = _Parser(prog="python -m bench.emulated", description=(__doc__ or "").split("\n", 1)[0], allow_abbrev=False)
    add = parser.add_argument
    add("--exp", default="Baseline", metavar="NAME", help="an experiment's name (Baseline)")
    add("--kernel", default="*", metavar="PATTERN", help="kernels whose name contains this, or matches a * pattern")
    add("--arch", default="sm_86", metavar="ARCH", help=f"one of {', '.join(EMULATED)} (sm_86)")
    add("--micro-batch", default=1, type=_positive, metavar="N", help="sequences (1)")
    add("--encoder", default=LENGTHS[0], type=_positive, metavar="N", help=f"positions ({LENGTHS[0]})")
    add("--decoder", default=LENGTHS[1], type=_positive, metavar="N", help=f"positions ({LENGTHS[1]})")
    add("--set", action="append", default=[], metavar="FIELD=VALUE", help="another field of the model; may be repeated")
    add("--top", default=5, type=_positive, metavar="N", help="lines of Python for each kernel (5)")
    add("--checks", action="store_true", help="memory, initialisation and race checks too")
    add("--json", action="store_true", help="one JSON object on standard output; see the module's docstring")
    given = parser.parse_args(arguments)
    if triton_interpreted():
        parser.error("expected compiled kernels, got TRITON_INTERPRET=1; start Python without it")
    if given.arch not in EMULATED:
        parser.error(f"--arch: expected one of {', '.join(EMULATED)}, got {given.arch!r}; choose from these")
    try:
        given.overrides = parse_overrides(given.set)
        config = experiments.configuration(given.exp, **given.overrides)
    except ConfigError as error:
        parser.error(str(error))
    for option in ("encoder", "decoder"):
        length = getattr(given, option)
        if length > config.max_length:
            parser.error(f"--{option}: expected at most {config.max_length} positions, got {length}; give fewer")
    pattern = given.kernel if "*" in given.kernel else f"*{given.kernel}*"
    given.chosen = lambda kernel: fnmatch.fnmatch(kernel, pattern)
    sizes = {"micro_batch": given.micro_batch, "encoder_length": given.encoder, "decoder_length": given.decoder}
    given.names = [x.kernel for x in training_step(given.exp, given.arch, compile=False, **sizes, **given.overrides)]
    if not any(map(given.chosen, given.names)):
        known = ", ".join(sorted(map(short, {*given.names})))
        parser.error(f"--kernel: expected a part of one of {known}, got {given.kernel!r}; this step launches these")
    return given


def main(arguments: Sequence[str] | None = None) -> int:
    given = parse(arguments)
    number = 0

    def done(launch: EmulatedLaunch) -> None:
        nonlocal number
        number += 1
        what = f"{number} of {len(given.names)}: {short(launch.recorded.kernel)}, {launch.seconds:.1f} s"
        print(what, file=sys.stderr, flush=True)

    session = emulated_step(
        given.exp, given.arch, micro_batch=given.micro_batch, lengths=(given.encoder, given.decoder),
        done=done, checks=given.checks, profile=given.chosen, **given.overrides,
    )  # fmt: skip
    found = profiles(launch for launch in session.launches if given.chosen(launch.recorded.kernel))
    facts = {
        "status": "counted by the emulator, not timed", "experiment": given.exp, "arch": given.arch,
        "micro_batch": given.micro_batch, "encoder_length": given.encoder, "decoder_length": given.decoder,
        "findings": list(map(str, session.findings)),
    }  # fmt: skip
    if given.json:
        print(json.dumps(facts | {"kernels": [asdict(one) for one in found]}, indent=1))
    else:
        print("\n\n".join([overview(found), *(details(one, given.top) for one in found)]))
        shapes = f"micro-batch {given.micro_batch}, {given.encoder}/{given.decoder} positions"
        print(f"\n{given.exp}, {given.arch}, {shapes}: counted by the emulator, not timed")
        print("\n".join(facts["findings"]), end="")
    return int(bool(session.findings))


if __name__ == "__main__":
    sys.exit(main())
