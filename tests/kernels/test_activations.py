"""One list of activations: each is right in every implementation, and an unknown name is refused by all."""

from unittest import mock

import harness
import pytest
import torch

import kernels
from kernels.activations import ACTIVATIONS, Activation

pytestmark = pytest.mark.skipif(not harness.INTERPRETED, reason="of every implementation on a CPU")
IMPLEMENTATIONS = ("reference", "torch", "triton")
# the formulas once more, written out, so that no entry is its own oracle
EXPECTED = {
    "relu": lambda x: x.clamp(min=0),
    "gelu": lambda x: 0.5 * x * (1 + torch.erf(x / 2**0.5)),
    "silu": lambda x: x / (1 + torch.exp(-x)),
    "sigmoid": lambda x: 1 / (1 + torch.exp(-x)),
    "identity": lambda x: x * 1,
    "relu2": lambda x: x.clamp(min=0) ** 2,
}
RELU2 = Activation(lambda x: torch.relu(x).square(), lambda d, x: 2 * d * torch.relu(x))


def results(function, kind: str) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(2, 5, 16, generator=generator).requires_grad_()
    weight = torch.randn(16 if kind == "plain" else 32, 16, generator=generator).requires_grad_()
    out = function(x, weight)
    upstream = torch.randn(out.shape, generator=generator)
    return [out.detach(), *torch.autograd.grad(out, (x, weight), upstream)]


def compare(name: str, kind: str, impl: str) -> None:
    def formula(x, weight):
        first, *second = (x @ weight.T).chunk(1 if kind == "plain" else 2, dim=-1)
        return EXPECTED[name](first) * second[0] if second else EXPECTED[name](first)

    ours = results(lambda x, w: kernels.glu(x, w, kind=kind, activation=name, impl=impl), kind)
    for a, b in zip(ours, results(formula, kind), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("kind", ["plain", "gated"])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_every_activation_is_its_formula(name, kind, impl):
    compare(name, kind, impl)


@pytest.mark.parametrize("kind", ["plain", "gated"])
def test_one_entry_adds_an_activation_and_the_fused_kernels_refuse_it(kind):
    with mock.patch.dict(ACTIVATIONS, relu2=RELU2):
        for impl in ("reference", "torch"):
            compare("relu2", kind, impl)
        with pytest.raises(ValueError, match=r"activation with device code among relu, .*identity, got 'relu2'"):
            compare("relu2", kind, "triton")


def test_device_code_refuses_a_name_that_it_does_not_know():
    """An entry that claims device code and has none does not become the identity."""
    claimed = Activation(RELU2.formula, RELU2.backward, fused=True)
    with mock.patch.dict(ACTIVATIONS, relu2=claimed), pytest.raises(Exception, match="without device code"):
        compare("relu2", "plain", "triton")


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_an_unknown_name_is_refused(impl):
    with pytest.raises(ValueError, match="among relu, gelu, silu, sigmoid, identity, got 'swish'"):
        kernels.glu(torch.ones(1, 1, 16), torch.ones(16, 16), kind="plain", activation="swish", impl=impl)
