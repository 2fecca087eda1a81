"""What `march check` looks at: the experiment's model, small and in float64, and batches to give it.

Legend: B sequences, Le and Ld encoder and decoder positions, V vocabulary.
"""

import contextlib
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import kernels
import march
from march import experiments
from march.config import ModelConfig, per_block
from march.experiments import Experiment
from march.model import Transformer

VOCABULARY = 211


@dataclass(frozen=True)
class Batch:
    """input_ids [B, Le], decoder_input_ids [B, Ld], labels [B, Ld]; attention_mask bool [B, Le]. first: the number of
    its first sequence in the step."""

    input_ids: Tensor
    decoder_input_ids: Tensor
    labels: Tensor
    attention_mask: Tensor | None
    first: int = 0

    @classmethod
    def draw(cls, size: int, encoder: int, decoder: int, vocabulary: int = VOCABULARY, seed: int = 0) -> "Batch":
        """Sequences in turn without padding, with some behind, with some before and some among the tokens."""
        generator = torch.Generator().manual_seed(seed)

        def ids(length: int) -> Tensor:
            return torch.randint(0, vocabulary, (size, length), generator=generator)

        labels, mask = ids(decoder), torch.ones(size, encoder, dtype=torch.bool)
        labels[:, decoder // 2] = -100
        mask[1::3, -(encoder // 3) :] = False
        mask[2::3, : encoder // 4] = False
        mask[2::3] &= torch.rand(mask[2::3].shape, generator=generator) > 0.2
        mask[:, encoder // 2] = True  # nobody is all padding
        return cls(ids(encoder), ids(decoder), labels, mask)

    def row(self, index: int) -> "Batch":
        """Sequence `index` alone."""
        one = slice(index, index + 1)
        mask = None if self.attention_mask is None else self.attention_mask[one]
        return Batch(self.input_ids[one], self.decoder_input_ids[one], self.labels[one], mask, self.first + index)


@dataclass(frozen=True)
class Subject:
    """An experiment, the fields that make its model small, and why it is not where it cannot be."""

    experiment: Experiment
    small: dict[str, Any]
    wide: str = ""

    @classmethod
    def of(cls, experiment: Experiment, blocks: int = 3) -> "Subject":
        """Small where the idea's model can be; what is wrong with it at its own widths is raised."""
        subject = cls(experiment, _small(experiments.configuration(experiment), blocks))
        try:
            subject.outputs(subject.model(), Batch.draw(1, 5, 4))
        except Exception as error:
            why = f"{type(error).__name__} at dim_model {subject.small['dim_model']}: {error}"
            subject = replace(subject, small={"vocab_size": VOCABULARY}, wide=" ".join(why.split())[:200])
            subject.outputs(subject.model(), Batch.draw(1, 5, 4))
        return subject

    def build(self, seed: int = 0, impl: str = "torch", experiment: Experiment | None = None) -> Transformer:
        """The model as an experiment begins with it, in float32."""
        return march.build_model(experiment or self.experiment, impl=impl, seed=seed, **self.small)

    def model(self, impl: str = "torch") -> Transformer:
        """In float64, every parameter moved from where it begins: a part behind a zero would not be seen."""
        model, generator = self.build(impl=impl).double(), torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():
                spread = 0.1 * max(float(parameter.abs().mean()), 0.2)
                parameter.add_(spread * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
        return model

    def outputs(
        self, model: nn.Module, batch: Batch, training: bool = False, step: int = 3, torch_seed: int = 0
    ) -> Tensor:
        """Logits [B, Ld, V], the global generators at `torch_seed`, dropout at `step`."""
        return self._run(model, batch, training, step, torch_seed).logits.detach()

    def loss(self, model: nn.Module, batch: Batch, training: bool = True, step: int = 3) -> Tensor:
        """The loss, with its graph."""
        return self._run(model, batch, training, step, 0).loss

    def _run(self, model: nn.Module, batch: Batch, training: bool, step: int, torch_seed: int) -> Any:
        with seeded(torch_seed):
            return model.train(training)(
                batch.input_ids,
                batch.decoder_input_ids,
                batch.labels,
                batch.attention_mask,
                return_logits=True,
                dropout_state=kernels.dropout_state(7, step, batch.first),
            )


def _small(config: ModelConfig, blocks: int = 3) -> dict[str, Any]:
    """Narrow, and the first of its blocks, with their heads and widths."""
    fields: dict[str, Any] = {"dim_model": 64, "dim_feedforward": 96, "vocab_size": VOCABULARY}
    heads, kv, widths = (per_block(config, name)[:blocks] for name in ("num_heads", "num_kv_heads", "dim_qkv"))
    fields |= {"num_layers": 2 * len(heads), "num_heads": heads, "num_kv_heads": kv}
    fields["dim_qkv"] = tuple(max(4, width // 16 * 2) for width in widths)
    if config.database_states:
        fields["database_states"] = 24
    return fields


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Within it the global generators of torch, numpy and Python begin at `seed`; behind it they are as before."""
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002
    torch.manual_seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    random.seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        random.setstate(states[2])
