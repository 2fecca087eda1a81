"""Nothing to compute: zeros of the right shape, and a graph whose backward gives zeros; and no gradient unasked."""

import pytest
import torch
from operator_cases import CASES, IMPLS, ONE_EACH, call, cases_of, floating, leaves_of
from test_portable_path import Largest

import kernels

NONE = [{"B": 0}, {"L": 0}, {"M": 0}, {"L": 0, "M": 0, "F": 0}]


@pytest.mark.parametrize("none", NONE, ids=lambda none: "".join(none))
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("impl", IMPLS)
def test_of_nothing_there_is_a_graph_and_zero_gradients(impl, name, none):
    case = cases_of(**none)[name]
    leaves = leaves_of(case)
    outputs = [x for x in call(case, leaves, impl) if x.requires_grad]
    gradients = torch.autograd.grad(sum(x.sum() for x in outputs), list(floating(leaves).values()))
    assert [g.shape for g in gradients] == [x.shape for x in floating(leaves).values()]
    needed = {"glu": "BLF", "attention": "BLM"}.get(case.operator, "BL")
    # two segments have keys of their own, a packed one has its keys' length
    needed = "BL" if "k2" in case.inputs else "BM" if name == "self" else needed
    if set(none) & set(needed):
        assert not any(x.any() for x in (*outputs, *gradients))


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_no_gradient_of_the_table_is_computed_without_grad(context):
    h, weight = torch.randn(1, 2, 8), torch.randn(500, 8, requires_grad=True)
    with context(), Largest() as largest:
        kernels.linear_cross_entropy(h, weight, torch.zeros(1, 2, dtype=torch.int64), impl="torch")
    assert largest.elements <= 2 * 500


@pytest.mark.parametrize("name", ONE_EACH)
@pytest.mark.parametrize("impl", IMPLS)
def test_operators_take_the_type_of_autocast(impl, name):
    """Mixed inputs too; gradients come back in each input's own type. float64 stays, as in torch's products."""
    case = CASES[name]
    leaves = leaves_of(case)
    for n in list(floating(leaves))[1:]:
        leaves[n] = leaves[n].detach().half().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        outputs = call(case, leaves, impl)
    rounded = {n: x if x is None or not x.is_floating_point() else x.bfloat16() for n, x in leaves.items()}
    for got, expected in zip(outputs, call(case, rounded, impl), strict=True):
        assert torch.equal(got, expected)
        assert got.dtype == expected.dtype
    used = [x for x in outputs if x.requires_grad]
    gradients = torch.autograd.grad(sum(x.sum() for x in used), list(floating(leaves).values()))
    assert [g.dtype for g in gradients] == [x.dtype for x in floating(leaves).values()]
    if impl != "triton":
        with torch.autocast("cpu", torch.bfloat16):
            assert call(case, leaves_of(case, dtype=torch.float64), impl)[0].dtype == torch.float64
