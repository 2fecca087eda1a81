"""Devices as data: what the vendors' data sheets say. Peaks are dense, with float32 accumulation."""

from dataclasses import dataclass

TERA, GIGA, GIB = 1e12, 1e9, 2**30


@dataclass(frozen=True)
class Device:
    """A GPU. bf16, fp32: peak FLOP/s of tensor cores and of float32 units. bandwidth: bytes/s. memory: bytes.

    sms: streaming multiprocessors; hmma_cycles: for how long an HMMA.16816 holds the tensor pipe of a sub-core, from
    the peak, sms and the boost clock. GeForce cards have half the rate with float32 accumulation.
    """

    name: str
    arch: str
    bf16: float
    fp32: float
    bandwidth: float
    memory: int
    sms: int
    hmma_cycles: int

    def peak(self, precision: str) -> float:
        """Peak FLOP/s of matrix products in "bf16" or "fp32" (ieee, not tf32)."""
        return self.bf16 if precision == "bf16" else self.fp32


DEVICES = {
    "a5000": Device("RTX A5000", "sm_86", 111.1 * TERA, 27.8 * TERA, 768 * GIGA, 24 * GIB, 64, 16),
    "a6000": Device("RTX A6000", "sm_86", 154.8 * TERA, 38.7 * TERA, 768 * GIGA, 48 * GIB, 84, 16),
    "3090": Device("GeForce RTX 3090", "sm_86", 71.2 * TERA, 35.6 * TERA, 936 * GIGA, 24 * GIB, 82, 32),
    "4090": Device("GeForce RTX 4090", "sm_89", 165.2 * TERA, 82.6 * TERA, 1008 * GIGA, 24 * GIB, 128, 32),
    "l4": Device("L4", "sm_89", 121.0 * TERA, 30.3 * TERA, 300 * GIGA, 24 * GIB, 58, 16),
    "a100-40gb": Device("A100-SXM4-40GB", "sm_80", 312 * TERA, 19.5 * TERA, 1555 * GIGA, 40 * GIB, 108, 8),
    "a100": Device("A100-SXM4-80GB", "sm_80", 312 * TERA, 19.5 * TERA, 2039 * GIGA, 80 * GIB, 108, 8),
    "h100": Device("H100 80GB HBM3", "sm_90", 989.4 * TERA, 66.9 * TERA, 3350 * GIGA, 80 * GIB, 132, 4),
    "h100-pcie": Device("H100 PCIe", "sm_90", 756 * TERA, 51.2 * TERA, 2000 * GIGA, 80 * GIB, 114, 4),
    "h200": Device("H200", "sm_90", 989.4 * TERA, 66.9 * TERA, 4800 * GIGA, 141 * GIB, 132, 4),
}


def find_device(name: str) -> Device | None:
    """The device whose name is in `name`, as CUDA reports it ("NVIDIA RTX A5000"); None where it is not listed."""
    if name.lower() in DEVICES:
        return DEVICES[name.lower()]
    matches = [device for device in DEVICES.values() if device.name.lower() in name.lower()]
    return max(matches, key=lambda device: len(device.name), default=None)


def device_peak(name: str, precision: str) -> float | None:
    """Peak FLOP/s of the device called `name` in "bf16" or "fp32"; None where it is not listed."""
    device = find_device(name)
    return device.peak(precision) if device else None
