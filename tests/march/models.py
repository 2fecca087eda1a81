"""Small models of every experiment, shared by the tests."""

import torch

import march
from march import experiments

SMALL = {"dim_model": 32, "dim_feedforward": 48, "vocab_size": 97, "max_length": 24}


def small_overrides(name: str) -> dict:
    """Overrides that shrink an experiment and keep what it is about (its heads by block, its states)."""
    configuration = experiments.configuration(name)
    shrunk = dict(SMALL)
    if configuration.num_layers > 6:
        shrunk |= {"num_layers": 4, "num_heads": 2}
    widths = configuration.dim_qkv
    shrunk["dim_qkv"] = tuple(w // 16 for w in widths) if isinstance(widths, tuple) else max(4, widths // 16)
    if configuration.database_states:
        shrunk["database_states"] = 12
    return shrunk


def small_model(name, impl="torch", seed: int = 0, **overrides):
    """Of an experiment's name, or of Baseline with a block of one's own."""
    torch.manual_seed(seed)
    if not isinstance(name, str):
        name, overrides = "Baseline", {"parts": {"block": name}, **overrides}
    return march.build_model(name, impl=impl, **{**small_overrides(name), **overrides})


def batch(size: int = 3, encoder: int = 17, decoder: int = 9, vocabulary: int = 97, seed: int = 1):
    generator = torch.Generator().manual_seed(seed)
    lengths = [encoder - 3 * i for i in range(size)]

    def draw(length: int) -> torch.Tensor:
        return torch.randint(0, vocabulary, (size, length), generator=generator)

    labels = draw(decoder)
    labels[0, :2] = -100
    return {
        "input_ids": draw(encoder),
        "decoder_input_ids": draw(decoder),
        "labels": labels,
        "attention_mask": torch.arange(encoder)[None] < torch.tensor(lengths)[:, None],
    }
