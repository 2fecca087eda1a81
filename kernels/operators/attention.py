from collections.abc import Callable, Mapping
from typing import Any

from kernels.operators.record import ENCODER_LENGTH, MICRO_BATCH, Draw, Kernel, Limit, Operator, Tuned
from kernels.validation import Contract

PADDING = {
    "key_lengths": "int B; one length a sequence",
    "key_mask": "bool B Lk; give one row a sequence and one column a key, True where it is real",
}
# Of both segments: separate tensors, or packed ones. Of two segments the first, the queries' own, has their length
_FIRST = (
    {"q": "B Lq H K", "k": "B|1 Lk G K", "v": "B|1 Lk G Kv"},
    {"q": "B Lk 3 H K"},
    {"q": "B Lq H K", "k": "B|1 Lk 2 G K"},
)
_SECOND: tuple[dict[str, str], ...] = ({}, {"k2": "B'|1 Lk G' K", "v2": "B'|1 Lk G' Kv"}, {"k2": "B'|1 Lk 2 G' K"})


def _form(first: Mapping[str, str], second: Mapping[str, str]) -> Contract:
    if second:
        first = {name: axes.replace("Lk", "Lq") for name, axes in first.items()}
    arguments = {**first, **second}
    for name, axes in arguments.items():
        # packed values are as wide as keys
        axes = axes if "v" in first and ("v2" in second or not second) else axes.replace("Kv", "K")
        parts = next((n for n in "32" if n in axes.split()), None)
        fix = "lay heads out as [B, L, H, K]; values alone may have another last dimension"
        if parts:
            fix = f"give the product of all {parts} weights as x.unflatten(-1, ({parts}, H, K))"
        arguments[name] = f"{axes}; {fix}"
    return Contract("attention", **arguments, **PADDING)


# separate tensors of one segment, of two, then the packed ones
FORMS = tuple(_form(first, second) for first in _FIRST for second in _SECOND)


def _sizes(
    batch: int, queries: int, keys: int, heads: int, width: int, *, value_width: int | None = None,
    key_heads: int | None = None, key_batch: int | None = None, segments: int = 1,
) -> dict[str, int]:  # fmt: skip
    """Of two segments, `keys` and what else is said of keys are the second's."""
    sizes = {"form": segments - 1, "B": batch, "Lq": queries, "Lk": keys, "H": heads, "K": width}
    sizes |= {"Kv": width if value_width is None else value_width, "B|1": batch, "G": heads}
    second = "'" if segments == 2 else ""
    return sizes | {
        f"B{second}|1": batch if key_batch is None else key_batch,
        f"G{second}": heads if key_heads is None else key_heads,
    }


def _queries(draw: Draw, sizes: Any, shape: Any) -> Any:
    """Scores of variance 1; a packed q holds keys and values too."""
    if len(shape) == 4:
        return draw.normal(shape, scale=sizes["K"] ** -0.5)
    x = draw.normal(shape)
    x[:, :, 0] *= sizes["K"] ** -0.5
    return x


def products(sizes: Any, kwargs: Any) -> tuple[int, int]:
    """Scores that a causal mask hides are left out; backward has the scores again."""
    two = "G'" in sizes
    first = sizes["Lq"] * (sizes["Lq"] if two else sizes["Lk"])
    if kwargs.get("causal"):
        first = sizes["Lq"] * (sizes["Lq"] + 1) // 2
    scores = sizes["B"] * sizes["H"] * (first + (sizes["Lq"] * sizes["Lk"] if two else 0))
    return 2 * scores * (sizes["K"] + sizes["Kv"]), 2 * scores * (3 * sizes["K"] + 2 * sizes["Kv"])


def _scores(kernel: Any) -> int:
    """Twice the scores of a launch, [B, H, Lq, Lk] with all key segments."""
    batch, queries, heads, _ = kernel.shape("q_ptr")
    # dK, dV: of one segment; the others read a second one, or None
    keys = kernel["Lk"] + (("k2_ptr" in kernel.arguments and kernel["Lk2"]) or 0)
    return 2 * batch * heads * queries * keys


