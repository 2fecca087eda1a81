"""First values and dropout ids by name: common random numbers, one rule a parameter, the distributions."""

import copy
import pickle
import re

import pytest
import torch
from models import batch, small_model
from torch import nn

import kernels
import march
from march import experiments
from march.model.init import ids_by_name, initialise, normal, ones
from march.model.modules import Axis, Dropout, Linear

HEADS = {"num_heads": 2, "dim_qkv": 4}


def places(model: nn.Module) -> dict[str, int]:
    return {name: module.dropout_id for name, module in model.named_modules() if isinstance(module, Dropout)}


# (idea, control, fields of both, which of the control's parameters the idea has not, or has in another shape)
PAIRS = [
    ("Database", "Baseline", {}, ""),
    ("NoSelfAttentionResidual", "APEUnitVariance", {}, ""),
    ("BaselineFP32", "Baseline", {}, ""),
    ("MixedActSOMDropoutControlled", "ReLUGatedLinearUnitControlled", {}, ""),
    # its attention is the control's self-attention with more keys, and in its place
    ("UnifiedAttention", "Baseline", HEADS, ".cross_attention."),
    ("UnifiedAttention", "Baseline", {}, "_attention.(qkv|q|o).weight|.cross_attention."),
    ("MoreHeadsLessLayers", "Baseline", HEADS, ".2."),
    ("MoreHeadsLessLayers", "Baseline", {}, "_attention.(qkv|q|o).weight|.2."),
    ("ReLUGatedLinearUnitControlled", "Baseline", {}, "feedforward.up.weight"),
    ("APEUnitVariance", "Baseline", {}, "^positions"),
    ("StandardCrossAttention", "Baseline", {}, ""),
    ("QKNorm", "Baseline", {}, ""),
    ("SandwichNorm", "Baseline", {}, ""),
    ("SquaredReLU", "Baseline", {}, ""),
    ("RotaryPositions", "NoPositions", {}, ""),
    ("NoPositions", "Baseline", {}, "^positions"),
    ("GroupedKeysValues", "Baseline", {}, "qkv.weight"),
]


@pytest.mark.parametrize(("idea", "control", "fields", "apart"), PAIRS)
def test_an_idea_shares_everything_that_its_control_has(idea, control, fields, apart):
    a, b = small_model(idea, **fields), small_model(control, **fields)
    ours, theirs = a.state_dict(), b.state_dict()
    expected = {name for name in theirs if not apart or not re.search(apart, name)}
    assert {name for name in theirs if name in ours and torch.equal(ours[name], theirs[name])} == expected
    ids, others = places(a), places(b)
    missing = {name for name, number in others.items() if ids.get(name) != number}
    assert all(".cross_attention." in name or ".2." in name for name in missing)
    assert not missing or idea in ("UnifiedAttention", "MoreHeadsLessLayers")


def test_heads_and_hidden_units_that_both_have_begin_the_same():
    """Rows are drawn in turn: of more heads, and of a gate's branch, the first are those of the control."""
    more, few = (small_model("Baseline", num_heads=h).encoder.blocks[0].self_attention.qkv for h in (8, 4))
    for a, b in zip(*(x.weight.chunk(3) for x in (more, few)), strict=True):
        assert torch.equal(a[: b.shape[0]], b)
    gated = small_model("ReLUGatedLinearUnitControlled").decoder.blocks[1].feedforward
    plain = small_model("Baseline").decoder.blocks[1].feedforward
    assert torch.equal(gated.up.weight.chunk(2)[1], plain.up.weight)
    assert torch.equal(gated.down.weight, plain.down.weight)


def test_a_part_of_a_packed_weight_begins_as_it_would_alone():
    stream, heads = Axis("stream", 8), Axis("heads", 2, 3)
    apart = nn.ModuleDict({name: Linear("torch", stream, **{name: heads}) for name in "qk"})
    packed = nn.ModuleDict({"qk": Linear("torch", stream, q=heads, k=heads)})
    models = [nn.ModuleDict({"attention": layer}) for layer in (apart, packed)]
    for model in models:
        initialise(model, 5)
    assert torch.equal(torch.cat([apart["q"].weight, apart["k"].weight]), packed["qk"].weight)


