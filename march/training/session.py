"""The parts of a run before and after the loop: data, model, micro-batch, and what the folder says about them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import nn

import kernels
import march
from march import config as configuration
from march import cost, experiments
from march.config import ModelConfig
from march.data import DataError, Examples, SpanCorruption, Store
from march.data.vocabulary import SMALLEST
from march.training import published, selftest
from march.training.arguments import Request
from march.training.budget import Budget
from march.training.checkpoint import Checkpoint, Checkpoints
from march.training.distributed import World, from_first, largest, say, together
from march.training.errors import UsageError
from march.training.loop import Plan, Trainer
from march.training.microbatch import (
    available_memory,
    choose_micro_batch,
    largest_divisor,
    share_of_process,
    total_memory,
    trial,
)
from march.training.plot import plot_curve
from march.training.runfolder import RunFolder, device_name, environment

# Validation is drawn the same way whatever the run's seed, so that seeds can be compared.
EVALUATION_SEED = 0
# Sequences whose labels the unigram entropy is counted over, at most.
ENTROPY_SEQUENCES = 4096


def prepare_data(request: Request, world: World) -> Store:
    """The token store of the request's source; local rank 0 prepares what is not there, the others wait.

    Raises:
        DataError: what march.data finds wrong, and Wikipedia that was not prepared: it takes too long on the side.
    """

    def prepare() -> Store:
        request.data.require_prepared()
        return request.data.open()

    prepares = world.local_rank == 0
    prepared = together(world, prepare, when=prepares)
    store = together(world, lambda: prepared or request.data.open())
    assert store is not None
    content = from_first(world, store.manifest["files"])

    def compare() -> None:
        if store.manifest["files"] != content:
            raise UsageError(f"expected the same data on every node, got others in {store.path}; copy one to all")

    together(world, compare)
    return store


def fit_vocabulary(request: Request, store: Store) -> ModelConfig:
    """The model's configuration with the corpus's vocabulary, or with --set vocab_size where that is larger.

    Raises:
        UsageError: --set vocab_size is smaller than the tokenizer's.
    """
    asked = request.overrides.get("vocab_size")
    if asked is None:
        return configuration.override(request.config, vocab_size=store.vocab_size)
    if asked < store.vocab_size:
        raise UsageError(
            f"expected vocab_size of at least {store.vocab_size}, the tokenizer's in {store.path}, got {asked}; "
            "leave --set vocab_size out"
        )
    return request.config


def require_memory(request: Request, world: World) -> None:
    """UsageError, before anything is done, when weights, gradients and optimiser state alone do not fit.

    A vocabulary that only the text decides counts as the smallest.
    """
    vocabulary = request.overrides.get("vocab_size") or request.data.vocab_size or SMALLEST
    config = configuration.override(request.config, vocab_size=vocabulary)
    parameters = cost.total_parameters(config)
    needed = cost.state_bytes(parameters, request.precision, world.size if request.zero else 1)
    total = total_memory(world)
    if needed > total:
        raise UsageError(
            f"expected a model that fits {total / 2**30:.1f} GiB of memory for each process, got {parameters:,} "
            f"parameters, which need {needed / 2**30:.1f} GiB with gradients and optimiser state; use a smaller "
            "dim_model, num_layers, dim_feedforward or max_length"
        )


def examples(store: Store, split: str, corruption: SpanCorruption, seed: int) -> Examples:
    """The sequences of a split; DataError when there is not one."""
    tokens = store.split(split)
    if tokens.size < corruption.raw_length:
        raise DataError(
            f"at least one sequence of {corruption.raw_length} tokens in each split of {store.path}",
            f"{tokens.size} tokens in {split}",
            "prepare more text" + ("" if corruption.raw_length < 1024 else ", or train with --budget demo"),
        )
    return Examples(tokens, corruption, seed)


def check_lengths(config: ModelConfig, corruption: SpanCorruption) -> None:
    """UsageError when the model has fewer positions than the sequences."""
    longest = max(corruption.input_length, corruption.label_length)
    if longest > config.max_length:
        raise UsageError(
            f"expected max_length of at least {longest}, got {config.max_length}; use --set max_length={longest}"
        )


def identity(request: Request, config: ModelConfig, store: Store) -> dict[str, Any]:
    """What a run must share with the one it continues. Steps, micro-batch, processes, ZeRO and impl may change."""
    free = ("name", "label", "comparable", "steps", "checkpoint_every", "keep_checkpoints")
    budget = {name: value for name, value in request.budget.to_dict().items() if name not in free}
    return {
        "experiment": request.experiment.name,
        "config": configuration.to_dict(config),
        "budget": {"name": request.budget_name, **budget, "seed": request.seed},
        "precision": request.precision,
        "data": {name: entry["sha256"] for name, entry in store.manifest["files"].items()},
    }


def find_run(
    given: str, experiment: str | None, budget: str | None, parent: Path, world: World
) -> tuple[RunFolder, dict[str, Any]]:
    """The folder to continue and its config.json, read by rank 0."""

    def find() -> tuple[str, dict[str, Any]]:
        folder = RunFolder.existing(Path(given)) if given else RunFolder.newest(parent, experiment, budget)
        return str(folder.path), folder.read_config()

    found = together(world, find, when=world.is_first)
    path, config = from_first(world, found)  # type: ignore[misc]
    return RunFolder(Path(path)), config


def create_folder(given: str | None, request: Request, parent: Path, world: World) -> RunFolder:
    """A new run folder, made by rank 0."""

    def create() -> RunFolder:
        return RunFolder.create(parent, request.experiment.name, request.budget_name, Path(given) if given else None)

    folder = together(world, create, when=world.is_first)
    return RunFolder(Path(from_first(world, str(folder.path) if folder else "")))


def load_checkpoint(folder: RunFolder, budget: Budget, world: World) -> Checkpoint:
    """The newest whole checkpoint; rank 0 reads it, the others get its state without the tensors."""
    loaded = together(world, Checkpoints(folder.checkpoints, budget.keep_checkpoints).load, when=world.is_first)
    if loaded is not None and loaded.warning:
        say(world, f"WARNING: {loaded.warning}")
    state = from_first(world, loaded.state if loaded else {})
    return loaded or Checkpoint(folder.checkpoints, state, {})


def check_kernels(request: Request, world: World) -> None:
    """Refuses an --impl that cannot run here, before anything takes time.

    Raises:
        UsageError: an operator cannot run here.
    """

    def check() -> None:
        try:
            kernels.require(request.impl, world.device)
        except kernels.ImplementationError as error:
            raise UsageError(str(error)) from error

    together(world, check)


def fastest_precision(world: World) -> str:
    """What products run fastest in on rank 0's processor, "bf16" or "fp32"; the same for all ranks."""
    measured = together(world, kernels.portable.product_dtype, when=world.is_first)
    return from_first(world, "bf16" if measured == torch.bfloat16 else "fp32")


