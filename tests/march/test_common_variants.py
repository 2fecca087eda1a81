"""The common parts of today's transformers: each does what its paper says, beside Baseline or a formula of its own."""

import pytest
import torch
from models import batch, small_model
from test_own_ideas import Squared

import kernels
import march
from march.model.modules import rotate


def logits(model, **changed):
    inputs = batch() | changed
    del inputs["labels"]
    return model(**inputs).logits


def evaluated(name, **fields):
    return small_model(name, **fields).double().eval()


def test_rotation_is_relative_and_leaves_position_0_lengths_and_the_rest():
    x, y = (torch.randn(6, dtype=torch.float64).repeat(1, 9, 2, 1) for _ in range(2))
    turned, other = rotate(x, 6), rotate(y, 6)
    scores = torch.einsum("blhk,bmhk->lm", turned, other)
    for offset in range(-8, 9):
        diagonal = scores.diagonal(offset)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=0, atol=1e-12)
    assert scores[0].std() > 0.01
    assert torch.equal(turned[:, 0], x[:, 0])
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))
    # one plane by hand: features 1 and 4 at position 3 turn by 3 / 10000^(2/6)
    plane = torch.view_as_complex(torch.stack([x[0, 3, 0, 1], x[0, 3, 0, 4]])) * torch.exp(
        torch.tensor(3j) * 1e4 ** (-1 / 3)
    )
    torch.testing.assert_close(torch.view_as_real(plane), turned[0, 3, 0, [1, 4]], rtol=1e-6, atol=1e-6)
    wide = torch.cat([x, torch.full((1, 9, 2, 2), 5.0, dtype=torch.float64)], -1)
    assert torch.equal(rotate(wide, 6), torch.cat([turned, wide[..., 6:]], -1))
    # 16 bits: angles of float32, rounded once
    assert torch.equal(rotate(x.bfloat16(), 6), rotate(x.bfloat16().float(), 6).bfloat16())


@pytest.mark.parametrize(("name", "seen"), [("NoPositions", False), ("RotaryPositions", True), ("Baseline", True)])
def test_without_positions_the_encoder_is_blind_to_order(name, seen):
    model, inputs = evaluated(name), batch()
    order = torch.randperm(17, generator=torch.Generator().manual_seed(0))
    swapped = {key: inputs[key][:, order] for key in ("input_ids", "attention_mask")}
    changed = (logits(model) - logits(model, **swapped)).abs().max().item()
    assert changed > 1e-3 if seen else changed < 1e-12


def test_no_positions_is_a_table_of_zeros():
    model, control = evaluated("NoPositions"), evaluated("Baseline")
    with torch.no_grad():
        control.positions.zero_()
    torch.testing.assert_close(logits(model), logits(control), rtol=0, atol=0)


def test_normalised_queries_and_keys_do_not_care_for_their_weights_scale():
    model, control = evaluated("QKNorm"), evaluated("Baseline")
    before, other = logits(model), logits(control)
    with torch.no_grad():
        for one in (model, control):
            for name, weight in one.named_parameters():
                if ".qkv." in name:
                    weight[:64] *= 64  # of queries and keys
                elif ".q." in name:
                    weight *= 64
    torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-4)  # eps of the norm
    assert (logits(control) - other).abs().max() > 1e-2
    assert model.decoder.blocks[0].cross_attention.scale == 4**-0.5
    assert control.decoder.blocks[0].cross_attention.scale == 1.0


@pytest.mark.parametrize("fields", [{}, {"unified_attention": True}, {"cross_attention": "encoder_output"}])
def test_grouped_keys_are_the_controls_whose_heads_agree(fields):
    grouped = evaluated("GroupedKeysValues", **fields)
    control = evaluated("Baseline", **fields)
    weights = grouped.state_dict()
    for name, weight in weights.items():
        if ".qkv." in name or ".kv." in name:
            q = weight[:32] if ".qkv." in name else weight[:0]
            pairs = weight[q.shape[0] :].view(2, 2, 4, -1).repeat_interleave(4, 1)
            weights[name] = torch.cat([q, pairs.flatten(0, 2)])
    control.load_state_dict(weights)
    torch.testing.assert_close(logits(grouped), logits(control), rtol=0, atol=1e-12)


def test_a_norm_behind_a_sublayer_takes_its_scale():
    model, control = evaluated("SandwichNorm"), evaluated("Baseline")
    before, other = logits(model), logits(control)
    with torch.no_grad():
        for one in (model, control):
            for name, weight in one.named_parameters():
                if name.endswith((".o.weight", ".down.weight")):
                    weight *= 64
    torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-3)
    assert (logits(control) - other).abs().max() > 0.1
    with torch.no_grad():
        for name, gain in model.named_parameters():
            if "post_norm" in name:
                gain.zero_()
    stripped = logits(model)
    changed = batch()["input_ids"] * 0 + 7
    assert torch.equal(stripped, logits(model, input_ids=changed))  # no sublayer reaches the stream


def test_standard_cross_attention_reads_the_encoders_output():
    model = evaluated("StandardCrossAttention")
    assert model.dead_parameters() == set()
    before = logits(model)
    with torch.no_grad():
        model.encoder.final_norm.gain.zero_()
    silent = logits(model)
    assert (silent - before).abs().max() > 1e-3
    assert torch.equal(silent, logits(model, input_ids=batch()["input_ids"] * 0 + 7))
    # the same by hand: queries of one block, keys and values of the output
    block = model.decoder.blocks[0].cross_attention
    output, z = torch.randn(3, 17, 32, dtype=torch.float64), torch.randn(3, 9, 32, dtype=torch.float64)
    ctx = march.model.modules.ForwardContext("torch", z.dtype, z.device, encoder_output=output)
    q, k, v = (
        (x @ w.T).unflatten(-1, (8, 4)).transpose(1, 2)
        for x, w in ((z, block.q.weight), *((output, w) for w in block.kv.weight.chunk(2)))
    )
    mixed = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=1.0)
    torch.testing.assert_close(block(z, ctx), mixed.transpose(1, 2).flatten(2) @ block.o.weight.T)


@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_squared_relu_is_the_formula_with_its_dropout(impl):
    state = kernels.dropout_state(7, 3)
    models = small_model("SquaredReLU", impl=impl), small_model("Baseline", impl=impl, parts={"block": Squared})
    losses = [model.double().train()(**batch(), dropout_state=state).loss for model in models]
    torch.testing.assert_close(*losses, rtol=0, atol=1e-12)
    assert losses[0] != small_model("Baseline", impl=impl).double().train()(**batch(), dropout_state=state).loss


def test_what_plain_torch_computes_is_said():
    from march import experiments
    from march.config import outside_kernels

    said = {name: outside_kernels(experiments.configuration(name)) for name in experiments.names()}
    assert {name for name, steps in said.items() if steps} == {
        "RotaryPositions",
        "UnifiedAttentionAsPublished",
    }
