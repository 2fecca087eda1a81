"""What a command line asks for: it trains, or it is refused in one line before anything is done."""

import json
import math
import re
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from training_support import SMALL, one_line, small_overrides, write_corpus

import march
from kernels.activations import ACTIVATIONS
from march import cost, experiments
from march.config import BOUNDS, FIELDS, ConfigError, check_type, override, parse_value, resolve
from march.data.__main__ import main as data_main
from march.training import distributed, session
from march.training.main import main


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(distributed, "stop", lambda world: None)  # a process group can be made once a process


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    """The corpus as JSON lines in another field, and as one text file with separators."""
    folder = tmp_path_factory.mktemp("texts")
    rows = [json.loads(line) for line in write_corpus(folder / "text.jsonl").read_text().splitlines()]
    (folder / "body.jsonl").write_text("\n".join(json.dumps({"body": row["text"]}) for row in rows))
    (folder / "marked.txt").write_bytes("\r\n***\r\n".join(row["text"] for row in rows).encode("utf-16"))
    return folder


TRAIN = ["--recipe", "demo", "--precision", "fp32", "--steps", "1", *small_overrides()]


@pytest.mark.parametrize(
    "options",
    [
        ["--files", "{}/body.jsonl", "--field", "body", "--vocab-size", "370"],
        ["--files", "{}/marked.txt", "--separator", r"\n***\n", "--encoding", "utf-16"],
    ],
    ids=["field", "separator and encoding"],
)
def test_text_prepared_with_options_is_trained_on_with_the_same_or_by_its_folder(options, texts, capsys):
    options = [option.format(texts) for option in options]
    assert data_main(["prepare", *options]) == 0
    advice = capsys.readouterr().out.splitlines()[-1].split("train.py ")[1].split()
    stores = sorted(Path("data").iterdir())
    assert main([*TRAIN, *options, "--run-dir", "same"]) == 0
    assert main([*TRAIN, *advice, "--run-dir", "folder"]) == 0
    assert sorted(Path("data").iterdir()) == stores, "nothing else was prepared"
    shown = capsys.readouterr()
    assert shown.out == "", "stdout is for what was asked"
    runs = [json.loads(Path(name, "summary.json").read_text()) for name in ("same", "folder")]
    assert runs[0]["final_loss"] == runs[1]["final_loss"]
    assert not runs[0]["comparable"]
    # once, at the end, over sequences that no step and no evaluation saw
    assert abs(runs[0]["test_loss"] - runs[0]["eval_loss"]) < 0.5
    assert runs[0]["test_loss"] != runs[0]["eval_loss"]
    assert f"test {runs[0]['test_loss']:.4f}" in shown.err
    assert main(["--resume", "folder", "--steps", "2"]) == 0, "the run remembers its text"


def test_the_share_of_the_peak_is_recorded(texts, monkeypatch):
    monkeypatch.setattr(session, "peak_share", lambda *_: lambda sequences_per_second: sequences_per_second / 1e6)
    assert main([*TRAIN, "--files", f"{texts}/text.jsonl", "--run-dir", "run"]) == 0
    (row,) = map(json.loads, Path("run/metrics.jsonl").read_text().splitlines())
    assert row["mfu"] == pytest.approx(row["tokens_per_second"] / 128 / 1e6, abs=1e-3)


@pytest.mark.fault("a corpus too small for each split", "refused in one line, nothing written")
def test_a_corpus_without_a_sequence_for_each_split_is_refused(tmp_path, capsys):
    Path("a.txt").write_text("few words " * 200)
    assert main([*TRAIN, "--files", "a.txt"]) == 2
    assert "at least one sequence of 128 tokens in each split" in one_line(capsys.readouterr().err)
    assert not Path("runs").exists()


@pytest.mark.fault("a port that is taken", "refused in one line")
def test_a_process_group_that_cannot_be_joined_is_one_line(monkeypatch, capsys):
    def refuse(*_):
        raise RuntimeError("The server socket has failed to listen: EADDRINUSE\nException raised from makeWithPort")

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: False)
    monkeypatch.setattr(distributed, "_init_process_group", refuse)
    assert main([*TRAIN]) == 2
    assert re.search(
        r"expected to join 1 process\(es\) at .*EADDRINUSE; use a free port", one_line(capsys.readouterr().err)
    )


