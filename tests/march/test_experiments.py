"""The experiments: exact parameter counts, only declared fields differ, names and overrides are checked."""

from pathlib import Path

import pytest
import torch

import march
from march import config, experiments
from march.cost import total_parameters
from march.report import listing

README = (Path(__file__).resolve().parents[2] / "README.md").read_text(encoding="utf-8")
ROWS = {row[0]: row for line in README.splitlines() if len(row := [c.strip() for c in line.split("|")[1:-1]]) == 3}
# counted by hand from the shapes, beyond Baseline's; every other count is README's
BASELINE = 36_340_224
BY_HAND = {
    # embedding, positions, the encoder's and the decoder's products, norms
    **{
        name: 30_000 * 380 + 1024 * 380 + 3 * (4 * 380 * w + f) + 3 * (6 * 380 * w + f) + 17 * 380 - BASELINE
        for name, w, f in (("BigHeads2", 1520, 2 * 380 * 1520), ("BigHeads3", 3040, 2 * 380 * 1520))
    },
    "StandardCrossAttention": 3 * 2 * 512 * 8 * 64,  # keys' and values' weights of 3 decoder blocks
    "QKNorm": (6 * 2 + 3) * 64,  # gains for queries and keys of 6 self-attentions, queries of 3 cross-attentions
    "RotaryPositions": -1024 * 512,  # no table
    "NoPositions": -1024 * 512,
    "GroupedKeysValues": -6 * 2 * 512 * 6 * 64,  # keys and values of 6 self-attentions, 6 heads fewer
    "SandwichNorm": 15 * 512,  # gains behind 3 * 2 + 3 * 3 sublayers
}


@pytest.mark.parametrize("name", experiments.names())
def test_parameter_count_and_readmes_row(name):
    shown = name.removesuffix("Controlled")  # a twin has the parameters of what it is a twin of
    expected = int(ROWS[shown][2].replace(",", ""))
    with torch.device("meta"):
        model = march.build_model(name)
    assert sum(p.numel() for p in model.parameters()) == expected
    assert total_parameters(experiments.configuration(name)) == expected
    if name == "Baseline" or name in BY_HAND:
        assert expected == BASELINE + BY_HAND.get(name, 0)
    if name == shown:
        for field, value in listing.describe(name)["changes"].items():
            assert f"{field} {listing._value(value)}" in ROWS[name][1]


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


def test_a_value_of_another_type_is_refused_where_it_is_no_text_too():
    for fields in ({"dim_model": True}, {"activation": ["relu"]}, {"num_heads": (1, 2)}, {"num_layers": "4"}):
        with pytest.raises(config.ConfigError, match=f"^{next(iter(fields))}: expected"):
            experiments.configuration("Baseline", **fields)


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