def test_the_same_masks_fall_on_what_both_have():
    """An idea that changes nothing in value has its control's loss: an extra sublayer whose output is zero."""
    state = kernels.dropout_state(3, 5)
    idea, control = small_model("Database").double().train(), small_model("Baseline").double().train()
    with torch.no_grad():
        for name, parameter in idea.named_parameters():
            if name.endswith("database_attention.o.weight"):
                parameter.zero_()
    assert torch.equal(*(m(**batch(), dropout_state=state).loss for m in (idea, control)))


def test_values_depend_on_the_seed_and_the_name_alone():
    def build(**more):
        return march.build_model("Baseline", dim_model=24, vocab_size=31, max_length=8, **HEADS, **more).state_dict()

    torch.manual_seed(3)
    first = build()
    torch.rand(5)
    again, given = build(), build(seed=3)
    torch.set_default_dtype(torch.float64)
    try:
        wide = build(seed=3)
    finally:
        torch.set_default_dtype(torch.float32)
    for name, value in first.items():
        assert torch.equal(value, again[name])
        assert torch.equal(value, given[name])
        assert torch.equal(value.double(), wide[name])
    for seed in (4, 3 + 2**32):
        other = build(seed=seed)
        drawn = [name for name in first if not name.endswith("gain")]
        assert not any(torch.equal(first[name], other[name]) for name in drawn)
    before = torch.get_rng_state()
    build()
    assert torch.equal(before, torch.get_rng_state())


def test_no_two_parameters_and_no_two_places_of_any_experiment_are_alike():
    for name in experiments.names():
        with torch.device("meta"):
            ids = places(march.build_model(name))
        assert len(set(ids.values())) == len(ids)
        assert all(0 <= number < 1 << 30 for number in ids.values())
    model = small_model("Baseline")
    parts = [p for name, w in model.named_parameters() if w.dim() == 2 for p in w.chunk(3 if "qkv" in name else 1)]
    firsts = [tuple((part / part.abs().max()).flatten()[:4].tolist()) for part in parts]
    assert len(set(firsts)) == len(firsts)


@pytest.mark.parametrize("name", [n for n in experiments.names() if not n.endswith("Controlled")])
def test_every_place_draws_once_a_pass(name, monkeypatch):
    """No two operators of a forward pass share a mask, and of what is not dead no place is left out."""
    drawn, dropout = [], kernels.Dropout

    def recorded(p, rng, dropout_id):
        drawn.append(dropout_id)
        return dropout(p, rng, dropout_id)

    monkeypatch.setattr(kernels, "Dropout", recorded)
    model = small_model(name, dropout=0.25).train()
    model(**batch(), dropout_state=kernels.dropout_state(1, 2))
    assert len(set(drawn)) == len(drawn)
    ids = places(model)
    idle = {place for place, number in ids.items() if number not in drawn}
    last = f"encoder.blocks.{len(model.encoder.blocks) - 1}."
    unused = [place for place in idle if model.get_submodule(place).p and not place.startswith(last)]
    tables = {"encoder.position_dropout", "decoder.position_dropout"}
    assert set(unused) == (set() if model.config.positions == "absolute" else tables)


def test_ids_are_stable_and_a_collision_is_refused():
    ids = ids_by_name(["encoder.blocks.0.feedforward.dropout", "decoder.token_dropout"], bits=30)
    assert ids == {"encoder.blocks.0.feedforward.dropout": 1_057_617_128, "decoder.token_dropout": 737_255_436}
    with pytest.raises(RuntimeError, match=r"got one for .* and .*; rename one"):
        ids_by_name([f"place {i}" for i in range(40)], bits=4)


