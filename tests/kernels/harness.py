"""How an operator is judged: by its error against float64, beside the error of the plain formula in the same dtype.

`check(operator, inputs, kwargs, dtype)` runs an implementation on poisoned inputs, with poisoned allocations and in a
shuffled program order, and compares outputs and every gradient. Every tensor argument lies in memory as no kernel would
choose: inputs by `layout`, lengths, masks and generator states with poison between their elements. With `again`, once
an operator (test_second_backward.py), a second backward is given upstream gradients and saved tensors likewise, as a
hook may hand them back. That a wrong kernel fails is shown by mistakes in its source: mutants.py.
"""

import contextlib
import os
import random
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import kernels
from kernels.dropout import Dropout

DEVICE = "cuda" if os.environ.get("KERNEL_TEST_DEVICE", "cpu") == "cuda" else "cpu"
INTERPRETED = DEVICE == "cpu"
DTYPES = [torch.float32, torch.float16] + ([] if INTERPRETED else [torch.bfloat16])
OUTPUTS = {
    "residual_norm": ("y", "z"),
    "linear_cross_entropy": ("loss", "per_token"),
}
NOT_DIFFERENTIABLE = ("per_token",)
GUARD = 64  # elements of NaN before and after every allocation
SLACK = 3  # elements or rows of NaN beside the valid region of a padded input
HEAD_SLACK = 8  # elements beside heads: rows that start at other than multiples of 16 bytes are copied, NaN left behind

_INTEGER_OF_SIZE = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


# ---------------------------------------------------------------- poison


def _poison(x: Tensor) -> Tensor:
    if x.dtype.is_floating_point:
        return x.fill_(float("nan"))
    return x.fill_(True) if x.dtype == torch.bool else x.fill_(torch.iinfo(x.dtype).max)


def _bits(x: Tensor) -> Tensor:
    """The same memory as integers: NaN compares equal to itself."""
    return x if x.dtype == torch.bool else x.view(_INTEGER_OF_SIZE[x.element_size()])


def _extent(shape: torch.Size, stride: tuple[int, ...]) -> int:
    return 0 if 0 in shape else 1 + sum((n - 1) * s for n, s in zip(shape, stride, strict=True))


class _Guarded:
    """Buffers larger than the tensors given out of them, and what lies outside those tensors."""

    def __init__(self):
        self.buffers: list[tuple[Tensor, Tensor, str]] = []

    def add(self, buffer: Tensor, view: Tensor, what: str) -> Tensor:
        inside = torch.zeros_like(buffer, dtype=torch.bool)
        inside.as_strided(view.shape, view.stride(), view.storage_offset()).fill_(True)
        self.buffers.append((buffer, inside, what))
        return view

    def verify(self) -> None:
        for buffer, inside, what in self.buffers:
            pristine = _bits(_poison(torch.empty_strided(buffer.shape, buffer.stride(), dtype=buffer.dtype)))
            touched = (_bits(buffer.cpu()) != pristine) & ~inside.cpu()
            assert not touched.any(), (
                f"{what}: {int(touched.sum())} elements outside the valid region were written, first at "
                f"{touched.nonzero()[0].tolist()} of the buffer {list(buffer.shape)}"
            )


@contextlib.contextmanager
def poisoned_allocations() -> Iterator[None]:
    """torch.empty and its kin give NaN (the largest integer), inside guard zones that are checked at the end."""
    guarded = _Guarded()

    def wrap(original):
        def allocate(*args, **kwargs):
            plain = original(*args, **kwargs)
            if type(plain) is not Tensor or plain.device.type == "meta" or plain.layout != torch.strided:
                return plain
            extent = _extent(plain.shape, plain.stride())
            # the true torch.empty: this function replaces the public name
            buffer = _poison(true_empty(extent + 2 * GUARD, dtype=plain.dtype, device=plain.device))
            view = buffer.as_strided(plain.shape, plain.stride(), GUARD)
            return guarded.add(buffer, view, f"allocation {list(plain.shape)}").requires_grad_(plain.requires_grad)

        return allocate

    true_empty = torch.empty
    with contextlib.ExitStack() as stack:
        for owner, name in (
            (torch, "empty"),
            (torch, "empty_like"),
            (torch, "empty_strided"),
            (Tensor, "new_empty"),
            (Tensor, "new_empty_strided"),
        ):
            stack.enter_context(mock.patch.object(owner, name, wrap(getattr(owner, name))))
        yield
    guarded.verify()


