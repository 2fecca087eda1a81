from collections.abc import Callable
from typing import Any

from kernels.operators.record import ENCODER_LENGTH, MICRO_BATCH, Kernel, Limit, Operator, Tuned
from kernels.validation import Contract


def row_tiles(kind: str) -> tuple[Callable, tuple[dict[str, Any], ...]]:
    """(committed, alternatives) of a kernel that holds whole rows; kind: of tiles_rows.ELEMENTS."""
    from kernels.fused import tiles_rows

    return lambda arch: {"elements": tiles_rows.ELEMENTS[kind]}, tuple({"elements": n} for n in (4, 8, 16, 32))


RECORD = Operator(
    Contract(
        "residual_norm",
        x="B L D; reshape it",
        s="B L D; reshape it, a sublayer keeps its stream's shape",
        gain="D; one gain a feature",
    ),
    portable="kernels.portable.norm",
    sizes=lambda batch, length, width: {"B": batch, "L": length, "D": width},
    values={"gain": lambda draw, sizes, shape: 1 + draw.normal(shape, scale=0.1)},
    # without s, y is x
    saved=("out", "gain"),
    checked={"eps": 1e-6},
    libraries=("apex",),
    kernels={
        "_residual_norm_fwd_kernel": Kernel("y_ptr z_ptr rstd_ptr"),
        "_residual_norm_bwd_kernel": Kernel("dx_ptr ds_ptr partial_ptr"),
        "_sum_rows_kernel": Kernel("out_ptr"),
    },
    tiles=lambda: [
        Tuned("rows.stream", *row_tiles("stream"), {"batch": MICRO_BATCH, "length": ENCODER_LENGTH, "width": 512})
    ],
    limits=(Limit("_residual_norm_*", no_spills=True),),
)