def build_model(request: Request, config: ModelConfig) -> nn.Module:
    """The experiment's model on the CPU, float32, the same on every rank."""
    torch.manual_seed(request.seed)
    overrides = {**request.overrides, "vocab_size": config.vocab_size, "precision": request.precision}
    return march.build_model(request.experiment.name, impl=request.impl, **overrides)


def fit_micro_batch(
    request: Request, config: ModelConfig, model: nn.Module, corruption: SpanCorruption, world: World
) -> int:
    """--micro-batch, or what the memory estimate allows; tried on the device, halved where it does not fit."""
    share = share_of_process(request.budget.global_batch, world.size)
    lengths = (corruption.input_length, corruption.label_length)
    if request.micro_batch is not None:
        start = request.micro_batch
        if share % start:
            raise UsageError(
                f"expected --micro-batch to divide the {share} sequences of a process, got {start}; "
                f"use {largest_divisor(share, start)}"
            )
    else:
        fits = cost.fitting_micro_batch(
            config,
            *lengths,
            memory_bytes=-largest(world, -float(available_memory(world))),
            impl=request.impl,
            dtype=request.precision,
            zero_world=world.size if request.zero else 1,
        )
        start = largest_divisor(share, fits)
    impl, precision = request.impl, request.precision
    selftest.check(config, lengths, start, impl, precision, world)
    attempt = trial(model, lengths, config.vocab_size, request.precision, request.zero, world)
    try:
        size = choose_micro_batch(attempt, share, start, world, lambda text: say(world, text))
    except kernels.ImplementationError as error:
        raise UsageError(str(error)) from error
    if size != start:  # the same programs as a rule, which are remembered
        selftest.check(config, lengths, size, impl, precision, world)
    if world.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(world.device)  # the trial set memory aside that training does not use
    return size


def peak_share(
    config: ModelConfig, corruption: SpanCorruption, precision: str, world: World
) -> Callable[[float], float | None]:
    """A function from sequences a second of one device to its share of the device's peak; None on a CPU."""
    peak = cost.device_peak(device_name(world), precision) if world.device.type == "cuda" else None
    if peak is None:
        return lambda sequences_per_second: None
    work = cost.training_flops(config, corruption.input_length, corruption.label_length)
    return lambda sequences_per_second: sequences_per_second * work / peak


