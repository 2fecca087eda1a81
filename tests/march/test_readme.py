"""What README says of the experiments is what the catalogue says."""

from pathlib import Path

import pytest

from march import experiments
from march.report import listing

README = (Path(__file__).resolve().parents[2] / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", [n for n in experiments.names() if not n.endswith("Controlled")])
def test_the_table_has_the_experiment(name):
    row = next(line for line in README.splitlines() if line.startswith(f"| {name} |"))
    described = listing.describe(name)
    assert f"{described['parameters']:,}" in row
    for field, value in described["changes"].items():
        assert f"{field} {listing._value(value)}" in row
