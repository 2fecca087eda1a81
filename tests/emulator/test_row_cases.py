"""glu, residual_norm, linear_cross_entropy and embedding, compiled for sm_86: the interpreter's cases in 16 bits."""

from shared_cases import session, take  # noqa: F401  a fixture

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
    take(globals(), module)


def test_the_spread_is_of_these(request):
    assert {item.name for item in request.session.items} >= set(SPREAD)


SPREAD += (test_the_spread_is_of_these.__name__,)
