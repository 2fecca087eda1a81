"""Training through impl='torch': the reference's loss curve, and in which type a float32 model computes."""

import pytest
import torch

import kernels
import march
from march.model import transformer

STEPS = 25
SMALL = {"dim_model": 64, "dim_feedforward": 96, "num_heads": 4, "dim_qkv": 16, "vocab_size": 211, "max_length": 64}


def inputs(step: int) -> dict[str, torch.Tensor]:
    """A learnable task: the decoder repeats the encoder's first tokens."""
    ids = torch.randint(1, 211, (4, 40), generator=torch.Generator().manual_seed(step))
    labels = ids[:, :12]
    decoder = torch.cat([torch.zeros(4, 1, dtype=torch.int64), labels[:, :-1]], 1)
    mask = torch.arange(40)[None] < torch.tensor([40, 40, 31, 25])[:, None]
    return {"input_ids": ids, "decoder_input_ids": decoder, "labels": labels, "attention_mask": mask}


def curve(impl: str, name: str = "Baseline", **overrides) -> torch.Tensor:
    torch.manual_seed(0)
    model = march.build_model(name, impl=impl, **{**SMALL, **overrides}).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, fused=True)
    losses = []
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = model(**inputs(step), dropout_state=kernels.dropout_state(5, step)).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return torch.tensor(losses)


@pytest.mark.parametrize("name", ["Baseline", "UnifiedAttention"])
def test_the_loss_curve_is_the_references(name):
    """Dropout on, padding on, float32: only rounding is between them, after 25 steps too."""
    ours, theirs = curve("torch", name), curve("reference", name)
    assert ours[-1] < ours[0] - 0.5
    torch.testing.assert_close(ours, theirs, rtol=2e-4, atol=0)


def test_the_loss_curve_in_bfloat16_follows(monkeypatch):
    monkeypatch.setattr(transformer, "NARROW", 1)
    monkeypatch.setattr(transformer, "portable_dtype", lambda: torch.bfloat16)
    ours, theirs = curve("torch"), curve("reference")
    assert not torch.equal(ours, theirs)
    torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0)


def test_gradients_of_bfloat16_products_are_float32_and_within_budget(monkeypatch):
    """No further from float32's gradients than twice the reference with bfloat16 parameters is."""

    def gradients(impl: str, dtype: torch.dtype, parameters: torch.dtype) -> dict[str, torch.Tensor]:
        monkeypatch.setattr(transformer, "NARROW", 1)
        monkeypatch.setattr(transformer, "portable_dtype", lambda: dtype)
        torch.manual_seed(0)
        model = march.build_model("Baseline", impl=impl, **SMALL).to(parameters).train()
        model(**inputs(0), dropout_state=kernels.dropout_state(5, 0)).loss.backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    exact = gradients("reference", torch.float32, torch.float32)
    plain = gradients("reference", torch.float32, torch.bfloat16)
    ours = gradients("torch", torch.bfloat16, torch.float32)
    assert set(exact) == set(ours)
    for name, gradient in exact.items():
        assert ours[name].dtype == torch.float32
        error, budget = ((x[name].float() - gradient).norm().item() for x in (ours, plain))
        assert 0 < error <= 2 * budget, (name, error, budget)


def test_what_a_model_computes_in(monkeypatch):
    monkeypatch.setattr(transformer, "portable_dtype", lambda: torch.bfloat16)
    wide = {**SMALL, "dim_model": 256}

    def dtype(model):
        return model.compute_dtype()

    assert dtype(march.build_model("Baseline", impl="torch", **wide).train()) == torch.bfloat16
    assert dtype(march.build_model("Baseline", impl="auto", **wide).train()) == torch.bfloat16
    # its own precision, its own type, evaluation, the oracle, and widths that gain nothing keep what they have
    assert dtype(march.build_model("BaselineFP32", impl="torch", **wide).train()) is None
    assert dtype(march.build_model("Baseline", impl="torch", **wide).train().bfloat16()) is None
    assert dtype(march.build_model("Baseline", impl="torch", **wide).train().double()) is None
    assert dtype(march.build_model("Baseline", impl="torch", **wide).eval()) is None
    assert dtype(march.build_model("Baseline", impl="reference", **wide).train()) is None
    assert dtype(march.build_model("Baseline", impl="torch", **SMALL).train()) is None
    monkeypatch.setattr(transformer, "portable_dtype", lambda: torch.float32)
    assert dtype(march.build_model("Baseline", impl="torch", **wide).train()) is None
