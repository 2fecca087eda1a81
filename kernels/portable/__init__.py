"""The fast portable path, in plain torch operations: what a CPU runs, and the fair rival of the fused kernels.

No [B, H, Lq, Lk] tensor outlives one chunk of heads, logits exist in chunks, masks are drawn again in backward. The
dropout masks are those of kernels.dropout, so the numbers are `reference`'s; on CUDA, attention is the library's and
its dropout draws from the library's generator (it says so). docs/portable.md has the measurements behind the choices.
"""

from kernels.portable.chunked_attention import attention
from kernels.portable.feedforward import glu
from kernels.portable.loss import linear_cross_entropy
from kernels.portable.norm import residual_norm
from kernels.portable.products import describe_products, fix_float32_library, linear, product_dtype
from kernels.portable.token_embedding import embedding, tied_table

__all__ = [
    "attention",
    "describe_products",
    "embedding",
    "fix_float32_library",
    "glu",
    "linear",
    "linear_cross_entropy",
    "product_dtype",
    "residual_norm",
    "tied_table",
]
