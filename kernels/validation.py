"""What an operator refuses: ValueError with what was expected, what came, and what to do.

Legend: kernels.api. `operator` is the name that the message begins with.
"""

import functools
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from kernels.dropout import Dropout

MAX_HEAD_DIM = 512


def check(condition: bool, operator: str, expected: str, got: object, fix: str) -> None:
    if not condition:
        raise ValueError(f"{operator}: expected {expected}, got {got}; {fix}")


def shape_of(x: Tensor) -> list[int]:
    return list(x.shape)


def once_differentiable(backward: Callable) -> Callable:
    """A backward of plain operations that is not differentiable. torch's own of this name leaves what it cannot follow
    out of a second derivative, without a word, where autograd.grad is asked for some inputs alone."""

    @functools.wraps(backward)
    def first(ctx: Any, *gradients: Tensor | None) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError("kernels: expected a first derivative, got create_graph=True; use impl='reference'")
        return backward(ctx, *gradients)

    return first


def check_dense(operator: str, arguments: dict[str, object], optional: dict[str, bool]) -> None:
    """Those named in `optional` are tensors, or None where True stands, and strided: they have the shape and the memory
    that all else reads."""
    for name, may_lack in optional.items():
        x = arguments.get(name)
        if not isinstance(x, Tensor):
            lacks = x is None and (may_lack or name not in arguments)  # Python itself names what is not given
            check(lacks, operator, f"{name} as a tensor", type(x).__name__, "convert it with torch.as_tensor")
        else:
            got = "a nested one" if x.is_nested else x.layout
            dense = got == torch.strided
            check(dense, operator, f"{name} as a dense tensor", got, f"convert it with {name}.to_dense() or pad it")


def check_same(operator: str, dropouts: tuple[Dropout | None, ...] = (), **tensors: Tensor | None) -> None:
    """One floating dtype and one device for all tensors that are given."""
    given = {name: x for name, x in tensors.items() if x is not None}
    first_name, first = next(iter(given.items()))
    check(
        first.dtype.is_floating_point,
        operator,
        f"{first_name} of a floating dtype",
        first.dtype,
        f"convert it with {first_name}.to(torch.float32)",
    )
    for name, x in given.items():
        check(
            x.dtype == first.dtype,
            operator,
            f"{name} as {first.dtype} like {first_name}",
            x.dtype,
            f"convert it with {name}.to({first.dtype})",
        )
        check(
            x.device == first.device,
            operator,
            f"{name} on {first.device} like {first_name}",
            x.device,
            f"move it with {name}.to({first_name}.device)",
        )
    for dropout in dropouts:
        if dropout is not None:
            check(
                dropout.rng.device == first.device,
                operator,
                f"dropout.rng on {first.device}",
                dropout.rng.device,
                "move it to the operator's device",
            )


def check_padding(
    operator: str, batch: int, keys: int, lengths: Tensor | None, mask: Tensor | None, device: torch.device
) -> None:
    check(
        lengths is None or mask is None,
        operator,
        "key_lengths or key_mask",
        "both",
        "give the mask alone, it can express the lengths",
    )
    if lengths is not None:
        check(
            lengths.shape == (batch,) and lengths.dtype in (torch.int32, torch.int64),
            operator,
            f"key_lengths as integers [{batch}]",
            f"{lengths.dtype} {shape_of(lengths)}",
            "one length a sequence",
        )
        check(lengths.device == device, operator, f"key_lengths on {device}", lengths.device, "move it there")
    if mask is not None:
        check(
            mask.shape == (batch, keys) and mask.dtype == torch.bool,
            operator,
            f"key_mask as bool [{batch}, {keys}], True where a key is real",
            f"{mask.dtype} {shape_of(mask)}",
            "give one row a sequence and one column a key",
        )
        check(mask.device == device, operator, f"key_mask on {device}", mask.device, "move it there")


def check_keys_values(operator: str, q: Tensor, k: Tensor, v: Tensor, names: tuple[str, str]) -> None:
    batch, _, heads, width = q.shape
    for name, x in zip(names, (k, v), strict=True):
        check(
            x.dim() == 4 and x.shape[0] in (1, batch),
            operator,
            f"{name} as [{batch} or 1, Lk, G, K]",
            shape_of(x),
            "lay heads out as [B, L, H, K]",
        )
    check(
        k.shape[:3] == v.shape[:3],
        operator,
        f"{names[0]} and {names[1]} of one [B, Lk, G]",
        f"{shape_of(k)} and {shape_of(v)}",
        "only the last dimension may differ",
    )
    check(
        k.shape[3] == width,
        operator,
        f"{names[0]} of width {width} like q",
        shape_of(k),
        "project to one width",
    )
    check(
        k.shape[2] > 0 and heads % k.shape[2] == 0,
        operator,
        f"a number of key/value heads that divides {heads}",
        k.shape[2],
        "repeat or regroup the heads",
    )
    for name, x in (("q", q), (names[1], v)):
        check(
            1 <= x.shape[3] <= MAX_HEAD_DIM,
            operator,
            f"a head width from 1 to {MAX_HEAD_DIM} in {name}",
            x.shape[3],
            "use more, narrower heads",
        )


def check_indices(operator: str, name: str, indices: Tensor, rows: int, ignored: int | None = None) -> None:
    """ValueError for a table without rows. With KERNELS_DEBUG=1 in the environment ValueError names the first index
    outside [0, rows) other than `ignored`, for which it waits for the device."""
    check(rows > 0 or indices.numel() == 0, operator, "a vocabulary of at least 1", rows, "give a table [V, D]")
    if torch.compiler.is_compiling() or os.environ.get("KERNELS_DEBUG") != "1":
        return
    if isinstance(indices, FakeTensor) or indices.device.type == "meta":
        return
    wrong = (indices < 0) | (indices >= rows)
    if ignored is not None:
        wrong &= indices != ignored
    if bool(wrong.any()):
        at = wrong.nonzero()[0].tolist()
        expected = f"{name} in [0, {rows})" + ("" if ignored is None else f" or {ignored}")
        check(False, operator, expected, f"{indices[tuple(at)].item()} at {at}", "look at how they were made")


def check_packed(operator: str, name: str, x: Tensor, parts: int) -> None:
    check(
        x.dim() == 5 and x.shape[2] == parts,
        operator,
        f"{name} as [B, L, {parts}, H, K]",
        shape_of(x),
        f"give the product of all {parts} weights as x.unflatten(-1, ({parts}, H, K))",
    )
