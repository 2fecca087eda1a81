"""What the fused kernels compile to, without a GPU: one row a kernel and configuration, with its verdict.

    python -m bench.compiled [--arch sm_86] [--exp Baseline] [--kernel PATTERN] [--padding] [--brief] [--json]
        [--save DIR]

A whole training step of the experiment, forward and backward, at the paper's shapes runs on meta tensors through the
launch code of a GPU run; every kernel that it launches is compiled for the target. Nothing is executed: these are
counts of instructions and resources, no speeds. Exit status 1 where a limit is broken or an operator has no fused
kernel.
"""

import argparse
import datetime
import fnmatch
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

import kernels
import march
from bench.cache import DECODER_LENGTH, ENCODER_LENGTH
from bench.tables import markdown
from kernels.compile_only import ARCHITECTURES, Launch, recording, reports, save, table
from kernels.compile_only.report import Report
from kernels.compile_only.sass import tool
from kernels.dispatch import OPERATORS, fused_available
from march import experiments
from march.cost.step import DTYPES, inputs

MICRO_BATCH = 64


def missing_operators() -> list[str]:
    """Operators without a fused kernel in this installation."""
    return [operator for operator in OPERATORS if not fused_available(operator)]


def implementations() -> dict[str, str]:
    """The fused kernels of this installation, and the torch path where one is missing."""
    return {operator: "triton" if fused_available(operator) else "torch" for operator in OPERATORS}


def training_step(
    name: str,
    arch: str = "sm_86",
    *,
    micro_batch: int = MICRO_BATCH,
    encoder_length: int = ENCODER_LENGTH,
    decoder_length: int = DECODER_LENGTH,
    padding: bool = False,
    compile: bool | Callable[[str], bool] = True,
    **overrides: Any,
) -> list[Launch]:
    """Launches of one forward and backward of experiment `name` in its precision, with dropout.

    padding: give the encoder's padding mask; training's packed sequences have none.

    Operators without a fused kernel (`missing_operators`) take the torch path and do not appear. overrides: fields of
    march.config.ModelConfig.
    """
    config = experiments.configuration(name, **overrides)
    with torch.device("meta"):
        model = march.build_model(name, impl=implementations(), **overrides).to(DTYPES[config.precision]).train()
        mask = torch.empty(micro_batch, encoder_length, dtype=torch.bool) if padding else None
    batch = inputs(config, encoder_length, decoder_length, micro_batch) | {"attention_mask": mask}
    with recording(arch, compile) as launches:
        loss = model(**batch).loss
        assert loss is not None
        loss.backward()
    return launches


def versions() -> dict[str, str]:
    """What compiled: Triton, its ptxas, torch."""
    import triton

    output = subprocess.run([tool("ptxas"), "--version"], check=True, capture_output=True, text=True).stdout
    release = next((line.split("release ")[1].split(",")[0] for line in output.splitlines() if "release" in line), "?")
    return {"triton": triton.__version__, "ptxas": release, "torch": torch.__version__, "kernels": kernels.__version__}


def brief(name: str, arch: str, launches: Sequence[Launch], rows: Sequence[Report]) -> dict[str, str]:
    """One line of the digest: what a step of an experiment compiles to on a target, by its worst kernel."""
    slots = [row.main_loop.issue_per_hmma for row in rows if row.main_loop and "float32" not in row.dtype]
    spilling = sorted({row.kernel.strip("_") for row in rows if row.spill_stores or row.spill_loads or row.local})
    failures = sorted({failure for row in rows for failure in row.failures})
    return {
        "experiment": name,
        "target": arch,
        "launches": str(len(launches)),
        "programs": str(len(rows)),
        "most registers": str(max((row.registers for row in rows), default=0)),
        "spilling": ", ".join(spilling) or "-",
        "most shared": str(max((row.shared for row in rows), default=0)),
        "fewest warps an SM": str(min((row.warps_per_sm for row in rows if row.hmma), default=0)),
        # the loops of wgmma and tcgen05 have no HMMA of one warp to count by
        "most slots/HMMA": f"{max(slots):.2f}" if slots and arch not in ("sm_90", "sm_100") else "-",
        "atomics": str(sum(row.atomics for row in rows)),
        "verdict": "FAIL: " + "; ".join(failures) if failures else "pass" if rows else "no fused kernel",
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.compiled", description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--arch", default="sm_86", choices=(*ARCHITECTURES, "all"))
    parser.add_argument("--exp", default="Baseline", help="an experiment's name; several with commas; or 'all'")
    parser.add_argument("--kernel", default="*", help="only kernels whose name contains this, or matches a * pattern")
    parser.add_argument("--padding", action="store_true", help="with a padding mask, which training's sequences lack")
    parser.add_argument("--brief", action="store_true", help="one line an experiment and target instead of tables")
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    parser.add_argument("--save", type=Path, metavar="DIR", help="keep cubins, disassembly, PTX and TTGIR there")
    given = parser.parse_args(arguments)
    names = list(experiments.names()) if given.exp == "all" else given.exp.split(",")
    architectures = ARCHITECTURES if given.arch == "all" else (given.arch,)
    pattern = given.kernel if "*" in given.kernel else f"*{given.kernel}*"

    def chosen(kernel: str) -> bool:
        return fnmatch.fnmatch(kernel, pattern)

    missing = missing_operators()
    failed = bool(missing)
    results = []
    lines: list[dict[str, str]] = []
    for arch in architectures:
        for name in names:
            step = training_step(name, arch, padding=given.padding, compile=chosen)
            launches = [launch for launch in step if launch.compiled is not None]
            rows = reports(launches)
            failed |= any(not row.passed for row in rows) or not rows
            results.append({"experiment": name, "arch": arch, "rows": [row.row() for row in rows]})
            if given.save:
                save(launches, given.save / arch / name)
            if given.brief:
                lines.append(brief(name, arch, launches, rows))
                print(f"{name}, {arch}: {lines[-1]['verdict']}", file=sys.stderr)
            elif not given.json:
                print(f"{name}, {arch}: {len(launches)} launches of {len(rows)} compiled programs; compiled, not run")
                print(table(rows) + "\n" if rows else "no fused kernel was launched\n")
    facts = {"date": datetime.date.today().isoformat(), "versions": versions(), "status": "compiled, not run"}
    shapes = {
        "micro_batch": MICRO_BATCH,
        "encoder_length": ENCODER_LENGTH,
        "decoder_length": DECODER_LENGTH,
        "padding": given.padding,
    }
    if given.json:
        print(json.dumps({**facts, **shapes, "missing": missing, "passed": not failed, "results": results}, indent=1))
    else:
        if lines:
            print(markdown(lines) + "\n\ncompiled, not run")
        print(f"{facts['date']}, " + ", ".join(f"{key} {value}" for key, value in versions().items()))
        print(f"micro-batch {MICRO_BATCH}, encoder {ENCODER_LENGTH}, decoder {DECODER_LENGTH} positions")
        if missing:
            print(f"operators without a fused kernel: {', '.join(missing)}")
        print("FAIL" if failed else "pass")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
