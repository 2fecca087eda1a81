"""glu, residual_norm, linear_cross_entropy and embedding, compiled for sm_86: the interpreter's cases in 16 bits."""

import pytest
from shared_cases import harness, session, take  # noqa: F401  a fixture

from kernels import cases
from kernels.fused import linear_cross_entropy as fused

import test_embedding  # isort: skip
import test_glu  # isort: skip
import test_linear_cross_entropy  # isort: skip
import test_residual_norm  # isort: skip

SPREAD = (
    "test_glu_odd_sizes[gated silu-(3, 63, 40, 85)]",
    "test_residual_norm_shapes[380-2-33]",
    "test_linear_cross_entropy_shapes[(2, 3, 380, 257)-recompute-torch.float16]",
    "test_embedding_shapes[1-63-380-11-64]",
    "test_embedding_empty[2-0]",
)
for module in (test_glu, test_residual_norm, test_linear_cross_entropy, test_embedding):
    take(globals(), module, "large_logits")


@pytest.mark.parametrize("logits", fused.LOGITS)
def test_linear_cross_entropy_large_logits(logits):
    """The interpreter's case has 18 rows, nearly all of whose softmax is one word's: the formula is right by luck."""
    inputs = cases.linear_cross_entropy_inputs(2, 64, 16, 300)
    harness.check("linear_cross_entropy", inputs, {"scale": 30.0, "logits": logits})


def test_the_spread_is_of_these(request):
    assert {item.name for item in request.session.items} >= set(SPREAD)


SPREAD += (test_the_spread_is_of_these.__name__,)
