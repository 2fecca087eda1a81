"""The parts of a run before and after the loop: data, model, micro-batch, and what the folder says about them."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

import kernels
import march
from kernels.dispatch import OPERATORS, choice
from march import config as configuration
from march import cost
from march.config import ModelConfig
from march.data import DataError, Examples, SpanCorruption, TokenDataset
from march.data.description import Description
from march.data.vocabulary import SMALLEST
from march.recipe import Recipe, typed
from march.training import selftest
from march.training.arguments import implementation
from march.training.checkpoint import Checkpoint, Checkpoints
from march.training.distributed import World, all_reduce_max, broadcast_object, log_rank0, run_on_rank
from march.training.errors import UsageError
from march.training.files import read_json
from march.training.microbatch import (
    available_memory,
    choose_micro_batch,
    largest_divisor,
    sequence_bytes,
    share_of_process,
    total_memory,
    trial,
)
from march.training.runfolder import RunFolder, device_name

# Validation is drawn the same way whatever the run's seed, so that seeds can be compared.
EVALUATION_SEED = 0
# Sequences whose labels the unigram entropy is counted over, at most.
ENTROPY_SEQUENCES = 4096


def prepare_data(recipe: Recipe, world: World) -> TokenDataset:
    """The token store of the recipe's text; local rank 0 prepares what is not there, the others wait.

    Raises:
        DataError: what march.data finds wrong, and Wikipedia that was not prepared: it takes too long on the side.
    """

    def prepare() -> TokenDataset:
        Description.of(recipe.data).require_prepared()
        return Description.of(recipe.data).open()

    prepares = world.local_rank == 0
    prepared = run_on_rank(world, prepare, when=prepares)
    store = run_on_rank(world, lambda: prepared or Description.of(recipe.data).open())
    assert store is not None
    content = broadcast_object(world, store.manifest["files"])

    def compare() -> None:
        if store.manifest["files"] != content:
            raise UsageError(f"expected the same data on every node, got others in {store.path}; copy one to all")

    run_on_rank(world, compare)
    return store


def fit_vocabulary(recipe: Recipe, store: TokenDataset) -> ModelConfig:
    """The model's configuration with the corpus's vocabulary, or with --set vocab_size where that is larger.

    Raises:
        UsageError: --set vocab_size is smaller than the tokenizer's.
    """
    asked = recipe.model.get("vocab_size")
    if asked is None:
        return configuration.override(recipe.config, vocab_size=store.vocab_size)
    if asked < store.vocab_size:
        raise UsageError(
            f"expected vocab_size of at least {store.vocab_size}, the tokenizer's in {store.path}, got {asked}; "
            "leave --set vocab_size out"
        )
    return recipe.config


def require_memory(recipe: Recipe, world: World) -> None:
    """UsageError, before anything is done, when weights, gradients and optimiser state alone do not fit.

    A vocabulary that only the text decides counts as the smallest.
    """
    vocabulary = recipe.model.get("vocab_size") or recipe.data.vocab_size or SMALLEST
    config = configuration.override(recipe.config, vocab_size=vocabulary)
    parameters = cost.total_parameters(config)
    needed = cost.state_bytes(parameters, recipe.precision.compute, world.size if recipe.devices.zero else 1)
    total = total_memory(world)
    if needed > total:
        raise UsageError(
            f"expected a model that fits {total / 2**30:.1f} GiB of memory for each process, got {parameters:,} "
            f"parameters, which need {needed / 2**30:.1f} GiB with gradients and optimiser state; use a smaller "
            "dim_model, num_layers, dim_feedforward or max_length"
        )


def examples(store: TokenDataset, split: str, corruption: SpanCorruption, seed: int) -> Examples:
    """The sequences of a split; DataError when there is not one."""
    tokens = store.split(split)
    if tokens.size < corruption.sequence_length:
        raise DataError(
            f"at least one sequence of {corruption.sequence_length} tokens in each split of {store.path}",
            f"{tokens.size} tokens in {split}",
            "prepare more text" + ("" if corruption.sequence_length < 1024 else ", or train with --recipe demo"),
        )
    return Examples(tokens, corruption, seed)


def check_lengths(config: ModelConfig, corruption: SpanCorruption) -> None:
    """UsageError when the model has fewer positions than the sequences."""
    longest = max(corruption.input_length, corruption.label_length)
    if longest > config.max_length:
        raise UsageError(
            f"expected max_length of at least {longest}, got {config.max_length}; use --set max_length={longest}"
        )


def resume_command(folder: RunFolder, world: World) -> str:
    """What continues the run, in one line."""
    launcher = "python" if world.size == 1 else f"deepspeed --num_gpus {world.local_size}"
    return f"{launcher} train.py --resume {shlex.quote(str(folder.path))}"


def refuse_other_file(recipe: Recipe, before: Mapping[str, Any], accepted: bool, world: World) -> None:
    """UsageError where the experiment's file is not the one that the run began with, or not the same on every node."""
    name, ours, theirs = recipe.entry.file, recipe.entry.sha256, (before.get("file") or {}).get("sha256")

    def compare() -> None:
        if from_rank_0 != ours:
            raise UsageError(f"expected the same file on every node, got another {name}; copy one to all")
        if before and ours != theirs and not accepted:
            raise UsageError(
                f"expected {name} as the run has it (sha256 {str(theirs)[:16]}), got {str(ours)[:16]}; its folder "
                "has a copy to take back, --accept-changed-file continues with the file as it is"
            )

    from_rank_0 = broadcast_object(world, ours)
    run_on_rank(world, compare)


