"""What a step costs: parameters, FLOPs, bytes, memory, the micro-batch that fits.

Used by `train.py --show`, the trainer and the benchmarks. Torch is loaded by what needs it.
"""

from typing import Any

from march.cost.devices import DEVICES, Device, device_peak, find_device

_LAZY = {
    "parameters": "size",
    "total_parameters": "size",
    "OpCosts": "op_costs",
    "step_costs": "op_costs",
    "training_flops": "op_costs",
    "Memory": "fitting",
    "counted_as": "fitting",
    "memory": "fitting",
    "fitting_micro_batch": "fitting",
    "room": "fitting",
    "state_bytes": "fitting",
}

__all__ = [
    "DEVICES",
    "Device",
    "device_peak",
    "find_device",
    *_LAZY,
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        import importlib

        value = getattr(importlib.import_module(f"march.cost.{_LAZY[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'march.cost' has no attribute {name!r}")
