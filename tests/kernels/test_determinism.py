"""Same inputs, same bits: whatever the order in which programs run, and whatever memory held before."""

import harness
import pytest
import torch
from operator_cases import call, cases_of, differentiate, leaves_of

from kernels.fused import embedding, linear_cross_entropy, tiles_attention, tiles_rows
from kernels.fused.tiles_attention import Tile

CASES = cases_of(B=2, L=20, M=40, H=1, D=24, F=40, V=150)
# whose sums several programs share: keys of all sequences, weights, rows of a gain, of a table, of a vocabulary
NAMES = ("shared", "relu", "norm", "recompute", "chunks", "embedding")


def _bits(name, order):
    leaves = leaves_of(CASES[name])
    with harness.shuffled_programs(order), harness.poisoned_allocations():
        outputs = call(CASES[name], leaves)
        return [*outputs, *differentiate(outputs, leaves)]


@pytest.mark.parametrize("name", NAMES)
def test_the_order_of_programs_does_not_matter(name, monkeypatch):
    monkeypatch.setattr(tiles_attention, "tile", lambda direction, *_: Tile(16, 16, 4, 1))
    monkeypatch.setattr(tiles_rows, "PROGRAMS", 4)
    monkeypatch.setattr(embedding, "ROWS_OF_E", 3)
    monkeypatch.setattr(linear_cross_entropy, "CHUNK_BYTES", 1)
    first, second = _bits(name, 1), _bits(name, 2)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
def test_repeated_runs_give_the_same_bits(name):
    first = _bits(name, 0)
    for _ in range(20):
        for a, b in zip(first, _bits(name, 0), strict=True):
            assert torch.equal(a, b)