def test_an_ideas_own_parameter_is_counted_and_shown(monkeypatch):
    """Parameters are those of the module, whatever it has."""
    from march.model import Transformer

    config = experiments.configuration("Baseline", **SMALL)
    before = cost.total_parameters(config)
    real = Transformer.__init__

    def extended(self, *arguments, **keywords):
        real(self, *arguments, **keywords)
        self.register_parameter("own", torch.nn.Parameter(torch.empty(7, 11)))

    monkeypatch.setattr(Transformer, "__init__", extended)
    cost.parameters.cache_clear()
    assert cost.total_parameters(config) == before + 77
    assert cost.parameters(config)["own"] == 77
    cost.parameters.cache_clear()


def test_show_heeds_the_budget_and_one_implementation(capsys):
    for impl in ("auto", "torch"):
        assert main(["--show", "Baseline", "--recipe", "demo", "--impl", impl, "--json", *small_overrides()]) == 0
        shown = json.loads(capsys.readouterr().out)
        cost = shown["cost"]
        assert (cost["encoder_length"], cost["decoder_length"], cost["micro_batch_on_8_devices"]) == (115, 26, 2)
        assert shown["configuration"]["vocab_size"] == 4096
        assert len(cost["implementation"]) == 1
    assert cost["implementation"] == ["torch"]


# any configuration


def _values(name: str) -> st.SearchStrategy:
    """Values of a field: near its bounds, of other types, and small ones that can be built."""
    small = {**SMALL, "vocab_size": 200, "database_states": 4}.get(name, FIELDS[name].default)
    known = {"feedforward": ["plain", "gated", "mixed"], "activation": list(ACTIVATIONS)}
    known |= {"unified_mask": ["aligned", "as_published"], "precision": ["bf16", "fp32"], "linear_init": ["t5"]}
    likely = [
        small,
        FIELDS[name].default if name in known or not isinstance(small, int) else small,
        *known.get(name, []),
    ]
    if isinstance(FIELDS[name].default, bool):
        likely += [True, False]
    wrong = [None, "", "x", math.nan, math.inf, -math.inf, -1, 10**30, 2.5, True, [], [1, 2, 3], (2, "a"), (2,) * 2000]
    edges = [number for bound in [BOUNDS.get(name, (0, 1))] for number in (bound[0] - 1, bound[0], bound[1] + 1)]
    return st.one_of(st.sampled_from(likely), st.sampled_from(likely), st.sampled_from(wrong + edges))


@st.composite
def changes(draw) -> dict:
    names = draw(st.lists(st.sampled_from(sorted(FIELDS)), max_size=5, unique=True))
    return {**SMALL, "vocab_size": 200, **{name: draw(_values(name)) for name in names}}


def is_refusal(text: str) -> None:
    assert len(text.splitlines()) == 1
    assert len(text) < 400


def _builds_and_steps(fields: dict) -> None:
    """A configuration is refused, or takes a training step with a finite loss and gradients."""
    try:
        config = override(experiments.configuration("Baseline"), **fields)
    except ConfigError as error:
        return is_refusal(str(error))
    assert resolve(config).model == config
    if cost.total_parameters(config) > 2_000_000 or config.max_length < 8:
        return  # too large for a test; where it is too large for a machine, its memory refuses it
    model = march.build_model("Baseline", impl="torch", **fields).train()
    assert sum(p.numel() for p in model.parameters()) == cost.total_parameters(config)
    ids = torch.arange(12).reshape(2, 6) % config.vocab_size
    loss = model(ids, ids[:, :4], labels=ids[:, :4]).loss
    loss.backward()
    assert torch.isfinite(loss)
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(changes())
def test_a_configuration_takes_a_step_or_is_refused(fields):
    _builds_and_steps(fields)


@pytest.mark.slow
@settings(max_examples=2000, deadline=None, suppress_health_check=list(HealthCheck))
@given(changes())
def test_many_configurations_take_a_step_or_are_refused(fields):
    _builds_and_steps(fields)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    st.sampled_from(sorted(FIELDS)),
    st.one_of(st.text(max_size=20), st.from_regex(r"-?[0-9._,e]{1,12}", fullmatch=True)),
)
def test_any_text_is_a_value_of_its_type_or_one_line(name, text):
    try:
        value = parse_value(name, text)
    except ConfigError as error:
        return is_refusal(str(error))
    assert check_type(name, value) == value
