"""Queries and keys of self-attention are normalised, scores divided by sqrt(K) (Henry et al., 2020).

    deepspeed train.py --exp examples/qk_norm.py:NormalisedScores

A sublayer of one's own, with parameters of its own.
"""

import torch

from march.experiments import Experiment
from march.model import Norm, SelfAttention


class NormalisedSelfAttention(SelfAttention):
    def __init__(self, config, block):
        super().__init__(config, block)
        self.query_norm, self.key_norm = Norm(block.dim_qkv), Norm(block.dim_qkv)
        self.scale, self.packed = block.dim_qkv**-0.5, False

    def queries(self, q, ctx):
        """q [B, L, H, K]."""
        return self.query_norm(q, ctx)

    def keys_values(self, kv, ctx):
        """kv [B, L, 2 H K] to keys and values [B, L, 2, H, K]; the decoder reads the encoder's."""
        k, v = kv.unflatten(-1, (2, self.kv_axis.count, -1)).unbind(2)
        return torch.stack([self.key_norm(k, ctx), v], 2)


NormalisedScores = Experiment(
    "NormalisedScores",
    base="Baseline",
    changes={},
    control="Baseline",
    hypothesis="Scores of normalised queries and keys cannot grow, so training is steadier.",
    parts={"self_attention": NormalisedSelfAttention},
)
