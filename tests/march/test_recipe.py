"""The recipe: what was written is read, what cannot be is one line, a schedule is its formula, a run is repeatable."""

import json
import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_training_requests import is_refusal
from training_support import losses, small_overrides, small_recipe, write_corpus

from march import recipe
from march.config import ConfigError
from march.console import UsageError
from march.training import distributed
from march.training.arguments import ALIASES, build_parser, check, parse_leaf, table
from march.training.main import main

ROOT = Path(__file__).resolve().parents[2]


def asked(*words, cuda=False, run=None):
    return check(build_parser().parse_args(list(words)), cuda=cuda, run=run)


def written(tmp_path, text: str) -> str:
    file = tmp_path / "mine.toml"
    file.write_text(text)
    return str(file)


def valid() -> st.SearchStrategy:
    """A recipe of any values, by leaves."""
    share = st.floats(0, 1, exclude_max=True)
    return st.fixed_dictionaries(
        {"seed": st.integers(0, 2**32 - 1), "schedule.steps": st.integers(100, 10**9)},
        optional={
            "label": st.text(st.characters(exclude_categories=["Cs"]), max_size=30),
            "optimizer.lr": st.floats(1e-30, 1000),
            "optimizer.beta1": share,
            "optimizer.weight_decay": st.floats(0, 1000),
            "optimizer.decay": st.just("all"),
            "optimizer.gradient_clipping": st.floats(0, 1e300),
            "schedule.name": st.sampled_from(["constant", "linear", "cosine", "warmup_stable_decay"]),
            "schedule.warmup": st.integers(0, 80),
            "batch.micro": st.integers(1, 10**9),
            "data.limit": st.integers(1, 10**12),
            "data.separator": st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=5),
            "devices.zero": st.sampled_from([0, 1, 2]),
            "logging.curve": st.booleans(),
            "model": st.sampled_from([{}, {"dropout": 0.25}, {"num_heads": (2, 4, 8)}, {"qk_norm": True}]),
        },
    )


@settings(max_examples=60, deadline=None, derandomize=True)
@given(valid())
def test_a_recipe_that_was_written_is_read_as_it_was(tmp_path_factory, dotted):
    model = dotted.pop("model", {})
    made = small_recipe(**{**dotted, **{f"model.{name}": value for name, value in model.items()}})
    file = tmp_path_factory.mktemp("recipes") / "recipe.toml"
    file.write_text(made.toml(), encoding="utf-8")
    assert recipe.load(str(file)) == made


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    st.sampled_from(sorted(recipe.LEAVES)),
    st.one_of(st.text(max_size=20), st.from_regex(r"-?[0-9._,e]{1,12}", fullmatch=True), st.just("9" * 5000)),
)
def test_any_text_is_a_value_of_its_leaf_or_one_line(name, text):
    try:
        value = parse_leaf(name, text)
        made = small_recipe(**{name: value})
    except (UsageError, ConfigError) as error:
        return is_refusal(str(error))
    assert dict(recipe.leaves(made.model_dump()))[name] == value


def test_an_option_is_another_name_of_its_leaf():
    for name, (leaf, *_) in ALIASES.items():
        text = {"exp": "Database", "impl": "torch", "precision": "bf16"}.get(name, "2")
        option = f"--{name.replace('_', '-')}"
        assert asked(option, text) == asked("--set", f"{leaf}={text}"), name
        other = {"exp": "Mixed", "impl": "auto", "precision": "fp32"}.get(name, "1")
        with pytest.raises(UsageError, match=f"expected one {leaf}, got {option}"):
            asked(option, text, "--set", f"{leaf}={other}")
    assert asked("--set", "model.num_heads=12,8,4") == asked("--set", "num_heads=12,8,4")
    for words in (["num_heads=2", "model.num_heads=2"], ["optimizer.lr=3", "optimizer.lr=3"]):
        with pytest.raises(UsageError, match="once, got it twice"):
            asked(*(word for value in words for word in ("--set", value)))


def test_recipe_then_experiment_then_set(tmp_path):
    file = written(
        tmp_path, 'from = "demo"\nname = "mine"\n[model]\nnum_heads = 4\ndropout = 0.3\n[optimizer]\nlr = 2.0'
    )
    assert asked("--recipe", file).config.num_heads == 4
    changing = next(
        n for n in recipe.experiments.names() if isinstance(recipe.experiments.configuration(n).num_heads, tuple)
    )
    other = asked("--recipe", file, "--exp", changing)
    assert other.config.num_heads == recipe.experiments.configuration(changing).num_heads
    assert (other.config.dropout, other.optimizer.lr) == (0.3, 2.0)
    last = asked("--recipe", file, "--exp", changing, "--set", "num_heads=2", "--set", "optimizer.lr=1")
    assert (last.config.num_heads, last.optimizer.lr) == (2, 1.0)


