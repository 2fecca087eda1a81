"""What a benchmark ran on, and what its times are called."""

import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

import torch

from march.cost import Device, find_device

CPU_TIME, GPU_TIME = "CPU time", "GPU time"
PACKAGES = ("torch", "triton", "flash-attn", "apex", "liger-kernel", "transformers", "x-transformers", "deepspeed")


def device() -> torch.device:
    """The device that benchmarks run on: CUDA where there is one."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def kind() -> str:
    """What a time measured here is."""
    return GPU_TIME if torch.cuda.is_available() else CPU_TIME


def processor() -> str:
    """The processor's name and how many of it there are."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]}, {len(names)} cores" if names else platform.processor() or "unknown processor"


def device_name() -> str:
    """The GPU's name, or the processor's."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else processor()


def listed() -> Device | None:
    """This GPU's data sheet; None on a CPU and for a GPU that march.cost.devices does not list."""
    return find_device(torch.cuda.get_device_name()) if torch.cuda.is_available() else None


def versions() -> dict[str, str]:
    """Installed versions of what is measured."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def load() -> float | None:
    """Processes that wanted a core over the last minute, this one included."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def facts() -> dict[str, Any]:
    """For a JSON file: everything that a time depends on and its reader cannot see."""
    return {
        "kind": kind(),
        "device": device_name(),
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "versions": versions(),
    }
