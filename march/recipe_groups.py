"""The recipe's groups of leaves: what each means, its type and its bounds. No torch here."""

import math
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Count = Annotated[int, Field(ge=1, le=10**9)]
Share = Annotated[float, Field(ge=0, le=1)]
Moment = Annotated[float, Field(ge=0, lt=1)]


class Group(BaseModel):  # a table
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Data(Group):
    """The text: `store`, a prepared folder, or a source with its options (march.data)."""

    source: str | None = None
    vocab_size: Annotated[int, Field(ge=357, le=2**16)] | None = None  # None: what the source or its text has
    directory: str = "data"  # of prepared stores
    store: str | None = None
    files: Annotated[tuple[str, ...], Field(strict=False, min_length=1)] | None = None
    field: str | None = None
    column: str | None = None
    separator: str | None = None
    encoding: str | None = None
    dataset: str | None = None
    config: str | None = None
    split: str | None = None
    revision: str | None = None
    snapshot: str | None = None
    limit: Annotated[int, Field(ge=1, le=10**12)] | None = None
    held_out: Annotated[float, Field(gt=0, lt=0.5)] | None = None

    @model_validator(mode="after")
    def _one_text(self) -> "Data":
        if (self.source is None) is (self.store is None):
            got = "none" if self.source is None else f"{self.source} and {self.store}"
            raise ValueError(f"expected one of data.source and data.store, got {got}; name a source or a folder")
        return self


class Optimizer(Group):
    """decay: what weight_decay is for, every parameter or those of two dimensions and more. muon: for the weights of
    linear layers, with steps as large as AdamW's, which has the rest. momentum: muon's, 0.95 where it is None."""

    name: Literal["adamw", "muon"] = "adamw"
    lr: Annotated[float, Field(gt=0, le=1000)]
    beta1: Moment = 0.9
    beta2: Moment = 0.95
    epsilon: Annotated[float, Field(gt=0, le=1)] = 1e-8
    weight_decay: Annotated[float, Field(ge=0, le=1000)] = 0.1
    decay: Literal["all", "matrices"] = "all"
    momentum: Moment | None = None
    gradient_clipping: Annotated[float, Field(ge=0)] = 1.0  # largest norm; 0: none

    @model_validator(mode="after")
    def _has_momentum(self) -> "Optimizer":
        if self.momentum is not None and self.name != "muon":
            raise ValueError("expected optimizer.momentum with muon, got adamw; its momentum is optimizer.beta1")
        return self


class Schedule(Group):
    """The learning rate's way over `steps` optimiser steps; `factor` has the formulas.

    warmup: steps. final: the last step's share of lr. decay: the share of the steps that warmup_stable_decay falls in.
    """

    name: Literal["constant", "linear", "cosine", "warmup_stable_decay"] = "constant"
    steps: Count
    warmup: Annotated[int, Field(ge=0, le=10**9)] = 0
    final: Share | None = None  # 0 where the schedule falls
    decay: Annotated[float, Field(gt=0, le=1)] | None = None  # 0.2 in warmup_stable_decay

    @model_validator(mode="after")
    def _agrees(self) -> "Schedule":
        if self.name == "constant" and self.final is not None:
            raise ValueError("expected schedule.final with a schedule that falls, got constant; leave final out")
        if self.name != "warmup_stable_decay" and self.decay is not None:
            raise ValueError(f"expected schedule.decay with warmup_stable_decay, got {self.name}; leave decay out")
        if self.warmup + (self._decaying if self.name == "warmup_stable_decay" else 0) > self.steps:
            raise ValueError(
                f"expected schedule.warmup and decay within {self.steps} steps, got a warm-up of {self.warmup}; "
                "use a shorter one"
            )
        return self

    @property
    def _decaying(self) -> int:
        return max(1, round((0.2 if self.decay is None else self.decay) * self.steps))

    def factor(self, step: int) -> float:
        """Of lr in step 1, 2, ...: step / warmup, then with p the share of the rest that is done, and f = final:
        1 (constant), 1 - (1 - f) p (linear), f + (1 - f) (1 + cos(pi p)) / 2 (cosine); warmup_stable_decay is 1, then
        linear over its last steps."""
        if step <= self.warmup:
            return step / self.warmup
        if self.name == "constant":
            return 1.0
        begin = self.steps - self._decaying if self.name == "warmup_stable_decay" else self.warmup
        done = max(0, step - begin) / (self.steps - begin)
        left = (1 + math.cos(math.pi * done)) / 2 if self.name == "cosine" else 1 - done
        final = self.final or 0.0
        return final + (1 - final) * left


class Batch(Group):
    """sequences: of an optimiser step, over all processes; sequence_length: corpus tokens, before span corruption;
    micro: sequences at once in a process, None for what fits."""

    sequences: Count
    sequence_length: Annotated[int, Field(ge=1, le=2**20)]
    micro: Count | None = None

    @property
    def tokens(self) -> int:
        """Corpus tokens that one optimiser step sees."""
        return self.sequences * self.sequence_length


class Evaluation(Group):
    """every: steps; sequences: of the validation split, at most."""

    every: Count
    sequences: Count


class Checkpoints(Group):
    """every: steps, and the last one; keep: the newest so many."""

    every: Count
    keep: Count


class Logging(Group):
    """metrics.jsonl has every step. every: steps from one printed line to the next, None for a twentieth of the run;
    tensorboard: the same numbers for it; trackers: for these too, optional packages; curve: a picture at the end."""

    every: Count | None = None
    tensorboard: bool = True
    trackers: Annotated[tuple[Literal["wandb", "trackio"], ...], Field(strict=False)] | None = None
    curve: bool = True


class Precision(Group):
    """compute: of weights and activations, the experiment's, or `fastest`: bf16 where the experiment asks for it and
    rank 0 measures it faster than float32. communication: of gradients between processes, None for that of compute.
    float32_library: of matmuls on a CPU, None for the faster."""

    compute: Literal["experiment", "fastest", "bf16", "fp32"] = "experiment"
    communication: Literal["bf16", "fp32"] | None = None
    float32_library: str | None = None


class Devices(Group):
    """zero: ZeRO's stage; impl: of the operators."""

    zero: Annotated[int, Field(ge=0, le=2)] = 1
    impl: str = "auto"