def kept_file(folder: RunFolder, experiment: str) -> str:
    """The experiment as a run remembers it: of the run's copy where its file has gone."""
    path, _, name = experiment.rpartition(":")
    kept = folder.path / Path(path).name
    return f"{kept}:{name}" if path and not Path(path).exists() and kept.exists() else experiment


def find_run(
    given: str | None, experiment: str | None, recipe: str | None, parent: Path, before: int | None, world: World
) -> tuple[RunFolder, Checkpoint]:
    """The folder to continue, locked, and its newest whole checkpoint (`before`: with fewer steps than that).

    Rank 0 reads it, the others get its state without the tensors. All that a run was is in the checkpoint; config.json
    only tells, where it can be read, whose checkpoints these must be.
    """

    def find() -> tuple[RunFolder, Checkpoint]:
        folder = RunFolder.newest(parent, experiment, recipe) if given is None else RunFolder.existing(Path(given))
        fingerprint = None
        try:
            fingerprint = read_json(folder.path / "config.json").get("fingerprint")
        except UsageError as error:
            log_rank0(world, f"WARNING: {error}: written anew from the checkpoint")
        if not isinstance(fingerprint, dict):
            fingerprint = None
        checkpoint = Checkpoints(folder.checkpoints, 1, fingerprint).load(before=before, check=check_state)
        if checkpoint.warning:
            log_rank0(world, f"WARNING: {checkpoint.warning}")
        return folder, checkpoint

    found = run_on_rank(world, find, when=world.is_first)
    path, tag, state = broadcast_object(world, (found[0].path, found[1].path, found[1].state) if found else None)  # type: ignore[misc]
    return found or (RunFolder(path), Checkpoint(tag, state, {}))


def check_state(checkpoint: Checkpoint) -> None:
    """UsageError when a whole checkpoint's state lacks what a run continues from."""
    state, step = checkpoint.state, checkpoint.step
    run = state.get("run")
    rows = state.get("rows")
    whole = (
        isinstance(run, dict)
        and isinstance(run.get("recipe"), dict)
        and isinstance(run.get("numerics"), dict)
        and isinstance(state.get("fingerprint"), dict)
        and isinstance(state.get("elapsed"), float)
        and isinstance(rows, list)
        and all(isinstance(row, dict) and isinstance(row.get("loss"), float) for row in rows)
        and [row.get("step") for row in rows] == list(range(1, step + 1))
    )
    if not whole:
        raise UsageError(
            f"{checkpoint.path.name}: expected a run's settings and metrics of {step} steps in state.json, got others; "
            "use another checkpoint"
        )
    assert run is not None
    typed(run["recipe"], "the run's recipe")


