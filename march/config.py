"""What a model is: frozen, typed, checked, resolved into blocks before any module exists. No torch here.

`ModelConfig` is what experiments and `--set` change; `resolve` turns it into one `BlockConfig` for each block, an
ordered tuple of sublayers with a residual flag each. A module reads its block's fields only.
"""

import ast
import dataclasses
import difflib
import importlib.util
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

PerBlock = int | tuple[int, ...]
SublayerKind = Literal["self_attention", "cross_attention", "unified_attention", "database_attention", "feedforward"]
MAX_HEAD_DIM = 512
UNTURNED = "one query would meet own keys that are turned and the encoder's that are not"
# The least and the most of each number: room for every idea, and an end before a slip of the finger fills the memory
# or takes hours to build. What fits a machine is asked when a run starts.
BOUNDS: dict[str, tuple[float, float]] = {
    "dim_model": (1, 2**16),
    "num_layers": (2, 1024),
    "num_heads": (1, 1024),
    "num_kv_heads": (0, 1024),
    "dim_qkv": (1, MAX_HEAD_DIM),
    "dim_feedforward": (1, 2**20),
    "vocab_size": (1, 2**24),
    "max_length": (1, 2**20),
    "database_states": (0, 2**20),
    "mixed_factor": (-1000.0, 1000.0),
}


# What experiments of a file of their own bring, by ModelConfig.idea and place; march.experiments.own fills it.
PARTS: dict[str, Mapping[str, Any]] = {"": {}}


class ConfigError(ValueError):
    """A field or a value that cannot be: the message says expected, got, fix."""


@dataclass(frozen=True)
class ModelConfig:
    """The fields that experiments change. Widths in elements, lengths in positions.

    num_layers counts the blocks of both stacks. num_heads and dim_qkv are one number, or one for each block of a
    stack (block i of both stacks has the same). num_kv_heads: heads of keys and values, each read by as many heads of
    queries; 0 for num_heads. database_states: keys and values of the learned bank, 0 for none. cross_attention: the
    decoder reads the keys and values of encoder block i, or has its own, of the encoder's output. positions: a table
    added to the tokens, queries and keys of self-attention turned by their position, or none. qk_norm: queries and
    keys are normalised, scores divided by sqrt(dim_qkv). norm_placement: before a sublayer, or behind it too. idea: the
    experiment of a file of its own whose parts stand in the model, with the file's hash; "" for none.
    """

    dim_model: int = 512
    num_layers: int = 6
    num_heads: PerBlock = 8
    num_kv_heads: PerBlock = 0
    dim_qkv: PerBlock = 64
    dim_feedforward: int = 2048
    vocab_size: int = 30000
    max_length: int = 1024
    dropout: float = 0.1
    database_states: int = 0
    feedforward: Literal["plain", "gated", "mixed"] = "plain"
    activation: str = "relu"
    mixed_factor: float = 0.5
    slow_dropout: float = 0.0
    positions: Literal["absolute", "rotary", "none"] = "absolute"
    position_init: Literal["scaled", "unit"] = "scaled"
    embedding_combine: Literal["average", "sum"] = "average"
    self_attention_residual: bool = True
    cross_attention: Literal["encoder_block", "encoder_output"] = "encoder_block"
    unified_attention: bool = False
    unified_mask: Literal["aligned", "as_published"] = "aligned"
    qk_norm: bool = False
    norm_placement: Literal["pre", "sandwich"] = "pre"
    linear_init: Literal["torch", "t5"] = "torch"
    precision: Literal["bf16", "fp32"] = "bf16"
    idea: str = ""

    def part(self, place: str, default: Any) -> Any:
        """The class that the idea has for `place`, or `default`."""
        return PARTS[self.idea].get(place, default)


@dataclass(frozen=True)
class SublayerConfig:
    """One sublayer: what it is, and whether its input is added to its output."""

    kind: SublayerKind
    residual: bool = True


