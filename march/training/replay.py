"""One step of a run again, to say what in it is not finite."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from march.training.distributed import all_gather
from march.training.errors import NonFiniteError
from march.training.loop import Trainer

SHOWN = 8  # of a list


def replay(trainer: Trainer, step: int) -> str:
    """Trains up to step - 1 as the run did, then runs `step` without changing a weight; a report, one finding a line.

    A trainer that writes nothing, at a checkpoint before the step. Collective: each rank looks at its own sequences.

    Raises:
        RunError: the steps up to there cannot be run; NonFiniteError of an earlier one than `step` is a finding.
    """
    world = trainer.world
    findings = [f"replay of step {step} from the checkpoint of step {trainer.step}"]
    try:
        trainer.train_to(step - 1)
    except NonFiniteError as error:
        return "\n".join([*findings, f"step {trainer.step + 1} comes before it: {error}"])
    model = trainer.engine.module
    findings += [f"weight {name} is not finite" for name in _not_finite(dict(model.named_parameters()))]
    model.train()
    model.zero_grad(set_to_none=True)
    own = [line for micro in trainer.micro_batches() for line in _micro_batch(trainer, model, micro)]
    findings += [line for lines in all_gather(world, own) for line in lines]
    if len(findings) == 1:
        findings.append("everything is finite: weights, outputs, losses, gradients; the step went wrong elsewhere")
    return "\n".join(findings)


def _micro_batch(trainer: Trainer, model: nn.Module, micro) -> list[str]:
    """What is not finite: in the outputs of modules, the loss, gradients; with the sequences whose own loss is not."""
    outputs: list[str] = []

    def look(name: str):
        def hook(module: nn.Module, inputs: object, output: object) -> None:
            parts = output if isinstance(output, tuple) else (output,)
            if any(isinstance(part, Tensor) and not torch.isfinite(part).all() for part in parts):
                outputs.append(name)

        return hook

    handles = [module.register_forward_hook(look(name)) for name, module in model.named_modules() if name]
    inputs, state = trainer.inputs(micro), trainer.dropout_state(micro)
    try:
        loss = model(*inputs, state)
    finally:
        for handle in handles:
            handle.remove()
    where = f"sequences {micro.first_sequence} to {micro.first_sequence + len(inputs[0]) - 1} of the step"
    lines = [f"{where}: output of {name} is not finite" for name in outputs[:SHOWN]]
    if not math.isfinite(float(loss.detach())):
        lines.append(f"{where}: loss is {float(loss.detach())}")
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    odd = _not_finite(gradients)
    if odd:
        lines.append(f"{where}: gradient of {', '.join(odd[:SHOWN])} is not finite ({len(odd)} of {len(gradients)})")
    model.zero_grad(set_to_none=True)
    if lines:
        rows = trainer.sequences()[micro.first_sequence :]
        for i, row in enumerate(rows[: len(inputs[0])]):
            with torch.no_grad():
                single = float(model(*(tensor[i : i + 1] for tensor in inputs), _shifted(state, i)))
            if not math.isfinite(single):
                lines.append(f"training sequence {row}: loss is {single}")
    return lines


def _shifted(state: Tensor, i: int) -> Tensor:
    """The dropout state of the micro-batch's row i alone."""
    moved = state.clone()
    moved[2] += i
    return moved


def _not_finite(tensors: dict[str, Tensor]) -> list[str]:
    return [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
