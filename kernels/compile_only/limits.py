"""Limits as data: what the compiled code of each kernel must show on sm_86."""

import fnmatch
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


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
}


def _always(constants: Mapping[str, Any]) -> bool:
    return True


@dataclass(frozen=True)
class Limit:
    """Limits of the kernels whose name matches `kernel` (a shell pattern) and whose constants satisfy `where`.

    issue_per_hmma, shared_per_tensor: exclusive and inclusive upper bounds for `loop`: every innermost loop with
    products ("every"), or the one with fewest slots a product ("main", where other loops are masked edges).
    half_precision_only: the bound on products is for float16 and bfloat16; float32 has other instructions.
    """

    kernel: str
    where: Callable[[Mapping[str, Any]], bool] = _always
    no_spills: bool = False
    resident_warps: int | None = None
    issue_per_hmma: float | None = None
    shared_per_tensor: float | None = None
    no_duplicates: bool = False
    loop: str = "every"
    architectures: tuple[str, ...] = ("sm_86",)


def _width(constants: Mapping[str, Any]) -> int:
    """Wider head of queries and values; the rows kernel of backward has values only."""
    return max(constants.get("K", 0), constants.get("KV", 0))


def _at(width: int, dropout: bool) -> Callable[[Mapping[str, Any]], bool]:
    return lambda constants: (_width(constants), bool(constants["DROPOUT"])) == (width, dropout)


def _aligned(constants: Mapping[str, Any]) -> bool:
    """Rows that are copied 16 bytes at a time; gradients that come in rows of odd length take more copies."""
    return constants["ALIGN"] >= 8


def _wide(constants: Mapping[str, Any]) -> bool:
    """The softmax between two products of D features is the same work for any D: 4.7 slots at 384, 7.2 at 128."""
    return constants["D"] > 384


LIMITS: list[Limit] = [
    Limit("_glu_*", no_spills=True, architectures=("sm_80", "sm_86", "sm_89", "sm_90")),
    Limit("_glu_forward_kernel", issue_per_hmma=4.2, no_duplicates=True),
    Limit("_*attention_*", lambda c: _width(c) <= 128, no_spills=True, no_duplicates=True),
    Limit("_glu_dx_kernel", _aligned, issue_per_hmma=4.2, shared_per_tensor=0.95),
    # beside the main loop stands that of the last rows, which are fewer than a block
    Limit("_glu_dw_kernel", _aligned, issue_per_hmma=4.2, shared_per_tensor=0.95, loop="main"),
    Limit("_glu_d[xw]_kernel", no_duplicates=True),
    Limit("_*attention_fwd_kernel", lambda c: _width(c) <= 64, resident_warps=8),
    Limit("_*attention_bwd_d*", lambda c: _width(c) <= 64, resident_warps=8),
    # the main loop: beside it are loops over blocks at the causal diagonal and at the end of the keys
    *(
        Limit(
            f"_*attention_{kernel}",
            _at(width, dropout),
            issue_per_hmma=issue,
            shared_per_tensor=shared,
            loop="main",
        )
        for kernel, width, dropout, issue, shared in (
            ("fwd_kernel", 32, True, 19.0, None),
            ("fwd_kernel", 64, False, 6.0, 0.95),
            ("fwd_kernel", 64, True, 12.0, 0.95),
            ("fwd_kernel", 128, False, 5.0, None),
            ("fwd_kernel", 128, True, 8.0, None),
            ("bwd_d*", 64, False, 6.0, 0.95),
            ("bwd_d*", 64, True, 11.0, 0.95),
            ("bwd_d*", 128, False, 5.0, 1.2),
            ("bwd_d*", 128, True, 7.0, 1.2),
        )
    ),
    Limit("_residual_norm_*", no_spills=True),
    Limit("_linear_cross_entropy_*", no_spills=True),
    Limit("_linear_cross_entropy_fwd_kernel", issue_per_hmma=4.0, no_duplicates=True),
    Limit("_linear_cross_entropy_gradient_kernel", _wide, issue_per_hmma=4.0, shared_per_tensor=0.95),
    Limit("_linear_cross_entropy_gradient_kernel", no_duplicates=True),
]


def limits_of(kernel: str, constants: Mapping[str, Any], arch: str) -> list[Limit]:
    """Every limit that applies to a kernel with these constants on `arch`."""
    return [
        limit
        for limit in LIMITS
        if arch in limit.architectures and fnmatch.fnmatch(kernel, limit.kernel) and limit.where(constants)
    ]