@dataclass(frozen=True)
class BlockConfig:
    """One block of a stack: where it is, its attention widths and its sublayers in order."""

    stack: Literal["encoder", "decoder"]
    index: int
    num_heads: int
    num_kv_heads: int
    dim_qkv: int
    sublayers: tuple[SublayerConfig, ...]


@dataclass(frozen=True)
class ResolvedConfig:
    """A checked configuration and the blocks of both stacks."""

    model: ModelConfig
    encoder: tuple[BlockConfig, ...]
    decoder: tuple[BlockConfig, ...]


FIELDS: dict[str, dataclasses.Field] = {field.name: field for field in dataclasses.fields(ModelConfig)}
_TYPES = get_type_hints(ModelConfig)


def nearest(name: str, names: list[str], count: int = 3) -> list[str]:
    """The names most like `name`, by its letters in any case."""
    lowered = {candidate.lower(): candidate for candidate in names}
    close = difflib.get_close_matches(name.lower(), list(lowered), n=count, cutoff=0.4)
    return [lowered[match] for match in close]


@cache
def _written_activations() -> tuple[str, ...]:
    found = importlib.util.find_spec("kernels")
    assert found is not None
    assert found.origin is not None
    for node in ast.parse(Path(found.origin).with_name("activations.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == "ACTIVATIONS":
            assert isinstance(node.value, ast.Dict)
            return tuple(ast.literal_eval(key) for key in node.value.keys if key)
    raise AssertionError("kernels/activations.py: expected ACTIVATIONS as one dictionary, got none")


def activations() -> tuple[str, ...]:
    """The names in kernels.activations.ACTIVATIONS; from its text until somebody imports it, and torch with it."""
    module = sys.modules.get("kernels.activations")
    return _written_activations() if module is None else tuple(module.ACTIVATIONS)


def choices(name: str) -> tuple[str, ...]:
    """What field `name` may be, where that is one of a list."""
    if name == "activation":
        return activations()
    return get_args(_TYPES[name]) if get_origin(_TYPES[name]) is Literal else ()


def _expected(name: str) -> str:
    if choices(name):
        return "one of " + ", ".join(choices(name))
    kind = _TYPES[name]
    if name == "idea":
        return "a file's experiment that is loaded (--exp FILE.py:NAME sets it)"
    if kind == PerBlock:
        return "a whole number, or one for each block of a stack (12,8,4)"
    return {int: "a whole number", float: "a finite number", bool: "true or false"}[kind]


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def check_type(name: str, value: Any) -> Any:
    """`value` as the type of field `name` (lists become tuples); ConfigError otherwise."""
    if name not in FIELDS:
        close = nearest(name, list(FIELDS))
        hint = f"did you mean {', '.join(close)}?" if close else f"the fields are {', '.join(FIELDS)}"
        raise ConfigError(f"{name[:60]}: expected a field of the model, got {name[:60]!r}; {hint}")
    kind = _TYPES[name]
    if kind == PerBlock and isinstance(value, list | tuple) and value and all(_whole(v) for v in value):
        return tuple(value)
    if kind in (PerBlock, int) and _whole(value):
        return value
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if kind is float and number and abs(value) <= sys.float_info.max:  # NaN is not; an integer may be more
        return float(value)
    if kind is bool and isinstance(value, bool):
        return value
    if isinstance(value, str) and (value in choices(name) or (name in ("idea", "activation") and value in PARTS)):
        return value
    raise ConfigError(
        f"{name}: expected {_expected(name)}, got {repr(value)[:60]}; for example {name}={_example(name) or repr('')}"
    )


def _example(name: str) -> str:
    return str(FIELDS[name].default).lower() if _TYPES[name] is bool else str(FIELDS[name].default)


def parse_value(name: str, text: str) -> Any:
    """`text` of a command line as the value of field `name`, typed and checked; lists as 12,8,4."""
    if name not in FIELDS:
        check_type(name, text)
    kind = _TYPES[name]
    text = text.strip()
    value: Any = text
    try:
        if kind == PerBlock:
            numbers = [int(part) for part in text.strip("[]()").removesuffix(",").split(",")]
            value = numbers if "," in text else numbers[0]
        elif kind is int:
            value = int(text.replace("_", ""))
        elif kind is float:
            value = float(text)
        elif kind is bool:
            value = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}[text.lower()]
    except (ValueError, KeyError, IndexError):
        value = text  # the check below says what was expected
    return check_type(name, value)


def parse_override(assignment: str) -> tuple[str, Any]:
    """("field", value) of "field=value"."""
    name, separator, text = assignment.partition("=")
    if not separator or not text.strip():
        raise ConfigError(f"--set: expected field=value, got {assignment[:60]!r}; for example --set num_heads=12,8,4")
    return name.strip(), parse_value(name.strip(), text)


def parse_overrides(assignments: Iterable[str]) -> dict[str, Any]:
    """Fields and values of several "field=value", each field once."""
    changes: dict[str, Any] = {}
    for assignment in assignments:
        name, value = parse_override(assignment)
        if name in changes:
            raise ConfigError(f"--set: expected {name} once, got it twice; leave one out")
        changes[name] = value
    return changes


def override(config: ModelConfig, **changes: Any) -> ModelConfig:
    """`config` with the fields in `changes` and nothing else changed; checked."""
    changed = dataclasses.replace(config, **{name: check_type(name, value) for name, value in changes.items()})
    check(changed)
    return changed


def blocks_per_stack(config: ModelConfig) -> int:
    return config.num_layers // 2


def per_block(config: ModelConfig, name: Literal["num_heads", "num_kv_heads", "dim_qkv"]) -> tuple[int, ...]:
    """The field's value for each block of a stack."""
    value = getattr(config, name)
    if name == "num_kv_heads" and value == 0:
        value = config.num_heads
    return value if isinstance(value, tuple) else (value,) * blocks_per_stack(config)


def _require(condition: bool, name: str, expected: str, got: Any, fix: str) -> None:
    if not condition:
        raise ConfigError(f"{name}: expected {expected}, got {str(got)[:60]}; {fix}")


def check(config: ModelConfig) -> None:
    """ConfigError when the fields cannot go together."""
    check_type("idea", config.idea)  # of a configuration from another process
    for name, (least, most) in BOUNDS.items():
        value = getattr(config, name)
        for number in value if isinstance(value, tuple) else (value,):
            _require(least <= number <= most, name, f"{least} to {most}", number, f"the baseline has {_example(name)}")
    _require(
        config.num_layers % 2 == 0,
        "num_layers",
        "an even number, the blocks of both stacks",
        config.num_layers,
        f"use {config.num_layers + 1}",
    )
    depth = blocks_per_stack(config)
    for name in ("num_heads", "num_kv_heads", "dim_qkv"):
        value = getattr(config, name)
        if isinstance(value, tuple):
            _require(
                len(value) == depth,
                name,
                f"one number or {depth}, one for each block of a stack (num_layers={config.num_layers})",
                f"{len(value)} in {','.join(map(str, value))}",
                "give as many as blocks",
            )
    heads, kv_heads = per_block(config, "num_heads"), per_block(config, "num_kv_heads")
    _require(
        all(g > 0 and h % g == 0 for h, g in zip(heads, kv_heads, strict=True)),
        "num_kv_heads",
        f"a divisor of num_heads ({','.join(map(str, heads))}), or 0",
        ",".join(map(str, kv_heads)),
        "each head of keys and values is read by as many heads of queries",
    )
    for name in ("dropout", "slow_dropout"):
        value = getattr(config, name)
        _require(0.0 <= value < 1.0, name, "a probability in [0, 1)", value, "0 switches it off")
    if config.database_states:
        widths = sorted(set(per_block(config, "dim_qkv")))
        _require(
            len(widths) == 1,
            "database_states",
            "one dim_qkv in all blocks, which share the bank",
            f"dim_qkv {widths}",
            "use one dim_qkv, or database_states=0",
        )
    _require(
        config.unified_mask == "aligned" or config.unified_attention,
        "unified_mask",
        "aligned without unified_attention",
        config.unified_mask,
        "set unified_attention=true too",
    )
    _require(
        config.slow_dropout == 0 or config.feedforward == "mixed",
        "slow_dropout",
        "0 without the mixed feedforward",
        config.slow_dropout,
        "set feedforward=mixed too",
    )
    table = config.positions == "absolute"
    _require(
        table or config.position_init == "scaled",
        "position_init",
        "scaled without a table of positions",
        config.position_init,
        "set positions=absolute, or leave position_init out",
    )
    if config.positions == "rotary":
        _require(
            not config.unified_attention, "positions", "absolute or none with unified_attention", "rotary", UNTURNED
        )
        odd = [width for width in per_block(config, "dim_qkv") if width % 2]
        _require(not odd, "dim_qkv", "even numbers with positions=rotary", odd, "features are turned in pairs")


def unpublished(config: ModelConfig) -> dict[str, Any]:
    """Fields with values that the published architecture did not know; what repeats that one must refuse them."""
    names = ("num_kv_heads", "positions", "cross_attention", "qk_norm", "norm_placement", "idea")
    found = {name: getattr(config, name) for name in names if getattr(config, name) != FIELDS[name].default}
    new = config.activation not in ("relu", "gelu", "silu", "sigmoid", "identity")
    return found | ({"activation": config.activation} if new else {})


def outside_kernels(config: ModelConfig) -> list[str]:
    """What of the configuration has no fused kernel and is computed by plain torch beside them."""
    steps = {
        "rotation of queries and keys by their position": config.positions == "rotary",
        "decoder attention under the published mask": config.unified_mask == "as_published",
    }
    own = [place.replace("_", " ") for place in PARTS[config.idea] if place != "activation"]
    return [step for step, there in steps.items() if there] + [f"what its own {place} does itself" for place in own]


def _sublayers(config: ModelConfig, decoder: bool) -> tuple[SublayerConfig, ...]:
    sublayers: list[SublayerConfig] = []
    if decoder and config.unified_attention:
        sublayers.append(SublayerConfig("unified_attention", config.self_attention_residual))
    else:
        sublayers.append(SublayerConfig("self_attention", config.self_attention_residual))
        if decoder:
            sublayers.append(SublayerConfig("cross_attention"))
    if config.database_states:
        sublayers.append(SublayerConfig("database_attention"))
    sublayers.append(SublayerConfig("feedforward"))
    return tuple(sublayers)


def resolve(config: ModelConfig) -> ResolvedConfig:
    """The blocks of both stacks; ConfigError when the fields cannot go together."""
    check(config)
    heads, kv_heads, widths = (per_block(config, name) for name in ("num_heads", "num_kv_heads", "dim_qkv"))

    def blocks(stack: Literal["encoder", "decoder"]) -> tuple[BlockConfig, ...]:
        sublayers = _sublayers(config, stack == "decoder")
        numbers = zip(heads, kv_heads, widths, strict=True)
        return tuple(BlockConfig(stack, i, h, g, width, sublayers) for i, (h, g, width) in enumerate(numbers))

    return ResolvedConfig(config, blocks("encoder"), blocks("decoder"))


def to_dict(config: ModelConfig) -> dict[str, Any]:
    """The fields as JSON knows them."""
    fields = {name: getattr(config, name) for name in FIELDS if name != "idea" or config.idea}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()}


def from_dict(fields: dict[str, Any]) -> ModelConfig:
    """The configuration that `to_dict` wrote."""
    return override(ModelConfig(), **fields)


def difference(config: ModelConfig, base: ModelConfig) -> dict[str, tuple[Any, Any]]:
    """Fields in which `config` differs from `base`: name -> (base's value, config's value)."""
    ours, theirs = to_dict(config), to_dict(base)
    return {n: (theirs.get(n), ours.get(n)) for n in {**theirs, **ours} if ours.get(n) != theirs.get(n)}
