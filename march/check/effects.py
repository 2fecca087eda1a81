"""What a file changes beside itself: other experiments would be others while it is loaded."""

import hashlib
import importlib
import sys
from types import FunctionType
from typing import Any

import torch

LOADED = ("kernels.fused.launch", "march.model")

REGISTRIES = ("PARTS", "SPECS", "_OWN", "_SAID", "_LOADED")  # grow by what is asked, and are looked up by its name


def snapshot() -> dict[str, Any]:
    """What is shared: torch's defaults, and the functions, classes and tables of kernels and march."""
    for name in LOADED:
        importlib.import_module(name)
    shared: dict[str, Any] = {
        "torch's default dtype": torch.get_default_dtype(),
        "torch's default device": torch.get_default_device(),
        "torch.is_grad_enabled()": torch.is_grad_enabled(),
        "torch.get_num_threads()": torch.get_num_threads(),
        "torch's deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "torch's generator": hashlib.sha256(torch.get_rng_state().numpy().tobytes()).hexdigest(),
    }
    for name, module in [*sys.modules.items()]:
        if name.split(".")[0] not in ("kernels", "march") or name.startswith("march.experiments.own."):
            continue
        for key, value in vars(module).items():
            if isinstance(value, dict) and key.isupper() and key not in REGISTRIES:
                shared[f"{name}.{key}"] = dict(value)
            elif isinstance(value, FunctionType):
                shared[f"{name}.{key}"] = value
            elif isinstance(value, type) and value.__module__ == name:
                shared |= {f"{name}.{key}.{n}": v for n, v in vars(value).items() if not n.startswith("__weak")}
    for name in ("linear", "softmax", "relu", "gelu", "silu", "scaled_dot_product_attention"):
        shared[f"torch.nn.functional.{name}"] = getattr(torch.nn.functional, name)
    return shared


def changed(before: dict[str, Any]) -> list[str]:
    """Names of what is another now, or gone."""
    now = snapshot()
    return [name for name, value in before.items() if not (now.get(name) is value or _same(now.get(name), value))]


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(a[key] is b[key] for key in a)
    return isinstance(a, int | float | str | torch.dtype | torch.device | None) and a == b
