"""What a run is: one typed tree, frozen and checked, of which experiments and options are changes. No torch here.

A leaf has a dotted name: optimizer.lr. A shipped recipe (march/recipes) or a file of TOML gives them all, or what
differs from another recipe, which it names: from = "demo". Precedence: recipe, then experiment, then --set and options.
"""

import json
import tomllib
from collections.abc import Iterator, Mapping
from functools import reduce
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError, model_validator

from march import config as configuration
from march import experiments
from march.config import ConfigError, ModelConfig, nearest
from march.console import UsageError
from march.recipe_groups import (
    Batch,
    Checkpoints,
    Data,
    Devices,
    Evaluation,
    Group,
    Logging,
    Optimizer,
    Precision,
    Schedule,
)

SHIPPED = Path(__file__).with_name("recipes")


class Recipe(Group):
    """One run. model: the fields that the run changes in its experiment."""

    name: str
    label: str = ""
    experiment: str = "Baseline"
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 42  # dropout keys have 32 bits
    model: dict[str, Any] = Field(default_factory=dict)
    data: Data
    optimizer: Optimizer
    schedule: Schedule
    batch: Batch
    evaluation: Evaluation
    checkpoints: Checkpoints
    logging: Logging = Logging()
    precision: Precision = Precision()
    devices: Devices = Devices()

    @model_validator(mode="after")
    def _goes_together(self) -> "Recipe":
        muon = self.optimizer.name == "muon"
        if muon and self.devices.zero:
            raise ValueError(
                f"expected --zero 0 with optimizer.name=muon, got {self.devices.zero}: ZeRO cuts matrices into flat "
                "parts, Muon wants them whole; add --zero 0 (and --precision fp32)"
            )
        if self.precision.compute == "bf16" and not self.devices.zero:
            raise ValueError(
                "expected --zero 1 or higher with bf16, got --zero 0, where DeepSpeed accumulates gradients in bf16; "
                f"use {'' if muon else '--zero 1 (same result on one process) or '}--precision fp32"
            )
        return self

    @property
    def entry(self) -> experiments.Experiment:
        return experiments.get(self.experiment)

    @property
    def config(self) -> ModelConfig:
        """The model's, before the text's vocabulary is known; ConfigError where fields cannot be."""
        compute = self.precision.compute
        decided = {"precision": compute} if compute in ("bf16", "fp32") else {}
        return experiments.configuration(self.entry, **{**self.model, **decided})

    @property
    def comparable(self) -> bool:
        """May the losses stand beside the published ones? The recipe, the text and the model as published."""
        from march.data.description import Description

        paper = load("paper")
        free = {"name", "label", "experiment", "seed", "model", "data", "checkpoints", "logging", "devices"}
        partly = {"batch": {"micro"}, "precision": {"compute", "float32_library"}}
        own = [recipe.model_dump(exclude={**dict.fromkeys(free, True), **partly}) for recipe in (self, paper)]
        published = experiments.configuration(self.entry).precision
        unchanged = not self.model and self.config.precision == published and own[0] == own[1]
        return unchanged and self.entry.file is None and Description.of(self.data).is_plain(paper.data)

    def computing(self, precision: str) -> "Recipe":
        """With precision.compute decided; UsageError where the rest does not go with it."""
        return typed(merge(self.model_dump(), {"precision": {"compute": precision}}), "recipe")

    def learning_rate(self, step: int) -> float:
        return self.optimizer.lr * self.schedule.factor(step)

    def changes(self) -> str:
        """Leaves that differ from the shipped recipe of the same name, for people."""
        if not (SHIPPED / f"{self.name}.toml").is_file():
            return ""
        base = dict(leaves(load(self.name).model_dump()))
        own = {**dict.fromkeys(base), **dict(leaves(self.model_dump()))}
        quiet = {"experiment", "seed", "batch.micro", "data.directory"}
        quiet |= {"precision.compute", "precision.float32_library"}
        return ", ".join(f"{n} {v}" for n, v in own.items() if n not in quiet and v != base.get(n) and v is not None)

    def resume_fingerprint(self, config: ModelConfig, data: Mapping[str, str]) -> dict[str, Any]:
        """What a run must share with the one it continues: all but where it runs and what it writes. data: SHA-256 of
        the store's files. Steps are free only where the learning rate does not depend on them."""
        free = {"name", "label", "experiment", "precision", "model", "data", "checkpoints", "logging", "devices"}
        tree = self.model_dump(exclude={**dict.fromkeys(free, True), "batch": {"micro"}})
        precision = {"compute": config.precision, "communication": self.precision.communication}
        if self.schedule.name == "constant":
            del tree["schedule"]["steps"]
        # the hash of an experiment's own file may change where that is asked for
        model = {n: self.entry.name if v == config.idea else v for n, v in configuration.to_dict(config).items()}
        decided = {"precision": precision, "config": model, "data": dict(data)}
        return {"experiment": self.entry.name, **decided, **tree}

    def toml(self) -> str:
        """`load` gives it back."""
        tree = self.model_dump()
        groups = {name: tree.pop(name) for name in [n for n, v in tree.items() if isinstance(v, dict)]}
        tables = [("", tree), *((f"\n[{name}]\n", group) for name, group in groups.items() if group)]
        return "".join(
            head + "".join(f"{name} = {_toml(value)}\n" for name, value in table.items() if value is not None)
            for head, table in tables
            if any(value is not None for value in table.values())
        )


