"""A training step by the emulator, by torch in the same type, and by the formula in float64, from the same bits."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import march
from kernels import dropout_state, emulator
from march import experiments
from march.config import ModelConfig

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
# of torch's distance to float64; below it is what rounds in another order
FACTOR, SLACK = 1.25, 1e-6


def distinct() -> list[list[str]]:
    """Experiments in groups that compute the same; where weights and positions start is not counted."""
    groups: dict[ModelConfig, list[str]] = {}
    for name in experiments.names():
        groups.setdefault(experiments.configuration(name, position_init="scaled", linear_init="torch"), []).append(name)
    return list(groups.values())


def affordable(name: str) -> dict[str, Any]:
    """Fewer blocks of an experiment that has dozens of equal ones: the same programs."""
    return {"num_layers": 4} if experiments.configuration(name).num_layers > 12 else {}


@dataclass
class Step:
    """loss; gradients and, after updates, weights by name; session: of the emulator, None of the others."""

    losses: list[float] = field(default_factory=list)
    gradients: dict[str, Tensor] = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict)
    session: emulator.Session | None = None


def tokens(config: ModelConfig, lengths: tuple[int, int], batch: int, seed: int, padded: bool) -> dict[str, Tensor]:
    """Ids, labels of which a tenth is ignored, and where padded a mask: the last sequence is half padding."""
    generator = torch.Generator().manual_seed(seed)

    def draw(length: int) -> Tensor:
        return torch.randint(config.vocab_size, (batch, length), generator=generator)

    encoder, decoder = lengths
    given = {"input_ids": draw(encoder), "decoder_input_ids": draw(decoder), "labels": draw(decoder)}
    given["labels"][:, ::10] = -100
    if padded:
        given["attention_mask"] = torch.ones(batch, encoder, dtype=torch.bool)
        given["attention_mask"][-1, encoder // 2 :] = False
    return given


@contextlib.contextmanager
def _executing(impl: str, options: dict[str, Any]) -> Iterator[emulator.Session | None]:
    if impl == "triton":
        with emulator.active(**options) as session:
            yield session
    else:
        yield None


def run(
    name: str, impl: str, dtype: torch.dtype, lengths: tuple[int, int], *, batch: int = 1, padded: bool = False,
    updates: int = 0, learning_rate: float = 1e-2, emulation: dict[str, Any] | None = None, **overrides: Any,
) -> Step:  # fmt: skip
    """Forward and backward of an experiment with dropout; its gradients, or the weights after AdamW's `updates`.

    The model's weights are rounded to the configuration's type first, then taken in `dtype`. Updates are of a copy in
    float32 (float64 of float64), as in training, and rounded to `dtype` from there.
    """
    config = experiments.configuration(name, **overrides)
    model = march.build_model(name, impl=impl, seed=0, **overrides).to(DTYPES[config.precision]).to(dtype).train()
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    masters = {n: p.detach().to(wide).requires_grad_() for n, p in model.named_parameters()} if updates else {}
    optimizer = torch.optim.AdamW(masters.values(), lr=learning_rate, betas=(0.9, 0.95)) if updates else None
    out = Step()
    with _executing(impl, emulation or {}) as out.session:
        for number in range(max(1, updates)):
            given = tokens(config, lengths, batch, number, padded)
            loss = model(**given, dropout_state=dropout_state(42, 1 + number, 0, "cpu")).loss
            model.zero_grad()
            loss.backward()
            out.losses.append(loss.item())
            if optimizer is not None:
                with torch.no_grad():
                    for n, p in model.named_parameters():
                        masters[n].grad = None if p.grad is None else p.grad.to(wide)
                    optimizer.step()
                    for n, p in model.named_parameters():
                        p.copy_(masters[n])
    out.gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    out.weights = {n: x.detach() for n, x in masters.items()}
    return out


def three(name: str, lengths: tuple[int, int], **options: Any) -> tuple[Step, Step, Step]:
    """The step by the emulator, by torch in the configuration's type, and in float64."""
    overrides = {n: x for n, x in options.items() if n in ModelConfig.__dataclass_fields__}
    dtype = DTYPES[experiments.configuration(name, **overrides).precision]
    kinds = (("triton", dtype), ("torch", dtype), ("reference", torch.float64))
    return tuple(run(name, impl, as_type, lengths, **options) for impl, as_type in kinds)


def distances(got: dict[str, Tensor], plain: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, float]:
    """How much further from `exact` than `plain` each tensor is, in the Euclidean norm; at most FACTOR is right."""
    assert set(got) == set(plain) == set(exact)
    ratios = {}
    for n, want in exact.items():
        assert torch.isfinite(got[n]).all(), f"{n}: not finite"
        ours, theirs = ((x[n].double() - want).norm() for x in (got, plain))
        ratios[n] = (ours / (theirs + SLACK * want.norm() + torch.finfo(torch.float64).tiny)).item()
    return ratios


def check(name: str, lengths: tuple[int, int], loss_slack: float = 1e-3, **options: Any) -> str:
    """Asserts that the emulated step is right beside the others; what was measured, on one line."""
    got, plain, exact = three(name, lengths, **options)
    assert got.session is not None
    assert got.session.launches
    assert not got.session.findings
    ratios = distances(got.gradients, plain.gradients, exact.gradients)
    worst = max(ratios, key=ratios.__getitem__)
    losses = [step.losses[-1] for step in (got, plain, exact)]
    text = "{}: {} launches, loss {:.4f} (torch {:.4f}, float64 {:.4f}), worst gradient {:.2f} of torch's distance ({})"
    said = text.format(name, len(got.session.launches), *losses, ratios[worst], worst)
    errors = [abs(x - losses[2]) for x in losses[:2]]
    assert errors[0] <= FACTOR * errors[1] + loss_slack * losses[2], said
    assert ratios[worst] <= FACTOR, f"{said}; above {FACTOR}: {[n for n, x in ratios.items() if x > FACTOR]}"
    return said
