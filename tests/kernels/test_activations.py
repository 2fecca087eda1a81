"""One list of activations: each is right in every implementation, and an unknown name is refused by all."""

import functools
import subprocess
import sys
from pathlib import Path
from unittest import mock

import harness
import pytest
import torch
import torch.nn.functional as F
import triton.language as tl
from compiling import compiled

import kernels
from bench.kernel_baselines import eager_glu
from kernels.activations import ACTIVATIONS, Activation
from march import config, experiments

pytestmark = pytest.mark.skipif(not harness.INTERPRETED, reason="of every implementation on a CPU")
IMPLEMENTATIONS = ("reference", "torch", "triton", "bench")
# the formulas once more, written out, so that no entry is its own oracle
EXPECTED = {
    "relu": lambda x: x.clamp(min=0),
    "gelu": lambda x: 0.5 * x * (1 + torch.erf(x / 2**0.5)),
    "silu": lambda x: x / (1 + torch.exp(-x)),
    "sigmoid": lambda x: 1 / (1 + torch.exp(-x)),
    "identity": lambda x: x * 1,
    "relu2": lambda x: x.clamp(min=0) ** 2,
}


def _softplus(a):
    return tl.maximum(a, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(a)))


def _softplus_slope(a):
    return tl.sigmoid(a)


SOFTPLUS = Activation(F.softplus, lambda d, x: d * torch.sigmoid(x), _softplus, _softplus_slope)


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

    function = eager_glu if impl == "bench" else functools.partial(kernels.glu, impl=impl)
    ours = results(functools.partial(function, kind=kind, activation=name), kind)
    for a, b in zip(ours, results(formula, kind), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("kind", ["plain", "gated"])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_every_activation_is_its_formula(name, kind, impl):
    compare(name, kind, impl)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("kind", ["plain", "gated"])
def test_one_entry_adds_an_activation(kind, impl):
    with mock.patch.dict(ACTIVATIONS, softplus=SOFTPLUS), mock.patch.dict(EXPECTED, softplus=F.softplus):
        compare("softplus", kind, impl)
        chosen = experiments.configuration("Baseline", activation="softplus", feedforward=kind)
        assert config.unpublished(chosen) == {"activation": "softplus"}
    with pytest.raises(ValueError, match=r"among relu, .*relu2, got 'softplus'"):
        compare("softplus", kind, impl)


@pytest.mark.parametrize("kind", ["plain", "gated"])
def test_another_entry_under_an_old_name_has_its_own_code(kind):
    with mock.patch.dict(ACTIVATIONS, gelu=SOFTPLUS), mock.patch.dict(EXPECTED, gelu=F.softplus):
        compare("gelu", kind, "triton")
    compare("gelu", kind, "triton")


CHANGED = """
import dataclasses, json, sys
from kernels.activations import ACTIVATIONS
from kernels.fused.activation_code import activation_key

keys = [activation_key("gelu")]
for field in ("value", "slope"):
    ACTIVATIONS["gelu"] = dataclasses.replace(ACTIVATIONS["gelu"], **{field: getattr(ACTIVATIONS["silu"], field)})
    keys.append(activation_key("gelu"))
print(json.dumps(keys))
"""


def test_changed_device_code_is_another_program():
    """Triton's cache on disk knows a program by its kernel's source and constants."""
    assert len(set(compiled(CHANGED))) == 3


def test_device_code_has_no_answer_for_a_name_without_code():
    import kernels.fused.glu as fused

    with mock.patch.object(fused, "activation_key", return_value="swish"), pytest.raises(Exception, match="swish"):
        compare("relu", "gated", "triton")


@pytest.mark.parametrize("impl", IMPLEMENTATIONS[:3])
@pytest.mark.parametrize("kind", ["plain", "gated", "mixed"])
def test_an_unknown_name_is_refused(kind, impl):
    with pytest.raises(ValueError, match="among relu, gelu, silu, sigmoid, identity, relu2, got 'swish'"):
        kernels.glu(torch.ones(1, 1, 16), torch.ones(16, 16), kind=kind, activation="swish", impl=impl)


def test_the_configuration_has_the_same_names_without_importing_torch():
    code = (
        "import sys, march.config as config\n"
        "print(*config.choices('activation'))\n"
        "sys.exit(any(m.split('.')[0] in ('torch', 'kernels') for m in sys.modules))"
    )
    root = Path(kernels.__file__).parents[1]
    run = subprocess.run([sys.executable, "-c", code], cwd=root, check=True, capture_output=True, text=True)
    assert run.stdout.split() == list(ACTIVATIONS) == list(config.choices("activation"))
