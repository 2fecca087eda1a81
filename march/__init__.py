"""march: a laboratory for transformer architectures under one budget.

`march.build_model(name, ...)` builds an experiment's model; `march.load("runs/x")` gives a trained one with its
tokenizer and recipe; `march.load_predecessor` and `march.to_predecessor`
exchange weights with the original's checkpoints. The names load torch when they are first used.
"""

import importlib.util
from pathlib import Path
from typing import Any

_found = importlib.util.find_spec("kernels")
if _found is None or not Path(_found.origin or "").with_name("fused").is_dir():
    # else the first import of one of its modules fails, and says nothing of why
    raise ImportError(
        f"march: expected its own package kernels, got {_found.origin if _found else None}, as Hugging Face's package "
        "of that name is; pip uninstall kernels, then install march again"
    )

__version__ = "0.1.0"
_MODULES = {
    "build_model": "march.model",
    "load": "march.trained",
    "load_predecessor": "march.predecessor.weights",
    "to_predecessor": "march.predecessor.weights",
}
__all__ = ["build_model", "load", "load_predecessor", "to_predecessor"]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        import importlib

        return getattr(importlib.import_module(_MODULES[name]), name)
    raise AttributeError(f"module 'march' has no attribute {name!r}")
