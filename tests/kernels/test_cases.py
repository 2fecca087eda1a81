"""The shapes that tests and bench share are those that the experiments' models ask for."""

from collections import Counter

import pytest
import torch

import kernels.api
import march
from kernels import cases, packed
from kernels.operators import OPERATORS
from march import experiments
from march.config import unpublished


def _signature(operator, tensors, kwargs):
    """What a call is counted by: shapes and the arguments that choose a kernel; a packed form is its operator."""
    if operator != packed.operator_of(operator):
        operator, tensors = packed.operator_of(operator), packed.unpack(*tensors)
    shapes = tuple(None if x is None else tuple(x.shape) for x in tensors)
    plain = {
        n: kwargs.get(n) for n in ("causal", "kind", "activation", "factor", "combine") if kwargs.get(n) is not None
    }
    if plain.get("kind") == "mixed":
        plain.pop("activation", None)
    drops = tuple(n for n in ("dropout", "gate_dropout", "position_dropout") if kwargs.get(n) is not None)
    return operator, shapes, tuple(sorted(plain.items())), drops


def _asked(name, monkeypatch):
    """The operator calls of one forward pass of the experiment's model, on meta tensors."""
    calls = Counter()
    true = kernels.api.implementation

    def recorded(operator, *arguments):
        function = true(operator, *arguments)

        def call(*tensors, **kwargs):
            calls[_signature(operator, tensors, kwargs)] += 1
            return function(*tensors, **kwargs)

        return call

    monkeypatch.setattr(kernels.api, "implementation", recorded)
    batch, encoder, decoder = 2, 31, 13
    with torch.device("meta"):
        model = march.build_model(name, impl="torch").train()

        def ids(length):
            return torch.empty(batch, length, dtype=torch.int64)

        model(
            input_ids=ids(encoder),
            decoder_input_ids=ids(decoder),
            labels=ids(decoder),
            attention_mask=torch.empty(batch, encoder, dtype=torch.bool),
            dropout_state=torch.empty(3, dtype=torch.int64),
        )
    return calls


@pytest.mark.parametrize("name", [n for n in cases.EXPERIMENTS if n != "Best"])
def test_calls_are_the_models(name, monkeypatch):
    expected = Counter()
    for call in cases.calls(name, batch=2, encoder=31, decoder=13):
        kwargs = call.kwargs | call.dropouts
        inputs = tuple(call.inputs(device="meta").values())
        expected[_signature(call.operator, inputs, kwargs)] += call.count
    asked = _asked(name, monkeypatch)
    assert asked == expected, f"only the model: {asked - expected}; only cases: {expected - asked}"


def test_every_experiment_of_its_own_shape_is_there():
    """The others of the catalogue (controls, the published mask, parts of later transformers) run the same kernels."""
    names = {n for n in experiments.names() if not n.endswith(("Controlled", "AsPublished"))}
    names -= {n for n in names if unpublished(experiments.configuration(n))}
    assert names <= set(cases.EXPERIMENTS), names - set(cases.EXPERIMENTS)


def test_precision_is_the_experiments():
    for name, shape in cases.EXPERIMENTS.items():
        precision = {"bf16": torch.bfloat16, "fp32": torch.float32}[experiments.configuration(name).precision]
        assert shape.dtype == precision, name


@pytest.mark.parametrize("operator", cases.FACTORIES)
def test_factories_draw_the_same_numbers_again(operator):
    import inspect

    parameters = inspect.signature(OPERATORS[operator].sizes).parameters.values()
    dims = {p.name: 4 for p in parameters if p.default is p.empty}
    first, again = (cases.FACTORIES[operator](**dims, seed=3) for _ in range(2))
    other = cases.FACTORIES[operator](**dims, seed=4)
    assert all(torch.equal(first[n], again[n]) for n in first)
    assert not any(torch.equal(first[n], other[n]) for n in first)
