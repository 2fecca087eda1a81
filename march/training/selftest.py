"""The kernels' self-test before a run: the programs of its own training and evaluation step, compiled once a node."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as torch_distributed

import kernels
from kernels.dispatch import OPERATORS, choice
from march.config import ModelConfig, resolve
from march.cost.step import DTYPES, inputs
from march.model import Transformer
from march.training.distributed import T, World, run_on_rank
from march.training.errors import UsageError

# of compiling and comparing every program of a step: minutes on a slow processor
TIMEOUT = timedelta(hours=2)


def meta_step(
    config: ModelConfig, lengths: tuple[int, int], micro_batch: int, impl: kernels.Impl, precision: str, device: str
) -> Callable[[], None]:
    """Forward and backward of a micro-batch on meta tensors, then an evaluation's forward, with the fused kernels that
    `impl` takes on a device of type `device`. lengths: of encoder and decoder."""
    chosen = {o: choice(o, impl, torch.device(device)) for o in OPERATORS}
    with torch.device("meta"):
        # what is no kernel of ours runs as plain torch here
        names = {o: name if name == "triton" else "torch" for o, name in chosen.items()}
        model = Transformer(resolve(config), names).to(DTYPES[precision])
    batch = inputs(config, *lengths, micro_batch)

    def step() -> None:
        loss = model.train()(**batch).loss
        assert loss is not None
        loss.backward()
        with torch.no_grad():
            model.eval()(**batch | {"dropout_state": None})

    return step


def check(
    config: ModelConfig, lengths: tuple[int, int], micro_batch: int, impl: kernels.Impl, precision: str, world: World
) -> None:
    """Compares every fused program of the run's steps with the reference, and leaves it compiled on disk.

    Raises:
        UsageError: an operator cannot run here, or its kernel disagrees.
    """

    def test() -> None:
        step = meta_step(config, lengths, micro_batch, impl, precision, world.device.type)
        try:
            kernels.self_test(impl, world.device, DTYPES[precision], step=step)
        except kernels.ImplementationError as error:
            raise UsageError(str(error)) from error

    first_of_node(world, test)


def first_of_node(world: World, action: Callable[[], T]) -> T | None:
    """Run `action` on the first rank of each node, then on the others, which find on disk what it compiled; fails on
    every rank where it fails on one.

    The others wait in a group of gloo's with a timeout of its own, so that NCCL's does not run out over a compiler.
    """
    result: T | None = None
    failure: Exception | None = None
    first = world.local_rank == 0
    group = torch_distributed.new_group(backend="gloo", timeout=TIMEOUT) if world.size > 1 else None
    if first:
        try:
            result = action()
        except Exception as error:
            failure = error
    if group is not None:
        torch_distributed.barrier(group)
        torch_distributed.destroy_process_group(group)

    def rest() -> T | None:
        if failure is not None:
            raise failure
        return result if first else action()

    return run_on_rank(world, rest)
