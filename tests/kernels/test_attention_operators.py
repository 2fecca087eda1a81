"""The registered operators of attention: fakes, torch.compile, activation checkpointing, what is saved."""

import pytest
import torch
from harness import DEVICE
from test_attention import case, dropout
from test_unified_attention import case as unified_case
from torch.utils.checkpoint import checkpoint

import kernels
from kernels.fused import attention, unified_attention

CASES = {"attention": case(2, 20, 37, heads=2), "unified_attention": unified_case(2, 20, 37, heads=2)}
KEYS = {"key_lengths": torch.tensor([37, 20], device=DEVICE)}


def _leaves(operator):
    return {n: x.float().to(DEVICE).requires_grad_() for n, x in CASES[operator].items()}


FUNCTIONS = {"attention": attention.attention, "unified_attention": unified_attention.unified_attention}


def _run(operator, leaves):
    """The fused function itself: kernels.dispatch imports it by name, which a full graph cannot hold."""
    extra = {"causal": False} if operator == "attention" else {}
    return FUNCTIONS[operator](*leaves.values(), scale=0.5, key_mask=None, dropout=dropout(), **KEYS, **extra)


def _gradients(function, leaves):
    out = function(leaves)
    return [out, *torch.autograd.grad(out.square().sum(), list(leaves.values()))]


@pytest.mark.parametrize("operator", CASES)
def test_operators_satisfy_torch(operator):
    """Schemas, registered derivatives and fakes agree with what the operators do."""
    leaves = [x.half() if x.is_floating_point() else x for x in (y.detach() for y in _leaves(operator).values())]
    leaves = [x.requires_grad_() for x in leaves]
    d = dropout()
    if operator == "attention":
        arguments = (*leaves, KEYS["key_lengths"], None, d.rng, 1.0, False, d.p, d.site, True)
    else:
        arguments = (*leaves, KEYS["key_lengths"], None, d.rng, 1.0, d.p, d.site, True)
    op = attention.attention_op if operator == "attention" else unified_attention.unified_attention_op
    torch.library.opcheck(op, arguments, test_utils=("test_schema", "test_autograd_registration", "test_faketensor"))


@pytest.mark.parametrize("operator", CASES)
def test_compile_and_checkpoint_give_the_same_bits(operator):
    leaves = _leaves(operator)
    plain = _gradients(lambda x: _run(operator, x), leaves)
    compiled = torch.compile(lambda x: _run(operator, x), backend="aot_eager", fullgraph=True)
    for other in (compiled, lambda x: checkpoint(_run, operator, x, use_reentrant=False)):
        for got, expected in zip(_gradients(other, leaves), plain, strict=True):
            assert torch.equal(got, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("operator", CASES)
def test_saves_inputs_output_and_log_sum_exp_only(operator, dtype):
    leaves, saved = {n: x.to(dtype) for n, x in _leaves(operator).items()}, []
    leaves = {n: x.detach().requires_grad_() for n, x in leaves.items()}

    def pack(x):
        saved.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = _run(operator, leaves)
    known = {x.data_ptr() for x in (*leaves.values(), out, KEYS["key_lengths"])}
    rest = [x for x in saved if x.data_ptr() not in known]
    # four more bits of a 16-bit output, the state of the generator, and one float32 a query and head
    further = 0 if dtype == torch.float32 else out.numel() // 2
    assert sorted(x.numel() * x.element_size() for x in rest) == sorted([further, 3 * 8, 4 * 2 * 2 * 20])


@pytest.mark.parametrize("operator", CASES)
def test_further_bits_of_the_output_are_written_for_a_backward_pass_only(operator, monkeypatch):
    module = attention if operator == "attention" else unified_attention
    sizes, true_rest = [], module.rest_of

    def rest_of(o, backward):
        rest = true_rest(o, backward)
        sizes.append(rest.numel())
        return rest

    monkeypatch.setattr(module, "rest_of", rest_of)
    leaves = {n: x.half().detach().requires_grad_() for n, x in _leaves(operator).items()}
    with torch.no_grad():
        without = _run(operator, leaves)
    out = _run(operator, leaves)
    assert sizes == [0, out.numel() // 2]
    assert torch.equal(out, without)


@pytest.mark.parametrize("operator", CASES)
def test_meta_tensors_give_shapes_without_a_launch(operator):
    leaves = {n: x.to("meta").requires_grad_() for n, x in CASES[operator].items()}
    leaves = {n: x.bfloat16().detach().requires_grad_() for n, x in leaves.items()}
    out = getattr(kernels, operator)(*leaves.values(), impl="triton")
    out.sum().backward()
    assert out.shape == (2, 20, 2, 16)
    assert all(x.grad.shape == x.shape for x in leaves.values())