def _dkdv(kernel: Any) -> int:
    """Scores again; dV where wanted; dP again and dK where wanted."""
    dk, dv = (kernel.arguments[name].is_tensor for name in ("dk_ptr", "dv_ptr"))
    return _scores(kernel) * (kernel["K"] + dv * kernel["KV"] + dk * (kernel["KV"] + kernel["K"]))


def _tiles() -> list[Tuned]:
    """Encoder self-attention with dropout, in bfloat16, at the widths of most experiments."""
    from dataclasses import asdict

    from kernels.fused.tiles_attention import Tile, tile

    shapes = [(128, 64, 8, 2), (128, 32, 8, 2), (64, 64, 4, 2), (64, 32, 4, 2), (32, 64, 4, 2), (32, 128, 8, 2)]
    alternatives = tuple(
        asdict(Tile(*shape, registers)) for shape in shapes for registers in ((0, 128) if shape[2] == 8 else (0, 168))
    )
    dims = {"batch": MICRO_BATCH, "queries": ENCODER_LENGTH, "keys": ENCODER_LENGTH}
    return [
        Tuned(
            f"attention.{direction}.{width}.dropout.16",
            lambda arch, direction=direction, width=width: asdict(  # type: ignore[misc]
                tile(direction, arch, width, width, False, True, 16)
            ),
            alternatives,
            dims | {"heads": 512 // width, "width": width},
            {"scale": 1.0},
            backward=direction != "forward",
        )
        for width in (32, 64, 128)
        for direction in ("forward", "dq", "dkdv")
    ]


def _width(constants: Mapping[str, Any]) -> int:
    """Wider head of queries and values; the rows kernel of backward has values only."""
    return max(constants.get("K", 0), constants.get("KV", 0))


def _at(width: int, dropout: bool) -> Callable[[Mapping[str, Any]], bool]:
    return lambda constants: (_width(constants), bool(constants["DROPOUT"])) == (width, dropout)


LIMITS = (
    Limit("_*attention_*", lambda c: _width(c) <= 128, no_spills=True, no_duplicates=True),
    Limit("_*attention_fwd_kernel", lambda c: _width(c) <= 64, resident_warps=8),
    Limit("_*attention_bwd_d*", lambda c: _width(c) <= 64, resident_warps=8),
    # the main loop: beside it are loops over blocks at the causal diagonal and at the end of the keys
    *(
        Limit(f"_*attention_{kernel}", _at(width, dropout), issue_per_hmma=issue, shared_per_tensor=shared, loop="main")
        for kernel, width, dropout, issue, shared in (
            ("fwd_kernel", 32, True, 15.0, None),
            ("fwd_kernel", 64, False, 6.0, 0.95),
            ("fwd_kernel", 64, True, 11.0, 0.95),
            ("fwd_kernel", 128, False, 5.0, None),
            ("fwd_kernel", 128, True, 7.0, None),
            ("bwd_d*", 64, False, 4.6, 0.95),
            ("bwd_d*", 64, True, 7.4, 0.95),
            ("bwd_d*", 128, False, 4.0, 1.0),
            ("bwd_d*", 128, True, 5.4, 1.0),
        )
    ),
)
RECORD = Operator(
    FORMS[1],
    portable="kernels.portable.chunked_attention",
    sizes=_sizes,
    values={"q": _queries},
    saved=(*FORMS[1].tensors, "out", "lse"),
    flops=products,
    checked={"scale": 0.5, "causal": True, "key_lengths": None, "key_mask": None},
    forms=FORMS,
    libraries=("flash_attn",),
    kernels={
        "_column_keys_kernel": Kernel("ckeys_ptr"),
        "_attention_fwd_kernel": Kernel("o_ptr lse_ptr", lambda k: _scores(k) * (k["K"] + k["KV"])),
        # scores again, dP, dQ
        "_attention_bwd_dq_kernel": Kernel("dq_ptr rows_ptr", lambda k: _scores(k) * (2 * k["K"] + k["KV"])),
        "_attention_bwd_dkdv_kernel": Kernel("dk_ptr dv_ptr", _dkdv),
        "_sum_partials_kernel": Kernel("out_ptr"),
    },
    tiles=_tiles,
    limits=LIMITS,
)