def test_statistics():
    model = march.build_model("Baseline", vocab_size=4000, seed=0)
    block = model.encoder.blocks[0]
    assert model.embedding.std().item() == pytest.approx(1.0, rel=0.01)
    assert model.positions.std().item() == pytest.approx(512**-0.5, rel=0.01)
    assert block.self_attention.qkv.weight.abs().max().item() == pytest.approx(512**-0.5, rel=0.01)
    assert block.feedforward.down.weight.abs().max().item() == pytest.approx(2048**-0.5, rel=0.01)
    assert block.feedforward.down.weight.std().item() == pytest.approx((3 * 2048) ** -0.5, rel=0.01)
    assert (block.self_attention.norm.gain == 1).all()
    unit = march.build_model("APEUnitVariance", vocab_size=400, seed=0)
    assert unit.positions.std().item() == pytest.approx(1.0, rel=0.01)
    t5 = march.build_model("Baseline", vocab_size=400, linear_init="t5", seed=0)
    w_qkv = t5.encoder.blocks[0].self_attention.qkv.weight
    assert w_qkv[:512].std().item() == pytest.approx((512 * 64) ** -0.5, rel=0.02)
    assert w_qkv[512:].std().item() == pytest.approx(512**-0.5, rel=0.02)
    assert t5.decoder.blocks[1].cross_attention.q.weight.std().item() == pytest.approx((512 * 64) ** -0.5, rel=0.02)
    assert t5.decoder.blocks[1].cross_attention.o.weight.std().item() == pytest.approx(512**-0.5, rel=0.02)
    assert t5.decoder.blocks[1].feedforward.down.weight.std().item() == pytest.approx(2048**-0.5, rel=0.02)
    parts = t5.decoder.blocks[1].self_attention.qkv.weight.chunk(3)
    correlation = torch.corrcoef(torch.stack([part.flatten() for part in parts])).triu(1)
    assert correlation.abs().max() < 0.01


class Scaled(nn.Module):
    def __init__(self, rules):
        super().__init__()
        self.gain = nn.Parameter(torch.full((3,), torch.nan))
        self.init_rules = rules


def test_every_parameter_has_exactly_one_rule():
    model = Scaled({"gain": ones})
    initialise(model, 0)
    assert model.gain.tolist() == [1, 1, 1]
    with pytest.raises(RuntimeError, match=r"^inner\.gain: expected .*, got no rule; in Scaled set self\.init_rules"):
        initialise(nn.ModuleDict({"inner": Scaled({})}), 0)
    with pytest.raises(RuntimeError, match=r"^bias: .* got a rule alone"):
        initialise(Scaled({"gain": ones, "bias": ones}), 0)
    with pytest.raises(RuntimeError, match=r"^0\.bias: .* got no rule; in Linear"):
        initialise(nn.Sequential(nn.Linear(3, 3)), 0)
    whole = small_model("Baseline")
    whole.encoder.surplus = nn.Parameter(torch.zeros(2, 2))
    with pytest.raises(RuntimeError, match=r"^encoder\.surplus: .* got no rule; in Encoder"):
        initialise(whole, 0)


def test_a_copy_and_one_from_meta_can_be_drawn_anew():
    model = small_model("Database")
    with torch.device("meta"):
        empty = small_model("Database")
    for other in (copy.deepcopy(model).bfloat16(), empty.to_empty(device="cpu"), pickle.loads(pickle.dumps(model))):
        initialise(other, 0)
        for name, value in model.state_dict().items():
            assert torch.equal(other.state_dict()[name], value.to(other.state_dict()[name].dtype)), name


def test_a_draw_by_an_own_rule_is_by_its_name_too():
    def module():
        part = Linear("torch", Axis("stream", 8), q=Axis("heads", 2, 3))
        part.init_rules = {"weight": normal(0.5)}
        return nn.ModuleDict({"a": part})

    models = [module(), nn.ModuleDict({"first": Scaled({"gain": ones}), **module()})]
    for model in models:
        initialise(model, 5)
    assert torch.equal(models[0]["a"].weight, models[1]["a"].weight)
