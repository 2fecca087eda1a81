"""What holds for every operator in every form: layouts, second backwards, single gradients, micro-batches, torch's own
machinery, refusals."""

import pytest
import torch
from harness import check
from operator_cases import (
    CASES,
    IMPLS,
    ONE_EACH,
    UNBATCHED,
    Case,
    call,
    cases_of,
    differentiate,
    floating,
    kwargs_of,
    leaves_of,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from kernels.fused import tiles_attention
from kernels.fused.tiles_attention import Tile

every_form = pytest.mark.parametrize("name", CASES)
every_operator = pytest.mark.parametrize("name", ONE_EACH)


@pytest.mark.parametrize("impl", IMPLS)
@every_form
def test_every_tensor_in_odd_strides_and_again(name, impl, monkeypatch):
    """Inputs, lengths, masks, generator states, upstream gradients, saved tensors: `harness.check` lays all of them out
    as no kernel would choose, and asks for a second backward."""
    monkeypatch.setattr(tiles_attention, "tile", lambda direction, *_: Tile(16, 32, 4, 1))
    case = CASES[name]
    options = {"unused": case.unused, "cancelling": case.cancelling, "layout": "strided", "again": True}
    # of O in 16 bits alone backward has a little more error than the formula
    dtype, times = (torch.float16, 3) if impl == "triton" else (torch.float32, 2)
    check(case.operator, case.inputs, kwargs_of(case, impl), dtype, impl=impl, times=times, **options)


@pytest.mark.parametrize("layout", ["guarded", "transposed"])
@every_form
def test_layouts(name, layout):
    case = CASES[name]
    check(case.operator, case.inputs, case.kwargs, layout=layout, unused=case.unused, cancelling=case.cancelling)


@every_operator
def test_a_gradient_alone_is_the_one_among_all(name):
    """And what needs none gets none."""
    leaves = leaves_of(CASES[name])
    both = dict(zip(floating(leaves), differentiate(call(CASES[name], leaves), leaves), strict=True))
    for n in both:
        one = {m: x if x is None or m == n else x.detach() for m, x in leaves.items()}
        (got,) = differentiate(call(CASES[name], one), one)
        # the cross entropy's dE alone has its log-sum-exp from another kernel, of another order
        rtol, atol = (1e-5, 1e-6) if CASES[name].operator == "linear_cross_entropy" else (0, 0)
        torch.testing.assert_close(got, both[n], rtol=rtol, atol=atol)


@pytest.mark.parametrize("name", [n for n, case in CASES.items() if "dropout" in case.kwargs])
def test_a_micro_batch_sees_the_masks_of_the_whole(name):
    """The second sequence of two, alone."""
    whole, part = CASES[name], cases_of(first=4)[name]

    def second(given):
        batched = {n for n, x in given.items() if isinstance(x, Tensor) and n not in UNBATCHED and len(x) == 2}
        return {n: x[1:] if n in batched else x for n, x in given.items()}

    outputs = call(whole, leaves_of(whole))
    alone = Case(whole.operator, second(whole.inputs), second(part.kwargs))
    for a, b in zip(outputs, call(alone, leaves_of(alone)), strict=True):
        # masks to the bit; values to rounding: the interpreter's products depend on a row's place in its tile
        assert torch.equal(a[1:] == 0, b == 0)
        torch.testing.assert_close(b, a[1:], rtol=1e-5, atol=1e-6)


@every_operator
def test_compiled_and_checkpointed_give_the_same_bits(name):
    leaves = leaves_of(CASES[name])
    wanted = floating(leaves)

    def function(*given):
        outputs = call(CASES[name], leaves | dict(zip(wanted, given, strict=True)))
        return sum(x.float().square().sum() for x in outputs if x.requires_grad)

    plain = torch.autograd.grad(function(*wanted.values()), list(wanted.values()))
    torch.compiler.reset()
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    for other in (compiled, lambda *given: checkpoint(function, *given, use_reentrant=False)):
        got = torch.autograd.grad(other(*wanted.values()), list(wanted.values()))
        assert all(torch.equal(a, b) for a, b in zip(got, plain, strict=True))


class _Ours(TorchDispatchMode):
    """Our registered operators that are called, with their arguments."""

    def __init__(self):
        super().__init__()
        self.calls: dict[str, tuple] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function.namespace.startswith("march"):
            self.calls[function.name()] = (function, args, kwargs or {})
        return out


@every_operator
def test_registered_operators_satisfy_torch(name):
    """Schemas and fakes (shapes and strides) agree with what forward's and backward's operators do."""
    leaves = leaves_of(CASES[name], dtype=torch.float16)
    with _Ours() as ours:
        differentiate(call(CASES[name], leaves), leaves)
    assert len(ours.calls) >= 2
    for function, args, kwargs in ours.calls.values():
        torch.library.opcheck(function, args, kwargs, test_utils=("test_schema", "test_faketensor"))


@every_form
def test_float64_is_refused(name):
    with pytest.raises(ValueError, match=r"expected float16, bfloat16 or float32.*got torch\.float64"):
        call(CASES[name], leaves_of(CASES[name], dtype=torch.float64))


# bytes that are kept for backward beside inputs and outputs: the generator's state, a float32 a query and head, bits or
# products of the hidden layer in rows that are filled up; of what is recomputed nothing
SAVED = {
    **dict.fromkeys(("lengths", "mask", "causal", "shared", "unified lengths", "unified mask", "cross"), 4 * 2 * 2 * 7),
    "packed unified": 4 * 2 * 2 * 7,
    "self": 4 * 2 * 2 * 9,
    "relu": 4 * 2 * 7 * 1,
    "gelu": 4 * 2 * 7 * 32,
    "gated": 4 * 2 * 7 * 2 * 32,
    "mixed kept": 4 * 2 * 7 * 2 * 32,
    "relu recomputed": 0,
    "mixed": 0,
}


@pytest.mark.parametrize("name", SAVED)
def test_what_is_saved(name):
    leaves, sizes = leaves_of(CASES[name]), {}

    def pack(x):
        sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        outputs = call(CASES[name], leaves)
    given = [x for x in (*leaves.values(), *outputs, *CASES[name].kwargs.values()) if isinstance(x, Tensor)]
    given += [x.rng for x in CASES[name].kwargs.values() if hasattr(x, "rng")]
    for x in given:
        sizes.pop(x.untyped_storage().data_ptr(), None)
    assert sum(sizes.values()) in (SAVED[name], SAVED[name] + 3 * 8, SAVED[name] + 2 * 3 * 8), sizes