def place(x: Tensor, layout: str, guarded: _Guarded | None = None) -> Tensor:
    """A copy of `x` whose memory is surrounded by NaN.

    guarded: contiguous. padded: every dimension of the buffer is longer by SLACK. transposed: padded, the last two
    dimensions (of a [B, L, H, K] tensor L and H) are swapped in memory. strided: every second element of the last one.
    """
    rank = x.dim()
    order = list(range(rank))
    if layout == "transposed" and rank >= 2:
        a, b = (1, 2) if rank == 4 else (rank - 2, rank - 1)
        order[a], order[b] = order[b], order[a]
    stored = x.permute(order)
    step = 2 if layout == "strided" else 1
    slacks = [0 if layout == "guarded" else SLACK] * rank
    if rank >= 4 and layout != "guarded":
        slacks[-1] = HEAD_SLACK
    sizes = [n + 2 * slack for n, slack in zip(stored.shape, slacks, strict=True)]
    sizes[-1:] = [n * step for n in sizes[-1:]]
    count = 1
    for n in sizes:
        count *= n
    buffer = _poison(torch.empty(count + 2 * GUARD, dtype=x.dtype, device=x.device))
    view = buffer[GUARD : GUARD + count].view(sizes)
    for dim, (n, slack) in enumerate(zip(stored.shape, slacks, strict=True)):
        last = dim == rank - 1
        view = view.narrow(dim, slack * (step if last else 1), n * (step if last else 1))
    view = (view[..., ::step] if rank else view).permute(order)
    view.copy_(x)
    return guarded.add(buffer, view, f"input {list(x.shape)} ({layout})") if guarded is not None else view


# ---------------------------------------------------------------- order


def seed_of(text: str) -> int:
    """Seed of the program order: KERNEL_TEST_SEED, else a hash of `text`."""
    return int(os.environ.get("KERNEL_TEST_SEED", zlib.crc32(text.encode())))


@contextlib.contextmanager
def shuffled_programs(seed: int) -> Iterator[int]:
    """Runs the interpreter's programs in a random order, and refuses masked loads without `other`.

    The interpreter runs a grid in order on one thread, so a program that reads what an earlier one wrote looks right,
    and it fills masked lanes with zeros where a GPU leaves them undefined. No effect outside the interpreter.
    """
    if not INTERPRETED:
        yield seed
        return
    from triton.runtime import interpreter

    generator = random.Random(seed)
    builder = interpreter.interpreter_builder
    order: list[tuple[int, int, int]] = []
    dims = [1, 1, 1]
    true_dim, true_index, true_load = builder.set_grid_dim, builder.set_grid_idx, builder.create_masked_load

    def set_grid_dim(nx, ny, nz):
        true_dim(nx, ny, nz)
        dims[:] = [nx, ny, nz]
        order[:] = [(x, y, z) for x in range(nx) for y in range(ny) for z in range(nz)]
        generator.shuffle(order)

    def set_grid_idx(x, y, z):
        true_index(*order[(x * dims[1] + y) * dims[2] + z])

    def create_masked_load(pointers, mask, other, *rest):
        # the interpreter serves unmasked loads through this function too, with a mask of ones
        if other is None and not mask.data.all():
            raise AssertionError("a masked load without `other`: its masked lanes are undefined on a GPU")
        return true_load(pointers, mask, other, *rest)

    with (
        mock.patch.object(builder, "set_grid_dim", set_grid_dim),
        mock.patch.object(builder, "set_grid_idx", set_grid_idx),
        mock.patch.object(builder, "create_masked_load", create_masked_load),
    ):
        yield seed


# ---------------------------------------------------------------- evaluation


@dataclass(frozen=True)
class Result:
    """Outputs and gradients of one call, by name."""

    outputs: dict[str, Tensor]
    gradients: dict[str, Tensor]


def _call(operator: str, inputs: Mapping[str, Any], kwargs: Mapping[str, Any], impl: str) -> dict[str, Tensor]:
    extra = {"return_per_token": True} if operator == "linear_cross_entropy" else {}
    if operator == "attention":  # inputs of kernels.cases have scores of variance 1 without a scale
        extra["scale"] = kwargs.get("scale", 1.0)
    out = getattr(kernels, operator)(**inputs, **(kwargs | extra), impl=impl)
    names = OUTPUTS.get(operator, ("out", "kv"))
    return dict(zip(names, out if isinstance(out, tuple) else (out,), strict=False))


def _leaves(inputs: Mapping[str, Any], dtype: torch.dtype, layout: str | None, guarded: _Guarded | None):
    leaves = {}
    for name, x in inputs.items():
        if x is None:
            leaves[name] = None
            continue
        floating = x.dtype.is_floating_point
        x = x.to(DEVICE, dtype if floating else x.dtype)
        x = place(x.detach(), layout, guarded) if layout is not None else x.detach().clone()
        leaves[name] = x.requires_grad_(floating)
    return leaves


