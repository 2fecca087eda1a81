"""The published runs: what they computed, in which micro-batches, and how long a step took.

Seconds come from march.training.published (the original experiments' logs, 8 RTX A5000, 1000 steps, one seed each).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.rivals import Attention, Eager, KeysValues, RMSNorm
from march import experiments
from march.config import ModelConfig
from march.training.published import PUBLISHED

SEQUENCES, GPUS = 1024, 8
# micro-batches were halved by hand where memory ran out
MICRO_BATCH, HALVED = 64, 32
HALVED_EXPERIMENTS = frozenset(
    {
        "MoreHeadsLessQKVDim",
        "MoreHeadsLessQKVDimLessLayers",
        "Database",
        "DatabaseFromHeads2",
        "DatabaseFromDim",
        "BaselineFP32",
    }
)
# never published: what 24 GB hold (docs/ledger.md); the fused step of Best likewise
UNPUBLISHED = {"Best": 1, "BigHeads3": 32}
FUSED = {"Best": 8}
# an evaluation of about 0.42 s every 20 steps is in the published seconds
EVALUATION_SECONDS = 0.42 / 20


def micro_batch(name: str, impl: str = "eager") -> int:
    """Sequences of a micro-batch: of the eager run as it was published, a twin as its base; of the fused step 64."""
    if impl == "triton":
        return FUSED.get(name, MICRO_BATCH)
    base = name.removesuffix("Controlled")
    return HALVED if base in HALVED_EXPERIMENTS else UNPUBLISHED.get(name, MICRO_BATCH)


def published_seconds() -> dict[str, float]:
    """Seconds a step of the published runs, evaluation included, of those whose log has a clean figure."""
    return {
        name: row.seconds_per_step
        for name, row in PUBLISHED.items()
        if row.seconds_per_step is not None and name in experiments.names()
    }


class CudaDropout(nn.Module):
    """Dropout as torch dispatches it on CUDA: one kernel that writes its output and a mask of bytes. On the meta device
    `nn.Dropout` takes the three operators of a CPU."""

    def __init__(self, probability: float):
        super().__init__()
        self.probability = probability

    def forward(self, x: Tensor) -> Tensor:
        return torch.native_dropout(x, self.probability, True)[0]


class _Unmasked(nn.Module):
    """Attention over the bank: `Eager` fills it with a mask of nothing, the published runs had none."""

    def __init__(self, attention: Attention):
        super().__init__()
        self.inner = attention

    def forward(self, x: Tensor, hidden: Tensor, memory: KeysValues) -> tuple[Tensor, KeysValues]:
        inner, (k, v) = self.inner, memory
        weights = inner.dropout(torch.softmax(torch.matmul(inner.split(inner.q(x)), k.transpose(-1, -2)), -1))
        mixed = torch.matmul(weights, v)
        return inner.o(mixed.transpose(1, 2).reshape(*x.shape[:2], -1)), memory


class _Norm(nn.Module):
    """RMSNorm with statistics in float32, as T5's: x is widened, squared, and multiplied in float32."""

    def __init__(self, weight: nn.Parameter):
        super().__init__()
        self.weight = weight

    def forward(self, x: Tensor) -> Tensor:
        variance = x.float().pow(2).mean(-1, keepdim=True)
        return self.weight * (x * torch.rsqrt(variance + 1e-6)).to(self.weight.dtype)


def _as_published(module: nn.Module) -> None:
    """Replaces parts of `module`, in place, by those of the published runs."""
    for name, child in module.named_children():
        _as_published(child)
        if isinstance(child, nn.Dropout):
            setattr(module, name, CudaDropout(child.p) if child.p else nn.Identity())
        elif isinstance(child, Attention) and child.kind == "database_attention":
            setattr(module, name, _Unmasked(child))
        elif isinstance(child, RMSNorm):
            setattr(module, name, _Norm(child.weight))


class Predecessor(Eager):
    """`Eager` as the published runs had it on CUDA: cross entropy of bf16 logits, norms with float32 statistics, one
    dropout draw of the position table for the whole micro-batch, no mask on the bank."""

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        _as_published(self)

    def embed(self, ids: Tensor) -> Tensor:
        x = self.dropout(self.embedding(ids)) + self.dropout(self.positions[: ids.shape[1]])
        return x / 2 if self.config.embedding_combine == "average" else x

    def forward(self, input_ids: Tensor, decoder_input_ids: Tensor, labels: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = ~attention_mask[:, None, None, :]
        memory: list[KeysValues] = []
        bank = None if self.bank is None else (self.bank[0], self.bank[1])
        self.encoder(self.embed(input_ids), hidden, memory, bank, False)
        h = self.decoder(self.embed(decoder_input_ids), hidden, memory, bank, True)
        logits = F.linear(h * self.config.dim_model**-0.5, self.embedding.weight)
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten())
