"""Projected seconds of a training step: counted work, a data sheet, and efficiencies fitted to published eager runs.

    python -m bench.projection --exp NAME[,NAME]|all --impl eager|triton [--device a5000] [--gpus 8] [--json]
    python -m bench.projection --markdown > docs/projection.md        the whole page, every table of it
    python -m bench.projection --count        what kernels execute, by the emulator, for bench/projection/emulated.json

A projection, never a measurement, and so called in every table, title and file name. 1024 sequences a step at 921 and
206 positions; exchange and optimiser included. Counts are kept under build/counts by a hash of the sources
they follow from. --count executes a part of each launch that the page and the given experiments need and the file
lacks, and drops the others; a launch that the file lacks is projected from its main loop alone, and named. --kernels:
kernel by kernel. --fit: the fit and its leave-one-out errors alone.

--json prints a list, one object for each experiment and implementation:
    status              "projection, not measured"
    experiment, impl    names; impl "eager" (the published runs' manner) or "triton" (the fused kernels)
    device, gpus        key of march.cost.DEVICES; number
    seconds, low, high  of a step; low to high holds 90% of what the fit's error implies
    by_operator         {operator: seconds}, adds up to seconds. In eager also "host" and "evaluation"; in both
                        "exchange" (gradients and weights), "optimizer", "gradient sums" (accumulation in float32)
    published_seconds   of the published run (8 RTX A5000, evaluation included, as in eager seconds), or null
    arithmetic_seconds  its FLOPs at the data sheet's peak
    micro_batch, micro_batches, precision, tflop, dram_bytes    of a step on one GPU
    static_slots        kernels with products whose issue slots are their main loop's alone
--save [FILE] writes the same list to a file with "projection" in its name, by default
build/projection/projection_DEVICE_GPUS.json.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from bench.cache import ROOT
from bench.projection import executed, tables
from bench.projection.collect import IMPLEMENTATIONS, product_launches
from bench.projection.model import EXCHANGE_BANDWIDTH
from bench.projection.project import FITTED, batch_of, calibrate, project
from kernels.emulator.session import EMULATED
from march import experiments
from march.config import ConfigError
from march.cost.devices import DEVICES
from march.predecessor.runs import GPUS, SEQUENCES, known


def _among(known: Iterable[str], several: bool = False) -> Callable[[str], str | list[str]]:
    """A text, or its parts between commas, of `known`."""

    def parse(text: str) -> str | list[str]:
        parts = text.split(",") if several else [text]
        for one in parts:
            if one not in known:
                raise argparse.ArgumentTypeError(f"expected one of {', '.join(known)}, got {one!r}; choose from these")
        return parts if several else text

    return parse


def _names(text: str) -> list[str]:
    try:
        return known() if text == "all" else [experiments.get(name).name for name in text.split(",")]
    except ConfigError as error:
        raise argparse.ArgumentTypeError(f"{error}; `python train.py --list` names them all, or give all") from error


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.projection", description=(__doc__ or "").split("\n", 1)[0])
    add = parser.add_argument
    add("--exp", type=_names, default="Baseline", help="an experiment's name; several with commas; or 'all'")
    add(
        "--impl",
        type=_among(IMPLEMENTATIONS, True),
        default="eager,triton",
        help="eager, triton or eager,triton (both)",
    )
    add("--device", type=_among(DEVICES), default="a5000", help=f"one of {', '.join(DEVICES)} (a5000)")
    add("--gpus", type=int, default=GPUS, metavar="N", help=f"devices in one node ({GPUS})")
    add("--micro-batch", type=int, metavar="N", help="sequences; by default the published run's, 64 fused")
    add("--exchange", type=float, default=EXCHANGE_BANDWIDTH / 1e9, metavar="GB/S", help="bus bandwidth between GPUs")
    add("--kernels", action="store_true", help="also kernel by kernel")
    add("--fit", action="store_true", help="the fitted efficiencies and the leave-one-out errors alone")
    add("--count", action="store_true", help="emulated.json anew, for the page and --exp, --device, --micro-batch")
    add("--markdown", action="store_true", help="docs/projection.md, whole, on standard output")
    add("--json", action="store_true", help="a JSON list on standard output; see the module's docstring")
    add("--save", nargs="?", const="", metavar="FILE", help="write that list to a *projection*.json file")
    given = parser.parse_args(arguments)
    if not 1 <= given.gpus <= SEQUENCES:
        parser.error(
            f"--gpus: expected 1 to {SEQUENCES}, got {given.gpus}; a step has {SEQUENCES} sequences to share out"
        )
    if given.micro_batch is not None and given.micro_batch < 1:
        parser.error(f"--micro-batch: expected at least 1, got {given.micro_batch}; one sequence is the smallest")
    if not given.exchange > 0:
        parser.error(f"--exchange: expected GB/s above 0, got {given.exchange}; for example 12")
    if given.save is not None:
        path = given.save = Path(
            given.save or ROOT / "build" / "projection" / f"projection_{given.device}_{given.gpus}.json"
        )
        if "projection" not in path.name or path.suffix != ".json":
            parser.error(
                f"--save: expected a name with 'projection' ending in .json, got {path.name!r}; it is no measurement"
            )
    return given


def main(arguments: Sequence[str] | None = None) -> int:
    given = parse(arguments)

    def progress(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    if given.count:
        wanted = {(name, FITTED[0], batch_of(name, "triton")) for name in known()}
        wanted |= {("Baseline", device, batch_of("Baseline", "triton")) for device in tables.OTHERS}
        wanted |= {(name, given.device, batch_of(name, "triton", given.gpus, given.micro_batch)) for name in given.exp}
        steps = sorted({(name, batch, DEVICES[device].arch) for name, device, batch in wanted})
        steps = [step for step in steps if step[2] in EMULATED]
        executed.save((launch for step in steps for launch in product_launches(*step)), progress)
        return 0
    calibration = calibrate()
    if given.markdown:
        print(tables.page(calibration), end="")
        return 0
    if given.fit:
        print(tables.efficiencies(calibration) + "\n\n" + tables.left_out(calibration))
        return 0
    found = [
        project(name, impl, calibration, given.device, given.gpus, given.micro_batch, given.exchange * 1e9)
        for name in given.exp
        for impl in given.impl
    ]
    for one in found:
        if one.counts.uncounted:
            progress(tables.uncounted(one))
    text = json.dumps([one.to_dict() for one in found], indent=1)
    if given.save is not None:
        given.save.parent.mkdir(parents=True, exist_ok=True)
        given.save.write_text(text + "\n", encoding="utf-8")
        progress(f"wrote {given.save}")
    if given.json:
        print(text)
        return 0
    print(tables.predictions(found))
    if given.kernels or len(given.exp) == 1:
        for one in found:
            print("\n" + tables.operators(one))
    if given.kernels:
        for one in found:
            print("\n" + tables.kernels(one, calibration))
    return 0


if __name__ == "__main__":
    sys.exit(main())