def odd(x: Tensor) -> Tensor:
    """A copy of `x` with poison between its elements."""
    return place(x.detach(), "strided")


def _odd_arguments(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    return {
        n: replace(v, rng=odd(v.rng)) if isinstance(v, Dropout) else odd(v) if isinstance(v, Tensor) else v
        for n, v in kwargs.items()
    }


def _upstream(name: str, out: Tensor, seed: int) -> Tensor:
    """Gradient of output `name`, exact in float16: sixteenths in [-2, 2]."""
    generator = torch.Generator().manual_seed(seed + zlib.crc32(name.encode()) % 1000)
    return (torch.randint(-32, 33, out.shape, generator=generator) / 16 if out.dim() else torch.tensor(1.75)).to(out)


def _differentiate(
    outputs: dict[str, Tensor],
    leaves: Mapping[str, Any],
    unused: tuple[str, ...],
    seed: int,
    again: bool = False,
    lay=lambda x: x,
):
    used = {n: x for n, x in outputs.items() if n not in unused + NOT_DIFFERENTIABLE and x.requires_grad}
    wanted = {n: x for n, x in leaves.items() if x is not None and x.requires_grad}
    gradients = torch.autograd.grad(
        list(used.values()),
        list(wanted.values()),
        [lay(_upstream(n, x, seed)) for n, x in used.items()],
        allow_unused=True,
        retain_graph=again,
    )
    return {
        name: torch.zeros_like(x) if g is None else g for (name, x), g in zip(wanted.items(), gradients, strict=True)
    }


def evaluate(
    operator: str,
    inputs: Mapping[str, Any],
    kwargs: Mapping[str, Any],
    dtype: torch.dtype,
    impl: str,
    *,
    layout: str | None = None,
    unused: tuple[str, ...] = (),
    seed: int = 0,
    again: bool = False,
) -> Result:
    """Outputs and gradients of `operator`; unused: outputs that the loss does not depend on; layout None: as given;
    again: a second backward must give the same."""
    if layout is None:
        leaves = _leaves(inputs, dtype, None, None)
        outputs = _call(operator, leaves, kwargs, impl)
        return Result(outputs, _differentiate(outputs, leaves, unused, seed))
    guarded = _Guarded()
    leaves, kwargs = _leaves(inputs, dtype, layout, guarded), _odd_arguments(kwargs)
    arguments = {n: x for n, x in (leaves | kwargs).items() if isinstance(x, Tensor)}
    before = {n: x.detach().clone() for n, x in arguments.items()}
    hand_back = [lambda x: x]
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: hand_back[0](x))
    with poisoned_allocations(), shuffled_programs(seed_of(f"{operator}{seed}")) as order:
        try:
            with hooks:
                outputs = _call(operator, leaves, kwargs, impl)
            kept = {n: x.detach().clone() for n, x in outputs.items()}
            gradients = _differentiate(outputs, leaves, unused, seed, again)
            hand_back[0] = odd
            second = _differentiate(outputs, leaves, unused, seed, lay=odd) if again else gradients
        except Exception as error:
            error.add_note(f"program order seed {order} (KERNEL_TEST_SEED={order} repeats it)")
            raise
    guarded.verify()
    for name, x in before.items():
        assert torch.equal(_bits(x), _bits(arguments[name].detach())), f"{operator}: input {name} was overwritten"
    for name, x in kept.items():
        assert torch.equal(_bits(x), _bits(outputs[name].detach())), f"{operator}: output {name} changed in backward"
    for name, x in gradients.items():
        if impl == "triton":
            same = torch.equal(_bits(x), _bits(second[name]))
        else:  # a library sums in another order where strides differ
            same = torch.allclose(x, second[name], *((1e-4, 1e-5) if dtype == torch.float32 else (2e-2, 1e-2)))
        assert same, f"{operator}: d{name} differs in a second backward, of other strides"
    return Result(kept, gradients)


# ---------------------------------------------------------------- judgement


def _distance(x: Tensor, oracle: Tensor) -> tuple[float, float]:
    """(largest error relative to the oracle's largest value, 1 - cosine)."""
    x, oracle = x.detach().double().cpu().flatten(), oracle.detach().double().cpu().flatten()
    if oracle.numel() == 0:
        return 0.0, 0.0
    scale = oracle.abs().max().item()
    error = (x - oracle).abs().max().item() / (scale if scale > 0 else 1.0)
    norms = x.norm() * oracle.norm()
    # of the normalised difference: 1 - cosine itself loses half the digits
    cosine = 0.0 if norms == 0 else ((x / x.norm() - oracle / oracle.norm()).square().sum() / 2).item()
    return error, cosine


