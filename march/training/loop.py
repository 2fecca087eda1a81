"""The training loop: one optimiser step after another over the same global batch, whatever the split.

Legend: Le encoder length, Ld decoder length, in tokens; a micro-batch is what one process runs at once.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor, nn

from march.data import Examples
from march.data.order import MicroBatch, Prefetch, step_indices
from march.recipe import Recipe
from march.training.checkpoint import Checkpoint, Checkpoints
from march.training.distributed import World, all_gather, all_reduce_max, all_reduce_sum, log_rank0, run_on_rank
from march.training.engine import (
    build_engine,
    deepspeed_config,
    gather_state,
    global_norm,
    guard_gradients,
    plain_norm,
    scatter_state,
)
from march.training.errors import NonFiniteError, RunError
from march.training.metrics import LiveLine, Metrics
from march.training.microbatch import is_out_of_memory
from march.training.runfolder import RunFolder
from march.training.watch import Watch


@dataclass(frozen=True)
class Plan:
    """One run, decided: nothing below it reads the command line."""

    recipe: Recipe  # its precision.compute is bf16 or fp32
    micro_batch: int
    train: Examples
    validation: Examples
    fingerprint: Mapping[str, Any] = field(default_factory=dict)  # what a resumed run must share
    run: Mapping[str, Any] = field(default_factory=dict)  # config.json, which every checkpoint carries
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
        stop: says when to end; None: a watch of its own in `run`.
    """

    def __init__(
        self,
        plan: Plan,
        model: nn.Module,
        world: World,
        folder: RunFolder | None = None,
        checkpoint: Checkpoint | None = None,
        *,
        stop: Watch | None = None,
        quiet: bool = False,
    ):
        self.plan, self.world, self.folder, self.quiet = plan, world, folder, quiet
        self.stop = stop
        recipe = plan.recipe
        config = deepspeed_config(recipe, plan.micro_batch, world.size)
        self.accumulation = config["gradient_accumulation_steps"]
        self.engine = build_engine(model, config, recipe, world)
        self.step = 0  # finished steps
        self.elapsed = 0.0  # training seconds, over all starts
        self.rows: list[dict[str, Any]] = []
        self.checkpoints = (
            Checkpoints(folder.checkpoints, recipe.checkpoints.keep, plan.fingerprint) if folder else None
        )
        self._saved_step: int | None = None
        if checkpoint is not None:
            scatter_state(self.engine, checkpoint.tensors, checkpoint.step, world)
            self.step = self._saved_step = checkpoint.step
            self.elapsed = checkpoint.state["elapsed"]
            self.rows = list(checkpoint.state["rows"])
            if self.checkpoints:
                self.checkpoints.resumed = checkpoint.path.name
        guard_gradients(self.engine, world, self._non_finite)
        first = folder if world.is_first else None
        self.metrics = first and Metrics.of(first, recipe.logging, plan.run, self.rows)

    def run(self) -> Outcome:
        """Train until the recipe's last step, or until a signal; evaluates and saves on the way.

        Raises:
            RunError: non-finite loss, gradients, weights or evaluation, a checkpoint that cannot be written, out of
                memory, another rank that is gone.
        """
        if self.stop is None:
            with Watch() as self.stop:
                return self.run()
        stop, self.stop.orderly = self.stop, True
        recipe, world = self.plan.recipe, self.world
        shown, every = world.is_first and not self.quiet, recipe.logging.every
        line = LiveLine(recipe.schedule.steps, self.step, enabled=shown, every=every)
        speeds: list[float] = []
        begin, begin_step = time.perf_counter(), self.step
        stopped = False
        try:
            with self._batches() as batches:
                self._catch_up_evaluation()
                for _, micro_batches in batches:
                    row = self._one_step(micro_batches)
                    if row is None:
                        stopped = True
                        self.save()
                        break
                    self.step += 1
                    row = {"step": self.step, **row}
                    self.elapsed += row["seconds"]
                    speeds.append(row["tokens_per_second"])
                    row["elapsed"] = round(self.elapsed, 3)
                    last = self.step == recipe.schedule.steps
                    if self._evaluates(self.step):
                        row["eval_loss"] = self.evaluate(whole=last)
                    share = self.plan.peak_share(row["tokens_per_second"] / recipe.batch.sequence_length / world.size)
                    row |= {} if share is None else {"mfu": round(share, 4)}
                    self._record(row)
                    spent = time.perf_counter() - begin
                    left = spent / (self.step - begin_step) * (recipe.schedule.steps - self.step)
                    line.show(row, self._last_eval(), share, left)
                    stopped = self._must_stop() and not last
                    if last or stopped or self.step % recipe.checkpoints.every == 0:
                        self.save()
                    if stopped:
                        break
        except Exception as error:
            lost = stop.lost(error)
            if lost is not None:
                raise lost from error
            raise
        finally:
            line.close()
            if self.metrics:
                self.metrics.close()
        reason = (stop.reason or "a signal to another rank") if stopped else None
        return self._outcome(speeds, reason, (stop.exit_code or 143) if stopped else 0)

    def _must_stop(self) -> bool:
        """Whether any rank was asked to; collective."""
        if self.stop is not None:
            self.stop.progress()
        return bool(all_reduce_max(self.world, float(self.stop is not None and self.stop.reason is not None)))

    def _evaluates(self, step: int) -> bool:
        return step == self.plan.recipe.schedule.steps or step % self.plan.recipe.evaluation.every == 0

    def _catch_up_evaluation(self) -> None:
        """The evaluation that a signal came before."""
        if self.step and self.step % self.plan.recipe.evaluation.every == 0 and self.rows[-1].get("eval_loss") is None:
            self.rows[-1] = {**self.rows[-1], "eval_loss": self.evaluate()}
            if self.metrics:
                self.metrics.replace(self.rows)

    def _batches(self, stop_step: int | None = None) -> Prefetch:
        plan = self.plan
        return Prefetch(
            plan.train,
            plan.recipe.seed,
            plan.recipe.batch.sequences,
            rank=self.world.rank,
            world=self.world.size,
            micro_batch=plan.micro_batch,
            start_step=self.step,
            stop_step=plan.recipe.schedule.steps if stop_step is None else stop_step,
        )

    def train_to(self, step: int) -> None:
        """The steps up to `step` without evaluation, checkpoints or metrics."""
        with self._batches(step) as batches:
            for _, micro_batches in batches:
                if self._one_step(micro_batches) is None:
                    raise RunError(f"stopped by {self.stop and self.stop.reason} before step {self.step + 1}")
                self.step += 1

    def micro_batches(self) -> list[MicroBatch]:
        """This rank's of the next step."""
        with self._batches(self.step) as batches:
            return batches.collate(self.step)

    def _one_step(self, micro_batches: list) -> dict[str, Any] | None:
        """Forward and backward over this rank's micro-batches, one optimiser step; the step's metrics. None where the
        run was asked to stop before the weights changed."""
        begin = time.perf_counter()
        self.engine.train()
        losses: list[Tensor] = []
        polls = self.world.device.type == "cpu"  # where micro-batches take seconds, and asking costs nothing
        try:
            for number, micro in enumerate(micro_batches):
                if polls and self._must_stop():
                    return None
                loss = self.engine(*self.inputs(micro), self.dropout_state(micro))
                self.engine.backward(loss)  # DeepSpeed divides by the accumulation and averages over ranks
                losses.append(loss.detach().double())
                if number == len(micro_batches) - 1:
                    mean_loss = self._mean_over_ranks(torch.stack(losses).sum())
                    if not math.isfinite(mean_loss):  # before the weights see it
                        self._non_finite("loss", mean_loss, losses)
                    norm = plain_norm(self.engine)
                    if norm is not None and all_reduce_max(self.world, float(not math.isfinite(norm))):
                        self._non_finite("gradient norm", norm)
                    for group in self.engine.basic_optimizer.param_groups:
                        group["lr"] = self.plan.recipe.learning_rate(self.step + 1)
                self.engine.step()
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            half = max(1, self.plan.micro_batch // 2)
            raise RunError(
                f"out of memory in step {self.step + 1} at micro-batch {self.plan.micro_batch}; "
                f"continue with --resume --micro-batch {half}"
            ) from error
        norm = global_norm(self.engine) if norm is None else norm
        if not math.isfinite(norm):  # DeepSpeed skipped the step by itself
            self._non_finite("gradient norm", norm)
        seconds = time.perf_counter() - begin
        return {
            "loss": mean_loss,
            "lr": self.plan.recipe.learning_rate(self.step + 1),
            "grad_norm": norm,
            "tokens_per_second": round(self.plan.recipe.batch.tokens / seconds, 1),
            "seconds": round(seconds, 4),
        }

    def dropout_state(self, micro: MicroBatch) -> Tensor:
        """int64 [3]: seed, step counted from 0, the micro-batch's first sequence."""
        return self._on_device(np.array([self.plan.recipe.seed, self.step, micro.first_sequence], dtype=np.int64))

    def inputs(self, micro: MicroBatch) -> list[Tensor]:
        """input_ids int64 [B, Le], decoder_input_ids and labels int64 [B, Ld]."""
        arrays = (micro.batch.input_ids, micro.batch.decoder_input_ids, micro.batch.labels)
        return [self._on_device(array) for array in arrays]

    def _on_device(self, array: np.ndarray) -> Tensor:
        tensor = torch.from_numpy(array)
        if self.world.device.type == "cuda":
            return tensor.pin_memory().to(self.world.device, non_blocking=True)
        return tensor

    def _mean_over_ranks(self, loss_sum: Tensor) -> float:
        """Every micro-batch has the same number of labels, so the mean of means is the global batch's mean."""
        return all_reduce_sum(self.world, float(loss_sum))[0] / (self.accumulation * self.world.size)

    def sequences(self, losses: Sequence[Tensor] | None = None) -> list[int]:
        """Indices into the training sequences of the step that runs: of all its rows, or of the micro-batches, on any
        rank, whose `losses` are not finite; collective."""
        recipe, size, world = self.plan.recipe, self.plan.micro_batch, self.world
        rows = step_indices(self.step, recipe.batch.sequences, len(self.plan.train), self.plan.recipe.seed)[0].tolist()
        if losses is None:
            return rows
        odd = [number for number, loss in enumerate(losses) if not math.isfinite(float(loss))]
        firsts = [(number * world.size + world.rank) * size for number in odd]
        return [row for first in sorted(chain(*all_gather(world, firsts))) for row in rows[first : first + size]]

    def _non_finite(self, what: str, value: float, losses: Sequence[Tensor] | None = None) -> NoReturn:
        """Every rank comes here, and raises."""
        rows = self.sequences(losses)
        shown = ", ".join(map(str, rows[:8])) + (f" and {len(rows) - 8} more" if len(rows) > 8 else "")
        self._keep_last_good_state()
        error = NonFiniteError(
            f"{what} is {value} in step {self.step + 1}, sequences {shown}: stopped before the weights saw it; "
            f"{self._saved()}; --resume with --replay {self.step + 1} says what is not finite; lower the learning "
            "rate, use --precision fp32, or look at the data of this step"
        )
        error.facts = {"failed_step": self.step + 1, "sequences": rows}
        raise error

    def _saved(self) -> str:
        return (
            "nothing was saved yet" if self._saved_step is None else f"--resume continues from step {self._saved_step}"
        )

    def _keep_last_good_state(self) -> None:
        """The steps before one that was not finite, in addition to what was saved; not weights that are not finite."""
        if self.checkpoints is None or self._saved_step == self.step:
            return
        try:
            self.save(prune=False)
        except RunError as error:
            log_rank0(self.world, f"step {self.step} was not saved: {error}")

    @torch.no_grad()
    def evaluate(self, examples: Examples | None = None, *, whole: bool = False) -> float | None:
        """Mean loss over `examples` (validation), the same draw every time, without dropout; None where the run was
        asked to stop meanwhile, unless `whole`. Collective.

        Raises:
            RunError: it is not finite.
        """
        plan, world = self.plan, self.world
        examples = examples or plan.validation
        number = min(plan.recipe.evaluation.sequences, len(examples))
        stride = plan.micro_batch * world.size
        loss_sum, count = 0.0, 0
        self.engine.eval()
        try:
            for begin in range(0, number, stride):
                if self._must_stop() and not whole:
                    return None
                first = begin + world.rank * plan.micro_batch
                indices = np.arange(first, min(first + plan.micro_batch, number), dtype=np.int64)
                if not len(indices):  # forward has no collectives: a rank may have one micro-batch less
                    continue
                batch = examples.batch(indices, np.zeros(len(indices), dtype=np.int64))
                arrays = (batch.input_ids, batch.decoder_input_ids, batch.labels)
                loss = self.engine(*[self._on_device(array) for array in arrays], None)
                loss_sum += float(loss) * len(indices)
                count += len(indices)
        finally:
            self.engine.train()
        loss_total, sequences = all_reduce_sum(world, loss_sum, float(count))
        mean = loss_total / sequences
        if not math.isfinite(mean):
            raise RunError(
                f"evaluation loss is {mean} after step {self.step}: the weights are not finite or too large; "
                f"{self._saved()}; lower the learning rate, or use --precision fp32"
            )
        return mean

    def save(self, *, prune: bool = True) -> None:
        """Write a checkpoint of the finished steps; collective.

        Raises:
            RunError: it could not be written, or is not finite (on every rank).
        """
        if self.checkpoints is None or self._saved_step == self.step:
            return
        checkpoints = self.checkpoints
        tensors = gather_state(self.engine, self.world)
        state = {
            "elapsed": self.elapsed,
            "fingerprint": self.plan.fingerprint,
            "run": self.plan.run,
            "rows": self.rows,
            "world_size": self.world.size,
            "micro_batch": self.plan.micro_batch,
        }
        run_on_rank(
            self.world, lambda: checkpoints.save(self.step, tensors or {}, state, prune=prune), when=self.world.is_first
        )
        self._saved_step = self.step

    def _record(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        if self.metrics:
            self.metrics.add(row)

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
