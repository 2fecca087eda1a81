"""One function an operator: its contract, its validation, its dispatch.

Legend: B batch, L positions (Lq queries, Lk keys), H heads, G key/value heads, K head width (Kv of the values),
D stream width, F hidden width, V vocabulary, S states. Any strides. All floating inputs have one dtype (float16,
bfloat16, float32; float64 where `reference` or `torch` computes) and one device, else ValueError. Every operator is
differentiable in all its floating inputs. `impl`: see kernels.dispatch. Under torch.autocast, operators take its dtype
as torch's products do: it is what their floating inputs, but those of float64, are converted to.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from kernels import packed, reference
from kernels.activations import activation_of
from kernels.dispatch import Impl, ImplementationError, choice, implementation, transformed
from kernels.dropout import Dropout
from kernels.operators import OPERATORS
from kernels.portable.products import linear as portable_linear
from kernels.portable.token_embedding import tied_table as portable_tied_table
from kernels.validation import check, check_dense, check_heads, check_indices

__all__ = [
    "attention",
    "autocast_dtype",
    "embedding",
    "glu",
    "head_width",
    "linear",
    "linear_cross_entropy",
    "residual_norm",
    "row_width",
    "tied_table",
]
LOGITS = ("auto", "recompute", "chunks")

P = ParamSpec("P")
R = TypeVar("R")


def autocast_dtype(x: Tensor) -> torch.dtype:
    """What torch.autocast, where it is on for the device of `x`, makes of it; else its own dtype."""
    narrow = x.dtype in (torch.float16, torch.bfloat16, torch.float32)
    if not narrow or x.device.type == "meta" or not torch.is_autocast_enabled(x.device.type):
        return x.dtype
    return torch.get_autocast_dtype(x.device.type)


def _operator(function: Callable[P, R]) -> Callable[P, R]:
    """`function` on dense inputs, as torch.autocast wants them, in their own precision from there on."""
    parameters = inspect.signature(function).parameters
    names = tuple(parameters)
    optional = {n: p.annotation != Tensor for n, p in parameters.items() if p.annotation in (Tensor, Tensor | None)}

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        check_dense(function.__name__, {**dict(zip(names, args, strict=False)), **kwargs}, optional)
        device = next((x.device.type for x in (*args, *kwargs.values()) if isinstance(x, Tensor)), "cpu")
        if device == "meta" or not torch.is_autocast_enabled(device):
            return function(*args, **kwargs)

        def cast(x: Any) -> Any:
            return x.to(autocast_dtype(x)) if isinstance(x, Tensor) else x

        inputs, named = [cast(x) for x in args], {n: cast(x) for n, x in kwargs.items()}
        with torch.autocast(device, enabled=False):
            return function(*inputs, **named)  # type: ignore[arg-type]

    return call


def _active(dropout: Dropout | None) -> Dropout | None:
    return dropout if dropout is not None and dropout.p > 0 else None


@_operator
def attention(
    q: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    k2: Tensor | None = None,
    v2: Tensor | None = None,
    *,
    scale: float | None = None,
    causal: bool = False,
    key_lengths: Tensor | None = None,
    key_mask: Tensor | None = None,
    dropout: Dropout | None = None,
    return_kv: bool = False,
    as_published: bool = False,
    impl: Impl = "auto",
) -> Any:
    """dropout(softmax(scale Q K^T + mask)) V (Vaswani et al., 2017), for each head. Returns [B, Lq, H, Kv].

    q [B, Lq, H, K]; k [B or 1, Lk, G, K]; v [B or 1, Lk, G, Kv], H a multiple of G: query head h reads key/value
    head h // (H / G); a batch of 1 is shared by all sequences. K, Kv from 1 to 512.
    Packed: k alone holds keys and values [B or 1, Lk, 2, G, K]; q alone queries, keys and values [B, L, 3, H, K]. Their
    gradients are packed too, written in one go by the fused kernels.
    k2, v2, or k2 packed: a second segment of Lo keys, under one softmax with the first, whose keys are then the
    queries' own positions. `causal` concerns the first segment, key_lengths and key_mask the last.

    scale: any number, K^-1/2 where it is not given; heads filled up with zeros (`head_width`) need that of their own K.
    causal: query i sees keys j <= i (both counted from 0). key_lengths: integers [B] of any value, keys from there on
    are padding. key_mask: bool [B, Lk], True where a key is real; one of the two. A query that sees no key gives zeros
    and zero gradients. What stands in padding keys and their values, NaN too, reaches neither O nor a gradient; the
    future under causal is data like any.
    dropout: on the probabilities, rows (sequence, head, query), columns keys.
    return_kv: (O, kv) of a packed q alone; kv [B, L, 2, H, K] is a view of its keys and values, for other calls to
    read: what comes back to it in backward is part of q's gradient.
    as_published: of two segments, the mask of the published runs, whose segments were in the other order than the
    keys, so that a query saw later positions. `reference` only; any other explicit choice raises ImplementationError.
    """
    op, tensors = "attention", {"q": q, "k": k, "v": v, "k2": k2, "v2": v2}
    contract, padding = OPERATORS[op].contract_of(tensors), {"key_lengths": key_lengths, "key_mask": key_mask}
    sizes = contract.check((dropout,), **tensors, **padding)
    fix = "give the mask alone, it can express the lengths"
    check(key_lengths is None or key_mask is None, op, "key_lengths or key_mask", "both", fix)
    check_heads(contract, sizes)
    alone = contract.tensors == ("q",)
    check(alone or not return_kv, op, "return_kv with q packed and alone", ", ".join(contract.tensors), "leave it out")
    arguments = {"scale": sizes["K"] ** -0.5 if scale is None else float(scale), "causal": causal, **padding}
    arguments |= {"dropout": _active(dropout)} | ({"return_kv": True} if return_kv else {})
    if not as_published:
        return implementation(op, impl, q.device, q.dtype)(*tensors.values(), **arguments)
    check(k2 is not None, op, "as_published with a second segment", "one", "leave it out")
    name = choice(op, impl, q.device)
    if name != "reference":
        raise ImplementationError(
            f"{op}: the published mask exists in impl='reference' only, got {name!r} on {q.device}; "
            "pass impl={'attention': 'reference'}"
        )
    return reference.attention(*tensors.values(), as_published=True, **arguments)


def head_width(width: int, device: torch.device, *, impl: Impl = "auto") -> int:
    """The head width that attention wants products of: `width`, or more with zeros in the rest.

    The fused kernels copy q, k and v into that width where they come in another (`kernels.packed.head_stride`). A model
    that fills its projections' weights up with zeros has products, outputs and gradients that need no copy.
    """
    if choice("attention", impl, device) == "triton":
        return packed.head_stride(width)
    return width


def row_width(operator: str, width: int, dtype: torch.dtype, device: torch.device, *, impl: Impl = "auto") -> int:
    """The width that rows of a stream (operator "residual_norm") or of a hidden layer ("glu") want: `width`, or more
    with zeros in the rest, where the operator is a fused kernel.

    Rows of 380 or 1365 elements of 16 bits start at multiples of 8 or 2 bytes, and every product that reads them,
    ours and the library's, then loads so little at a time. A model fills up its weights, which are small.
    """
    if choice(operator, impl, device) == "triton":
        return packed.aligned_width(width, dtype.itemsize)
    return width


@_operator
def linear(x: Tensor, weight: Tensor, *, impl: Impl = "auto") -> Tensor:
    """x W^T, x [..., D], weight [F, D]; the library's product on a GPU, the faster library's on a CPU in float32."""
    if x.device.type == "cpu" and choice("linear", impl, x.device) == "torch":
        return portable_linear(x, weight)
    return torch.nn.functional.linear(x, weight)


def tied_table(table: Tensor, dtype: torch.dtype | None = None, *, impl: Impl = "auto") -> tuple[Tensor, Tensor]:
    """A table [V, D] that is embedding and output layer: (for `embedding`, for the output layer in `dtype`).

    On a CPU the gradients of both uses meet in one dense gradient in the table's own type; elsewhere it is the table
    itself and its conversion. dtype None: the table's.
    """
    traced = torch.compiler.is_compiling()
    if table.device.type == "cpu" and choice("linear", impl, table.device) == "torch" and (traced or not transformed()):
        return portable_tied_table(table, dtype)
    return table, table if dtype is None else table.to(dtype)


@_operator
def glu(
    x: Tensor,
    weight: Tensor,
    *,
    kind: str = "gated",
    activation: str = "relu",
    factor: float = 1.0,
    dropout: Dropout | None = None,
    gate_dropout: Dropout | None = None,
    recompute: bool = False,
    impl: Impl = "auto",
) -> Tensor:
    """Hidden layer of a feedforward with its first product. x [B, L, D]; returns [B, L, F].

    kind "plain":  dropout(act(x W^T)), weight [F, D];
    kind "gated":  dropout(act(x Wg^T) * (x Wu^T)), weight [2 F, D], the gate's rows first (Shazeer, 2020);
    kind "mixed":  dropout(factor (gate_dropout(sigmoid(x Ws^T)) + relu(x Wf^T))), weight [2 F, D], the slow rows first.
    activation: a name in kernels.activations. factor, gate_dropout: of "mixed" only.
    recompute: the fused kernels keep no products for backward but compute them again; the others always keep them.
    """
    op = "glu"
    rows = OPERATORS[op].contract.check((dropout, gate_dropout), x=x, weight=weight)["rows"]
    check(kind in ("plain", "gated", "mixed"), op, "kind plain, gated or mixed", repr(kind), "name one of them")
    activation_of(activation)
    even = kind == "plain" or rows % 2 == 0
    check(even, op, "an even number of rows, two halves", rows, "stack gate and up")
    mixed = kind == "mixed" or (factor == 1.0 and gate_dropout is None)
    check(mixed, op, "factor and gate_dropout with kind 'mixed' only", kind, "leave them out")
    extra = {"recompute": True} if recompute and choice(op, impl, x.device) == "triton" else {}
    return implementation(op, impl, x.device, x.dtype)(
        x,
        weight,
        kind=kind,
        activation=activation,
        factor=float(factor),
        dropout=_active(dropout),
        gate_dropout=_active(gate_dropout),
        **extra,
    )


@_operator
def residual_norm(
    x: Tensor | None,
    s: Tensor | None,
    gain: Tensor,
    *,
    dropout: Dropout | None = None,
    eps: float = 1e-6,
    features: int | None = None,
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor]:
    """y = x + dropout(s) and z = rmsnorm(y) gain (Zhang and Sennrich, 2019), in one pass; returns (y, z), [B, L, D].

    x None: no residual, y = dropout(s). s None: norm alone, y = x. gain [D]. Statistics float32 (float64 for float64).
    features: what the sum of squares is divided by, D if not given; of streams that are filled up with columns of zeros
    to a width that the kernels like (`row_width`), where a mean over D would be too small.
    """
    op = "residual_norm"
    stream = x if x is not None else s
    if stream is None:
        raise ValueError(f"{op}: expected x or s, got neither; give the tensor to normalise")
    width = OPERATORS[op].contract.check((dropout,), x=x, s=s, gain=gain)["D"]
    check(s is not None or dropout is None, op, "no dropout without s", "one", "leave it out")
    check(features is None or 1 <= features <= width, op, f"features from 1 to {width}", features, "leave it out")
    more = {} if features in (None, width) else {"features": features}
    function = implementation(op, impl, stream.device, stream.dtype)
    return function(x, s, gain, dropout=_active(dropout), eps=float(eps), **more)


@_operator
def linear_cross_entropy(
    h: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    scale: float = 1.0,
    ignore_index: int = -100,
    return_per_token: bool = False,
    logits: str = "auto",
    impl: Impl = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Mean cross entropy of the logits (h scale) weight^T. h [B, L, D], weight [V, D], labels int64 [B, L].

    Returns the float32 (float64 for float64) mean over the labels other than ignore_index, 0 where there are none;
    with return_per_token also the loss of each token [B, L], 0 where ignored, detached. A label outside [0, V) other
    than ignore_index reads nothing and gives NaN: its loss, the mean, its row of dh and all of dweight; the device is
    not waited for. KERNELS_DEBUG=1 in the environment names such a label instead (ValueError), and waits.
    logits: how the fused kernels' backward gets them, "recompute" (in registers), "chunks" (of at most 200 MB), or
    "auto" (the first for 16 bits and D up to 512, else the second); the other implementations have one way.
    """
    op = "linear_cross_entropy"
    words = OPERATORS[op].contract.check(h=h, weight=weight, labels=labels)["V"]
    whole = isinstance(ignore_index, int) and -(1 << 63) <= ignore_index < 1 << 63
    check(whole, op, "ignore_index as an int of 64 bits", repr(ignore_index), "-1 or -100 stands for no token")
    check(logits in LOGITS, op, f"logits among {', '.join(LOGITS)}", repr(logits), "auto takes the faster")
    check_indices(op, "labels", labels, words, ignore_index)
    function = implementation(op, impl, h.device, h.dtype)
    extra = {"logits": logits} if logits != "auto" and choice(op, impl, h.device) == "triton" else {}
    loss, per_token = function(h, weight, labels, scale=float(scale), ignore_index=ignore_index, **extra)
    return (loss, per_token.detach()) if return_per_token else loss


