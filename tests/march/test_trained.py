"""A trained model in use: loaded as it was saved, exported and read elsewhere, gaps filled; wrong folders and texts."""

import json
import shutil

import pytest
import torch
from tokenizers import Tokenizer
from training_support import ROOT, run_command, small_overrides, write_corpus

import march
from march import cli
from march.console import UsageError
from march.trained import Infilled, Trained

TEXT = "bar <extra_id_0> kist <extra_id_1> lumo."


# for what needs no more than one of them
ONE = pytest.mark.parametrize("run", ["Baseline"], indirect=True)


@pytest.fixture(scope="module", params=["Baseline", str(ROOT / "examples/squareplus.py:Squareplus")])
def run(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    corpus = write_corpus(folder / "text.jsonl")
    leaves = ("batch.sequences=8", "batch.sequence_length=32", "checkpoints.every=2", "checkpoints.keep=2")
    options = ["--exp", request.param, "--files", str(corpus), "--vocab-size", "400", "--steps", "4"]
    options += ["--run-dir", str(folder / "run"), "--data-dir", str(folder / "data")]
    options += [word for leaf in leaves for word in ("--set", leaf)]
    done = run_command([*options, *small_overrides()], cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder / "run"


@pytest.fixture(scope="module")
def trained(run):
    return march.load(run)


def _saved(run, step):
    return torch.load(run / f"checkpoints/step-{step:08d}/model.pt", weights_only=True)


def test_a_run_is_loaded_as_its_checkpoint_has_it(run, trained):
    assert trained.step == 4
    assert not trained.model.training
    for step, model in ((4, trained.model), (2, march.load(run, step=2).model)):
        saved = _saved(run, step)
        assert saved.keys() == dict(model.named_parameters()).keys()
        assert all(torch.equal(x, saved[name]) for name, x in model.named_parameters())
    store = next(run.parent.glob("data/*/tokenizer.json"))
    assert trained.tokenizer.to_str() == Tokenizer.from_file(str(store)).to_str()
    assert trained.recipe.batch.sequence_length == 32


def test_what_is_exported_stands_alone(run, trained, tmp_path, capsys):
    """In another place, without the run, its text or the experiment's own file."""
    assert cli.main(["export", str(run), str(tmp_path / "first")]) == 0
    assert "after 4 steps" in capsys.readouterr().out
    moved = shutil.move(tmp_path / "first", tmp_path / "second")
    again = march.load(moved)
    assert (again.step, again.recipe.optimizer) == (4, trained.recipe.optimizer)
    for name, x in again.model.named_parameters():
        assert torch.equal(x, trained.model.get_parameter(name))
    assert again.infill(TEXT) == trained.infill(TEXT)
    assert march.load(again.export(tmp_path / "third")).infill(TEXT) == trained.infill(TEXT)
    with pytest.raises(UsageError, match="expected a new or empty folder"):
        again.export(moved)
    recipe = [
        "--recipe",
        str(moved / "recipe.toml"),
        "--steps",
        "1",
        "--data",
        str(next(run.parent.glob("data/*/manifest.json")).parent),
    ]
    assert run_command([*recipe, "--run-dir", str(tmp_path / "again")], cwd=tmp_path).returncode == 0


@ONE
def test_the_likeliest_filling_is_the_models_own(run, trained):
    """Token by token the argmax over what may stand there: bytes and merges, and behind one of them the next gap."""
    found = trained.infill(TEXT, longest=5)
    known = trained.tokenizer.get_vocab_size()
    out, spans = [0, 100], []
    for closing in (99, 98):
        span = []
        while len(span) < 5:
            with torch.no_grad():
                logits = trained.model(torch.tensor([trained.encode(TEXT)]), torch.tensor([out])).logits[0, -1]
            token = max([*range(101, known), *([closing] if span else [])], key=lambda i: float(logits[i]))
            if token == closing:
                break
            span.append(token)
            out.append(token)
        out.append(closing)
        spans.append(trained.tokenizer.decode(span))
    assert found.spans == tuple(spans)
    assert found.text == f"bar {spans[0]} kist {spans[1]} lumo."
    assert found.score < 0


@ONE
def test_draws_are_their_seeds(run, trained):
    drawn = [trained.infill(TEXT, temperature=1.5, seed=seed, longest=4) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert trained.infill(TEXT, temperature=1.0, top_k=1, longest=4).spans == trained.infill(TEXT, longest=4).spans


class _Told(torch.nn.Module):
    """Says the tokens of `plan` in turn, then padding."""

    def __init__(self, plan, config):
        super().__init__()
        self.plan, self.config = list(plan), config

    def forward(self, ids, out, return_logits=True):
        logits = torch.zeros(1, out.shape[1], self.config.vocab_size)
        logits[0, -1, 0] = 99.0  # what may never be chosen
        logits[0, -1, self.plan.pop(0)] = 9.0
        return march.model.Output(None, logits)


@ONE
def test_a_gap_ends_at_the_next_sentinel(run, trained):
    a, b, c = (trained.tokenizer.encode(x).ids[0] for x in "abc")
    told = _Told([a, b, 99, c, 98], trained.model.config)
    found = Trained(told, trained.tokenizer, trained.recipe, 4).infill(TEXT)
    assert (found.text, found.spans) == ("bar ab kist c lumo.", ("ab", "c"))
    assert told.plan == []
    # a sentinel is no filling: neither where none stands yet, nor the wrong one
    told = _Told([99, 7, 99, 98, 98], trained.model.config)
    assert len(Trained(told, trained.tokenizer, trained.recipe, 4).infill(TEXT).spans[0]) > 0


@ONE
@pytest.mark.parametrize(
    "text",
    ["", "no gap", "<extra_id_1>", "<extra_id_0> <extra_id_0>", "<extra_id_1> <extra_id_0>",
     "<extra_id_0> <extra_id_2>", " ".join(f"<extra_id_{i}>" for i in range(100)), "<extra_id_0> " + "lumo " * 200],
)  # fmt: skip
def test_wrong_texts_get_one_line(run, trained, text, capsys):
    with pytest.raises(ValueError, match=r"expected .*, got .*; "):
        trained.infill(text)
    if text:
        assert cli.main(["infill", str(run), text]) == 2
        assert capsys.readouterr().err.count("\n") == 1


@ONE
@pytest.mark.parametrize("options", [{"temperature": -1.0}, {"longest": 0}, {"top_k": 0}])
def test_wrong_values_get_one_line(run, trained, options):
    with pytest.raises(ValueError, match=r"infill: expected .*, got .*; "):
        trained.infill(TEXT, **options)


def _flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def _cut(path):
    path.write_bytes(path.read_bytes()[:100])


@ONE
@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "recipe.toml", "config.json"])
@pytest.mark.parametrize(
    "harm", [_flip, lambda path: path.write_bytes(path.read_bytes()[:100]), lambda path: path.unlink()]
)
def test_a_damaged_export_is_refused_in_one_line(run, trained, tmp_path, name, harm, capsys):
    folder = trained.export(tmp_path / "exported")
    harm(folder / name)
    assert cli.main(["infill", str(folder), TEXT]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_wrong_folders_get_one_line(run, tmp_path):
    for path, options in ((tmp_path, {}), (tmp_path / "none", {}), (run, {"step": 3})):
        with pytest.raises(UsageError, match=r"expected .*, got .*"):
            march.load(path, **options)
    copy = shutil.copytree(run, tmp_path / "copy")
    (copy / "tokenizer.json").unlink()
    with pytest.raises(UsageError, match=r"tokenizer\.json"):
        march.load(copy)


@ONE
def test_the_command_line(run, capsys):
    assert cli.main(["infill", str(run), TEXT, "--samples", "2", "--top-k", "5", "--json", "--longest", "3"]) == 0
    said = capsys.readouterr()
    lines = [json.loads(line) for line in said.out.splitlines()]
    assert len(lines) == 2
    assert {*lines[0]} == {"text", "spans", "score"} == {*Infilled.__dataclass_fields__}
    assert "WARNING" not in said.err
    assert cli.main(["infill", str(run), "<extra_id_0> " + "lumo " * 35, "--longest", "2"]) == 0
    assert "in training" in capsys.readouterr().err
