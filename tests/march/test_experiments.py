"""The experiments: exact parameter counts, only declared fields differ, names and overrides are checked."""

import re

import pytest
import torch

import march
from march import config, experiments
from march.cost import total_parameters

# parameters are exact, with per-dimension norm gains; BigHeads2 and 3 counted by hand from their shapes
COUNTS = {
    "Baseline": 36_340_224,
    "BaselineFP32": 36_340_224,
    "Best": 686_204_928,
    "MoreHeadsLessLayers": 34_764_800,
    "MoreHeadsLessQKVDim": 36_340_224,
    "MoreHeadsLessQKVDimLessLayers": 32_143_360,
    "LessHeadsMoreQKVDim": 36_340_224,
    "ScalingHeads": 36_340_224,
    "InverseScalingHeads": 36_340_224,
    "ScalingHeadsConstant": 36_340_224,
    "InverseScalingHeadsConstant": 36_340_224,
    "APESumOverAverage": 36_340_224,
    "APEUnitVariance": 36_340_224,
    "ReLUGatedLinearUnit": 36_337_152,
    "GELUGatedLinearUnit": 36_337_152,
    "SiLUGatedLinearUnit": 36_337_152,
    "MixedAct": 36_337_152,
    "MixedActSumOverMean": 36_337_152,
    "MixedActSOMDropout": 36_337_152,
    "NoSelfAttentionResidual": 36_340_224,
    "Database": 39_554_560,
    "DatabaseFromHeads": 34_180_608,
    "DatabaseFromHeads2": 38_178_304,
    "DatabaseFromLayers": 31_752_192,
    "DatabaseFromDim": 32_144_448,
    "UnifiedAttention": 37_911_552,
    "UnifiedAttentionAsPublished": 37_911_552,
    "BigHeads": 35_582_400,
    # 30000*380 + 1024*380 + 3*(4*380*1520 + 2*380*1520) + 3*(6*380*1520 + 2*380*1520) + 17*380
    "BigHeads2": 36_054_780,
    "BigHeads3": 53_382_780,
    # Wk and Wv of 3 decoder blocks: 3*2*512*8*64
    "StandardCrossAttention": 36_340_224 + 1_572_864,
    "SquaredReLU": 36_340_224,
    # gains of 64: queries and keys of 6 self-attentions, queries of 3 cross-attentions
    "QKNorm": 36_340_224 + (6 * 2 + 3) * 64,
    # without the table: 1024*512
    "RotaryPositions": 36_340_224 - 524_288,
    "NoPositions": 36_340_224 - 524_288,
    # keys and values of 6 self-attentions, 6 heads of 64 fewer: 6*2*512*6*64
    "GroupedKeysValues": 36_340_224 - 2_359_296,
    # gains of 512 behind 3*2 + 3*3 sublayers
    "SandwichNorm": 36_340_224 + 15 * 512,
    "MoreHeadsLessQKVDimLessLayersControlled": 32_143_360,
    "ReLUGatedLinearUnitControlled": 36_337_152,
    "GELUGatedLinearUnitControlled": 36_337_152,
    "SiLUGatedLinearUnitControlled": 36_337_152,
    "MixedActControlled": 36_337_152,
    "MixedActSumOverMeanControlled": 36_337_152,
    "MixedActSOMDropoutControlled": 36_337_152,
    "NoSelfAttentionResidualControlled": 36_340_224,
}


def test_the_catalogue_is_the_list():
    assert set(experiments.names()) == set(COUNTS)


@pytest.mark.parametrize("name", experiments.names())
def test_parameter_count(name):
    with torch.device("meta"):
        model = march.build_model(name)
    assert sum(p.numel() for p in model.parameters()) == COUNTS[name]
    assert total_parameters(experiments.configuration(name)) == COUNTS[name]


@pytest.mark.parametrize("name", experiments.names())
def test_only_declared_fields_differ(name):
    experiment = experiments.get(name)
    assert set(experiments.difference(name)) == set(experiment.changes)


