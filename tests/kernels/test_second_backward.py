"""A backward may run again, of upstream gradients and saved tensors with other strides: the same bits, by operator."""

import pytest
import test_glu
import test_packed
import test_unified_attention
import torch
from harness import check
from test_attention import case, dropout, small_tiles  # noqa: F401  a fixture

from kernels import cases

LENGTHS = {"key_lengths": torch.tensor([50, 18]), "dropout": dropout()}
BOTH = {"dropout": dropout(site=1), "position_dropout": dropout(site=2)}
NORM = cases.residual_norm_inputs(2, 7, 40)
CASES = {
    "attention": ("attention", case(2, 20, 50, heads=2), LENGTHS, {}),
    "attention, causal": ("attention", case(2, 20, 20, heads=2), {"causal": True}, {"cancelling": ("q", "k")}),
    "attention, shared keys": (
        "attention",
        case(2, 20, 40, heads=2, groups=1, shared=True),
        {"dropout": dropout()},
        {},
    ),
    "attention, a width that is filled up": ("attention", case(2, 9, 21, width=23), {"dropout": dropout()}, {}),
    "unified attention": ("attention", test_unified_attention.case(2, 20, 50, heads=2), LENGTHS | {"causal": True}, {}),
    **{form: ("attention", test_packed.case(form), test_packed.named(form), {}) for form in test_packed.FORMS},
    **{
        f"glu, {form}{', recomputed' * recompute}": (
            "glu",
            test_glu._inputs(settings["kind"]),
            {**settings, "dropout": dropout(), "recompute": recompute},
            {},
        )
        for form, settings in test_glu.FORMS.items()
        if form in ("plain relu", "plain gelu", "gated silu", "mixed dropout")
        for recompute in (False, True)
    },
    "residual norm": ("residual_norm", NORM, {"dropout": dropout()}, {}),
    "residual norm, no residual": ("residual_norm", NORM | {"x": None}, {"dropout": dropout()}, {}),
    "norm alone": ("residual_norm", NORM | {"s": None}, {}, {}),
    **{
        f"cross entropy, {logits}": (
            "linear_cross_entropy",
            cases.linear_cross_entropy_inputs(2, 6, 24, 40, ignored=0.3),
            {"scale": 0.3, "logits": logits},
            {},
        )
        for logits in ("recompute", "chunks")
    },
    "embedding": ("embedding", cases.embedding_inputs(2, 6, 24, 9), BOTH, {}),
}


@pytest.mark.parametrize("name", CASES)
def test_a_second_backward_gives_the_same_bits(small_tiles, name):  # noqa: F811
    operator, inputs, kwargs, options = CASES[name]
    check(operator, inputs, kwargs, torch.float16, again=True, **options)
