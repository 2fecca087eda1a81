"""Attention in all its forms, and every operator of nothing, compiled for sm_86: the interpreter's cases in 16 bits."""

from shared_cases import session, small_tiles, take  # noqa: F401  fixtures

import test_attention  # isort: skip
import test_empty  # isort: skip
import test_packed  # isort: skip
import test_unified_attention  # isort: skip

SPREAD = (
    "test_attention_lengths[causal-92-20]",
    "test_attention_padding_of_shared_keys[lengths]",
    "test_attention_grouped_and_shared_heads[2-True]",
    "test_unified_attention_head_widths[40]",
    "test_empty_of_nothing_there_is_a_graph_and_zero_gradients[triton-lengths-M]",
    "test_empty_of_nothing_there_is_a_graph_and_zero_gradients[triton-embedding-B]",
)
take(globals(), test_empty, "without_grad|autocast")
for module in (test_attention, test_unified_attention, test_packed):
    take(globals(), module)


def test_the_spread_is_of_these(request):
    assert {item.name for item in request.session.items} >= set(SPREAD)


SPREAD += (test_the_spread_is_of_these.__name__,)
