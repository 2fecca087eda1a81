"""The predecessor's checkpoints: its state dict into a model, and a model's weights or gradients under its keys.

Its norms are one list for each stack: sublayer j of block i reads entry 2i + j, whatever the number of sublayers, so in
the decoder some entries serve two sublayers and some none. Loading copies an entry to each user; on the way back the
users' gradients are summed and their weights must agree. Entries without a user are dropped.
"""

from collections.abc import Iterator, Mapping
from typing import cast

import torch
from torch import Tensor

from march.model.layers import FeedForward, Sublayer
from march.model.transformer import Stack, Transformer

_NAMES = {
    "SelfAttention": "self_attention_layers",
    "UnifiedAttention": "cross_attention_layers",
    "CrossAttention": "cross_attention_layers",
    "DatabaseAttention": "database_attention_layers",
    "FeedForward": "feedforward_layers",
}
_HALVES = {
    "plain": ("up_projection",),
    "gated": ("gate_projection", "up_projection"),
    "mixed": ("up_projection_slow", "up_projection_fast"),
}


def _parts(model: Transformer, stack_name: str) -> Iterator[tuple[str, str, int, int]]:
    """(our parameter, its key, first row, rows) of every linear weight of a stack; a packed one has several keys."""
    stack: Stack = getattr(model, stack_name)
    for i, block in enumerate(stack.blocks):
        for j, sublayer in enumerate(cast("list[Sublayer]", block)):
            ours = f"{stack_name}.blocks.{i}.{j}"
            theirs = f"{stack_name}.{_NAMES[type(sublayer).__name__]}.{i}"
            if isinstance(sublayer, FeedForward):
                rows = sublayer.w_down.shape[1]
                for part, name in enumerate(_HALVES[sublayer.kind]):
                    yield f"{ours}.w_in", f"{theirs}.{name}.weight", part * rows, rows
                yield f"{ours}.w_down", f"{theirs}.down_projection.weight", 0, model.config.dim_model
                continue
            rows = sublayer.heads * sublayer.width
            if hasattr(sublayer, "w_qkv"):
                for part, name in enumerate("qkv"):
                    yield f"{ours}.w_qkv", f"{theirs}.w_{name}.weight", part * rows, rows
            else:
                yield f"{ours}.w_q", f"{theirs}.w_q.weight", 0, rows
            yield f"{ours}.w_o", f"{theirs}.w_o.weight", 0, model.config.dim_model


def _norms(model: Transformer, stack_name: str) -> Iterator[tuple[str, int]]:
    """(our gain, number in its list) of every norm of a stack but the final one."""
    stack: Stack = getattr(model, stack_name)
    for i, block in enumerate(stack.blocks):
        for j in range(len(block)):  # type: ignore[arg-type]
            yield f"{stack_name}.blocks.{i}.{j}.norm.gain", 2 * i + j


def _final_norm(model: Transformer, stack_name: str) -> int:
    """Number of the final norm in its list: as last loaded, else one entry a sublayer and the final one."""
    stack: Stack = getattr(model, stack_name)
    return model.predecessor_final_norms.get(stack_name, len(stack.sublayers()))


def _whole(model: Transformer) -> Iterator[tuple[str, str]]:
    yield "embedding", "embedding.weight"
    yield "positions", "position_encoding.timing_table"
    if model.config.database_states:
        yield "database_keys", "database_key_value_states.0"
        yield "database_values", "database_key_value_states.1"


def _norm_number(key: str, stack_name: str) -> int | None:
    prefix, suffix = f"{stack_name}.layernorms.", ".weight"
    middle = key[len(prefix) : -len(suffix)]
    return int(middle) if key.startswith(prefix) and key.endswith(suffix) and middle.isdigit() else None


