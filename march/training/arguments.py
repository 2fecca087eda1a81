"""The command line of train.py. Only parsing and what follows from the arguments alone; no torch here.

Options that were not given stay None, so that a resumed run can tell "as before" from "asked anew".
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from march import config as configuration
from march import experiments
from march.console import Parser, whole
from march.data import description
from march.data.description import Description
from march.training.budget import BUDGETS, FASTEST, Budget, get_budget
from march.training.errors import UsageError

# What a run folder remembers of the command line, and a resumed run takes from there.
REMEMBERED = ("exp", "impl", "budget", "seed", "steps", "set", "zero", "precision", *description.OPTIONS)

# --resume without a folder; no text, so that an empty variable of the shell is not taken for it
NEWEST = object()

ZERO_STAGES = (0, 1, 2)
# Tried with DeepSpeed 0.19: backward meets empty weights, because the operators read weights of other modules
# (tied embedding, norms), which stage 3 has released by then.
NO_ZERO_3 = "stage 3 releases weights that the operators read across modules; 1 is the default"


def build_parser() -> Parser:
    parser = Parser(
        prog="train.py",
        description="Train one experiment: `deepspeed train.py ...` on every GPU, `python train.py ...` on one.",
    )
    what = parser.add_argument_group("what to train")
    what.add_argument("--exp", metavar="NAME", help="experiment (see --list), or FILE.py:NAME; default Baseline")
    what.add_argument(
        "--set", action="append", metavar="FIELD=VALUE", help="change one field of the model; may be repeated"
    )
    what.add_argument("--impl", help="auto, torch, reference, triton, or by operator: attention=flash_attn,glu=torch")
    how = parser.add_argument_group("how")
    how.add_argument("--budget", metavar="NAME", help=f"{' or '.join(BUDGETS)}; default paper on CUDA, else demo")
    count = whole(1, 10**9, "leave it out for the usual number")
    how.add_argument("--steps", type=count, metavar="N", help="optimiser steps, instead of the budget's")
    how.add_argument("--seed", type=int, metavar="N", help="initialisation, data order, dropout; default 42")
    how.add_argument("--precision", metavar="TYPE", help="bf16 or fp32; default the budget's or the experiment's")
    how.add_argument("--micro-batch", type=count, metavar="N", help="sequences at once in a process; default what fits")
    how.add_argument("--zero", type=int, metavar="STAGE", help="ZeRO stage 0, 1 or 2; default 1")
    how.add_argument("--data", metavar="DIR", help="a prepared store, instead of the options of the text")
    description.add_arguments(parser, "the budget's")
    where = parser.add_argument_group("where, and again")
    where.add_argument("--run-dir", metavar="DIR", help="default runs/<experiment>-<budget>-<date>")
    where.add_argument("--checkpoint-every", type=count, metavar="N", help="steps; the last one is always saved")
    where.add_argument(
        "--resume",
        nargs="?",
        const=NEWEST,
        metavar="DIR",
        help="continue the run in DIR, or the newest one of this experiment and budget",
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
    heeded = {"show": {"set", "budget", "impl", "json", "show"}, "list": {"json", "list"}}
    given = [name for name, value in vars(arguments).items() if value not in (None, False) and name != "local_rank"]
    for mode in modes:
        if other := [f"--{name.replace('_', '-')}" for name in given if name not in heeded[mode]]:
            raise UsageError(f"expected --{mode} without {' '.join(other)}, got both; leave one out")
    if arguments.json and not modes:
        raise UsageError("expected --json with --list or --show, got it alone; name what to print")


@dataclass(frozen=True)
class Request:
    """A checked command line: what to train, under which budget, from which data."""

    experiment: experiments.Experiment
    overrides: dict[str, Any]  # --set, typed
    config: configuration.ModelConfig  # before the corpus's vocabulary is known
    budget: Budget
    budget_name: str
    seed: int
    precision: str  # fp32 until it is measured, where `precision_open`
    precision_open: bool
    zero: int
    impl: str | Mapping[str, str]
    data: Description
    micro_batch: int | None
    remembered: dict[str, Any]  # the options given, for a later --resume

    @property
    def comparable(self) -> bool:
        """May the losses stand beside the published ones? The recipe, the corpus and the model as published."""
        unchanged = not self.overrides and self.precision == experiments.configuration(self.experiment).precision
        unchanged = unchanged and self.experiment.file is None
        return self.budget.comparable and unchanged


def check(arguments: argparse.Namespace, *, cuda: bool) -> Request:
    """The request behind `arguments`; `cuda` decides the default budget.

    Raises:
        UsageError, march.config.ConfigError: a name or value that cannot be; one line: expected, got, fix.
    """
    experiment = experiments.get(arguments.exp or "Baseline")
    overrides = configuration.parse_overrides(arguments.set or ())
    budget_name = arguments.budget or ("paper" if cuda else "demo")
    budget = get_budget(budget_name, steps=arguments.steps, checkpoint_every=arguments.checkpoint_every)
    if arguments.seed is not None and not 0 <= arguments.seed < 2**32:
        raise UsageError(f"expected --seed from 0 to 2^32 - 1, got {arguments.seed}; 42 is the recipe's")
    precision = _precision(arguments.precision, overrides, budget, experiment)
    precision_open = False
    if precision == FASTEST:
        own = experiments.configuration(experiment, **overrides).precision
        precision_open = own == "bf16" and not cuda
        precision = "fp32" if precision_open else own
    zero = 1 if arguments.zero is None else arguments.zero
    if zero not in ZERO_STAGES:
        raise UsageError(f"expected --zero 0, 1 or 2, got {zero}; {NO_ZERO_3}")
    data = Description.of(arguments, budget.source, budget.vocab_size)
    if not data.is_plain(budget.source, budget.vocab_size):
        budget = replace(budget, vocab_size=None, comparable=False, label=f"{budget.label}; from {data.name}")
    config = experiments.configuration(experiment, **{**overrides, "precision": precision})
    return Request(
        experiment=experiment,
        overrides=overrides,
        config=config,
        budget=budget,
        budget_name=budget_name,
        seed=budget.seed if arguments.seed is None else arguments.seed,
        precision=precision,
        precision_open=precision_open,
        zero=zero,
        impl=_impl(arguments.impl or "auto"),
        data=data,
        micro_batch=arguments.micro_batch,
        remembered={
            **{name: getattr(arguments, name) for name in REMEMBERED if getattr(arguments, name) is not None},
            "exp": experiment.spec,
            "budget": budget_name,
        },
    )


def _precision(given: str | None, overrides: dict[str, Any], budget: Budget, experiment: experiments.Experiment) -> str:
    if given is not None and given not in ("bf16", "fp32"):
        raise UsageError(f"expected --precision bf16 or fp32, got {given!r}; give one of these")
    by_field = overrides.pop("precision", None)  # the field and the option are one thing
    if given and by_field and given != by_field:
        raise UsageError(f"expected one precision, got --precision {given} and precision={by_field}; leave one out")
    return given or by_field or budget.precision or experiments.configuration(experiment).precision


def _impl(text: str) -> str | Mapping[str, str]:
    import kernels

    try:
        return kernels.parse_impl(text)
    except ValueError as error:
        raise UsageError(f"--{error}; see --help") from error


def may_be_remembered(options: Mapping[str, Any]) -> bool:
    """Whether each value is of a kind that the option of its name has; what was read from a file may be anything."""
    actions = build_parser()._actions
    lists = {a.dest for a in actions if a.nargs == "+" or isinstance(a, argparse._AppendAction)}
    return all(
        isinstance(value, list) and all(isinstance(part, str) for part in value)
        if name in lists
        else isinstance(value, str | int)
        for name, value in options.items()
    )


def fill_from(arguments: argparse.Namespace, remembered: dict[str, Any]) -> argparse.Namespace:
    """`arguments` with what was not given taken from the run that is continued."""
    filled = argparse.Namespace(**vars(arguments))
    other_text = any(getattr(filled, name) is not None for name in description.OPTIONS)
    for name in REMEMBERED:
        if getattr(filled, name) is None and not (other_text and name in description.OPTIONS):
            setattr(filled, name, remembered.get(name))
    return filled
