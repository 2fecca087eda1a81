"""A model in plain torch, without the trainer: random state, checkpointing, precision, compilation."""

import pytest
import torch
from models import batch, small_model
from torch.utils.checkpoint import checkpoint


def model_and_inputs(name: str = "Baseline", impl: str = "torch"):
    return small_model(name, impl, dropout=0.2).train(), batch()


def gradients(model) -> list[torch.Tensor]:
    found = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad(set_to_none=True)
    return found


@pytest.mark.parametrize("impl", ["torch", "reference"])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_checkpointed_model_has_the_gradient_of_its_own_masks(impl, use_reentrant):
    model, inputs = model_and_inputs(impl=impl)
    torch.manual_seed(5)
    loss = model(**inputs).loss
    loss.backward()
    plain = gradients(model)
    torch.manual_seed(5)
    anchor = torch.ones((), requires_grad=True)  # the reentrant form wants an argument with a gradient
    again = checkpoint(lambda one: model(**inputs).loss * one, anchor, use_reentrant=use_reentrant)
    again.backward()
    assert torch.equal(loss, again)
    for a, b in zip(plain, gradients(model), strict=True):
        assert torch.equal(a, b)


PARTS = {
    "encoder": lambda m: m.encoder,
    "decoder": lambda m: m.decoder,
    "encoder block": lambda m: m.encoder.blocks[0],
    "decoder block": lambda m: m.decoder.blocks[1],
    "attention of the encoder": lambda m: m.encoder.blocks[0].layers[0],
    "attention of the decoder": lambda m: m.decoder.blocks[0].layers[0],
    "attention to the encoder": lambda m: m.decoder.blocks[1].layers[-2],
    "feedforward": lambda m: m.decoder.blocks[0].layers[-1],
}


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("name", ["Baseline", "UnifiedAttention", "Database", "StandardCrossAttention"])
def test_a_checkpointed_part_has_the_right_gradient_or_refuses(name, part, use_reentrant, monkeypatch):
    """Reentrant checkpointing does not record the part's first run: what it shares with others has no gradient then."""
    model, inputs = model_and_inputs(name)
    torch.manual_seed(5)
    model(**inputs).loss.backward()
    plain = [p.grad for p in model.parameters()]
    model.zero_grad()
    module = PARTS[part](model)
    whole = module.forward
    monkeypatch.setattr(module, "forward", lambda *x: checkpoint(whole, *x, use_reentrant=use_reentrant))
    torch.manual_seed(5)
    alone = part == "feedforward" or (part == "attention of the decoder" and name != "UnifiedAttention")
    if use_reentrant and not alone:
        with pytest.raises(RuntimeError, match="use_reentrant=False"):
            model(**inputs)
        return
    model(**inputs).loss.backward()
    for a, b in zip(plain, [p.grad for p in model.parameters()], strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.equal(a, b)


def test_equal_seeds_give_equal_losses_and_successive_forwards_do_not():
    model, inputs = model_and_inputs()
    torch.manual_seed(5)
    first, second = model(**inputs).loss, model(**inputs).loss
    torch.manual_seed(5)
    assert torch.equal(model(**inputs).loss, first)
    assert torch.equal(model(**inputs).loss, second)
    assert not torch.equal(first, second)


def test_a_restored_generator_continues_where_it_was():
    """Another model object, as after a restart, goes on with the masks that were next."""
    model, inputs = model_and_inputs()
    torch.manual_seed(5)
    first, state = model(**inputs).loss, torch.get_rng_state()
    expected = model(**inputs).loss
    resumed, _ = model_and_inputs()
    torch.set_rng_state(state)
    assert torch.equal(resumed(**inputs).loss, expected)
    assert not torch.equal(first, expected)


def test_fork_rng_leaves_no_trace():
    model, inputs = model_and_inputs()
    torch.manual_seed(5)
    expected = model(**inputs).loss
    torch.manual_seed(5)
    with torch.random.fork_rng():
        model(**inputs)
    assert torch.equal(model(**inputs).loss, expected)


def test_evaluation_draws_nothing():
    model, inputs = model_and_inputs()
    state = torch.get_rng_state()
    model.eval()(**inputs)
    assert torch.equal(torch.get_rng_state(), state)
