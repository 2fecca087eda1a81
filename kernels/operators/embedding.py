from typing import Any

import torch
from torch import Tensor

from kernels.operators.record import ENCODER_LENGTH, MICRO_BATCH, VOCABULARY, Draw, Kernel, Operator, Tuned
from kernels.operators.residual_norm import row_tiles
from kernels.validation import Contract


def _sizes(batch: int, length: int, width: int, vocabulary: int, *, positions: int | None = None) -> dict[str, int]:
    places = length if positions is None else positions
    return {"B": batch, "L": length, "D": width, "V": vocabulary, "P": places}


def _ids(draw: Draw, sizes: Any, shape: Any) -> Tensor:
    """Half of them among the first tenth of the vocabulary."""
    any_word, frequent = draw.integers(sizes["V"], shape), draw.integers(max(1, sizes["V"] // 10), shape)
    return any_word if draw.meta else torch.where(draw.integers(2, shape) == 0, any_word, frequent)


DROPS = ("dropout", "position_dropout")
_TABLE = "both tables have one width, [rows, D]"
RECORD = Operator(
    Contract("embedding", ids="int64 B L; reshape or convert them", table=f"V D; {_TABLE}", positions=f"P D; {_TABLE}"),
    portable="kernels.portable.token_embedding",
    sizes=_sizes,
    values={"ids": _ids},
    saved=("ids",),
    checked={"combine": "average"},
    drops=DROPS,
    kernels={
        "_embedding_fwd_kernel": Kernel("out_ptr"),
        "_embedding_table_bwd_kernel": Kernel("d_table_ptr"),
        "_embedding_positions_bwd_kernel": Kernel("d_positions_ptr"),
    },
    tiles=lambda: [
        Tuned(
            "rows.runs",
            *row_tiles("runs"),
            {"batch": MICRO_BATCH, "length": ENCODER_LENGTH, "width": 512, "vocabulary": VOCABULARY},
            drops=DROPS,
        )
    ],
)
