"""The training loop: one optimiser step after another over the same global batch, whatever the split.

Legend: Le encoder length, Ld decoder length, in tokens; a micro-batch is what one process runs at once.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from march.data import Examples
from march.data.order import Prefetch
from march.training.budget import Budget
from march.training.checkpoint import Checkpoint, Checkpoints
from march.training.distributed import StopRequest, World, largest, together, total
from march.training.engine import build_engine, deepspeed_config, gather_state, scatter_state
from march.training.errors import RunError
from march.training.metrics import LiveLine, Metrics
from march.training.microbatch import is_out_of_memory
from march.training.runfolder import RunFolder


@dataclass(frozen=True)
class Plan:
    """One run, decided: nothing below it reads the command line."""

    experiment: str
    budget: Budget
    seed: int
    precision: str  # "fp32" or "bf16"
    zero: int
    micro_batch: int
    train: Examples
    validation: Examples
    identity: Mapping[str, Any] = field(default_factory=dict)  # what a resumed run must share
    peak_share: Callable[[float], float | None] = lambda sequences_per_second: None  # of one device


@dataclass
class Outcome:
    """How a run ended. Losses in nats per label token; None where there was no evaluation."""

    steps: int
    first_loss: float | None
    final_loss: float | None
    mean_last_losses: float | None  # of the last 50 steps, as the published figures are
    eval_loss: float | None
    training_seconds: float  # steps only, over all starts
    tokens_per_second: float | None  # median over this start's steps
    stopped_by: str | None = None
    exit_code: int = 0


class Trainer:
    """Runs a plan's steps through DeepSpeed's engine; collective, every rank builds one.

    Args:
        model: float32 parameters; `model(input_ids, decoder_input_ids, labels=, dropout_state=).loss`. Cast and
            moved in place.
        folder: where to write, or None to write nothing (tests).
        checkpoint: a loaded checkpoint to continue from.
    """

    def __init__(
        self,
        plan: Plan,
        model: nn.Module,
        world: World,
        folder: RunFolder | None = None,
        checkpoint: Checkpoint | None = None,
        *,
        quiet: bool = False,
    ):
        self.plan, self.world, self.folder, self.quiet = plan, world, folder, quiet
        budget = plan.budget
        config = deepspeed_config(budget, plan.precision, plan.zero, plan.micro_batch, world.size)
        self.accumulation = config["gradient_accumulation_steps"]
        self.engine = build_engine(model, config, budget, world)
        self.step = 0  # finished steps
        self.elapsed = 0.0  # training seconds, over all starts
        self.checkpoints = Checkpoints(folder.checkpoints, budget.keep_checkpoints) if folder else None
        if checkpoint is not None:
            scatter_state(self.engine, checkpoint.tensors, checkpoint.step, world)
            self.step = checkpoint.step
            self.elapsed = float(checkpoint.state["elapsed"])
        self._saved_step = self.step if checkpoint is not None else None
        self._metrics = Metrics(folder.metrics, folder.tensorboard, self.step) if folder and world.is_first else None
        self.rows: list[dict[str, Any]] = list(self._metrics.rows) if self._metrics else []

    def run(self) -> Outcome:
        """Train until the budget's last step, or until a signal; evaluates and saves on the way.

        Raises:
            RunError: non-finite loss or gradients, a checkpoint that cannot be written, out of memory.
        """
        budget, world = self.plan.budget, self.world
        line = LiveLine(budget.steps, self.step, enabled=world.is_first and not self.quiet)
        speeds: list[float] = []
        begin, begin_step = time.perf_counter(), self.step
        stopped: str | None = None
        try:
            with StopRequest() as request, self._batches() as batches:
                for _, micro_batches in batches:
                    row = self._one_step(micro_batches)
                    self.step += 1
                    row = {"step": self.step, **row}
                    self.elapsed += row["seconds"]
                    speeds.append(row["tokens_per_second"])
                    row["elapsed"] = round(self.elapsed, 3)
                    stop_now = bool(largest(world, float(request.reason is not None)))
                    last = self.step == budget.steps
                    if last or self.step % budget.eval_every == 0:
                        row["eval_loss"] = self.evaluate()
                    share = self.plan.peak_share(row["tokens_per_second"] / budget.raw_length / world.size)
                    if share is not None:
                        row["mfu"] = round(share, 4)
                    self._record(row)
                    spent = time.perf_counter() - begin
                    left = spent / (self.step - begin_step) * (budget.steps - self.step)
                    line.show(row, self._last_eval(), share, left)
                    if last or stop_now or self.step % budget.checkpoint_every == 0:
                        self.save()
                    if stop_now and not last:
                        stopped = request.reason or "a signal to another rank"
                        break
                exit_code = (request.exit_code or 143) if stopped else 0
        finally:
            line.close()
            if self._metrics:
                self._metrics.close()
        return self._outcome(speeds, stopped, exit_code)

    def _batches(self) -> Prefetch:
        plan = self.plan
        return Prefetch(
            plan.train,
            plan.seed,
            plan.budget.global_batch,
            rank=self.world.rank,
            world=self.world.size,
            micro_batch=plan.micro_batch,
            start_step=self.step,
            stop_step=plan.budget.steps,
        )

    def _one_step(self, micro_batches: list) -> dict[str, Any]:
        """Forward and backward over this rank's micro-batches, one optimiser step; the step's metrics."""
        begin = time.perf_counter()
        self.engine.train()
        loss_sum = torch.zeros((), dtype=torch.float64, device=self.world.device)
        try:
            for number, micro in enumerate(micro_batches):
                arrays = (micro.batch.input_ids, micro.batch.decoder_input_ids, micro.batch.labels)
                inputs = [self._on_device(array) for array in arrays]
                state = np.array([self.plan.seed, self.step, micro.first_sequence], dtype=np.int64)
                loss = self.engine(*inputs, self._on_device(state))
                self.engine.backward(loss)  # DeepSpeed divides by the accumulation and averages over ranks
                loss_sum += loss.detach()
                if number == len(micro_batches) - 1:
                    mean_loss = self._mean_over_ranks(loss_sum)
                    self._require_finite(mean_loss, "loss")  # before the weights see it
                self.engine.step()
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            half = max(1, self.plan.micro_batch // 2)
            raise RunError(
                f"out of memory in step {self.step + 1} at micro-batch {self.plan.micro_batch}; "
                f"continue with --resume --micro-batch {half}"
            ) from error
        norm = self.engine.get_global_grad_norm()  # None without ZeRO: DeepSpeed then does not keep it
        norm = None if norm is None else float(norm)
        if norm is not None:
            self._require_finite(norm, "gradient norm")
        seconds = time.perf_counter() - begin
        return {
            "loss": mean_loss,
            "lr": self.plan.budget.learning_rate,
            "grad_norm": norm,
            "tokens_per_second": round(self.plan.budget.tokens_per_step / seconds, 1),
            "seconds": round(seconds, 4),
        }

    def _on_device(self, array: np.ndarray) -> Tensor:
        tensor = torch.from_numpy(array)
        if self.world.device.type == "cuda":
            return tensor.pin_memory().to(self.world.device, non_blocking=True)
        return tensor

    def _mean_over_ranks(self, loss_sum: Tensor) -> float:
        """Every micro-batch has the same number of labels, so the mean of means is the global batch's mean."""
        return total(self.world, float(loss_sum))[0] / (self.accumulation * self.world.size)

    def _require_finite(self, value: float, what: str) -> None:
        if not math.isfinite(value):
            saved = f"--resume continues from step {self._saved_step}" if self._saved_step else "nothing was saved yet"
            raise RunError(
                f"{what} is {value} in step {self.step + 1}: stopped instead of skipping it; {saved}; "
                "lower the learning rate, use --precision fp32, or look at the data of this step"
            )

    @torch.no_grad()
    def evaluate(self, examples: Examples | None = None) -> float:
        """Mean loss over `examples` (validation), the same draw every time, without dropout; collective."""
        plan, world = self.plan, self.world
        examples = examples or plan.validation
        number = min(plan.budget.eval_sequences, len(examples))
        stride = plan.micro_batch * world.size
        loss_sum, count = 0.0, 0
        self.engine.eval()
        for begin in range(0, number, stride):
            first = begin + world.rank * plan.micro_batch
            indices = np.arange(first, min(first + plan.micro_batch, number), dtype=np.int64)
            if not len(indices):
                break  # forward has no collectives: a rank may have one micro-batch less
            batch = examples.batch(indices, np.zeros(len(indices), dtype=np.int64))
            arrays = (batch.input_ids, batch.decoder_input_ids, batch.labels)
            loss = self.engine(*[self._on_device(array) for array in arrays], None)
            loss_sum += float(loss) * len(indices)
            count += len(indices)
        self.engine.train()
        loss_total, sequences = total(world, loss_sum, float(count))
        return loss_total / sequences

    def save(self) -> None:
        """Write a checkpoint of the finished steps; collective.

        Raises:
            RunError: it could not be written (on every rank).
        """
        if self.checkpoints is None or self._saved_step == self.step:
            return
        checkpoints = self.checkpoints
        tensors = gather_state(self.engine, self.step, self.world)
        state = {
            "elapsed": self.elapsed,
            "identity": self.plan.identity,
            "world_size": self.world.size,
            "micro_batch": self.plan.micro_batch,
        }
        together(self.world, lambda: checkpoints.save(self.step, tensors or {}, state), when=self.world.is_first)
        self._saved_step = self.step

    def _record(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        if self._metrics:
            self._metrics.add(row)

    def _last_eval(self) -> float | None:
        return next((row["eval_loss"] for row in reversed(self.rows) if row.get("eval_loss") is not None), None)

    def _outcome(self, speeds: list[float], stopped: str | None, exit_code: int) -> Outcome:
        losses = [row["loss"] for row in self.rows]
        return Outcome(
            steps=self.step,
            first_loss=losses[0] if losses else None,
            final_loss=losses[-1] if losses else None,
            mean_last_losses=statistics.fmean(losses[-50:]) if losses else None,
            eval_loss=self._last_eval(),
            training_seconds=self.elapsed,
            tokens_per_second=statistics.median(speeds) if speeds else None,
            stopped_by=stopped,
            exit_code=exit_code,
        )
