"""The first start on a CUDA device: each selected kernel is compared with `reference` before it is used.

The kernels are tested in Triton's interpreter and compiled for their targets without a device, so a device may be the
first that ever runs them. The check of an operator runs forward and backward at a small shape, with dropout on (its
masks are exact), and compares outputs and gradients with the float64 formula. A pass is remembered in a file, by
device, versions and the kernels' sources; a disagreement raises and is never remembered.
"""

import hashlib
import json
import os
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kernels import cases, packed, reference
from kernels.dropout import Dropout, dropout_state

BUDGET_SECONDS = 10.0
# of the formula's own error in the dtype, and absolutely, relative to the largest value; a wrong kernel is off by 1e-2
# or more. Wider than the tests' 2 and 1e-5: one shape is drawn, and refusing a right kernel stops a run.
ERROR_FACTOR, ERROR_FLOOR = 4.0, 1e-4


def cases_of(operator: str, device: torch.device, contract_dropout: bool = True) -> tuple[dict, dict]:
    """(tensors in float64, other arguments) of the check of one operator: every feature of it that masks or scales.

    contract_dropout: False for a library that draws its own masks or has no padding; it is checked without either.
    """
    if operator != packed.operator_of(operator):
        inputs, kwargs = cases_of(packed.operator_of(operator), device, contract_dropout)
        return packed.pack(operator, inputs), kwargs
    rng = dropout_state(42, 1, 5, device)
    first, second = (Dropout(0.25, rng, site) if contract_dropout else None for site in (1, 2))
    lengths = torch.tensor([33, 20], device=device) if contract_dropout else None
    if operator == "attention":
        inputs = cases.attention_inputs(2, 40, 40, 2, 64, device=device)
        return inputs, {"scale": 0.5, "causal": True, "key_lengths": lengths, "key_mask": None, "dropout": first}
    if operator == "unified_attention":
        inputs = cases.unified_attention_inputs(2, 24, 40, 2, 64, device=device)
        return inputs, {"scale": 0.5, "key_lengths": lengths, "key_mask": None, "dropout": first}
    if operator == "glu":
        inputs = cases.glu_inputs(2, 40, 64, 96, device=device)
        kwargs = {"kind": "gated", "activation": "gelu", "factor": 1.0, "dropout": first, "gate_dropout": None}
        return inputs, kwargs
    if operator == "residual_norm":
        return cases.residual_norm_inputs(2, 40, 96, device=device), {"dropout": first, "eps": 1e-6}
    if operator == "linear_cross_entropy":
        inputs = cases.linear_cross_entropy_inputs(2, 40, 64, 300, device=device)
        return inputs, {"scale": 0.125, "ignore_index": -100}
    assert operator == "embedding", operator
    inputs = cases.embedding_inputs(2, 40, 96, 50, positions=48, device=device)
    return inputs, {"combine": "average", "dropout": first, "position_dropout": second}


