"""The published runs: losses, seconds and micro-batches; the table at the end of a `paper` run.

Source: the original experiments' logs, one seed each, one node of 8 RTX A5000 (24 GB), bf16, 1000 steps of 1M
tokens. Columns: mean train loss of the last 50 steps, eval loss at step 1000, seconds per step (None where the
log has no clean figure). Their tokenizer came from WikiText-103, their Wikipedia was the snapshot 20220301:
compare differences to Baseline, not absolute losses.
"""

from __future__ import annotations

from typing import NamedTuple

from march import experiments
from march.config import unpublished

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


class Published(NamedTuple):
    train_loss: float  # nats per label token, mean of steps 951..1000
    eval_loss: float  # nats per label token, step 1000
    seconds_per_step: float | None  # 8 x A5000


PUBLISHED: dict[str, Published] = {
    "APESumOverAverage": Published(5.8502, 5.8470, 0.9253),
    "APEUnitVariance": Published(5.8027, 5.8117, None),
    "Baseline": Published(5.7727, 5.7845, 0.9262),
    "BaselineFP32": Published(5.7856, 5.7958, 1.7620),
    "Database": Published(5.7691, 5.7920, 1.0004),
    "DatabaseFromDim": Published(5.8485, 5.8585, None),
    "DatabaseFromHeads": Published(5.8302, 5.8270, None),
    "DatabaseFromHeads2": Published(5.7958, 5.8020, None),
    "DatabaseFromLayers": Published(5.8097, 5.8117, 0.8660),
    "GELUGatedLinearUnit": Published(5.7718, 5.7917, None),
    "InverseScalingHeads": Published(5.7652, 5.7725, None),
    "InverseScalingHeadsConstant": Published(5.7929, 5.8038, None),
    "LessHeadsMoreQKVDim": Published(5.8389, 5.8350, 0.8338),
    "MixedAct": Published(5.8345, 5.8542, 0.9612),
    "MixedActSOMDropout": Published(5.8154, 5.8310, None),
    "MixedActSumOverMean": Published(5.8114, 5.8270, None),
    "MoreHeadsLessLayers": Published(5.7484, 5.7605, 0.9124),
    "MoreHeadsLessQKVDim": Published(5.7583, 5.7787, None),
    "MoreHeadsLessQKVDimLessLayers": Published(5.7652, 5.7880, 0.9104),
    "NoSelfAttentionResidual": Published(5.9369, 5.9288, None),
    "ReLUGatedLinearUnit": Published(5.7696, 5.7917, 0.9533),
    "ScalingHeads": Published(5.7786, 5.7805, 0.9698),
    "ScalingHeadsConstant": Published(5.7889, 5.7917, None),
    "SiLUGatedLinearUnit": Published(5.7799, 5.7958, None),
    "UnifiedAttention": Published(6.2087, 6.1122, 1.0753),
}


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


# One seed each: a difference in eval loss below this cannot be told from noise.
UNDECIDED_BELOW = 0.015


def comparison(name: str, control: str, train_loss: float, eval_loss: float) -> str:
    """Our losses of experiment `name` beside the published ones, as a text table.

    `control` is the experiment it is to be judged against. Losses in nats per label token.
    """
    reference = PUBLISHED.get(name)
    if reference is None:
        return f"{name} has no published run: train loss {train_loss:.4f}, eval loss {eval_loss:.4f}"
    rows = [
        ("", "ours", "published", "ours - published"),
        ("train loss", train_loss, reference.train_loss, train_loss - reference.train_loss),
        ("eval loss", eval_loss, reference.eval_loss, eval_loss - reference.eval_loss),
    ]
    lines = [_row(row) for row in rows]
    base = PUBLISHED.get(control)
    if base is not None and control != name:
        difference = reference.eval_loss - base.eval_loss
        verdict = "undecided with one seed" if abs(difference) < UNDECIDED_BELOW else "decided"
        lines.append(
            f"published {name} - {control}: {difference:+.4f} ({verdict}); compare with your own {control} run"
        )
    lines.append("published: another tokenizer and Wikipedia snapshot; compare differences to the control")
    return "\n".join(lines)


def _row(cells: tuple[object, ...]) -> str:
    *values, last = cells
    texts = [f"{cell:.4f}" if isinstance(cell, float) else str(cell) for cell in values]
    texts.append(f"{last:+.4f}" if isinstance(last, float) else str(last))
    return f"{texts[0]:12s}" + "".join(f"{text:>18s}" for text in texts[1:])