def create_folder(given: str | None, recipe: Recipe, parent: Path, world: World) -> RunFolder:
    """A new run folder, made and locked by rank 0."""

    def create() -> RunFolder:
        return RunFolder.create(parent, recipe.entry.name, recipe.name, recipe.seed, Path(given) if given else None)

    folder = run_on_rank(world, create, when=world.is_first)
    path = broadcast_object(world, folder.path if folder else None)
    return folder or RunFolder(path)  # type: ignore[arg-type]


def check_kernels(recipe: Recipe, world: World) -> None:
    """Refuses an --impl that cannot run here, before anything takes time.

    Raises:
        UsageError: an operator cannot run here.
    """

    def check() -> None:
        try:
            kernels.require(implementation(recipe), world.device)
        except kernels.ImplementationError as error:
            raise UsageError(str(error)) from error

    run_on_rank(world, check)


def fastest_precision(world: World) -> str:
    """What products run fastest in on rank 0's processor, "bf16" or "fp32"; the same for all ranks."""
    measured = run_on_rank(world, kernels.portable.product_dtype, when=world.is_first)
    return broadcast_object(world, "bf16" if measured == torch.bfloat16 else "fp32")


def fix_numerics(stored: Mapping[str, Any] | None, library: str | None, world: World) -> dict[str, Any]:
    """What decides a run's last bits beside its settings: measured or looked up by rank 0 when a run starts, kept by
    every rank and every resume, said where another machine cannot keep it."""
    threads = torch.get_num_threads()
    now: dict[str, Any] = {"device": device_name(world), "processes": world.size, "threads": threads}
    if world.device.type == "cpu":
        library = (stored or {}).get("float32_library", library)

        def choose() -> str:
            return kernels.portable.fix_float32_library(library)

        now["float32_library"] = broadcast_object(world, run_on_rank(world, choose, when=world.is_first))
        run_on_rank(world, lambda: kernels.portable.fix_float32_library(now["float32_library"]))
    changed = [
        f"{name} {stored.get(name)} -> {value}" for name, value in now.items() if stored and stored.get(name) != value
    ]
    if changed:
        log_rank0(world, f"WARNING: losses continue to within rounding, not bit by bit: {', '.join(changed)}")
    return now


def build_model(recipe: Recipe, config: ModelConfig) -> nn.Module:
    """The experiment's model on the CPU, float32, the same on every rank."""
    torch.manual_seed(recipe.seed)
    overrides = {**recipe.model, "vocab_size": config.vocab_size, "precision": recipe.precision.compute}
    return march.build_model(recipe.entry, impl=implementation(recipe), **overrides)


def fit_micro_batch(
    recipe: Recipe,
    config: ModelConfig,
    model: nn.Module,
    corruption: SpanCorruption,
    world: World,
    before: int | None = None,
) -> int:
    """--micro-batch, or `before`, that of the run so far (another would change the order of sums), or what the memory
    estimate allows; tried on the device, halved where it does not fit."""
    share = share_of_process(recipe.batch.sequences, world.size)
    lengths = (corruption.input_length, corruption.label_length)
    impl, precision = implementation(recipe), recipe.precision.compute
    attempt = trial(model, lengths, config.vocab_size, precision, recipe.devices.zero, world)
    if recipe.batch.micro is not None:
        start = recipe.batch.micro
        if share % start:
            raise UsageError(
                f"expected --micro-batch to divide the {share} sequences of a process, got {start}; "
                f"use {largest_divisor(share, start)}"
            )
    elif before is not None and share % before == 0:
        start = before
    else:
        memory = -all_reduce_max(world, -float(available_memory(world)))
        partitions = world.size if recipe.devices.zero else 1
        states = cost.state_bytes(cost.total_parameters(config), precision, partitions)
        # plainly enough memory for the whole share needs no estimate: 2 s, in which torch imports its compiler
        plain = world.device.type == "cpu" and all(choice(o, impl, world.device) != "triton" for o in OPERATORS)
        if plain and share * sequence_bytes(model, attempt, world) <= cost.room(memory, states):
            start = share
        else:
            fits = cost.fitting_micro_batch(
                config, *lengths, memory_bytes=memory, impl=impl, dtype=precision, zero_world=partitions
            )
            start = largest_divisor(share, fits)
    selftest.check(config, lengths, start, impl, precision, world)
    try:
        size = choose_micro_batch(attempt, share, start, world, lambda text: log_rank0(world, text))
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
