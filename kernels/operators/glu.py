from typing import Any

from kernels.operators.record import (
    ARCHITECTURES,
    ENCODER_LENGTH,
    MICRO_BATCH,
    Kernel,
    Limit,
    Operator,
    Tuned,
    normalised,
)
from kernels.validation import Contract


def _sizes(batch: int, length: int, width: int, hidden: int, *, kind: str = "gated") -> dict[str, int]:
    return {"B": batch, "L": length, "D": width, "rows": hidden if kind == "plain" else 2 * hidden}


def halves(kind: str) -> int:
    return 1 if kind == "plain" else 2


def _flops(sizes: Any, kwargs: Any) -> tuple[int, int]:
    forward = 2 * sizes["B"] * sizes["L"] * sizes["D"] * sizes["rows"]
    return forward, 2 * forward


def _product(kernel: Any) -> int:
    return 2 * kernel["M"] * kernel["F"] * halves(kernel["KIND"]) * kernel["D"]


def _gradient(kernel: Any) -> int:
    return 2 * kernel["M"] * kernel["F"] * kernel["D"]


def _tiles() -> list[Tuned]:
    """The first products of Baseline's feedforward and of a gated one."""
    from dataclasses import asdict

    from kernels.fused.measured import Tile
    from kernels.fused.tiles_glu import product_tile

    shapes = [(128, 128, 32, 4, 3), (128, 64, 32, 4, 3), (128, 128, 32, 8, 3), (64, 128, 32, 4, 4), (128, 64, 64, 4, 3)]
    dims = {"batch": MICRO_BATCH, "length": ENCODER_LENGTH, "width": 512}
    return [
        Tuned(
            f"glu.{name}.16",
            lambda arch, kind=kind: asdict(product_tile(arch, kind != "plain", 16)),  # type: ignore[misc]
            tuple(asdict(Tile(*shape)) for shape in shapes),
            dims | {"hidden": hidden, "kind": kind},
            {"kind": kind, "activation": "relu"},
        )
        for name, kind, hidden in (("plain", "plain", 2048), ("pair", "gated", 1365))
    ]


def _aligned(constants: Any) -> bool:
    """Rows that are copied 16 bytes at a time; gradients that come in rows of odd length take more copies."""
    return constants["ALIGN"] >= 8


RECORD = Operator(
    Contract("glu", x="B L D; reshape it", weight="rows D; weights are [out, in]"),
    portable="kernels.portable.feedforward",
    sizes=_sizes,
    values={"weight": normalised("D")},
    saved=("x", "weight"),
    flops=_flops,
    checked={"kind": "gated", "activation": "gelu", "factor": 1.0, "gate_dropout": None},
    kernels={
        "_glu_forward_kernel": Kernel("hidden_ptr saved_ptr", _product),
        "_glu_backward_kernel": Kernel("d_product_ptr"),
        "_glu_recompute_kernel": Kernel("d_product_ptr", _product),
        "_glu_dx_kernel": Kernel("dx_ptr", _gradient),
        "_glu_dw_kernel": Kernel("parts_ptr", _gradient),
    },
    tiles=_tiles,
    limits=(
        Limit("_glu_*", no_spills=True, architectures=ARCHITECTURES),
        Limit("_glu_forward_kernel", issue_per_hmma=4.2, no_duplicates=True),
        Limit("_glu_dx_kernel", _aligned, issue_per_hmma=4.2, shared_per_tensor=0.95),
        # beside the main loop stands that of the last rows, which are fewer than a block
        Limit("_glu_dw_kernel", _aligned, issue_per_hmma=4.2, shared_per_tensor=0.95, loop="main"),
        Limit("_glu_d[xw]_kernel", no_duplicates=True),
    ),
)