def evaluate(
    operator: str, function: Callable, inputs: Mapping[str, Any], kwargs: Mapping[str, Any], dtype: torch.dtype
) -> dict[str, Tensor]:
    """Outputs and gradients by name, in float64 on the CPU."""
    with torch.enable_grad():
        leaves = {
            n: x if x is None or not x.dtype.is_floating_point else x.detach().to(dtype).requires_grad_()
            for n, x in inputs.items()
        }
        outputs = function(**leaves, **kwargs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        # the loss of each token is not differentiable by contract, though it is in the formula
        used = outputs[:1] if operator == "linear_cross_entropy" else outputs
        upstream = [
            torch.linspace(-1, 1, x.numel()).view(x.shape).to(x) if x.dim() else torch.ones_like(x) for x in used
        ]
        wanted = {n: x for n, x in leaves.items() if x is not None and x.requires_grad}
        gradients = torch.autograd.grad(list(used), list(wanted.values()), upstream, allow_unused=True)
    named: dict[str, Tensor] = {f"output {i}": x for i, x in enumerate(outputs)}
    named |= {
        f"d{n}": torch.zeros_like(x) if g is None else g for (n, x), g in zip(wanted.items(), gradients, strict=True)
    }
    return {n: x.detach().double().cpu() for n, x in named.items()}


def disagreements(
    operator: str,
    function: Callable,
    device: torch.device,
    dtype: torch.dtype,
    contract_dropout: bool = True,
    case: tuple[dict, dict] | None = None,
) -> list[str]:
    """What of `function`'s outputs and gradients is further from the float64 formula than its dtype explains.

    case: as `cases_of` gives it, for another shape than its own.
    """
    inputs, kwargs = case or cases_of(operator, device, contract_dropout)
    rounded = {n: x.to(dtype) if x is not None and x.dtype.is_floating_point else x for n, x in inputs.items()}
    formula = packed.resolve(operator, reference)
    oracle = evaluate(operator, formula, rounded, kwargs, torch.float64)
    plain = evaluate(operator, formula, rounded, kwargs, dtype)
    got = evaluate(operator, function, rounded, kwargs, dtype)
    problems = []
    for name, expected in oracle.items():
        scale = max(expected.abs().max().item(), 1e-30)
        error = (got[name] - expected).abs().max().item() / scale
        budget = ERROR_FACTOR * (plain[name] - expected).abs().max().item() / scale + ERROR_FLOOR
        if not error <= budget:
            problems.append(f"{name}: error {error:.1e}, expected at most {budget:.1e}")
    return problems


# ---------------------------------------------------------------- memory


def cache_file() -> Path:
    """Where passed checks are remembered: $MARCH_CACHE, or the user's cache directory."""
    root = os.environ.get("MARCH_CACHE")
    base = Path(root) if root else Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "march"
    return base / "first_start.json"


@cache
def _sources() -> str:
    """Hash of the kernels' sources: an edited kernel is checked again."""
    digest = hashlib.sha256()
    root = Path(__file__).parent
    for path in sorted((*root.glob("*.py"), *root.glob("fused/*.py"), *root.glob("libraries/*.py"))):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def fingerprint(operator: str, name: str, device: torch.device, dtype: torch.dtype) -> str:
    """What a pass is remembered by: device, versions, sources, operator, implementation and dtype."""
    import importlib.metadata

    versions = [f"torch {torch.__version__}", f"cuda {torch.version.cuda}"]
    for package in ("triton", "flash-attn", "apex"):
        try:
            versions.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    where = device.type
    if device.type == "cuda":
        where = f"{torch.cuda.get_device_name(device)} sm_{''.join(map(str, torch.cuda.get_device_capability(device)))}"
    return " | ".join((where, *versions, f"kernels {_sources()}", operator, name, str(dtype)))


def _remembered() -> dict[str, float]:
    try:
        data = json.loads(cache_file().read_text())
    except (OSError, ValueError):
        return {}
    return data if isinstance(data, dict) else {}


def _remember(key: str, seconds: float) -> None:
    """Adds one pass; ranks write at once, so the file is replaced whole. A directory that cannot be written costs the
    check at every start, nothing else."""
    path = cache_file()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        data = _remembered() | {key: round(seconds, 3)}
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
            json.dump(data, file, indent=1)
        os.replace(file.name, path)
    except OSError:
        return


def verify(operator: str, name: str, function: Callable, device: torch.device, dtype: torch.dtype) -> str:
    """Checks `function` (implementation `name` of `operator`) on `device` unless a pass is remembered.

    Returns "remembered" or "passed in N s"; raises ImplementationError on disagreement.
    """
    from kernels.dispatch import LIBRARIES, ImplementationError

    key = fingerprint(operator, name, device, dtype)
    if key in _remembered():
        return "remembered"
    start = time.perf_counter()
    own = name not in LIBRARIES.get(packed.operator_of(operator), ())
    problems = disagreements(operator, function, device, dtype, contract_dropout=own)
    seconds = time.perf_counter() - start
    if problems:
        raise ImplementationError(
            f"{operator}: impl={name!r} disagrees with the reference formula on {device} in {dtype} ("
            + "; ".join(problems)
            + f"); its kernel is wrong on this device: use impl={{{operator!r}: 'torch'}} and report it"
        )
    _remember(key, seconds)
    return f"passed in {seconds:.1f} s"