def _compare(
    name: str,
    got: Tensor,
    formula: Tensor,
    oracle: Tensor,
    dtype: torch.dtype,
    exact_zeros: bool,
    floor: float,
    times: float = 2,
) -> str | None:
    if got.shape != oracle.shape or got.dtype != formula.dtype:
        return f"{name}: got {got.dtype} {list(got.shape)}, expected {formula.dtype} {list(oracle.shape)}"
    if not torch.isfinite(got).all():
        return f"{name}: {int((~torch.isfinite(got)).sum())} of {got.numel()} values are not finite"
    error, bend = _distance(got, oracle)
    formula_error, formula_bend = _distance(formula, oracle)
    budget = times * formula_error + floor
    # float16 rounds each value by up to 2^-11, which alone bends a vector by 1e-7: what the formula bends it is allowed
    bend_budget = 1e-6 if dtype == torch.float32 else 1e-6 + 2 * formula_bend
    if not error <= budget:
        return f"{name}: error {error:.3e} above {budget:.3e} (the formula in {dtype}: {formula_error:.3e})"
    if not bend <= bend_budget:
        return f"{name}: 1 - cosine {bend:.3e} above {bend_budget:.3e}"
    # masked, dropped and unreached elements are zero exactly, not nearly
    stray = (oracle.cpu() == 0) & (formula.cpu() == 0) & (got.cpu() != 0)
    if exact_zeros and stray.any():
        return f"{name}: {int(stray.sum())} elements should be exactly 0, first at {stray.nonzero()[0].tolist()}"
    return None


def check(
    operator: str,
    inputs: Mapping[str, Any],
    kwargs: Mapping[str, Any] | None = None,
    dtype: torch.dtype = torch.float32,
    *,
    impl: str = "triton",
    layout: str = "padded",
    unused: tuple[str, ...] = (),
    cancelling: tuple[str, ...] = (),
    cancelled: float = 1e-5,
    times: float = 2,
    seed: int = 0,
    again: bool = False,
) -> Result:
    """Asserts that `impl` is right at `inputs` (tensors or None by argument name) and `kwargs` in `dtype`.

    Floating inputs are rounded to `dtype` first, so that the oracle sees what the operator sees. For outputs and every
    gradient: error at most twice (gradients: `times`) that of the plain formula in `dtype`, plus 1e-5, relative to the
    largest value; 1 - cosine at most 1e-6 (float16: plus twice the formula's); exact zeros where formula and oracle
    have them, but for `cancelling`: inputs whose gradient has zeros that are differences of equal numbers (softmax over
    one key), to which `cancelled` is added in place of 1e-5.
    Also: inputs and outputs unchanged by backward, nothing written out of bounds, and with `again` the same from a
    second backward whose upstream gradients and saved tensors have other strides (of the fused kernels the same bits).
    """
    kwargs = dict(kwargs or {})
    if dtype == torch.bfloat16 and INTERPRETED:
        raise ValueError(
            "check: expected float32 or float16, got bfloat16: Triton's interpreter is silently wrong in it"
        )
    rounded = {n: x.to(dtype) if x is not None and x.dtype.is_floating_point else x for n, x in inputs.items()}
    on_device = {
        n: replace(v, rng=v.rng.to(DEVICE)) if isinstance(v, Dropout) else v.to(DEVICE) if isinstance(v, Tensor) else v
        for n, v in kwargs.items()
    }
    oracle = evaluate(operator, rounded, on_device, torch.float64, "reference", unused=unused, seed=seed)
    formula = evaluate(operator, rounded, on_device, dtype, "reference", unused=unused, seed=seed)
    got = evaluate(operator, rounded, on_device, dtype, impl, layout=layout, unused=unused, seed=seed, again=again)
    problems = [
        problem
        for kind in ("outputs", "gradients")
        for name, x in getattr(got, kind).items()
        if (
            problem := _compare(
                name if kind == "outputs" else f"d{name}",
                x,
                getattr(formula, kind)[name],
                getattr(oracle, kind)[name],
                dtype,
                name not in cancelling,
                cancelled if name in cancelling else 1e-5,
                2 if kind == "outputs" else times,
            )
        )
    ]
    order = seed_of(f"{operator}{seed}")
    assert not problems, f"{operator} {dtype} {layout} (program order seed {order}):\n  " + "\n  ".join(problems)
    return got
