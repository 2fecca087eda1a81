from collections.abc import Callable, Mapping
from typing import Any

from kernels.operators.record import ENCODER_LENGTH, MICRO_BATCH, Kernel, Limit, Operator, Tuned, normalised
from kernels.validation import Contract

NO_PADDING = {"key_lengths": None, "key_mask": None}
LAYOUT = "lay heads out as [B, L, H, K]"
PADDING = {
    "key_lengths": "int B; one length a sequence",
    "key_mask": "bool B Lk; give one row a sequence and one column a key, True where it is real",
}


def packed(parts: int) -> str:
    return f"give the product of all {parts} weights as x.unflatten(-1, ({parts}, H, K))"


def _sizes(
    batch: int,
    queries: int,
    keys: int,
    heads: int,
    width: int,
    *,
    value_width: int | None = None,
    key_heads: int | None = None,
    key_batch: int | None = None,
) -> dict[str, int]:
    sizes = {"B": batch, "Lq": queries, "Lk": keys, "H": heads, "K": width}
    own = {"B|1": (key_batch, batch), "G": (key_heads, heads), "Kv": (value_width, width)}
    return sizes | {axis: like if n is None else n for axis, (n, like) in own.items()}


def products(sizes: Any, kwargs: Any) -> tuple[int, int]:
    """Scores that a causal mask hides are left out; backward has the scores again."""
    own = sizes["Lq"] * (sizes["Lq"] + 1) // 2
    pairs = sizes["Lq"] * sizes["Lk"] + (own if "G'" in sizes else 0)
    scores = sizes["B"] * sizes["H"] * (own if kwargs.get("causal") else pairs)
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
        Limit(
            f"_*attention_{kernel}",
            _at(width, dropout),
            issue_per_hmma=issue,
            shared_per_tensor=shared,
            loop="main",
        )
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
_KEYS = {"k": f"B|1 Lk G K; {LAYOUT}", "v": f"B|1 Lk G Kv; {LAYOUT}, only the last dimension may differ from k's"}
RECORD = Operator(
    Contract("attention", q=f"B Lq H K; {LAYOUT}", **_KEYS, **PADDING),
    portable="kernels.portable.chunked_attention",
    sizes=_sizes,
    values={"q": normalised("K")},
    saved=("q", "k", "v", "out", "lse"),
    flops=products,
    checked={"scale": 0.5, "causal": True} | NO_PADDING,
    forms={
        "self_attention": Contract("self_attention", qkv=f"B Lk 3 H K; {packed(3)}", **PADDING),
        "cross_attention": Contract(
            "cross_attention", q=f"B Lq H K; {LAYOUT}", kv=f"B|1 Lk 2 G K; {packed(2)}", **PADDING
        ),
    },
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
