"""embedding in Triton's interpreter against float64: both tables' gradients, both dropouts."""

import pytest
from harness import DTYPES, check

from kernels import cases
from kernels.dropout import Dropout, dropout_state

RNG = dropout_state(42, 7, 3)
BOTH = {"dropout": Dropout(0.1, RNG, 1), "position_dropout": Dropout(0.3, RNG, 2)}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("combine", ["average", "sum"])
@pytest.mark.parametrize("drops", ["none", "dropout", "position_dropout", "both"])
def test_combinations(drops, combine, dtype):
    dropouts = {n: d for n, d in BOTH.items() if drops in (n, "both")}
    check("embedding", cases.embedding_inputs(2, 7, 40, 23), {"combine": combine, **dropouts}, dtype)


@pytest.mark.parametrize(
    ("batch", "length", "width", "vocabulary", "positions"),
    [(1, 1, 8, 5, 1), (3, 5, 1, 7, 9), (1, 63, 380, 11, 64), (5, 6, 448, 40, 8), (2, 3, 1024, 9, 3)],
)
def test_shapes(batch, length, width, vocabulary, positions):
    inputs = cases.embedding_inputs(batch, length, width, vocabulary, positions=positions)
    check("embedding", inputs, BOTH)


def test_one_id_for_all_positions():
    """A run of positions longer than a tile, and every other row of E without one."""
    inputs = cases.embedding_inputs(3, 25, 40, 6)
    inputs["ids"].fill_(4)
    result = check("embedding", inputs, BOTH)
    assert result.gradients["table"][:4].eq(0).all()


def test_positions_beyond_the_length_have_no_gradient():
    result = check("embedding", cases.embedding_inputs(2, 5, 24, 9, positions=12), BOTH)
    assert result.gradients["positions"][5:].eq(0).all()


def test_many_rows_for_each_program(monkeypatch):
    from kernels.fused import embedding as fused
    from kernels.fused import tiles_rows

    monkeypatch.setattr(tiles_rows, "PROGRAMS", 3)
    monkeypatch.setattr(fused, "ROWS_OF_E", 4)
    check("embedding", cases.embedding_inputs(3, 13, 40, 17), BOTH)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 31, 33, 380, 448, 512, 513, 1024, 2048, 5000])
def test_every_width(width, dtype):
    # sums of a few upstream values, which are sixteenths, cancel exactly here and there
    inputs = cases.embedding_inputs(3, 9, width, 12)
    check("embedding", inputs, BOTH, dtype, cancelling=("table", "positions"))
