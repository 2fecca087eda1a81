"""The ledger's and the memory estimate's numbers of every experiment, counted once for a state of the sources.

Counting an experiment takes seconds, so the result is kept under .benchmarks/, named by a hash of the sources that it
depends on.
"""

import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.ledger import DECODER_LENGTH, ENCODER_LENGTH
from bench.report.load import STORAGE
from march import cost, experiments

MICRO_BATCH, MEMORY_GIB = 64, 24
ROOT = Path(__file__).resolve().parents[2]

Counted = dict[str, Any]


def _fingerprint() -> str:
    digest = hashlib.sha256()
    for folder in ("kernels", "march/cost", "march/model", "march/experiments"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def count(name: str, micro_batch: int = MICRO_BATCH) -> Counted:
    """One experiment through the fused kernels at the paper's lengths: rows of the ledger, bytes, what fits."""
    config = experiments.configuration(name)
    ledger = cost.step_ledger(config, ENCODER_LENGTH, DECODER_LENGTH, micro_batch=micro_batch, impl="triton")
    memory = cost.memory(config, ENCODER_LENGTH, DECODER_LENGTH, impl="triton")
    return {
        "micro_batch": micro_batch,
        "precision": ledger.precision,
        "rows": [
            {key: value for key, value in asdict(row).items() if key not in ("names", "moved")} | {"dram": row.dram}
            for row in ledger.rows
        ],
        "kept": ledger.saved,
        "states": memory.states,
        "fixed": memory.fixed,
        "per_sequence": memory.per_sequence,
        "fits": cost.fitting_micro_batch(config, ENCODER_LENGTH, DECODER_LENGTH, MEMORY_GIB * 2**30, "triton"),
    }


def collect(names: Sequence[str]) -> dict[str, Counted]:
    """`count` of every experiment of `names`, from the file of these sources where it is there."""
    path = STORAGE / f"counted_{_fingerprint()}.json"
    known: dict[str, Counted] = json.loads(path.read_text()) if path.exists() else {}
    missing = [name for name in names if name not in known]
    for i, name in enumerate(missing):
        print(f"counting {name} ({i + 1} of {len(missing)})", file=sys.stderr, flush=True)
        known[name] = count(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(known))
    return {name: known[name] for name in names}


def floor(row: dict[str, Any], device: cost.Device, precision: str) -> float:
    """Seconds that a row takes at least on `device`: its products at the peak, or its DRAM bytes at the bandwidth."""
    return max(row["flops"] / device.peak(precision), row["dram"] / device.bandwidth)