def test_controlled_twins_change_nothing_but_the_positions():
    twins = [name for name in experiments.names() if name.endswith("Controlled")]
    assert len(twins) == 8
    for twin in twins:
        original = experiments.configuration(twin.removesuffix("Controlled"))
        assert set(config.difference(experiments.configuration(twin), original)) == {"position_init"}
        assert experiments.get(twin).control == "Baseline"
        assert experiments.get(twin.removesuffix("Controlled")).control == "APEUnitVariance"


@pytest.mark.parametrize("written", ["baseline", "BASELINE", "BaselineExperiment", "baselineexperiment", " Baseline "])
def test_names_in_any_case_with_or_without_suffix(written):
    assert experiments.get(written).name == "Baseline"


def test_a_typo_gets_the_nearest_names():
    with pytest.raises(config.ConfigError, match="did you mean ScalingHeads"):
        experiments.get("ScalngHeads")
    with pytest.raises(config.ConfigError, match="num_heads"):
        experiments.configuration("Baseline", num_head=4)


@pytest.mark.parametrize(
    ("assignment", "value"),
    [
        ("num_heads=12,8,4", (12, 8, 4)),
        ("num_heads=16", 16),
        ("dim_qkv=[32, 64, 128]", (32, 64, 128)),
        ("dropout=0", 0.0),
        ("self_attention_residual=false", False),
        ("activation=gelu", "gelu"),
    ],
)
def test_overrides_are_typed(assignment, value):
    assert config.parse_override(assignment)[1] == value


@pytest.mark.parametrize(
    ("assignment", "words"),
    [
        ("num_heads=eight", "expected a whole number"),
        ("dropout=high", "expected a finite number"),
        ("num_layers=3.5", "expected a whole number"),
        ("activation=swish", "one of relu"),
        ("num_heads", "expected field=value"),
        ("heads=8", "did you mean num_heads"),
    ],
)
def test_wrong_overrides_say_expected_and_got(assignment, words):
    with pytest.raises(config.ConfigError, match=re.escape(words)):
        config.parse_override(assignment)


@pytest.mark.parametrize(
    ("name", "overrides", "field"),
    [
        ("ScalingHeads", {"num_layers": 4}, "num_heads"),
        ("Baseline", {"num_heads": (1, 2)}, "num_heads"),
        ("Baseline", {"num_layers": 5}, "num_layers"),
        ("Baseline", {"dim_model": 0}, "dim_model"),
        ("Baseline", {"dropout": 1.0}, "dropout"),
        ("Baseline", {"dim_qkv": 513}, "dim_qkv"),
        ("Database", {"dim_qkv": (32, 64, 64)}, "database_states"),
        ("Baseline", {"database_states": -1}, "database_states"),
        ("Baseline", {"unified_mask": "as_published"}, "unified_mask"),
        ("Baseline", {"dim_model": True}, "dim_model"),
        ("Baseline", {"num_kv_heads": 3}, "num_kv_heads"),
        ("ScalingHeads", {"num_kv_heads": 8}, "num_kv_heads"),
        ("Baseline", {"num_kv_heads": (2, 0, 2)}, "num_kv_heads"),
        ("Baseline", {"num_kv_heads": -2}, "num_kv_heads"),
        ("NoPositions", {"position_init": "unit"}, "position_init"),
        ("RotaryPositions", {"dim_qkv": 63}, "dim_qkv"),
        ("UnifiedAttention", {"positions": "rotary"}, "positions"),
        ("ReLUGatedLinearUnit", {"activation": "swish"}, "activation"),
        ("MixedAct", {"activation": ["relu"]}, "activation"),
    ],
)
def test_impossible_configurations_are_refused(name, overrides, field):
    with pytest.raises(config.ConfigError, match=f"^{field}: expected"):
        experiments.configuration(name, **overrides)


def test_an_override_derives_nothing():
    base, changed = experiments.configuration("Baseline"), experiments.configuration("Baseline", dim_model=64)
    assert set(config.difference(changed, base)) == {"dim_model"}


def test_dict_round_trip():
    for name in experiments.names():
        configuration = experiments.configuration(name)
        assert config.from_dict(config.to_dict(configuration)) == configuration


def test_configuration_needs_no_torch():
    import subprocess
    import sys

    code = "import sys, march, march.experiments, march.cost; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
