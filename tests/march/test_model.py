"""The model: parity with the predecessor, what may influence what, dropout by contract, initialisation."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from models import batch, small_model
from test_own_ideas import IDEAS, Parallel

import kernels
import march
from march import experiments
from march.config import unpublished

PARITY = Path(__file__).resolve().parents[3] / "shared" / "parity"
ALL = experiments.names()
ALL_AND_IDEAS = pytest.mark.parametrize("name", [*ALL, *IDEAS], ids=lambda x: getattr(x, "__name__", x))


def losses_and_gradients(model, inputs, **more):
    model.zero_grad(set_to_none=True)
    out = model(**inputs, **more)
    out.loss.backward()
    return out, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("impl", ["reference", "torch"])
@pytest.mark.parametrize("pack", sorted(PARITY.glob("*.pt")) or [None], ids=lambda p: p.stem if p else "absent")
def test_parity_with_the_predecessor(pack, impl):
    if pack is None:
        pytest.skip("the parity packs are not beside this checkout")
    data = torch.load(pack, weights_only=True)
    fields = ("dim_model", "num_layers", "dim_qkv", "dim_feedforward", "num_heads")
    sizes = {name: data["config"][name] for name in fields}
    model = march.build_model(
        data["experiment"], impl=impl, vocab_size=data["vocab_size"], max_length=data["max_length"], **sizes
    )
    model = model.double().eval()
    march.load_predecessor(model, data["state_dict"])
    inputs = dict(data["inputs"])
    inputs["attention_mask"] = ~inputs["attention_mask"]
    out = model(**inputs, return_logits=True)
    out.loss.backward()
    torch.testing.assert_close(out.logits, data["logits"], rtol=0, atol=1e-9)
    torch.testing.assert_close(out.loss, data["loss"], rtol=0, atol=1e-9)
    gradients = march.to_predecessor(model, gradients=True)
    assert set(gradients) == set(data["gradients"])
    for key, expected in data["gradients"].items():
        torch.testing.assert_close(gradients[key], expected, rtol=0, atol=1e-9, msg=key)
    weights = march.to_predecessor(model)
    unused = {"decoder.layernorms.7.weight", "decoder.layernorms.8.weight"}
    assert set(data["state_dict"]) - set(weights) == unused
    assert all(torch.equal(weights[key], data["state_dict"][key]) for key in weights)


@pytest.mark.parametrize("name", [n for n in ALL if not unpublished(experiments.configuration(n))])
def test_predecessor_round_trip(name):
    """Shared norms agree in a fresh model (all ones), so every experiment goes there and back."""
    model, other = small_model(name), small_model(name, seed=5)
    exported = march.to_predecessor(model)
    march.load_predecessor(other, exported)
    for (key, ours), theirs in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(ours, theirs), key


@pytest.mark.parametrize("name", [n for n in ALL if unpublished(experiments.configuration(n))])
def test_the_predecessor_is_not_asked_for_what_it_has_not(name):
    field = next(iter(unpublished(experiments.configuration(name))))
    with pytest.raises(ValueError, match=f"expected what it has, got {field}="):
        march.to_predecessor(small_model(name))


def test_predecessor_scalar_gains_expand_and_shared_ones_must_agree():
    model = small_model("Baseline")
    state = march.to_predecessor(model)
    state["decoder.layernorms.2.weight"] = torch.tensor([3.0])
    march.load_predecessor(model, state)
    # entry 2 is the feedforward's in block 0 and self-attention's in block 1
    assert (model.decoder.blocks[0].feedforward.norm.gain == 3).all()
    assert (model.decoder.blocks[1].self_attention.norm.gain == 3).all()
    with torch.no_grad():
        model.decoder.blocks[1].self_attention.norm.gain += 1
    with pytest.raises(ValueError, match=r"decoder\.layernorms\.2\.weight"):
        march.to_predecessor(model)


def test_predecessor_errors_name_keys_and_leave_the_model_alone():
    model = small_model("Baseline")
    before = [p.clone() for p in model.parameters()]
    state = march.to_predecessor(model)
    state["encoder.surplus.weight"] = state.pop("embedding.weight")
    with pytest.raises(ValueError, match=r"embedding\.weight.*encoder\.surplus\.weight"):
        march.load_predecessor(model, state)
    wrong = march.to_predecessor(model) | {"embedding.weight": torch.zeros(3, 3)}
    with pytest.raises(ValueError, match=r"expected embedding\.weight as"):
        march.load_predecessor(model, wrong)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@ALL_AND_IDEAS
def test_torch_and_reference_agree_with_dropout(name):
    """float64: loss and every gradient, dropout on, padding on."""
    state = kernels.dropout_state(7, 3, 2)
    results = []
    for impl in ("reference", "torch"):
        model = small_model(name, impl=impl).double().train()
        results.append(losses_and_gradients(model, batch(), dropout_state=state))
    (a, gradients_a), (b, gradients_b) = results
    torch.testing.assert_close(a.loss, b.loss, rtol=0, atol=1e-12)
    assert set(gradients_a) == set(gradients_b)
    for key, gradient in gradients_a.items():
        torch.testing.assert_close(gradient, gradients_b[key], rtol=1e-9, atol=1e-12, msg=key)
        assert gradient.abs().max() > 0, key


def with_everything_computed(model):
    """The same model with nothing skipped: the encoder runs to its end, dead parameters included."""
    model.encoder.stops_early = False
    return model


@ALL_AND_IDEAS
def test_dead_work_is_skipped_and_nothing_else_changes(name):
    state = kernels.dropout_state(7, 3)
    inputs = batch()
    model = small_model(name).double().train()
    skipped, gradients = losses_and_gradients(model, inputs, return_logits=True, dropout_state=state)
    whole_model = with_everything_computed(small_model(name).double().train())
    whole, whole_gradients = losses_and_gradients(whole_model, inputs, return_logits=True, dropout_state=state)
    # equal but for the rounding of a product with fewer rows
    torch.testing.assert_close(skipped.loss, whole.loss, rtol=0, atol=1e-13)
    torch.testing.assert_close(skipped.logits, whole.logits, rtol=0, atol=1e-12)
    names = {name for name, _ in model.named_parameters()}
    if isinstance(name, str):
        assert names - set(gradients) == model.dead_parameters()
    else:  # what an idea overrides is not known: the encoder's end alone is dead, and norms that Parallel leaves out
        unread = ("cross_attention.norm.gain", "feedforward.norm.gain") if name is Parallel else ()
        ends = ("encoder.final_norm.gain", *unread)
        assert all(n.startswith("encoder.blocks.2.") or n.endswith(ends) for n in names - set(gradients))
    for key, gradient in whole_gradients.items():
        torch.testing.assert_close(gradient, gradients[key], rtol=1e-9, atol=1e-13, msg=key)


def test_dead_parameters_of_the_baseline():
    model = small_model("Database")
    dead = model.dead_parameters()
    last = "encoder.blocks.2"
    assert dead == {
        f"{last}.self_attention.o.weight",
        f"{last}.database_attention.q.weight",
        f"{last}.database_attention.o.weight",
        f"{last}.database_attention.norm.gain",
        f"{last}.feedforward.up.weight",
        f"{last}.feedforward.down.weight",
        f"{last}.feedforward.norm.gain",
        "encoder.final_norm.gain",
    }


@ALL_AND_IDEAS
def test_a_future_token_changes_no_earlier_logit(name):
    model = small_model(name).double().eval()
    inputs = batch()
    del inputs["labels"]
    changed = dict(inputs, decoder_input_ids=inputs["decoder_input_ids"].clone())
    position = 5
    changed["decoder_input_ids"][:, position] = (changed["decoder_input_ids"][:, position] + 1) % 97
    a, b = model(**inputs).logits, model(**changed).logits
    leak = (a[:, :position] - b[:, :position]).abs().max().item()
    assert (a[:, position:] - b[:, position:]).abs().max() > 1e-6
    if name == "UnifiedAttentionAsPublished":
        assert leak > 1e-6  # the published mask shows later tokens
    else:
        assert leak == 0.0


@ALL_AND_IDEAS
def test_a_padded_key_changes_nothing(name):
    if name == "UnifiedAttentionAsPublished":
        pytest.skip("the published mask shows it")
    model = small_model(name).double().eval()
    inputs = batch()
    del inputs["labels"]
    changed = dict(inputs, input_ids=torch.where(inputs["attention_mask"], inputs["input_ids"], 55))
    assert not torch.equal(inputs["input_ids"], changed["input_ids"])
    assert torch.equal(model(**inputs).logits, model(**changed).logits)
    real = dict(inputs, input_ids=inputs["input_ids"].clone())
    real["input_ids"][:, 0] = (real["input_ids"][:, 0] + 1) % 97
    assert not torch.equal(model(**inputs).logits, model(**real).logits)


@pytest.mark.parametrize("impl", ["reference", "torch"])
def test_a_sequence_of_padding_alone_is_finite(impl):
    model = small_model("Baseline", impl=impl).train()
    inputs = batch()
    inputs["attention_mask"] = torch.zeros_like(inputs["attention_mask"])
    out, gradients = losses_and_gradients(model, inputs, dropout_state=kernels.dropout_state(1, 1))
    assert out.loss.isfinite()
    assert all(gradient.isfinite().all() for gradient in gradients.values())


@pytest.mark.parametrize(
    "name", ["Baseline", "UnifiedAttention", "Database", "MixedActSOMDropout", "SquaredReLU", "RotaryPositions"]
)
def test_the_loss_does_not_depend_on_the_micro_batch(name):
    model = small_model(name).double().train()
    inputs = batch(4)
    inputs["labels"][0, :2] = 3  # equal counts, so the mean of means is the mean
    whole, gradients = losses_and_gradients(model, inputs, dropout_state=kernels.dropout_state(7, 3, 8))
    model.zero_grad(set_to_none=True)
    total = 0.0
    for start in range(0, 4, 2):
        part = {key: value[start : start + 2] for key, value in inputs.items()}
        loss = model(**part, dropout_state=kernels.dropout_state(7, 3, 8 + start)).loss / 2
        loss.backward()
        total += loss.item()
    assert total == pytest.approx(whole.loss.item(), abs=1e-12)
    for key, parameter in model.named_parameters():
        if key in gradients:
            torch.testing.assert_close(parameter.grad, gradients[key], rtol=1e-9, atol=1e-13, msg=key)


def test_dropout_depends_on_seed_step_and_sequence_only():
    model = small_model("Baseline").train()
    inputs = batch()

    def loss(*state):
        return model(**inputs, dropout_state=kernels.dropout_state(*state)).loss.item()

    assert loss(1, 2, 3) == loss(1, 2, 3)
    assert len({loss(1, 2, 3), loss(2, 2, 3), loss(1, 3, 3), loss(1, 2, 4)}) == 4
    model.eval()
    assert loss(1, 2, 3) == loss(2, 9, 9)


def test_state_may_be_overwritten_before_backward():
    model = small_model("Baseline").double().train()
    inputs, state = batch(), kernels.dropout_state(7, 3)
    _, expected = losses_and_gradients(model, inputs, dropout_state=state.clone())
    model.zero_grad(set_to_none=True)
    out = model(**inputs, dropout_state=state)
    state[1] = 99
    out.loss.backward()
    assert all(torch.equal(p.grad, expected[name]) for name, p in model.named_parameters() if p.grad is not None)


def test_without_a_state_a_training_forward_draws_anew():
    torch.manual_seed(3)
    model = small_model("Baseline").train()
    assert model(**batch()).loss.item() != model(**batch()).loss.item()


def test_a_tiny_run_overfits():
    model = small_model("Baseline", dim_model=64, dropout=0.0).train()
    inputs = batch()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(120):
        optimizer.zero_grad()
        loss = model(**inputs).loss
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1


def test_first_loss_of_the_full_width_baseline():
    """Logits start with variance 1 + ...: the loss of random tokens is 14.0 +- 0.4, above ln 30000 = 10.3."""
    torch.manual_seed(0)
    model = march.build_model("Baseline", impl="torch").eval()
    ids, decoder_ids, labels = (torch.randint(111, 30000, (2, length)) for length in (64, 100, 100))
    with torch.no_grad():
        assert model(ids, decoder_ids, labels).loss.item() == pytest.approx(14.0, abs=0.4)


def test_logits_are_returned_when_asked_for_or_without_labels():
    model = small_model("Baseline").eval()
    inputs = batch()
    assert model(**inputs).logits is None
    both = model(**inputs, return_logits=True)
    assert both.logits.shape == (3, 9, 97)
    mean = torch.nn.functional.cross_entropy(both.logits.flatten(0, 1), inputs["labels"].flatten())
    torch.testing.assert_close(both.loss, mean)
    del inputs["labels"]
    assert model(**inputs).loss is None
    assert torch.equal(model(**inputs).logits, both.logits)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"input_ids": torch.zeros(3, 25, dtype=torch.long), "attention_mask": None}, "at most 24 positions, got 25"),
        ({"input_ids": torch.zeros(3, 17)}, "expected int64"),
        ({"decoder_input_ids": torch.zeros(2, 9, dtype=torch.long)}, "expected 3 sequences"),
        ({"labels": torch.zeros(3, 8, dtype=torch.long)}, "labels: expected"),
        ({"attention_mask": torch.ones(3, 17)}, "expected bool"),
    ],
)
def test_wrong_inputs_say_expected_and_got(change, words):
    with pytest.raises(ValueError, match=words):
        small_model("Baseline")(**{**batch(), **change})


def test_explicit_triton_on_a_cpu_raises():
    """In a process of its own: others of this one may have Triton's interpreter on."""
    code = """
import torch, kernels, march
model = march.build_model("Baseline", impl="triton", dim_model=16, vocab_size=9, max_length=4)
ids = torch.zeros(1, 4, dtype=torch.long)
try:
    model(ids, ids, ids)
except kernels.ImplementationError as error:
    print(error)
"""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    out = subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True)
    assert "impl='triton' needs a CUDA device, got tensors on cpu; use impl='torch'" in out.stdout
    with pytest.raises(ValueError, match="expected one of"):
        small_model("Baseline", impl="cuda")
