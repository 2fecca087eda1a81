"""The fused Triton kernels: the only package that imports triton (kernels.compile_only drives its compiler)."""

import os

# Triton 3.10 flips this default: multiply-adds that are contracted here would round twice there, and be slower
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
