"""Resources of the architectures, and the limits that the operators' records set to compiled code."""

import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kernels.operators import OPERATORS
from kernels.operators.record import Limit


@dataclass(frozen=True)
class Architecture:
    """Resources of one streaming multiprocessor (CUDA C++ Programming Guide, table of technical specifications)."""

    shared_memory: int
    shared_memory_block: int
    warps: int
    blocks: int
    registers: int = 65536
    # the driver keeps 1 KiB of every block for itself; registers come in units of 256 a warp, warps of a block in fours
    shared_reserved: int = 1024
    register_unit: int = 256
    warp_unit: int = 4

    def resident_blocks(self, registers: int, shared: int, warps: int) -> int:
        """Blocks of `warps` warps that an SM holds, of `registers` a thread and `shared` bytes."""
        unit = self.register_unit
        per_warp = max(unit, -(-registers * 32 // unit) * unit)
        # registers belong to the four sub-cores, which hold whole warps
        by_registers = self.registers // self.warp_unit // per_warp * self.warp_unit
        allocated = -(-warps // self.warp_unit) * self.warp_unit
        by_shared = self.shared_memory // (shared + self.shared_reserved)
        return min(self.blocks, self.warps // allocated, by_registers // allocated, by_shared)


ARCHITECTURE_DATA = {
    "sm_80": Architecture(164 * 1024, 163 * 1024, 64, 32),
    "sm_86": Architecture(100 * 1024, 99 * 1024, 48, 16),
    "sm_89": Architecture(100 * 1024, 99 * 1024, 48, 24),
    "sm_90": Architecture(228 * 1024, 227 * 1024, 64, 32),
    "sm_100": Architecture(228 * 1024, 227 * 1024, 64, 32),
    "sm_120": Architecture(100 * 1024, 99 * 1024, 48, 24),
}


LIMITS: list[Limit] = [limit for record in OPERATORS.values() for limit in record.limits]


def limits_of(kernel: str, constants: Mapping[str, Any], arch: str) -> list[Limit]:
    """Every limit that applies to a kernel with these constants on `arch`."""
    return [
        limit
        for limit in LIMITS
        if arch in limit.architectures and fnmatch.fnmatch(kernel, limit.kernel) and limit.where(constants)
    ]
