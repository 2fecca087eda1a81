"""The registered operators of attention: fakes, torch.compile, activation checkpointing, what is saved."""

import pytest
import torch
from harness import DEVICE
from test_attention import case, dropout
from test_unified_attention import case as unified_case
from torch.utils.checkpoint import checkpoint

import kernels
from kernels.fused import attention

CASES = {"attention": case(2, 20, 37, heads=2), "two_segments": unified_case(2, 20, 37, heads=2)}
KEYS = {"key_lengths": torch.tensor([37, 20], device=DEVICE)}


def _leaves(operator):
    return {n: x.float().to(DEVICE).requires_grad_() for n, x in CASES[operator].items()}


def _run(operator, leaves):
    """The fused function itself: kernels.dispatch imports it by name, which a full graph cannot hold."""
    settings = {"scale": 0.5, "causal": operator != "attention", "key_mask": None, "dropout": dropout()}
    return attention.attention(*leaves.values(), **settings, **KEYS)


def _gradients(function, leaves):
    out = function(leaves)
    return [out, *torch.autograd.grad(out.square().sum(), list(leaves.values()))]


@pytest.mark.parametrize("operator", CASES)
def test_operators_satisfy_torch(operator):
    """Schemas and fakes agree with what the operators do."""
    leaves = [x.detach().half() for x in _leaves(operator).values()]
    d = dropout()
    settings = (KEYS["key_lengths"], None, d.rng, 1.0, operator == "two_segments", d.p, d.site)
    torch.library.opcheck(attention.attention_op, (leaves, *settings), test_utils=("test_schema", "test_faketensor"))


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
    # the state of the generator, and one float32 a query and head
    assert sorted(x.numel() * x.element_size() for x in rest) == sorted([3 * 8, 4 * 2 * 2 * 20])


@pytest.mark.parametrize("operator", CASES)
def test_meta_tensors_give_shapes_without_a_launch(operator):
    leaves = {n: x.to("meta").requires_grad_() for n, x in CASES[operator].items()}
    leaves = {n: x.bfloat16().detach().requires_grad_() for n, x in leaves.items()}
    out = getattr(kernels, operator)(*leaves.values(), impl="triton")
    out.sum().backward()
    assert out.shape == (2, 20, 2, 16)
    assert all(x.grad.shape == x.shape for x in leaves.values())
