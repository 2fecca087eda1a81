"""glu, residual_norm, linear_cross_entropy and embedding, compiled for sm_86: the interpreter's cases in 16 bits."""

import pytest
import torch
from shared_cases import SESSIONS, harness, session, take  # noqa: F401  a fixture

import kernels
from kernels import cases
from kernels.fused import linear_cross_entropy as fused

import test_embedding  # isort: skip
import test_glu  # isort: skip
import test_linear_cross_entropy  # isort: skip
import test_residual_norm  # isort: skip

WIDTHS = (31, 33, 65, 127)
SPREAD = (
    "test_pairs_of_float16_are_compared_at_once",
    *(f"test_a_sum_of_one_column_a_thread_is_the_same_in_every_lane[{n}-dtype{i}]" for n in WIDTHS for i in (0, 1)),
    "test_glu_aligned_rows_in_16_bits[(2, 5, 136, 96)]",
    "test_glu_odd_sizes[gated silu-(3, 63, 40, 85)]",
    "test_residual_norm_shapes[380-2-33]",
    "test_linear_cross_entropy_shapes[(2, 3, 380, 257)-recompute-torch.float16]",
    "test_embedding_shapes[1-63-380-11-64]",
)
for module in (test_glu, test_residual_norm, test_linear_cross_entropy, test_embedding):
    take(globals(), module, "large_logits")


@pytest.mark.parametrize("logits", fused.LOGITS)
def test_linear_cross_entropy_large_logits(logits):
    """The interpreter's case has 18 rows, nearly all of whose softmax is one word's: the formula is right by luck."""
    inputs = cases.linear_cross_entropy_inputs(2, 64, 16, 300)
    harness.check("linear_cross_entropy", inputs, {"scale": 30.0, "logits": logits})


def test_pairs_of_float16_are_compared_at_once():
    """relu's gradient in float16 is the one place where a kernel compares two halves of a register."""
    inputs = cases.glu_inputs(1, 37, 72, 88, kind="gated")
    harness.check("glu", inputs, {"kind": "gated", "activation": "relu"})
    assert any("setp.gt.f16x2" in x.recorded.compiled.asm["ptx"] for x in SESSIONS[-1].launches)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("width", WIDTHS)
def test_a_sum_of_one_column_a_thread_is_the_same_in_every_lane(width, dtype):
    """w n + shuffle(w n) as an fma rounds one product, each lane another; a race of the lanes that write the sum."""
    x, s = (torch.randn(2, 9, width).to(dtype).requires_grad_() for _ in range(2))
    gain = torch.randn(width).to(dtype).requires_grad_()
    y, z = kernels.residual_norm(x, s, gain, impl="triton")
    (y.float().sum() + z.float().square().sum()).backward()
    assert SESSIONS[-1].launches
    assert not SESSIONS[-1].findings


def test_the_spread_is_of_these(request):
    assert {item.name for item in request.session.items} >= set(SPREAD)


SPREAD += (test_the_spread_is_of_these.__name__,)
