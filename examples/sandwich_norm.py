"""A norm behind each sublayer too (Ding et al., 2021): x + norm(f(norm(x))).

    deepspeed train.py --exp examples/sandwich_norm.py:Sandwich

A block of one's own: where the norms stand. Its norms have parameters of their own.
"""

import torch

from march.experiments import Experiment
from march.model import Block, Norm


class SandwichBlock(Block):
    def __init__(self, config, block):
        super().__init__(config, block)
        self.behind = torch.nn.ModuleDict({name: Norm(config.dim_model) for name in self.names})

    def forward(self, stream, ctx):
        """stream: x [B, L, D]."""
        stream = stream.copy()
        for layer, behind in zip(self.layers, self.behind.values(), strict=True):
            s = behind(layer(stream.norm(layer.norm), ctx), ctx)
            stream.add(s, dropout=layer.dropout(ctx), residual=layer.residual)
        return stream


Sandwich = Experiment(
    "Sandwich",
    base="Baseline",
    changes={},
    control="Baseline",
    hypothesis="A sublayer's output keeps its scale, so no block drowns the others.",
    parts={"block": SandwichBlock},
)
