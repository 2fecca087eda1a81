from typing import Any

import torch
from torch import Tensor

from kernels.operators.record import DECODER_LENGTH, MICRO_BATCH, VOCABULARY, Draw, Kernel, Limit, Operator, Tuned
from kernels.validation import Contract


def _sizes(batch: int, length: int, width: int, vocabulary: int, *, ignored: float = 0.1) -> dict[str, Any]:
    return {"B": batch, "L": length, "D": width, "V": vocabulary, "ignored": ignored}


def _labels(draw: Draw, sizes: Any, shape: Any) -> Tensor:
    """About the share `ignored` of them is ignore_index."""
    labels, chance = draw.integers(sizes["V"], shape), draw.integers(1000, shape)
    ignored = 1000 * sizes.get("ignored", 0.1)
    return labels if draw.meta else labels.masked_fill(chance < ignored, sizes.get("ignore_index", -100))


def _flops(sizes: Any, kwargs: Any) -> tuple[int, int]:
    forward = 2 * sizes["B"] * sizes["L"] * sizes["D"] * sizes["V"]
    return forward, 2 * forward


def _tiles() -> list[Tuned]:
    from dataclasses import asdict

    from kernels.fused.measured import Tile
    from kernels.fused.tiles_rows import product_tile

    shapes = [(64, 128, 64, 4, 3), (128, 64, 64, 4, 3), (128, 128, 32, 4, 4), (128, 128, 64, 8, 3)]
    shapes.append((128, 256, 32, 8, 3))
    shapes_32 = [(64, 128, 16, 4, 3), (64, 64, 32, 4, 2), (128, 64, 16, 4, 3)]
    # own rows, other rows, features: what fits shared memory at 512 features
    gradient = [(64, 32, 512, 8, 2), (64, 16, 512, 8, 3), (32, 32, 512, 4, 3), (32, 32, 512, 8, 3)]
    products = [(kernel, bits, few, "chunks") for bits, few in ((16, shapes), (32, shapes_32)) for kernel in _PRODUCTS]
    dims = {"batch": MICRO_BATCH, "length": DECODER_LENGTH, "width": 512, "vocabulary": VOCABULARY}
    return [
        Tuned(
            f"linear_cross_entropy.{kernel}.{bits}",
            lambda arch, kernel=kernel, bits=bits: asdict(product_tile(arch, kernel, bits)),  # type: ignore[misc]
            tuple(
                asdict(Tile(*shape, precision))
                for shape in candidates
                for precision in (("ieee",) if bits == 16 else ("ieee", "tf32x3"))
            ),
            dims,
            {"scale": 512**-0.5, "logits": logits},
            (),
            torch.bfloat16 if bits == 16 else torch.float32,
            kernel != "forward",
        )
        for kernel, bits, candidates, logits in [*products, ("gradient", 16, gradient, "recompute")]
    ]


def _wide(constants: Any) -> bool:
    """The softmax between two products of D features is the same work for any D: 4.7 slots at 384, 7.2 at 128."""
    return constants["D"] > 384


_PRODUCTS = ("forward", "dlogits")
RECORD = Operator(
    Contract(
        "linear_cross_entropy",
        h="B L D; reshape it",
        weight="V D; weights are [out, in]",
        labels="int64 B L; one label a position",
    ),
    portable="kernels.portable.loss",
    sizes=_sizes,
    values={"labels": _labels},
    saved=("h", "weight", "labels"),
    flops=_flops,
    checked={"scale": 0.125, "ignore_index": -100},
    drops=(),
    # the loss of each token is not differentiable by contract, though it is in the formula
    differentiable=1,
    kernels={
        "_linear_cross_entropy_fwd_kernel": Kernel(
            "top_ptr total_ptr target_ptr", lambda k: 2 * k["tokens"] * k["vocabulary"] * k["width"]
        ),
        "_linear_cross_entropy_join_kernel": Kernel("lse_ptr loss_ptr sum_ptr count_ptr"),
        "_linear_cross_entropy_mean_kernel": Kernel("loss_ptr inverse_ptr"),
        "_linear_cross_entropy_dlogits_kernel": Kernel("g_ptr", lambda k: 2 * k["tokens"] * k["columns"] * k["width"]),
        # logits again, the gradient
        "_linear_cross_entropy_gradient_kernel": Kernel(
            "out_ptr top_ptr total_ptr",
            lambda k: 4 * k["own_rows"] * k["other_rows"] * k["D"],
        ),
        "_linear_cross_entropy_dh_kernel": Kernel("out_ptr target_ptr"),
        "_linear_cross_entropy_scale_kernel": Kernel("out_ptr"),
    },
    tiles=_tiles,
    limits=(
        Limit("_linear_cross_entropy_*", no_spills=True),
        Limit("_linear_cross_entropy_fwd_kernel", issue_per_hmma=4.0, no_duplicates=True),
        Limit("_linear_cross_entropy_gradient_kernel", _wide, issue_per_hmma=4.0, shared_per_tensor=0.95),
        Limit("_linear_cross_entropy_gradient_kernel", no_duplicates=True),
    ),
)
