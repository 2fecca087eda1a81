"""How the published runs ran: micro-batches, seconds a step. Their figures are in march.experiments.published."""

from __future__ import annotations

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