def _toml(value: Any) -> str:
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return str(value).lower() if isinstance(value, bool) else repr(value)


def leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """("optimizer.lr", 1e-4), ..."""
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _fields() -> Iterator[tuple[str, Any]]:
    for name, field in Recipe.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, Group):
            yield from ((f"{name}.{leaf}", below) for leaf, below in kind.model_fields.items())
        elif name != "model":
            yield name, field


LEAVES: dict[str, Any] = dict(_fields())


def names() -> list[str]:
    """The shipped recipes."""
    return sorted((path.stem for path in SHIPPED.glob("*.toml")), reverse=True)


def tree_of(recipe: str) -> dict[str, Any]:
    """The checked tree of a shipped recipe or a file, with what it starts from below it.

    Raises:
        UsageError: no such recipe, no TOML, a key, type or value that cannot be.
    """
    seen: list[Path] = []
    trees: list[dict[str, Any]] = []
    while True:
        path = SHIPPED / f"{recipe}.toml" if recipe in names() else Path(recipe)
        if recipe not in names() and path.suffix != ".toml":
            near = nearest(recipe, names(), 1)
            raise UsageError(
                f"expected a recipe among {', '.join(names())} or a FILE.toml, got {recipe[:60]!r}; "
                f"{f'did you mean {near[0]}?' if near else 'give one of these after --recipe'}"
            )
        if path.resolve() in seen:
            raise UsageError(f'{path}: expected a recipe that ends somewhere, got from = "{recipe}" of itself; mend it')
        seen.append(path.resolve())
        try:
            tree = tomllib.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            what = error.strerror if isinstance(error, OSError) else str(error).splitlines()[0]
            raise UsageError(f"expected a recipe of TOML in {path}, got {what}; mend or name another") from error
        base = tree.pop("from", None)
        trees.append(_beside(_known(tree, str(path)), path.parent))
        if base is None:
            break
        if not isinstance(base, str):
            raise UsageError(f'{path}: expected from = "NAME or FILE.toml", got {base!r}; give text')
        recipe = str(path.parent / base) if base.endswith(".toml") else base
    return reduce(merge, reversed(trees), {})


def load(recipe: str) -> Recipe:
    """The recipe of a shipped name or a file; UsageError where it cannot be, in one line."""
    return build(tree_of(recipe), recipe)


