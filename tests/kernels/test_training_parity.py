"""The strongest test: dropout is exact, so a training run by the fused kernels is the reference's, step by step.

Learning rate 1e-2: at the recipe's 1e-4 a gradient wrong by 1% would not show. float32, in Triton's interpreter,
where a program takes 10 to 20 ms: the shapes are tiny. CI runs Baseline and one experiment for each distinct set of
kernel calls; `make test-all` the rest.
"""

from typing import Any

import pytest
import torch

import kernels
import march
from kernels.fused import attention, linear_cross_entropy
from march import experiments

SIZES = {"dim_model": 24, "dim_feedforward": 20, "vocab_size": 41, "max_length": 8}
LEARNING_RATE = 1e-2

# one for each distinct set of kernel calls: gates and their activation, mixed branches, no residual, bank, two segments
DISTINCT = (
    "GELUGatedLinearUnit",
    "MixedActSOMDropout",
    "NoSelfAttentionResidual",
    "DatabaseFromLayers",
    "UnifiedAttention",
    "APESumOverAverage",
)


@pytest.fixture(autouse=True)
def logits_in_registers(monkeypatch):
    """The cross entropy's backward as 16-bit runs have it; float32 would take chunks, which have tests of their own."""
    monkeypatch.setattr(linear_cross_entropy, "RECOMPUTE_ELEMENT", 4)


def sizes_of(name: str) -> dict:
    """Tiny, with the experiment's heads by block and with head widths that keep their class where that is cheap."""
    config = experiments.configuration(name)
    sizes: dict = dict(SIZES)
    heads, width = config.num_heads, config.dim_qkv
    sizes["num_heads"] = tuple(max(1, h // 4) for h in heads) if isinstance(heads, tuple) else max(1, heads // 8)
    sizes["dim_qkv"] = tuple(w // 8 for w in width) if isinstance(width, tuple) else max(8, width // 8)
    if config.num_kv_heads:
        sizes |= {"num_heads": 2, "num_kv_heads": 1}
    per_block = isinstance(heads, tuple) or isinstance(width, tuple)
    sizes["num_layers"] = config.num_layers if per_block else 4
    if config.database_states:
        sizes["database_states"] = 10
    return sizes


def inputs(step: int, batch: int) -> dict:
    generator = torch.Generator().manual_seed(step)

    def draw(length: int) -> torch.Tensor:
        return torch.randint(0, SIZES["vocab_size"], (batch, length), generator=generator)

    return {"input_ids": draw(7), "decoder_input_ids": draw(4), "labels": draw(4)}


def train(name: str, impl: str, steps: int, batch: int, **changed: Any) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses of every step and the gradients of the first."""
    torch.manual_seed(0)
    model = march.build_model(name, impl=impl, **sizes_of(name) | changed).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.1)
    losses, gradients = [], {}
    for step in range(steps):
        optimizer.zero_grad()
        loss = model(**inputs(step, batch), dropout_state=kernels.dropout_state(42, step)).loss
        loss.backward()
        if step == 0:
            gradients = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
        optimizer.step()
        losses.append(loss.item())
    return losses, gradients


def compare(name: str, steps: int, batch: int = 1, **changed: Any) -> None:
    expected, expected_gradients = train(name, "reference", steps, batch, **changed)
    losses, gradients = train(name, "triton", steps, batch, **changed)
    assert losses == pytest.approx(expected, abs=1e-4)
    assert set(gradients) == set(expected_gradients)
    for key, gradient in expected_gradients.items():
        error = (gradients[key] - gradient).abs().max().item()
        assert error <= 1e-5 * gradient.abs().max().item(), key


def test_four_steps_of_the_baseline():
    compare("Baseline", 4, batch=2)


@pytest.mark.parametrize("name", DISTINCT)
def test_two_steps(name):
    compare(name, 2)


@pytest.mark.parametrize("name", ["BigHeads2", "DatabaseFromLayers", "UnifiedAttention"])
def test_heads_that_are_filled_up(name, monkeypatch):
    """Heads of 70 in float32 are computed as 80: by zero rows of the weights, no activation is padded."""

    def unpadded(*tensors):
        assert all(x.shape[-1] == 80 for x in tensors), "an activation would be padded"
        return tensors

    monkeypatch.setattr(attention, "padded_heads", unpadded)
    assert kernels.head_width(70, torch.device("cpu"), impl="triton") == 80
    compare(name, 1, num_heads=1, dim_qkv=70, num_layers=4)


@pytest.mark.parametrize("name", ["DatabaseFromLayers", "MixedActSOMDropout", "UnifiedAttention"])
def test_rows_that_are_filled_up(name, monkeypatch):
    """A stream of 70 features and a hidden layer of 90 in float32 are computed as 80 and 96: zeros in the weights."""
    widths = set()
    norm, hidden = kernels.residual_norm, kernels.glu

    def residual_norm(x, s, gain, **kwargs):
        widths.add(("stream", gain.shape[0]))
        return norm(x, s, gain, **kwargs)

    def glu(x, weight, **kwargs):
        out = hidden(x, weight, **kwargs)
        widths.add(("hidden", out.shape[-1]))
        return out

    monkeypatch.setattr(kernels, "residual_norm", residual_norm)
    monkeypatch.setattr(kernels, "glu", glu)
    compare(name, 1, dim_model=70, dim_feedforward=90, num_layers=4)
    assert widths == {("stream", 70), ("stream", 80), ("hidden", 90), ("hidden", 96)}


TOGETHER = {"qk_norm": True, "num_heads": 2, "num_kv_heads": 1, "norm_placement": "sandwich", "num_layers": 4}


@pytest.mark.parametrize("fields", [{"positions": "rotary"}, {"positions": "none", "unified_attention": True}])
def test_what_runs_between_the_kernels(fields):
    """Turned and normalised heads that are filled up, fewer of keys, own keys of the encoder's output, relu squared."""
    compare("StandardCrossAttention", 1, activation="relu2", dim_qkv=20, **TOGETHER, **fields)


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in experiments.names() if n not in (*DISTINCT, "Baseline")])
def test_three_steps_of_the_rest(name):
    compare(name, 3, batch=2)