@_operator
def embedding(
    ids: Tensor,
    table: Tensor,
    positions: Tensor,
    *,
    combine: str = "average",
    dropout: Dropout | None = None,
    position_dropout: Dropout | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """dropout(E[ids]) and position_dropout(T[:L]), summed, or averaged (halved sum). Returns [B, L, D].

    ids int64 [B, L] in [0, V); table E [V, D]; positions T [P, D] with P >= L. The position dropout is drawn for
    each sequence. An id outside [0, V) reads nothing: its row of the result is NaN, and E gets no gradient from it (T
    does); the device is not waited for. KERNELS_DEBUG=1 in the environment names it instead (ValueError), and waits.
    """
    op = "embedding"
    sizes = OPERATORS[op].contract.check((dropout, position_dropout), ids=ids, table=table, positions=positions)
    length, places = sizes["L"], sizes["P"]
    check(length <= places, op, f"at most {places} positions", length, "shorten the sequences or enlarge max_length")
    check(combine in ("average", "sum"), op, "combine average or sum", repr(combine), "name one of them")
    check_indices(op, "ids", ids, sizes["V"])
    drops = {"dropout": _active(dropout), "position_dropout": _active(position_dropout)}
    return implementation(op, impl, table.device, table.dtype)(ids, table, positions, combine=combine, **drops)
