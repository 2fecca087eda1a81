"""What the operators' records draw."""

import inspect

import pytest
import torch

from kernels import cases
from kernels.operators import OPERATORS


@pytest.mark.parametrize("operator", cases.FACTORIES)
def test_factories_draw_the_same_numbers_again(operator):
    parameters = inspect.signature(OPERATORS[operator].sizes).parameters.values()
    dims = {p.name: 4 for p in parameters if p.default is p.empty}
    first, again = (cases.FACTORIES[operator](**dims, seed=3) for _ in range(2))
    other = cases.FACTORIES[operator](**dims, seed=4)
    assert all(torch.equal(first[n], again[n]) for n in first)
    assert not any(torch.equal(first[n], other[n]) for n in first)
