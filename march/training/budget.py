"""Training budgets: how much data, how many steps, which optimiser settings. Plain data, no torch.

A budget fixes everything about a run that is not the architecture. Two runs may be compared when their
budgets are equal, whatever the number of processes or the micro-batch.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace

from march.training.errors import UsageError

# A precision: bf16 where the experiment asks for it and rank 0 measures it faster than float32, else fp32.
FASTEST = "fastest"


@dataclass(frozen=True)
class Budget:
    """One budget. Lengths are in tokens, batches in sequences, `steps` in optimiser steps."""

    name: str
    label: str  # one line, printed with every run and written into its folder
    comparable: bool  # may its losses stand beside the published ones?
    steps: int
    global_batch: int  # sequences per optimiser step, over all processes
    raw_length: int  # corpus tokens in a sequence, before span corruption
    eval_every: int  # steps
    eval_sequences: int
    learning_rate: float  # constant from step 1
    source: str  # of the data
    vocab_size: int | None  # None: whatever fits the corpus
    precision: str | None  # None: the experiment's own; or FASTEST
    checkpoint_every: int  # steps; the last step is always saved
    keep_checkpoints: int
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    weight_decay: float = 0.1  # on every parameter
    gradient_clipping: float = 1.0
    seed: int = 42

    @property
    def tokens_per_step(self) -> int:
        """Corpus tokens (before corruption) that one optimiser step sees."""
        return self.global_batch * self.raw_length

    def to_dict(self) -> dict[str, object]:
        return asdict(self)


PAPER = Budget(
    name="paper",
    label="the published recipe: 1000 steps of 1024 sequences of 1024 tokens",
    comparable=True,
    steps=1000,
    global_batch=1024,
    raw_length=1024,
    eval_every=20,
    eval_sequences=1000,
    learning_rate=1e-4,
    source="wikipedia",
    vocab_size=30_000,
    precision=None,
    checkpoint_every=100,
    keep_checkpoints=2,
)

# The architecture and its widths are the experiment's; only lengths, batch, steps and learning rate shrink.
DEMO = Budget(
    name="demo",
    label="a miniature for a CPU: short sequences, small batches, few steps; no architecture can be judged by it",
    comparable=False,
    steps=250,
    global_batch=16,
    raw_length=128,
    eval_every=25,
    eval_sequences=64,
    learning_rate=1e-3,
    source="excerpt",
    vocab_size=None,
    precision=FASTEST,
    checkpoint_every=125,
    keep_checkpoints=1,
)

BUDGETS = {budget.name: budget for budget in (PAPER, DEMO)}


def get_budget(name: str, *, steps: int | None = None, checkpoint_every: int | None = None) -> Budget:
    """The budget called `name`, with another number of steps or another checkpoint interval where given.

    A `paper` budget with fewer steps is no longer comparable and says so in its label.

    Raises:
        UsageError: unknown name.
    """
    if name not in BUDGETS:
        raise UsageError(f"expected a budget among {', '.join(BUDGETS)}, got {name!r}; use --budget NAME")
    budget = BUDGETS[name]
    if checkpoint_every is not None:
        budget = replace(budget, checkpoint_every=checkpoint_every)
    if steps is not None and steps != budget.steps:
        budget = replace(budget, steps=steps, comparable=False, label=f"{budget.label}; {steps} steps instead")
    return budget
