"""How the published runs ran: 1024 sequences a step on 8 RTX A5000, their micro-batches and seconds (from
march.experiments.published)."""

from march import experiments
from march.config import unpublished
from march.experiments.published import PUBLISHED

SEQUENCES, GPUS = 1024, 8
# micro-batches were halved by hand where memory ran out
MICRO_BATCH, HALVED = 64, 32
HALVED_EXPERIMENTS = {"MoreHeadsLessQKVDim", "MoreHeadsLessQKVDimLessLayers", "BaselineFP32"}
HALVED_EXPERIMENTS |= {"Database", "DatabaseFromHeads2", "DatabaseFromDim"}
# never published: what 24 GB hold (docs/ledger.md); the fused step of Best likewise
UNPUBLISHED = {"Best": 1, "BigHeads3": 32}
FUSED = {"Best": 8}
# an evaluation of about 0.42 s every 20 steps is in the published seconds
EVALUATION_SECONDS = 0.42 / 20


def micro_batch(name: str, impl: str = "eager") -> int:
    """Sequences of a micro-batch: of the eager run as it was published, a twin as its base; of the fused step 64."""
    if impl == "triton":
        return FUSED.get(name, MICRO_BATCH)
    base = name.removesuffix("Controlled")
    return HALVED if base in HALVED_EXPERIMENTS else UNPUBLISHED.get(name, MICRO_BATCH)


def published_seconds() -> dict[str, float]:
    """Seconds per step of the published runs, evaluation included, of those whose log has a clean figure."""
    return {n: x.seconds_per_step for n, x in PUBLISHED.items() if x.seconds_per_step is not None and n in known()}


def known() -> list[str]:
    """Experiments of the published architecture: of the others there is no eager model to compare with."""
    return [name for name in experiments.names() if not unpublished(experiments.configuration(name))]
