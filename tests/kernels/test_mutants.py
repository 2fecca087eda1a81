"""Mistakes inside the kernels (tests/mutants.toml): each is put into their source, and the checks must then fail."""

import ast
import importlib
import inspect
import sys
import types
from pathlib import Path

import pytest
import test_attention
import test_unified_attention
import torch
from harness import check
from test_attention import dropout, small_tiles  # noqa: F401  a fixture

from kernels import cases

sys.path.insert(0, str(Path(__file__).parents[1]))
from mutants import Mutant, mutants

COMMON = {"dropout": dropout(), "scale": 0.5}
WORDS = {"scale": 0.3, "ignore_index": 4}
CASES = {
    "causal": ("attention", test_attention.case(1, 20, 50), COMMON | {"causal": True}),
    "lengths": ("attention", test_attention.case(2, 20, 50), COMMON | {"key_lengths": torch.tensor([50, 18])}),
    "mask": ("attention", test_attention.case(1, 20, 50), COMMON | {"key_mask": torch.arange(50)[None] % 3 != 1}),
    "shared": ("attention", test_attention.case(2, 20, 40, heads=2, groups=1, shared=True), COMMON),
    "parts": ("attention", test_attention.case(1, 20, 37, heads=2, groups=1, width=48), {}),
    "unified": (
        "attention",
        test_unified_attention.case(2, 20, 50, heads=2),
        COMMON | {"key_lengths": torch.tensor([50, 18]), "causal": True},
    ),
    **{
        name: ("glu", cases.glu_inputs(2, 9, 40, 85, kind=kind), {"kind": kind, "dropout": dropout(site=2), **more})
        for name, kind, more in (
            ("plain", "plain", {"activation": "relu"}),
            ("gated", "gated", {"activation": "gelu"}),
            ("mixed", "mixed", {"factor": 0.5, "gate_dropout": dropout(0.5, site=3)}),
            ("recomputed", "gated", {"activation": "silu", "recompute": True}),
        )
    },
    "norm": ("residual_norm", cases.residual_norm_inputs(2, 6, 24), {"dropout": dropout(), "features": 20}),
    **{
        logits: (
            "linear_cross_entropy",
            cases.linear_cross_entropy_inputs(2, 40, 24, 300, ignored=0.3),
            {"scale": 0.3, "logits": logits},
        )
        for logits in ("recompute", "chunks")
    },
    "embedding": (
        "embedding",
        cases.embedding_inputs(9, 6, 24, 9),
        {"dropout": dropout(0.1), "position_dropout": dropout(0.3, site=12)},
    ),
}


def judge(name: str) -> None:
    operator, inputs, kwargs = CASES[name]
    dtype = torch.float16 if name == "parts" else torch.float32
    check(operator, inputs, kwargs, dtype, cancelling=("q", "k") if name == "causal" else ())


def _swap(monkeypatch, old, new) -> None:
    """Makes a kernel, function, operator or class do what another does, for all who hold it."""
    old = getattr(old, "_init_fn", old)  # of torch's custom operators
    if isinstance(old, types.FunctionType):
        monkeypatch.setattr(inspect.unwrap(old), "__code__", inspect.unwrap(new).__code__)
    elif isinstance(old, type):
        for name, method in vars(new).items():
            if isinstance(method, staticmethod | types.FunctionType):
                _swap(monkeypatch, *(inspect.unwrap(getattr(one, name)) for one in (old, new)))
    else:  # Triton's
        for name, value in vars(new).items():
            monkeypatch.setattr(old, name, value)


def install(monkeypatch, folder: Path, mutant: Mutant) -> None:
    """Only what the mistake is in is compiled anew: a module would register its operators twice."""
    module = importlib.import_module(mutant.file.removesuffix(".py").replace("/", "."))
    text = mutant.source()
    file = folder / Path(mutant.file).name
    file.write_text(text)
    known = {ast.dump(one) for one in ast.parse(Path(module.__file__).read_text()).body}
    changed = [one for one in ast.parse(text).body if ast.dump(one) not in known]
    assert changed, mutant
    for one in changed:  # an operator registered again would stay, mistake and all
        one.decorator_list = [x for x in one.decorator_list if not ast.unparse(x).startswith("operator(")]
    scope = dict(vars(module))
    exec(compile(ast.Module(changed, []), str(file), "exec"), scope)
    for one in changed:
        _swap(monkeypatch, getattr(module, one.name), scope[one.name])


TRIED = [one for one in mutants() if one.case]


@pytest.mark.parametrize("mutant", TRIED, ids=lambda one: f"{one.part}: {one.name}")
def test_mistakes_in_the_kernels_are_caught(small_tiles, monkeypatch, tmp_path, mutant):  # noqa: F811
    install(monkeypatch, tmp_path, mutant)
    with pytest.raises(AssertionError, match=CASES[mutant.case][0]):
        judge(mutant.case)


@pytest.mark.parametrize("name", CASES)
def test_without_a_mistake_they_pass(small_tiles, name):  # noqa: F811
    judge(name)


def test_every_mistake_has_its_place():
    """What the sources no longer hold is found here, not when the table is made."""
    for one in mutants():
        assert one.source(), one
        assert one.case in ("", *CASES), one
        assert all((Path(__file__).parents[2] / test).is_file() for test in one.tests), one
