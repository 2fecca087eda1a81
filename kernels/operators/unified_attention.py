from kernels.operators import attention
from kernels.operators.attention import LAYOUT, NO_PADDING, PADDING
from kernels.operators.record import Operator, normalised
from kernels.validation import Contract

_OWN = "own keys come from the queries' positions, in the queries' width"
_OTHER = f"{LAYOUT}; project both segments to one width"
RECORD = Operator(
    Contract(
        "unified_attention",
        q=f"B Lq H K; {LAYOUT}",
        k_own=f"B|1 Lq G K; {_OWN}",
        v_own=f"B|1 Lq G Kv; {_OWN}",
        k_other=f"B'|1 Lk G' K; {_OTHER}",
        v_other=f"B'|1 Lk G' Kv; {_OTHER}",
        **PADDING,
    ),
    portable="kernels.portable.chunked_attention",
    sizes=lambda batch, queries, other, heads, width: (
        {"B": batch, "Lq": queries, "Lk": other, "K": width, "Kv": width}
        | dict.fromkeys(("B|1", "B'|1"), batch)
        | dict.fromkeys(("H", "G", "G'"), heads)
    ),
    values={"q": normalised("K")},
    saved=("q", "k_own", "v_own", "k_other", "v_other", "out", "lse"),
    flops=attention.products,
    checked={"scale": 0.5} | NO_PADDING,
    forms={
        "packed_unified_attention": Contract(
            "packed_unified_attention",
            qkv=f"B Lq 3 H K; {attention.packed(3)}",
            kv_other=f"B'|1 Lk 2 G' K; {attention.packed(2)}",
            **PADDING,
        )
    },
    fused="kernels.fused.attention",  # its kernels are attention's, with a second segment of keys
)
