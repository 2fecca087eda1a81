"""The command line of train.py: options are aliases of the recipe's leaves. No torch here."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Annotated, Any, get_args

from pydantic import TypeAdapter, ValidationError

from march import config as configuration
from march import experiments, recipe
from march.console import Parser, whole
from march.data import description
from march.recipe import Recipe
from march.training import trackers
from march.training.errors import UsageError

# --resume without a folder; no text, so that an empty variable of the shell is not taken for it
NEWEST = object()

_COUNT = whole(1, 10**9, "leave it out for the usual number")
# option: the leaf that it is another name of, a type, the name of its value, help
ALIASES: dict[str, tuple[str, Any, str, str]] = {
    "exp": ("experiment", str, "NAME", "experiment, any case, or FILE.py:NAME; default Baseline (see --list)"),
    "impl": ("devices.impl", str, "NAME", "auto, torch, reference, triton, or attention=flash_attn,glu=torch"),
    "steps": ("schedule.steps", _COUNT, "N", "optimiser steps, instead of the recipe's"),
    "seed": ("seed", int, "N", "initialisation, data order, dropout; default 42"),
    "precision": ("precision.compute", str, "TYPE", "bf16 or fp32; default the recipe's or the experiment's"),
    "micro_batch": ("batch.micro", _COUNT, "N", "sequences at once in a process; default what fits"),
    "zero": ("devices.zero", int, "STAGE", "ZeRO stage 0, 1 or 2; default 1"),
    "checkpoint_every": ("checkpoints.every", _COUNT, "N", "steps; the last one is always saved"),
}
# those of the text are march.data's options too
TEXT = {name: f"data.{name}" for name in recipe.Data.model_fields}
_FLAGS = {"store": "data", "directory": "data-dir"}


def build_parser() -> Parser:
    parser = Parser(
        prog="train.py",
        description="Train one experiment: `deepspeed train.py ...` on every GPU, `python train.py ...` on one.",
    )
    what = parser.add_argument_group("what to train, each a leaf of the recipe")
    what.add_argument(
        "--recipe",
        "--budget",
        metavar="NAME",
        help=f"{' or '.join(recipe.names())}, or FILE.toml; default paper on CUDA, else demo",
    )
    what.add_argument(
        "--set", action="append", metavar="LEAF=VALUE", help="optimizer.lr=3e-4, or a field of the model; repeatable"
    )
    for name, (leaf, kind, metavar, text) in ALIASES.items():
        what.add_argument(f"--{name.replace('_', '-')}", type=kind, metavar=metavar, help=f"{text} ({leaf})")
    parser.add_argument("--data", dest="store", metavar="DIR", help="a prepared store, in place of the text's options")
    description.add_arguments(parser, "the recipe's")
    where = parser.add_argument_group("where, and again")
    where.add_argument("--run-dir", metavar="DIR", help="default runs/<experiment>-<recipe>-<date>")
    where.add_argument(
        "--resume",
        nargs="?",
        const=NEWEST,
        metavar="DIR",
        help="continue the run in DIR, or the newest one of this experiment and recipe",
    )
    where.add_argument(
        "--accept-changed-file", action="store_true", help="with --resume: the file of --exp may be another than it was"
    )
    where.add_argument(
        "--replay", type=int, metavar="STEP", help="with --resume: run that step again, say what is not finite in it"
    )
    show = parser.add_argument_group("look only")
    show.add_argument("--list", action="store_true", help="the experiments")
    show.add_argument("--show", metavar="NAME", help="one experiment: configuration, parameters, cost")
    show.add_argument("--json", action="store_true", help="with --list or --show: for machines")
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)  # from the launcher
    return parser


def check_mode(arguments: argparse.Namespace) -> None:
    """UsageError for options that go with --list or --show where there are none, and for those they cannot heed."""
    modes = [mode for mode in ("list", "show") if getattr(arguments, mode)]
    heeded = {"show": {"set", "recipe", "impl", "json", "show"}, "list": {"json", "list"}}
    given = [name for name, value in vars(arguments).items() if value not in (None, False) and name != "local_rank"]
    for mode in modes:
        if other := [_flag(name) for name in given if name not in heeded[mode]]:
            raise UsageError(f"expected --{mode} without {' '.join(other)}, got both; leave one out")
    if arguments.json and not modes:
        raise UsageError("expected --json with --list or --show, got it alone; name what to print")


def parse_leaf(name: str, text: str) -> Any:
    """`text` of a command line as the value of leaf `name`; UsageError otherwise. Lists as a,b; none for no value."""
    if name not in recipe.LEAVES:
        raise UsageError(f"--set: {recipe.unknown(name)}")
    field = recipe.LEAVES[name]
    if text.lower() == "none" and type(None) in get_args(field.annotation):
        return None
    kind: Any = Annotated[field.annotation, field]
    try:
        if "tuple[" in str(field.annotation):  # pydantic takes no list for strings
            return TypeAdapter(kind).validate_python(text.split(","))
        return TypeAdapter(kind).validate_strings(text)
    except ValidationError as error:
        first = error.errors()[0]
        raise UsageError(f"{name}: expected {recipe.expected(first)}, got {text[:60]!r}; {recipe.fix(name)}") from None


def parse_set(assignments: list[str]) -> dict[str, Any]:
    """Leaves and values of "leaf=value", fields of the model with or without their prefix, each once; dotted names."""
    found: dict[str, Any] = {}
    parts = {part for leaf in recipe.LEAVES for part in leaf.split(".")}
    for assignment in assignments:
        name, separator, text = (part.strip() for part in assignment.partition("="))
        model = name.removeprefix("model.")
        if not separator or not text or (model in configuration.FIELDS and name != "precision"):
            field, value = configuration.parse_override(assignment.strip().removeprefix("model."))
            name, value = f"model.{field}", recipe.model_field(field, value)
        elif "." in name or name in parts:
            value = parse_leaf(name, text)
        else:
            configuration.parse_override(assignment)
        if name in found:
            raise UsageError(f"--set: expected {name.removeprefix('model.')} once, got it twice; leave one out")
        found[name] = value
    return found


def nested(dotted: Mapping[str, Any]) -> dict[str, Any]:
    """{"optimizer": {"lr": 1e-4}} of {"optimizer.lr": 1e-4}."""
    tree: dict[str, Any] = {}
    for name, value in dotted.items():
        group, _, leaf = name.rpartition(".")
        (tree.setdefault(group, {}) if group else tree)[leaf] = value
    return tree


def check(arguments: argparse.Namespace, *, cuda: bool, run: Mapping[str, Any] | None = None) -> Recipe:
    """The recipe that `arguments` ask for; `cuda` decides the default one. run: the tree of the run that is continued,
    for what is not given. Its precision.compute stays `fastest` where that has to be measured.

    Raises:
        UsageError, DataError, march.config.ConfigError: a name or value that cannot be; one line: expected, got, fix.
    """
    options = {leaf: getattr(arguments, name) for name, (leaf, *_) in ALIASES.items()}
    options |= {leaf: getattr(arguments, name) for name, leaf in TEXT.items()}
    changes = {leaf: value for leaf, value in options.items() if value is not None}
    for leaf, value in parse_set(arguments.set or []).items():
        if leaf in changes and changes[leaf] != value:
            got = f"{_option(leaf)} {changes[leaf]} and {leaf}={value}"
            raise UsageError(f"expected one {leaf}, got {got}; leave one out")
        changes[leaf] = value
    if arguments.precision not in (None, "bf16", "fp32"):
        raise UsageError(f"expected --precision bf16 or fp32, got {arguments.precision!r}; give one of these")
    if not 0 <= changes.get("seed", 42) < 2**32:
        raise UsageError(f"expected --seed from 0 to 2^32 - 1, got {changes['seed']}; 42 is the recipe's")
    text = sorted(leaf for leaf in changes if leaf.startswith("data.") and leaf != "data.store")
    if "data.store" in changes and text:
        raise UsageError(
            f"expected --data alone, the prepared folder, got {' '.join(map(_option, text))} too; leave one out"
        )
    asked = arguments.recipe or ("paper" if cuda else "demo")
    tree = dict(run) if run and arguments.recipe in (None, run["name"]) else recipe.tree_of(asked)
    if "experiment" in changes:  # in its canonical spelling
        changes["experiment"] = entry = experiments.get(changes["experiment"]).spec
        if entry != tree.get("experiment", "Baseline"):  # what another experiment changes, it changes of the recipe
            own = experiments.configuration(entry), experiments.configuration("Baseline")
            kept = {n: v for n, v in tree.get("model", {}).items() if getattr(own[0], n) == getattr(own[1], n)}
            tree["model"] = kept
    found = recipe.build(recipe.merge(tree, nested(changes)), asked)
    description.Description.of(found.data)
    implementation(found)
    trackers.require(found.logging.trackers or ())
    own_precision = experiments.configuration(found.entry, **found.model).precision
    compute = found.precision.compute
    if compute == "experiment" or (compute == "fastest" and (cuda or own_precision != "bf16")):
        found = found.computing(own_precision)
    elif compute == "fastest" and found.devices.zero == 0:  # where bf16 cannot be
        found = found.computing("fp32")
    return found


def _flag(name: str) -> str:
    return f"--{_FLAGS.get(name, name).replace('_', '-')}"


def _option(leaf: str) -> str:
    named = {**{leaf: name for name, (leaf, *_) in ALIASES.items()}, **{leaf: name for name, leaf in TEXT.items()}}
    return _flag(named[leaf]) if leaf in named else leaf


def implementation(found: Recipe) -> str | Mapping[str, str]:
    """The operators' implementations, checked."""
    import kernels

    try:
        return kernels.parse_impl(found.devices.impl)
    except ValueError as error:
        raise UsageError(f"--{error}; see --help") from error


def table() -> list[str]:
    """Rows of Markdown: each leaf, what paper and demo have, its option."""
    paper, demo = (dict(recipe.leaves(recipe.load(name).model_dump())) for name in ("paper", "demo"))
    return [
        f"| `{leaf}` | {_shown(paper.get(leaf))} | {_shown(demo.get(leaf))} | "
        f"{_option(leaf) if _option(leaf) != leaf else ''} |"
        for leaf in recipe.LEAVES
    ]


def _shown(value: Any) -> str:
    return "" if value is None else str(value)