def _beside(tree: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The tree; the file of an experiment of its own is the one beside the recipe, where there is one."""
    file, _, name = str(tree.get("experiment", "")).rpartition(":")
    return {**tree, "experiment": f"{folder / file}:{name}"} if file and (folder / file).is_file() else tree


def _known(tree: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The tree, its keys known; UsageError otherwise, with the nearest."""
    for name, value in tree.items():
        group = name in Recipe.model_fields and name not in LEAVES
        if group is not isinstance(value, Mapping) and (group or name in LEAVES):
            kind, near = ("table", f"; did you mean {_below(name)}?") if group else ("value", "; give one value")
            raise UsageError(f"{where}: expected {name} as a {kind}, got {value!r:.60}{near}")
        if group and name == "model":
            for field, given in value.items():
                model_field(field, given)
        for leaf in () if name == "model" else [f"{name}.{leaf}" for leaf in value] if group else [name]:
            if leaf not in LEAVES:
                raise UsageError(f"{where}: {unknown(leaf)}")
    return dict(tree)


def model_field(name: str, value: Any) -> Any:
    """The checked value of a field of the model; ConfigError otherwise."""
    if name in ("precision", "idea"):
        other = "the recipe's own precision.compute" if name == "precision" else "experiment = 'FILE.py:NAME'"
        raise ConfigError(f"model.{name}: expected {other}, got model.{name}; move it")
    return configuration.check_type(name, value)


def unknown(name: str) -> str:
    """That there is no leaf `name`, and the nearest."""
    known = [*LEAVES, *(f"model.{field}" for field in configuration.FIELDS if field not in ("precision", "idea"))]
    same = [leaf for leaf in known if leaf.rpartition(".")[2] == name.rpartition(".")[2]]
    close = [_below(name)] if _below(name) else same or nearest(name, known)
    return f"expected a leaf of the recipe, got {name[:60]!r}; " + (
        f"did you mean {', '.join(close)}?" if close else "see docs/training.md"
    )


def _below(group: str) -> str:
    """The leaves of a group, for people."""
    return ", ".join(leaf for leaf in LEAVES if leaf.startswith(f"{group}."))


def merge(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with the leaves of `changes`. Another text takes nothing of the old one's but the folder of stores."""
    merged = {**base, **changes}
    for name in changes:
        if isinstance(changes[name], Mapping):
            merged[name] = {**base.get(name, {}), **changes[name]}
    text = {name for name in changes.get("data", {}) if name != "directory"}
    if text:
        old, new = base.get("data", {}), dict(changes["data"])
        kept = {"directory": old["directory"]} if "directory" in old else {}
        if "files" in text and "source" not in text and "store" not in text:
            new["source"] = "files"
        same = "store" not in text and new.get("source", old.get("source")) == old.get("source")
        merged["data"] = {**({n: v for n, v in old.items() if n != "store"} if same else kept), **new}
    return merged


def build(tree: Mapping[str, Any], where: str = "recipe") -> Recipe:
    """The recipe of a whole tree, whose experiment is there; UsageError or ConfigError in one line."""
    recipe = typed(tree, where)
    _ = recipe.config  # its fields go together
    return recipe


def typed(tree: Mapping[str, Any], where: str) -> Recipe:
    """The recipe of a whole tree, whose experiment may be a file that has gone; UsageError or ConfigError."""
    try:
        recipe = Recipe.model_validate(tree)
    except ValidationError as error:
        raise UsageError(_one_line(error, where)) from None
    return recipe.model_copy(update={"model": {n: model_field(n, value) for n, value in recipe.model.items()}})


def _one_line(error: ValidationError, where: str) -> str:
    first = error.errors()[0]
    name = ".".join(str(part) for part in first["loc"] if part in Recipe.model_fields or "." not in str(part))
    if first["type"] == "value_error":
        return str(first["ctx"]["error"])
    if first["type"] == "missing":
        return f'{where}: expected {name}, got none; add it, or what the recipe starts from: from = "paper"'
    return f"{name}: expected {expected(first)}, got {first['input']!r:.60}; {fix(name)}"


def expected(error: Any) -> str:
    """Of one of pydantic's errors."""
    return error["msg"].removeprefix("Input should ").removeprefix("be ").removeprefix("a valid ")


def fix(name: str) -> str:
    """What to do about a wrong value of leaf `name`."""
    if name == "devices.zero":
        return "stage 3 releases weights that the operators read across modules; 1 is the default"
    usual = dict(leaves(load("demo").model_dump())).get(name) if name in LEAVES else None
    return "give one of that kind" if usual is None else f"the demo has {usual}"