def count_parameters(model: nn.Module) -> int:
    """Tied ones once, dead ones included."""
    return sum(parameter.numel() for parameter in model.parameters())


def largest_memory(memory: Mapping[str, float], world: World) -> dict[str, float]:
    """The largest of any process, in MiB."""
    return {name: round(largest(world, value), 1) for name, value in memory.items()}


def write_start(
    folder: RunFolder,
    request: Request,
    config: ModelConfig,
    same: Mapping[str, Any],
    model: nn.Module,
    plan: Plan,
    trainer: Trainer,
    store: Store,
    world: World,
) -> None:
    """config.json (of a new run) and an entry in environment.json, before the first step."""
    if not (folder.path / "config.json").exists():
        published_config = experiments.configuration(request.experiment.name)
        folder.write(
            "config.json",
            {
                "experiment": request.experiment.name,
                "control": request.experiment.control,
                "budget": request.budget.to_dict() | {"name": request.budget_name},
                "comparable": request.comparable,
                "config": configuration.to_dict(config),
                "difference": {
                    "base": request.experiment.base,
                    "from_base": experiments.difference(request.experiment.name),
                    "in_this_run": configuration.difference(config, published_config),  # --set, corpus, precision
                },
                "arguments": request.remembered,
                "identity": same,
                "started": datetime.now(UTC).isoformat(),
            },
        )
    folder.add_environment(
        environment(
            world,
            seed=plan.seed,
            precision=plan.precision,
            zero=plan.zero,
            impl=request.impl,
            optimizer=type(trainer.engine.basic_optimizer).__module__,
            impl_chosen=kernels.describe(request.impl, world.device),
            micro_batch=plan.micro_batch,
            accumulation=trainer.accumulation,
            parameters=count_parameters(model),
            first_step=trainer.step + 1,
            train_sequences=len(plan.train),
            validation_sequences=min(len(plan.validation), request.budget.eval_sequences),
            data=str(store.path),
            data_source=store.manifest["source"],
        )
    )


def write_end(
    folder: RunFolder,
    request: Request,
    config: ModelConfig,
    rows: Sequence[Mapping[str, Any]],
    entropy: float,
    world: World,
    end: Mapping[str, Any],
) -> None:
    """summary.json and curve.png, on rank 0; also for a run that was stopped or failed."""
    if not world.is_first:
        return
    folder.write(
        "summary.json",
        {
            "experiment": request.experiment.name,
            "budget": request.budget_name,
            "comparable": request.comparable,
            "ln_vocabulary": math.log(config.vocab_size),
            "unigram_entropy": entropy,
            "processes": world.size,
            "device": device_name(world),
            **end,
        },
    )
    if rows:
        plot_curve(
            rows,
            folder.curve,
            title=request.experiment.name,
            subtitle=(
                f"{request.budget_name} budget: {request.budget.global_batch} x {request.budget.raw_length} tokens a "
                f"step, from {request.data.name}; {config.vocab_size:,} tokens in the vocabulary"
            ),
            vocab_size=config.vocab_size,
            unigram_entropy=entropy,
        )


def closing_lines(
    request: Request, config: ModelConfig, folder: RunFolder, end: Mapping[str, Any], entropy: float
) -> str:
    """What a user reads at the end: losses with their landmarks, speed, memory, and how far to trust them."""
    lines = []
    if end["stopped_by"]:
        lines.append(f"stopped by {end['stopped_by']} after step {end['steps']}; continue with --resume {folder.path}")
    evaluated = "none" if end["eval_loss"] is None else f"{end['eval_loss']:.4f}"
    test = "" if end["test_loss"] is None else f", test {end['test_loss']:.4f}"
    lines.append(
        f"loss {end['first_loss']:.4f} -> {end['final_loss']:.4f}, eval {evaluated}{test} "
        f"(ln V {math.log(config.vocab_size):.4f}, unigram entropy {entropy:.4f})"
    )
    memory = ", ".join(
        f"{name.replace('_', ' ').removesuffix(' mib')} {end[name]:.0f} MiB" for name in end if "memory" in name
    )
    lines.append(f"{end['tokens_per_second']:.0f} tokens/s, {end['process_seconds']:.0f} s in all, {memory}")
    if not end["stopped_by"]:
        if request.comparable and end["eval_loss"] is not None:
            control = request.experiment.control or "Baseline"
            lines.append(
                published.comparison(request.experiment.name, control, end["mean_last_losses"], end["eval_loss"])
            )
        else:
            lines.append("these losses cannot be compared with the published ones, nor with another budget's")
    lines.append(f"{folder.path}: config.json, metrics.jsonl, summary.json, {folder.curve.name}")
    return "\n".join(lines)