@torch.no_grad()
def load_predecessor(model: Transformer, state_dict: Mapping[str, Tensor]) -> None:
    """Copies the predecessor's `state_dict` into `model`, in the model's dtype and on its device.

    ValueError names what is missing, left over or of another shape; the model is unchanged then. Norm gains may be
    scalars [1], which expand to [D].
    """
    parameters = dict(model.named_parameters())
    copies: list[tuple[Tensor, Tensor, str]] = []
    used: set[str] = set()
    missing: list[str] = []
    finals: dict[str, int] = {}

    def plan(target: Tensor, key: str) -> None:
        used.add(key)
        if key in state_dict:
            copies.append((target, state_dict[key], key))
        else:
            missing.append(key)

    for ours, key in _whole(model):
        plan(parameters[ours], key)
    for stack_name in ("encoder", "decoder"):
        for ours, key, start, rows in _parts(model, stack_name):
            plan(parameters[ours][start : start + rows], key)
        numbers = [number for key in state_dict if (number := _norm_number(key, stack_name)) is not None]
        for ours, number in _norms(model, stack_name):
            plan(parameters[ours], f"{stack_name}.layernorms.{number}.weight")
        finals[stack_name] = max(numbers, default=_final_norm(model, stack_name))
        plan(parameters[f"{stack_name}.final_norm.gain"], f"{stack_name}.layernorms.{finals[stack_name]}.weight")
        used.update(f"{stack_name}.layernorms.{number}.weight" for number in numbers)
    left_over = [key for key in state_dict if key not in used]
    if missing or left_over:
        raise ValueError(
            f"predecessor state dict: expected the keys of {model.config}, got {len(missing)} missing "
            f"({', '.join(missing[:3])}) and {len(left_over)} left over ({', '.join(left_over[:3])}); "
            "build the model with the checkpoint's experiment and sizes"
        )
    prepared = []
    for target, value, key in copies:
        fits = (value.numel() == target.numel() and value.squeeze().shape == target.squeeze().shape) or (
            "layernorms" in key and value.numel() == 1
        )
        if not fits:
            raise ValueError(
                f"predecessor state dict: expected {key} as {list(target.shape)}, got {list(value.shape)}; "
                "build the model with the checkpoint's sizes"
            )
        prepared.append((target, value.reshape(target.shape) if value.numel() != 1 else value))
    for target, value in prepared:
        target.copy_(value)
    model.predecessor_final_norms = finals


def to_predecessor(model: Transformer, gradients: bool = False) -> dict[str, Tensor]:
    """The model's weights, or their gradients, under the predecessor's keys: new tensors.

    A norm that serves several sublayers there returns the sum of their gradients; of weights ValueError when the
    sublayers' gains differ, which the predecessor cannot hold. Norms that it owned but did not use are not returned.
    Gradients leave out what has none: the dead parameters, and all that backward has not reached.
    """
    parameters = dict(model.named_parameters())
    dead = model.dead_parameters() if gradients else set()
    last = f"encoder.blocks.{len(model.encoder.blocks) - 1}.0"
    result: dict[str, Tensor] = {}

    def read(name: str) -> Tensor | None:
        value = parameters[name].grad if gradients else parameters[name]
        return None if value is None or name in dead else value.detach()

    for ours, key in _whole(model):
        value = read(ours)
        if value is not None:
            bank = key.startswith("database")
            result[key] = (value[None, None] if bank else value).clone()
    for stack_name in ("encoder", "decoder"):
        for ours, key, start, rows in _parts(model, stack_name):
            value = read(ours)
            dead_rows = gradients and ours == f"{last}.w_qkv" and key.endswith("w_q.weight")
            if value is not None and not dead_rows:
                result[key] = value[start : start + rows].clone()
        users: dict[str, list[tuple[str, Tensor]]] = {}
        final = (f"{stack_name}.final_norm.gain", _final_norm(model, stack_name))
        for ours, number in [*_norms(model, stack_name), final]:
            value = read(ours)
            if value is not None:
                users.setdefault(f"{stack_name}.layernorms.{number}.weight", []).append((ours, value))
        for key, gains in users.items():
            if gradients:
                result[key] = torch.stack([gain for _, gain in gains]).sum(0)
                continue
            for name, gain in gains[1:]:
                if not torch.equal(gain, gains[0][1]):
                    raise ValueError(
                        f"to_predecessor: expected one gain for {key}, got different ones in {gains[0][0]} and {name}; "
                        "the predecessor shares this norm, so a model trained with its own norms cannot go back"
                    )
            result[key] = gains[0][1].clone()
    return result
