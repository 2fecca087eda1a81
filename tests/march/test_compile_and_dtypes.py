"""Whole models under what plain torch offers: torch.compile, half precision."""

import pytest
import torch
import torch.utils.checkpoint

import kernels
import march

TINY = {"vocab_size": 50, "dim_model": 32, "dim_feedforward": 48, "dim_qkv": 8, "num_heads": 2, "num_layers": 2}


def build(name="Baseline", **fields):
    fields = TINY | {"max_length": 16, "dropout": 0.2, "precision": "fp32"} | fields
    return march.build_model(name, impl="torch", seed=0, **fields)


def step(model, call=None):
    """Loss and gradients by name."""
    generator = torch.Generator().manual_seed(0)
    ids, decoder_ids, labels = (torch.randint(0, 50, (2, n), generator=generator) for n in (9, 5, 5))
    model.zero_grad()
    mask = torch.arange(9) < torch.tensor([[9], [6]])
    state = kernels.dropout_state(1, 2)
    loss = (model if call is None else call)(ids, decoder_ids, labels, mask, dropout_state=state).loss
    loss.backward()
    return {n: p.grad.float() for n, p in model.named_parameters() if p.grad is not None} | {"loss": loss.detach()}


SLOW = ("Baseline", "UnifiedAttention", "Database", "MixedAct", "ScalingHeads")


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "name", ["GELUGatedLinearUnit", *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]
)
def test_a_compiled_model_is_one_graph_with_the_same_loss_and_gradients(name, training):
    model = build(name).train(training)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    traced = step(model, compiled)  # first: no operator was called before
    torch.testing.assert_close(traced, step(model), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 0.02), (torch.bfloat16, 0.1), (torch.float64, 1e-4)])
def test_a_converted_model_trains(dtype, tolerance):
    expected = step(build())
    for name, x in step(build().to(dtype)).items():
        assert (x - expected[name]).norm() <= tolerance * expected[name].norm(), name


@pytest.mark.parametrize("impl", ["torch", "reference"])
@pytest.mark.parametrize("name", ["Baseline", "Database", "UnifiedAttention"])
def test_a_model_trains_under_autocast(name, impl):
    model = build(name)
    model.impl = impl
    expected = step(model)
    converted = build(name).to(torch.bfloat16)
    converted.impl = impl
    converted = step(converted)

    def call(*inputs, **options):
        with torch.autocast("cpu", torch.bfloat16):
            output = model(*inputs, **options, return_logits=True)
        assert output.logits.dtype == torch.bfloat16
        return output

    got = step(model, call)
    assert got["loss"].dtype == torch.float32
    assert got.keys() == expected.keys()
    for key, x in got.items():
        error, budget = ((y - expected[key]).norm() for y in (x, converted[key]))
        assert error <= 2 * budget + 0.01 * expected[key].norm(), key


def test_transforms_of_torch_func_have_the_reference_or_one_clear_line():
    model = build(dropout=0.0)
    parameters = dict(model.named_parameters())
    ids = torch.randint(0, 50, (2, 9), generator=torch.Generator().manual_seed(0))

    def loss(values):
        return torch.func.functional_call(model, values, (ids, ids[:, :5], ids[:, 4:])).loss

    with pytest.raises(kernels.ImplementationError, match="use impl='reference'"):
        torch.func.grad(loss)(parameters)
    x = torch.randn(3, 2, 4, 2, 8)
    with pytest.raises(kernels.ImplementationError, match="use impl='reference'"):
        torch.func.vmap(lambda q: kernels.attention(q, q, q, impl="torch"))(x)
    model.impl = "reference"
    gradients = torch.func.grad(loss)(parameters)
    loss(parameters).backward()
    for name, parameter in parameters.items():
        if parameter.grad is not None:
            torch.testing.assert_close(gradients[name], parameter.grad)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_one_operator_may_be_checkpointed(use_reentrant):
    x = torch.randn(2, 5, 3, 2, 8, generator=torch.Generator().manual_seed(1), requires_grad=True)
    dropout = kernels.Dropout(0.3, kernels.dropout_state(1, 2), 3)

    def attend(qkv):
        return kernels.attention(qkv, causal=True, dropout=dropout, impl="torch")

    (expected,) = torch.autograd.grad(attend(x).square().sum(), x)
    torch.utils.checkpoint.checkpoint(attend, x, use_reentrant=use_reentrant).square().sum().backward()
    torch.testing.assert_close(x.grad, expected)
