"""Who deserves a time: right implementations do, every way of being wrong does not. And what a call counts."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import kernels
from bench import kernel_baselines, kernel_calls, steps
from bench.checking import Oracle
from bench.kernel_calls import Sizes
from march import cost, experiments
from march.config import resolve

SIZES = Sizes("test", 2, 20, 12, 60)
CPU = torch.device("cpu")
CALLS = {
    call.operator + (" two segments" if "segments" in call.dims else ""): call
    for name in ("MixedAct", "UnifiedAttention", "Baseline")
    for call, _ in kernel_calls.distinct([name], SIZES)
}
DTYPES = (torch.float32, torch.bfloat16)


def oracle(operator, dtype, dropout=True):
    call = CALLS[operator]
    return Oracle(call.operator, call.inputs(), kernel_calls.arguments(call, CPU, dropout), dtype)


def ours(operator):
    return lambda **arguments: getattr(kernels, operator.split()[0])(**arguments, impl="torch")


def spoiled(operator, change):
    """Our implementation with its first output passed through `change`, a function with a gradient of its own."""

    def function(**arguments):
        out = ours(operator)(**arguments)
        return (change(out[0]), *out[1:]) if isinstance(out, tuple) else change(out)

    return function


class Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, factor):
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return ctx.factor * gradient, None


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("operator", CALLS)
def test_the_portable_path_is_let_through(operator, dtype):
    assert oracle(operator, dtype).problems(ours(operator)) == []


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("factor", [1.01, 0.99, 0.0, -1.0])
@pytest.mark.parametrize("operator", CALLS)
def test_a_scaled_gradient_is_refused(operator, factor, dtype):
    problems = oracle(operator, dtype).problems(spoiled(operator, lambda x: Scaled.apply(x, factor)))
    assert any(problem.startswith("d") for problem in problems), problems


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("operator", CALLS)
def test_a_scaled_output_is_refused(operator, dtype):
    assert oracle(operator, dtype).problems(spoiled(operator, lambda x: 1.01 * x))


@pytest.mark.parametrize("operator", [name for name, call in CALLS.items() if call.dropouts])
def test_a_dropped_mask_is_refused(operator):
    names = CALLS[operator].dropouts

    def function(**arguments):
        return ours(operator)(**{n: x for n, x in arguments.items() if n not in names})

    assert oracle(operator, torch.float32).problems(function)


def test_a_nan_and_a_shape_are_refused():
    one = oracle("glu", torch.float32)
    assert "finite" in one.problems(spoiled("glu", lambda x: x * float("nan")))[0]
    assert "expected finite" in one.problems(spoiled("glu", lambda x: x[..., :-1]))[0]


@pytest.mark.parametrize("operator", CALLS)
def test_eager_baselines_compute_the_formula(operator):
    assert oracle(operator, torch.float32, dropout=False).problems(kernel_baselines.EAGER[operator.split()[0]]) == []


@pytest.mark.parametrize("operator", ["attention", "glu", "linear_cross_entropy"])
def test_flops_are_those_of_the_products(operator):
    """Beside torch's own count of the eager formula, which computes no scores twice."""
    call = next(c for c, _ in kernel_calls.distinct(["Baseline"], SIZES) if c.operator == operator)
    inputs = call.inputs(dtype=torch.float32)
    leaves = {n: x.requires_grad_() if x.dtype.is_floating_point else x for n, x in inputs.items()}
    arguments = kernel_calls.arguments(call, CPU, dropout=False)
    with FlopCounterMode(display=False) as forward:
        out = kernel_baselines.EAGER[operator](**leaves, **arguments)
    with FlopCounterMode(display=False) as backward:
        out.sum().backward()
    d = call.dims
    again = 2 * d["batch"] * d["heads"] * d["queries"] * d["keys"] * d["width"] if operator == "attention" else 0
    assert kernel_calls.flops(call, "forward") == forward.get_total_flops()
    assert kernel_calls.flops(call, "backward") == backward.get_total_flops() + again
    assert kernel_calls.flops(call, "both") == forward.get_total_flops() + backward.get_total_flops() + again


@pytest.mark.parametrize("name", ["Baseline", "Database", "UnifiedAttention", "MixedAct"])
def test_bytes_are_the_ledgers_boundary(name):
    ledger = cost.step_costs(
        experiments.configuration(name, vocab_size=SIZES.vocabulary),
        SIZES.encoder,
        SIZES.decoder,
        micro_batch=SIZES.batch,
        impl="torch",
    )
    sums: dict[tuple[str, str], int] = {}
    for call, counts in kernel_calls.distinct([name], SIZES):
        for phase in ("forward", "backward"):
            key = call.operator, phase
            sums[key] = sums.get(key, 0) + counts[name] * kernel_calls.least_bytes(call, phase, torch.bfloat16)
    # in the model what the decoder sends back to the keys and values of an encoder block comes in, too
    encoder = resolve(experiments.configuration(name)).encoder[:-1]
    kept = sum(block.num_heads * block.dim_qkv for block in encoder)
    sums["attention", "backward"] += 2 * SIZES.batch * SIZES.encoder * kept * torch.bfloat16.itemsize
    counted = {(row.operator, row.phase): row.compulsory for row in ledger.rows if (row.operator, row.phase) in sums}
    # the ledger's loss has an output more, the losses of single tokens
    assert sums == {key: pytest.approx(value, abs=8 * SIZES.batch * SIZES.decoder) for key, value in counted.items()}


STEP = Sizes("test", 2, 20, 12, 200)
KINDS = ("Baseline", "MixedActSOMDropout", "GELUGatedLinearUnit", "Database", "UnifiedAttention", "ScalingHeads")


@pytest.mark.parametrize(
    "name", [*KINDS, "UnifiedAttentionAsPublished", "NoSelfAttentionResidual", "APESumOverAverage"]
)
def test_the_predecessors_model_computes_the_same_function(name):
    """What benchmarks time as the baseline and the projection counts, beside ours."""
    assert steps.loss_problem("torch", name, STEP, CPU, precision="fp32") == ""


def test_another_function_than_the_predecessors_is_noticed():
    assert "expected" in steps.loss_problem("torch", "Baseline", STEP, CPU, embedding_combine="sum", precision="fp32")
