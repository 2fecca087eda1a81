"""The shape language: what a contract binds, what it refuses, and in which words; every operator and form."""

import pytest
import torch

from kernels.calls import generic_calls
from kernels.operators import OPERATORS
from kernels.validation import Contract

FOUND = {f"{name} {i}": call for name in OPERATORS for i, call in enumerate(generic_calls(name, torch.float32))}
CONTRACTS = {name: call.contract for name, call in FOUND.items()}
CALLS = {
    name: {n: torch.zeros(x.shape, dtype=x.dtype) for n, x in call.tensors.items() if x is not None}
    for name, call in FOUND.items()
}
AXES = [
    (form, name, place)
    for form, tensors in CALLS.items()
    for name in tensors
    for place, axis in enumerate(CONTRACTS[form].arguments[name].axes)
    if axis.isdigit() or "|" in axis or sum(axis in CONTRACTS[form].arguments[n].axes for n in tensors) > 1
]
SIDES = [(form, name) for form, tensors in CALLS.items() for name in tensors]


def _refusal(form, **changed):
    with pytest.raises(ValueError, match=f"^{form.split()[0]}: expected ") as error:
        CONTRACTS[form].check(**CALLS[form] | changed)
    message, fix = str(error.value).split("; ", 1)
    assert ", got " in message
    assert len(fix) > 5
    return message


@pytest.mark.parametrize(("form", "name", "place"), AXES)
def test_a_size_that_another_argument_has_differently_is_refused(form, name, place):
    shape = list(CALLS[form][name].shape)
    shape[place] += 1
    message = _refusal(form, **{name: torch.zeros(shape, dtype=CALLS[form][name].dtype)})
    assert " as " in message


@pytest.mark.parametrize(("form", "name"), SIDES)
def test_rank_dtype_and_device_are_refused(form, name):
    x = CALLS[form][name]
    for other in (x[None], x.sum(), x[..., 0]):
        assert f"{name} as " in _refusal(form, **{name: other})
    if len(CALLS[form]) > 1:
        wrong = torch.int32 if CONTRACTS[form].arguments[name].type else torch.float64
        _refusal(form, **{name: x.to(wrong)})
        assert " on " in _refusal(form, **{name: x.to("meta")})


def test_what_fits_binds_every_name():
    for form, tensors in CALLS.items():
        sizes = CONTRACTS[form].check(**tensors)
        named = {a for n in tensors for a in CONTRACTS[form].arguments[n].axes if not a.isdigit()}
        assert set(sizes) == named, form


def test_a_batch_of_one_is_that_of_keys_and_values_together():
    contract = Contract("op", q="B L", k="B|1 K", v="B|1 V", other="B'|1 K")
    q, one, two = torch.zeros(2, 3), torch.zeros(1, 4), torch.zeros(2, 4)
    assert contract.check(q=q, k=one, v=one, other=two) == {"B": 2, "L": 3, "B|1": 1, "K": 4, "V": 4, "B'|1": 2}
    assert contract.check(q=q, k=two, v=two, other=one)["B'|1"] == 1
    for given, message in (
        ({"k": torch.zeros(3, 4)}, r"k as \[2 or 1, K\], got \[3, 4\]"),
        ({"k": one, "v": two}, r"v as \[1, V\], got \[2, 4\]"),
        ({"k": two, "v": one}, r"v as \[2, V\], got \[1, 4\]"),
    ):
        with pytest.raises(ValueError, match=message):
            contract.check(q=q, **given)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_lengths_are_whole_numbers(dtype):
    q = CALLS["attention 0"]
    CONTRACTS["attention 0"].check(**q, key_lengths=torch.zeros(2, dtype=dtype))
    for wrong in (torch.zeros(2), torch.zeros(2, dtype=torch.int16), torch.zeros(3, dtype=dtype)):
        assert "key_lengths as integers [2]" in _refusal("attention 0", key_lengths=wrong)