def test_another_text_takes_nothing_of_the_old_one(tmp_path):
    paper = asked("--recipe", "paper", "--data-dir", "there")
    assert (paper.data.source, paper.data.vocab_size) == ("wikipedia", 30_000)
    run = paper.model_dump(exclude_none=True)
    assert asked("--source", "excerpt", run=run).data == recipe.Data(source="excerpt", directory="there")
    files = asked("--files", "a.txt", "b c.txt", "--field", "body", run=run).data
    assert files == recipe.Data(source="files", files=("a.txt", "b c.txt"), field="body", directory="there")
    assert asked("--limit", "5", run=run).data.vocab_size == 30_000


# schedules


def expected_factor(name: str, step: int, steps: int, warmup: int, final: float, decay: float) -> float:
    if step <= warmup:
        return step / warmup
    share = (step - warmup) / (steps - warmup)
    if name == "warmup_stable_decay":
        share = max(0.0, (step - (steps - decay * steps)) / (decay * steps))
    return {
        "constant": 1.0,
        "linear": 1 - share * (1 - final),
        "cosine": final + (1 - final) * 0.5 * (1 + math.cos(math.pi * share)),
        "warmup_stable_decay": 1 - share * (1 - final),
    }[name]


@pytest.mark.parametrize("name", ["constant", "linear", "cosine", "warmup_stable_decay"])
@pytest.mark.parametrize("warmup", [0, 1, 7])
@pytest.mark.parametrize("final", [0.0, 0.1, 1.0])
def test_each_schedule_is_its_formula_at_every_step(name, warmup, final):
    changes = {} if name == "constant" else {"schedule.final": final}
    changes |= {"schedule.decay": 0.25} if name == "warmup_stable_decay" else {}
    made = small_recipe(**{"schedule.name": name, "schedule.steps": 40, "schedule.warmup": warmup, **changes})
    rates = [made.learning_rate(step) for step in range(1, 41)]
    formula = [expected_factor(name, step, 40, warmup, final, 0.25) for step in range(1, 41)]
    assert rates == pytest.approx([made.optimizer.lr * factor for factor in formula], rel=1e-12, abs=1e-18)
    assert all(0 <= rate <= made.optimizer.lr for rate in rates)
    if name != "constant":
        assert rates[-1] == pytest.approx(made.optimizer.lr * final, abs=1e-18)


# runs


def test_the_recipe_of_a_run_folder_is_the_same_run_bit_for_bit(tmp_path, monkeypatch, capsys):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(distributed, "stop", lambda world: None)
    monkeypatch.chdir(tmp_path)
    write_corpus(tmp_path / "text.jsonl")
    words = ["--exp", "Database", "--set", "database_states=8", "--set", "schedule.name=linear", "--seed", "5"]
    words += [
        "--set",
        "schedule.warmup=1",
        "--set",
        "optimizer.lr=2e-3",
        "--set",
        "batch.sequences=4",
        *small_overrides(),
    ]
    text = ["--files", "text.jsonl", "--vocab-size", "370", "--steps", "3"]
    assert main([*words, *text, "--run-dir", "one"]) == 0
    assert main(["--recipe", "one/recipe.toml", "--run-dir", "two"]) == 0
    assert losses(tmp_path / "one") == losses(tmp_path / "two")
    assert Path("one/recipe.toml").read_text() == Path("two/recipe.toml").read_text()
    one, two = (json.loads(Path(name, "config.json").read_text()) for name in ("one", "two"))
    assert one["identity"] == two["identity"]
    # a schedule that falls says when it ends: more steps are another run
    assert main(["--resume", "one", "--steps", "5"]) == 2
    assert "schedule.steps: the run has 3, asked 5" in capsys.readouterr().err


def test_the_page_has_every_leaf():
    """docs/training.md: a row for each leaf, with what paper and demo have."""
    rows = table()
    assert [row.split("`")[1] for row in rows] == list(recipe.LEAVES)
    assert "\n".join(rows) in (ROOT / "docs/training.md").read_text()
