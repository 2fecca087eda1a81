"""The predecessor's checkpoints: its state dict into a model, and a model's weights or gradients under its keys.

Its norms are one list for each stack: sublayer j of block i reads entry 2i + j, whatever the number of sublayers, so in
the decoder some entries serve two sublayers and some none. Loading copies an entry to each user; on the way back the
users' gradients are summed and their weights must agree. Entries without a user are dropped.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from march.config import unpublished
from march.model.modules import Linear
from march.model.transformer import Transformer

_LAYERS = {
    "SelfAttention": "self_attention_layers",
    "UnifiedAttention": "cross_attention_layers",
    "CrossAttention": "cross_attention_layers",
    "DatabaseAttention": "database_attention_layers",
    "FeedForward": "feedforward_layers",
}
_PROJECTIONS = {**{part: f"w_{part}" for part in "qkvo"}, **{p: f"{p}_projection" for p in ("up", "gate", "down")}}
_MIXED = {"gate": "up_projection_slow", "up": "up_projection_fast"}


def _stack_entries(model: Transformer, stack: Any, prefix: str, final_norm: int | None) -> Iterator[tuple]:
    names = _PROJECTIONS | (_MIXED if model.config.feedforward == "mixed" else {})
    count = 0
    for i, block in enumerate(stack.blocks):
        for j, layer in enumerate(block.layers):
            yield f"{prefix}.layernorms.{2 * i + j}.weight", layer.norm.gain, slice(None)
            for linear in layer.children():
                start = 0
                for part, rows in linear.rows.items() if isinstance(linear, Linear) else ():
                    key = f"{prefix}.{_LAYERS[type(layer).__name__]}.{i}.{names[part]}.weight"
                    yield key, linear.weight, slice(start, start := start + rows)
            count += 1
    # as last loaded, else one entry a sublayer and the final one
    number = final_norm if final_norm is not None else model.predecessor_final_norms.get(prefix, count)
    yield f"{prefix}.layernorms.{number}.weight", stack.final_norm.gain, slice(None)


def _entries(model: Transformer, final_norms: Mapping[str, int]) -> list[tuple[str, Tensor, slice]]:
    """(key, our parameter, its rows) of everything; a packed weight has several keys, a norm's key several users."""
    for name, value in unpublished(model.config).items():
        raise ValueError(f"predecessor: expected what it has, got {name}={value}; save and load model.state_dict()")
    assert model.positions is not None
    entries: list[tuple[str, Tensor, slice]] = [
        ("embedding.weight", model.embedding, slice(None)),
        ("position_encoding.timing_table", model.positions, slice(None)),
    ]
    if model.config.database_states:
        bank = (model.database.keys, model.database.values)
        entries += [(f"database_key_value_states.{i}", x, slice(None)) for i, x in enumerate(bank)]
    for prefix in ("encoder", "decoder"):
        entries += _stack_entries(model, getattr(model, prefix), prefix, final_norms.get(prefix))
    return entries


@torch.no_grad()
def load_predecessor(model: Transformer, state_dict: Mapping[str, Tensor]) -> None:
    """Copies the predecessor's `state_dict` into `model`, in the model's dtype and on its device.

    ValueError names what is missing, left over or of another shape; the model is unchanged then. Norm gains may be
    scalars [1], which expand to [D].
    """
    norms = [key for key in state_dict if key.split(".")[1:2] == ["layernorms"] and key.split(".")[2].isdigit()]
    finals: dict[str, int] = {}
    for stack, _, number, _ in (key.split(".") for key in norms):
        finals[stack] = max(finals.get(stack, 0), int(number))
    entries = _entries(model, finals)
    keys = {key for key, _, _ in entries}
    missing, left_over = sorted(keys - state_dict.keys()), sorted(state_dict.keys() - keys - set(norms))
    if missing or left_over:
        raise ValueError(
            f"predecessor state dict: expected the keys of {model.config}, got {len(missing)} missing "
            f"({', '.join(missing[:3])}) and {len(left_over)} left over ({', '.join(left_over[:3])}); "
            "build the model with the checkpoint's experiment and sizes"
        )
    for key, parameter, rows in entries:
        value, wanted = state_dict[key], parameter[rows].shape
        fits = value.squeeze().shape == parameter[rows].squeeze().shape
        if not fits and not (key in norms and value.numel() == 1):
            raise ValueError(
                f"predecessor state dict: expected {key} as {list(wanted)}, got {list(value.shape)}; "
                "build the model with the checkpoint's sizes"
            )
    for key, parameter, rows in entries:
        value = state_dict[key]
        parameter[rows] = value if value.numel() == 1 else value.reshape(parameter[rows].shape)
    model.predecessor_final_norms = finals


@torch.no_grad()
def to_predecessor(model: Transformer, gradients: bool = False) -> dict[str, Tensor]:
    """The model's weights, or their gradients, under the predecessor's keys: new tensors.

    A norm that serves several sublayers there returns the sum of their gradients; of weights ValueError when the
    sublayers' gains differ, which the predecessor cannot hold. Norms that it owned but did not use are not returned.
    Gradients leave out what has none: the dead parameters, and all that backward has not reached.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    dead = model.dead_parameters() if gradients else set()
    last = model.encoder.blocks[-1].self_attention.qkv  # type: ignore[union-attr]
    users: dict[str, list[tuple[str, Tensor]]] = {}
    for key, parameter, rows in _entries(model, {}):
        value = parameter.grad if gradients else parameter
        dead_rows = gradients and parameter is last.weight and rows.start == 0  # type: ignore[union-attr]
        if value is not None and names[id(parameter)] not in dead and not dead_rows:
            users.setdefault(key, []).append((names[id(parameter)], value[rows]))
    result: dict[str, Tensor] = {}
    for key, values in users.items():
        for name, value in values[1:] if not gradients else ():
            if not torch.equal(value, values[0][1]):
                raise ValueError(
                    f"to_predecessor: expected one gain for {key}, got different ones in {values[0][0]} and {name}; "
                    "the predecessor shares this norm, so a model trained with its own norms cannot go back"
                )
        total = torch.stack([value for _, value in values]).sum(0) if gradients else values[0][1].clone()
        result[key] = total[None, None] if key.startswith("database") else total
    return result
