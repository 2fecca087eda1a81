"""What a step costs: parameters, FLOPs, bytes, memory, the micro-batch that fits.

Used by `train.py --show`, the trainer and the benchmarks. Torch is loaded by what needs it.
"""

import importlib
from typing import Any

from march.cost.devices import DEVICES, Device, device_peak, find_device

_LAZY = {
    "step": ("OpCosts", "parameters", "step_costs", "total_parameters", "training_flops"),
    "fitting": ("Memory", "counted_as", "fitting_micro_batch", "memory", "room", "state_bytes"),
}
__all__ = ["DEVICES", "Device", "device_peak", "find_device", *_LAZY["step"], *_LAZY["fitting"]]


def __getattr__(name: str) -> Any:
    for module, names in _LAZY.items():
        if name in names:
            return getattr(importlib.import_module(f"march.cost.{module}"), name)
    raise AttributeError(f"module 'march.cost' has no attribute {name!r}")
