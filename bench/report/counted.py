"""The ledger's and the memory estimate's numbers of every experiment, counted once for a state of the sources.

Counting an experiment takes seconds, so the result is kept under .benchmarks/, named by a hash of the sources that it
depends on.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.cache import LENGTHS, sources_hash, write
from march import cost, experiments

STORAGE = Path(".benchmarks")
SOURCES = ("kernels", "march/config.py", "march/cost", "march/model", "march/experiments", "bench/report/counted.py")
MICRO_BATCH, MEMORY_GIB = 64, 24
COUNTED = "counted, not run"
# the device of the published runs, whose data sheet the counts are held against
REFERENCE = cost.DEVICES["a5000"]

Counted = dict[str, Any]


def count(name: str, micro_batch: int = MICRO_BATCH) -> Counted:
    """One experiment through the fused kernels at the paper's lengths: rows of the ledger, bytes, what fits."""
    config = experiments.configuration(name)
    ledger = cost.step_costs(config, *LENGTHS, micro_batch=micro_batch, impl="triton")
    memory = cost.memory(config, *LENGTHS, impl="triton")
    return {
        "micro_batch": micro_batch,
        "precision": ledger.precision,
        "rows": [
            {key: value for key, value in asdict(row).items() if key not in ("names", "moved")} | {"dram": row.bytes}
            for row in ledger.rows
        ],
        "kept": ledger.total().saved,
        "states": memory.states,
        "fixed": memory.fixed,
        "per_sequence": memory.per_sequence,
        "fits": cost.fitting_micro_batch(config, *LENGTHS, MEMORY_GIB * 2**30, "triton"),
    }


def collect(names: Sequence[str]) -> dict[str, Counted]:
    """`count` of every experiment of `names`, from the file of these sources where it is there."""
    path = STORAGE / f"counted_{sources_hash(*SOURCES)}.json"
    known: dict[str, Counted] = json.loads(path.read_text()) if path.exists() else {}
    missing = [name for name in names if name not in known]
    for i, name in enumerate(missing):
        print(f"counting {name} ({i + 1} of {len(missing)})", file=sys.stderr, flush=True)
        known[name] = count(name)
        write(path, json.dumps(known).encode())
    return {name: known[name] for name in names}


def floor(row: dict[str, Any], precision: str) -> float:
    """Seconds that a row takes at least on the reference: products at the peak, or DRAM bytes at the bandwidth."""
    return max(row["flops"] / REFERENCE.peak(precision), row["dram"] / REFERENCE.bandwidth)
