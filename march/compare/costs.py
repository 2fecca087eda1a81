"""What runs would cost, before they are paid for."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from march import cost
from march.compare.cell import FINISHED, Cell
from march.config import ModelConfig, override
from march.console import UsageError
from march.data import DataError, SpanCorruption
from march.data.corpora import SOURCES
from march.data.description import Description
from march.training import arguments

# Assumed before any run has been measured. The published runs of Baseline reached 0.109 of 8 RTX A5000s' bf16 peak;
# a small model on 2 cores trained at two thirds of a matrix product's speed.
SHARE_OF_PEAK, SHARE_OF_PRODUCT = 0.1, 0.6


@dataclass(frozen=True)
class Setting:
    """What the options of a run decide. sequences: a step. length: corpus tokens in one. tokens_per_byte: of the test
    split's text, None where it is not prepared."""

    config: ModelConfig
    steps: int
    sequences: int
    length: int
    learning_rate: float
    precision: str
    impl: Any
    text: str
    tokens_per_byte: float | None

    @property
    def lengths(self) -> tuple[int, int]:
        corruption = SpanCorruption(self.length)
        return corruption.input_length, corruption.label_length

    @property
    def tokens(self) -> int:
        """Corpus tokens of a run."""
        return self.steps * self.sequences * self.length

    @property
    def parameters(self) -> int:
        return cost.total_parameters(self.config)

    @property
    def flops(self) -> int:
        """Of a run's forward and backward passes."""
        return _flops(self.config, self.lengths) * self.sequences * self.steps


@cache
def _flops(config: ModelConfig, lengths: tuple[int, int]) -> int:
    return cost.training_flops(config, *lengths)


@cache
def setting(words: tuple[str, ...], cuda: bool) -> Setting:
    """Of train.py's options; the text is prepared where that takes seconds.

    Raises:
        UsageError, ConfigError, DataError: as train.py would.
    """
    recipe = arguments.check(arguments.build_parser().parse_args(list(words)), cuda=cuda)
    text, per_byte = Description.of(recipe.data), None
    try:
        text.require_prepared()
        store = text.open()
        vocabulary, per_byte = store.vocab_size, tokens_per_byte(store)
    except DataError:
        vocabulary = recipe.data.vocab_size or SOURCES[text.source].vocab_size
    size = recipe.model.get("vocab_size") or vocabulary or recipe.config.vocab_size
    return Setting(
        override(recipe.config, vocab_size=size),
        recipe.schedule.steps,
        recipe.batch.sequences,
        recipe.batch.sequence_length,
        recipe.optimizer.lr,
        recipe.precision.compute,
        arguments.implementation(recipe),
        text.name,
        per_byte,
    )


def setting_of(cell: Cell, cuda: bool) -> Setting:
    return setting(("--exp", cell.experiment, *cell.options), cuda)


def tokens_per_byte(store: Any) -> float | None:
    """Tokens for each byte of UTF-8, over the test split's first 100,000 tokens; None without any."""
    tokens = store.split("test")[:100_000]
    size = len(store.tokenizer().decode(tokens.tolist()).encode()) if len(tokens) else 0
    return len(tokens) / size if size else None


@dataclass(frozen=True)
class Estimate:
    """Of one run. seconds: `how` says from what; None where nothing is known. memory: bytes of a process."""

    parameters: int
    flops: int
    memory: int
    seconds: float
    how: str


def estimates(cells: Sequence[Cell], *, device: str | None, devices: int, cuda: bool) -> dict[Cell, Estimate]:
    """One for each cell, on `devices` of this machine's, or of the `device` named; without a GPU on its cores."""
    known = cost.find_device(device) if device else None
    if device and known is None:
        raise UsageError(f"expected a device among {', '.join(cost.DEVICES)}, got {device!r}; name one of them")
    if known is None and cuda:
        import torch

        known = cost.find_device(torch.cuda.get_device_name())
    first: dict[tuple[str, ...], Estimate] = {}
    result: dict[Cell, Estimate] = {}
    for cell in cells:
        kind = (cell.experiment, *cell.options)
        if kind not in first:
            first[kind] = _estimate(cell, known, devices, cuda)
        result[cell] = first[kind]
    return _measured(result) if device is None else result


def _estimate(cell: Cell, device: cost.Device | None, devices: int, cuda: bool) -> Estimate:
    what = setting_of(cell, cuda)
    where = "cuda" if device else "cpu"
    # one that is only measured when a run starts counts as the larger
    precision = what.precision if what.precision in ("bf16", "fp32") else "fp32"
    memory = cost.memory(what.config, *what.lengths, impl=what.impl, precision=precision, device_type=where)
    share = max(1, what.sequences // devices)
    if device:
        rate, how = device.peak(precision) * devices * SHARE_OF_PEAK, f"{SHARE_OF_PEAK:.0%} of peak assumed"
    else:
        rate, how = _cpu_rate(), "projected from a matrix product here"
    return Estimate(what.parameters, what.flops, memory.total(min(share, 16)), what.flops / rate, how)


def _measured(all_of_them: dict[Cell, Estimate]) -> dict[Cell, Estimate]:
    """Seconds from the runs that have finished: their own mean, else the mean time of a FLOP in the others'."""
    done: dict[tuple[str, ...], list[float]] = {}
    flops = seconds = 0.0
    for cell, estimate in all_of_them.items():
        took = cell.summary().get("process_seconds") if cell.ended() == FINISHED else None
        if isinstance(took, int | float):
            done.setdefault((cell.experiment, *cell.options), []).append(took)
            flops, seconds = flops + estimate.flops, seconds + took
    if not flops:
        return all_of_them
    result = {}
    for cell, estimate in all_of_them.items():
        own = done.get((cell.experiment, *cell.options))
        time_taken = sum(own) / len(own) if own else estimate.flops * seconds / flops
        result[cell] = replace(estimate, seconds=time_taken, how="measured" if own else "from the runs that finished")
    return result


@cache
def _cpu_rate() -> float:
    """FLOP/s of training on this processor: a share of what a matrix product of 1024 x 512 x 2048 reaches."""
    import torch

    a, b = torch.ones(1024, 512), torch.ones(512, 2048)
    times = []
    for _ in range(5):
        begin = time.perf_counter()
        a @ b
        times.append(time.perf_counter() - begin)
    return 2 * 1024 * 512 * 2048 / min(times) * SHARE_OF_PRODUCT
