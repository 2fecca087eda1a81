"""The harness itself: it passes what is right, and fails on what is wrong."""

import harness
import pytest
import torch
from harness import check

from kernels.dropout import Dropout, dropout_state


def _dropout(site, p=0.25):
    return Dropout(p, dropout_state(42, 3, 5), site)


def _randn(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


CASES = {
    "attention": (
        {"q": _randn(2, 5, 2, 8), "k": _randn(2, 7, 2, 8), "v": _randn(2, 7, 2, 6)},
        {"causal": True, "key_lengths": torch.tensor([4, 7]), "dropout": _dropout(1), "scale": 0.5},
    ),
    "residual_norm": (
        {"x": _randn(2, 5, 12), "s": _randn(2, 5, 12).flip(1), "gain": _randn(12)},
        {"dropout": _dropout(2)},
    ),
    "linear_cross_entropy": (
        {"h": _randn(2, 5, 8), "weight": _randn(11, 8), "labels": torch.tensor([[1, 2, -100, 10, 0]]).expand(2, -1)},
        {"scale": 0.35},
    ),
}
# what can be wrong with a result
SPOILED = {
    "nothing written": torch.zeros_like,
    "1% too large": lambda x: x * 1.01,
    "in another order": lambda x: x.flip(0) if x.dim() == 1 else x.transpose(-1, -2).reshape(x.shape),
    "of another type": lambda x: x.double(),
    "not finite": lambda x: x.where(x != x.max(), torch.nan),
    "a value too many": lambda x: torch.cat([x, x[:1]]),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("operator", CASES)
def test_check_passes_a_right_implementation(operator, dtype):
    inputs, kwargs = CASES[operator]
    check(operator, inputs, kwargs, dtype, impl="reference")


@pytest.mark.parametrize("how", SPOILED)
@pytest.mark.parametrize(
    ("operator", "name"), [("attention", "out"), ("residual_norm", "gain"), ("residual_norm", "z")]
)
def test_check_fails_a_spoiled_result(monkeypatch, operator, name, how):
    inputs, kwargs = CASES[operator]
    true = harness.evaluate

    def spoiled(*arguments, **options):
        result = true(*arguments, **options)
        if arguments[4] == "torch":
            for values in (result.outputs, result.gradients):
                values.update({n: SPOILED[how](x) for n, x in values.items() if n == name})
        return result

    monkeypatch.setattr(harness, "evaluate", spoiled)
    with pytest.raises(AssertionError, match=operator):
        check(operator, inputs, kwargs, impl="torch")


def test_exact_zeros_are_asked_for():
    """A masked or dropped element that is nearly 0 is wrong."""
    compare = harness._compare
    x = torch.tensor([0.0, 1.0])
    wrong = x + torch.tensor([1e-9, 0.0])
    assert "exactly 0" in compare("x", wrong, x, x.double(), torch.float32, True, 1e-5)
    assert compare("x", wrong, x, x.double(), torch.float32, False, 1e-5) is None


def test_check_refuses_bfloat16_under_the_interpreter():
    inputs, kwargs = CASES["residual_norm"]
    if not harness.INTERPRETED:
        pytest.skip("on a GPU bfloat16 is tested")
    with pytest.raises(ValueError, match="silently wrong"):
        check("residual_norm", inputs, kwargs, torch.bfloat16, impl="reference")


@pytest.mark.parametrize("layout", ["guarded", "padded", "transposed", "strided"])
@pytest.mark.parametrize("shape", [(5,), (3, 4), (2, 3, 5), (2, 3, 4, 5), (0, 3)])
def test_placed_inputs_lie_in_nan(layout, shape):
    x, guarded = _randn(*shape), harness._Guarded()
    placed = harness.place(x, layout, guarded)
    assert torch.equal(placed, x)
    guarded.verify()
    buffer, inside, _ = guarded.buffers[0]
    assert buffer[~inside].isnan().all()
    assert int(inside.sum()) == x.numel()
    buffer[0] = 1.0
    with pytest.raises(AssertionError, match="outside the valid region"):
        guarded.verify()


def _write_behind_an_allocation():
    with harness.poisoned_allocations():
        x = torch.empty(2, 3)
        x.as_strided((1,), (1,), x.storage_offset() + 6).fill_(0.0)


def test_allocations_are_poisoned_and_guarded():
    with harness.poisoned_allocations():
        x = torch.empty(2, 3)
        assert x.isnan().all()
        assert torch.empty_like(x).isnan().all()
        assert x.new_empty(4).isnan().all()
    with pytest.raises(AssertionError, match="outside the valid region"):
        _write_behind_an_allocation()


@pytest.mark.skipif(not harness.INTERPRETED, reason="of the interpreter")
def test_programs_run_shuffled_and_once():
    import triton
    import triton.language as tl

    @triton.jit
    def _order_kernel(order_ptr, counter_ptr, masked: tl.constexpr):
        n = tl.load(counter_ptr)
        tl.store(order_ptr + tl.program_id(0) * 4 + tl.program_id(1), n)
        tl.store(counter_ptr, n + 1)
        if masked:
            tl.load(order_ptr + tl.arange(0, 4), mask=tl.arange(0, 4) < 3)

    orders = []
    for seed in (1, 2):
        order, counter = torch.zeros(16, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
        with harness.shuffled_programs(seed):
            _order_kernel[(4, 4)](order, counter, masked=False)
        assert sorted(order.tolist()) == list(range(16))
        orders.append(order.tolist())
    assert orders[0] != orders[1]
    assert orders[0] != list(range(16))
    with harness.shuffled_programs(1), pytest.raises(Exception, match="without `other`"):
        _order_kernel[(1, 1)](order, counter, masked=True)
