"""Offsets that 32 bits do not hold: rows that lie far apart, in a sparse file of which a few pages exist, and refusals.

The interpreter's 32-bit arithmetic wraps as a GPU's does; `no_stray_access` turns a wrapped offset into a failure."""

import numpy as np
import pytest
import torch
from harness import DEVICE, INTERPRETED
from test_launch import CASES, HEADS, SEGMENTS, STREAM, Case, call, leaves_of, randn
from test_values import no_stray_access
from torch import Tensor

import kernels
from kernels import cases
from kernels.fused import attention as fused_attention
from kernels.fused import launch

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="a file is no device memory")


@pytest.fixture(scope="module")
def memory(tmp_path_factory):
    """2^33 float32 in a file without blocks."""
    path = tmp_path_factory.mktemp("far") / "memory"
    yield torch.from_numpy(np.memmap(path, dtype=np.float32, mode="w+", shape=(1 << 33,)))
    path.unlink()


def _far(memory: Tensor, x: Tensor, dim: int) -> Tensor:
    """A copy of `x` in `memory`, the first and last along `dim` 2^32 elements apart."""
    strides = list(x.contiguous().stride())
    strides[dim] = -(-(1 << 32) // (16 * (x.shape[dim] - 1))) * 16
    return memory.as_strided(x.shape, strides).copy_(x)


ENTROPY = cases.linear_cross_entropy_inputs(2, 9, 24, 40)
RELU = Case("glu", cases.glu_inputs(2, 9, 24, 40, kind="plain"), {"kind": "plain"})
GATED = Case("glu", cases.glu_inputs(2, 9, 24, 20, kind="gated"), {"activation": "silu"})
ATTENTION = Case("attention", {n: randn(2, 9, 9, 16) for n in HEADS})
PACKED = Case("attention", CASES["self"].inputs)
RECOMPUTED = Case("linear_cross_entropy", ENTROPY, {"logits": "recompute"})
# (operator, tensor or output whose gradient it is, dimension): every tensor whose strides a kernel is told
PLACES = {
    "attention head": (ATTENTION, "q", 2),
    "attention position": (ATTENTION, "k", 1),
    "attention value head": (ATTENTION, "v", 2),
    "attention batch": (ATTENTION, "v", 0),
    "attention upstream": (ATTENTION, "upstream", 1),
    "attention upstream head": (ATTENTION, "upstream", 2),
    "unified": (Case("attention", SEGMENTS, {"causal": True}), "k2", 1),
    "packed": (PACKED, "q", 1),
    "packed part": (PACKED, "q", 2),
    "relu rows": (RELU, "x", 1),
    "relu batch": (RELU, "x", 0),
    "relu weight": (RELU, "weight", 0),
    "relu upstream": (RELU, "upstream", 1),
    "relu upstream columns": (RELU, "upstream", 2),
    "gated weight": (GATED, "weight", 0),
    "gated rows": (GATED, "x", 1),
    "gated upstream columns": (GATED, "upstream", 2),
    "gated upstream rows": (GATED, "upstream", 1),
    "recompute gated": (Case("glu", GATED.inputs, GATED.kwargs | {"recompute": True}), "upstream", 2),
    "norm": (Case("residual_norm", STREAM), "s", 1),
    "norm upstream": (Case("residual_norm", STREAM), "upstream", 1),
    "recompute rows": (RECOMPUTED, "h", 1),
    "recompute weight": (RECOMPUTED, "weight", 0),
    "chunks weight": (Case("linear_cross_entropy", ENTROPY, {"logits": "chunks"}), "weight", 0),
    "table": (CASES["embedding"], "table", 0),
    "positions": (CASES["embedding"], "positions", 0),
    "embedding upstream": (CASES["embedding"], "upstream", 1),
}


def _results(case: Case, memory: Tensor | None = None, which: str = "", dim: int = 0) -> tuple[Tensor, ...]:
    """The output and all gradients; tensor `which` lies in `memory`, far apart along `dim`."""
    leaves = leaves_of(case)
    if memory is not None and which != "upstream":
        leaves[which] = _far(memory, leaves[which].detach(), dim).requires_grad_()
    out = next(x for x in reversed(call(case, leaves)) if x.requires_grad and x.dim() in (0, 3, 4))
    upstream = torch.ones_like(out) if out.dim() == 0 else randn(*out.shape).to(out)
    if memory is not None and which == "upstream":
        upstream = _far(memory, upstream, dim)
    wanted = [x for x in leaves.values() if x is not None and x.requires_grad]
    with no_stray_access():
        return out, *torch.autograd.grad(out, wanted, upstream)


CLOSE: dict[int, tuple[Tensor, ...]] = {}  # by case: several of its tensors are tried


@pytest.mark.parametrize("name", PLACES)
def test_rows_far_apart_give_the_bits_of_close_ones(memory, name):
    case, which, dim = PLACES[name]
    if id(case) not in CLOSE:
        CLOSE[id(case)] = _results(case)
    for close, apart in zip(CLOSE[id(case)], _results(case, memory, which, dim), strict=True):
        torch.testing.assert_close(apart, close, rtol=0, atol=0)


def _meta(*shape: int, dtype: torch.dtype = torch.float16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


LONG, MANY, WIDTH = 1 << 23, (1 << 14, 1 << 14), (1 << 23) + 16
REFUSED = {
    "q": ("attention", [_meta(1, LONG, 16, 16)] * 3, {}, r"2\^31 elements in a sequence"),
    "O": ("attention", [*[_meta(1, LONG // 8, 16, 16)] * 2, _meta(1, LONG // 8, 16, 512)], {}, r"2\^31 elements"),
    "heads filled up": ("attention", [_meta(1, LONG // 2, 32, 9)] * 3, {}, r"2\^31 elements"),
    "packed": ("attention", [_meta(1, LONG // 2, 3, 16, 16)], {}, r"2\^31 elements"),
    "hidden": ("glu", [_meta(*MANY, 8), _meta(8, 8)], {"kind": "plain"}, r"2\^28 rows"),
    "width": ("glu", [_meta(1, 1, WIDTH), _meta(1, WIDTH)], {"kind": "plain"}, "features"),
    "stream": ("residual_norm", [_meta(*MANY, 8), None, _meta(8)], {}, r"2\^28 rows"),
    "tokens": ("linear_cross_entropy", [_meta(*MANY, 8), _meta(9, 8), _meta(*MANY, dtype=torch.int64)], {}, "rows"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_offset_could_hold_is_refused(name):
    operator, tensors, kwargs, message = REFUSED[name]
    with pytest.raises(ValueError, match=f"{operator}: .*{message}"):
        getattr(kernels, operator)(*tensors, **kwargs, impl="triton")


def test_rows_that_backward_could_not_address_are_refused():
    q = _meta(1 << 20, 64, 8, 16)
    with pytest.raises(ValueError, match=r"2\^29 rows of queries"):
        fused_attention.empty_rows(q, [q, q], 64, False, 0.1)


def test_rows_are_copied_only_where_they_must_be():
    near, far = torch.empty(4, 9, 16, device=DEVICE), _meta(1 << 12, 1 << 12, 1 << 12)
    assert launch.in_rows(near) is near
    assert launch.in_vectors(near[:, ::2]).data_ptr() == near.data_ptr()
    assert launch.in_rows(far) is far  # contiguous: kernels of streams count rows in 64 bits
    assert launch.in_rows(near.mT).is_contiguous()
    assert launch.in_vectors(near[..., 1:]).is_contiguous()
