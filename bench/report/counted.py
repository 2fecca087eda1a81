"""The ledger's and the memory estimate's numbers of every experiment."""

from dataclasses import asdict
from typing import Any

from bench.cache import LENGTHS, kept
from march import cost, experiments

MICRO_BATCH, MEMORY_GIB = 64, 24
COUNTED = "counted, not run"
# the device of the published runs, whose data sheet the counts are held against
REFERENCE = cost.DEVICES["a5000"]

Counted = dict[str, Any]


@kept("kernels", "march/config.py", "march/cost", "march/model", "march/experiments", "bench/report/counted.py")
def counted(name: str) -> Counted:
    """One experiment through the fused kernels at the paper's lengths: rows of the ledger, bytes, what fits."""
    config = experiments.configuration(name)
    ledger = cost.step_costs(config, *LENGTHS, micro_batch=MICRO_BATCH, impl="triton")
    memory = cost.memory(config, *LENGTHS, impl="triton")
    return {
        "micro_batch": MICRO_BATCH,
        "precision": ledger.precision,
        "rows": [asdict(row) | {"bytes": row.bytes} for row in ledger.rows],
        "kept": ledger.step.saved,
        **asdict(memory),
        "fits": cost.fitting_micro_batch(config, *LENGTHS, MEMORY_GIB * 2**30, "triton"),
    }


def floor(row: dict[str, Any], precision: str) -> float:
    """Seconds that a row takes at least on the reference: products at the peak, or bytes at the bandwidth."""
    return max(row["flops"] / REFERENCE.peak(precision), row["bytes"] / REFERENCE.bandwidth)
