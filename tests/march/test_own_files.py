"""An experiment of a file of one's own: loaded, refused in one line, trained, resumed, sent to other processes."""

import json
import multiprocessing
import os
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import torch
from test_training_runs import corpus  # noqa: F401
from training_support import ROOT, launcher, losses, process_environment, run_command, run_here

import kernels
import march
from kernels.activations import ACTIVATIONS
from march import config, experiments
from march.config import ConfigError
from march.report import listing

HEAD = "from march.experiments import Experiment\nfrom march.model import Block, FeedForward, Norm\n"
IDEA = (
    'MyIdea = Experiment("MyIdea", "Baseline", {"num_heads": 4}, "Baseline", "Fewer.", parts={"feedforward": Twice})\n'
)
TWICE = """
class Twice(FeedForward):
    def forward(self, z, ctx):
        return 2 * super().forward(z, ctx)

"""
SIZES = {"dim_model": 32, "dim_feedforward": 48, "vocab_size": 97, "max_length": 24}


@pytest.fixture
def write(tmp_path):
    """write(text, name) to the path of a file with the usual imports."""

    def to(text=TWICE + IDEA, name="my_idea.py"):
        path = tmp_path / name
        path.write_text(HEAD + text, encoding="utf-8")
        return path

    return to


def logits(model, **more):
    ids = torch.arange(24).view(2, 12)
    return model.eval()(ids, ids[:, :7], **more).logits


def test_a_name_is_taken_wherever_the_lists_are(write, monkeypatch):
    path = write()
    experiment = experiments.get(f"{path}:MyIdea")
    assert experiments.get(experiment) is experiment
    assert experiments.configuration(f"{path}:MyIdea").num_heads == 4
    assert set(experiments.difference(experiment)) == {"num_heads", "idea"}
    assert listing.describe(f"{path}:MyIdea")["changes"]["num_heads"] == 4
    assert listing.show(f"{path}:MyIdea", {})["outside_kernels"] == ["what its own feedforward does itself"]
    model, control = (march.build_model(x, seed=1, **SIZES) for x in (f"{path}:MyIdea", "Baseline"))
    assert type(model.encoder.blocks[0].feedforward).__name__ == "Twice"
    assert type(control.encoder.blocks[0].feedforward).__name__ == "FeedForward"
    monkeypatch.chdir(path.parent)
    for text in ("my_idea.py:MyIdea", "my_idea.py", "./my_idea.py:MyIdea", " my_idea.py:MyIdea "):
        assert experiments.get(text) == experiment
    assert "MyIdea" not in experiments.names()


def test_each_part_stands_in_its_place(write):
    path = write("""
import torch
from kernels.activations import Activation, tl
class Mine(Block):
    pass
class Centred(Norm):
    def formula(self, x):
        x = x - x.mean(-1, keepdim=True)
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * self.gain.to(x.dtype)
def one(a):
    return a
act = Activation(torch.tanh, lambda d, x: d * (1 - torch.tanh(x) ** 2), one, one)
Idea = Experiment("Idea", "QKNorm", {"norm_placement": "sandwich"}, "QKNorm", "All.",
                  parts={"block": Mine, "norm": Centred, "activation": act})
More = Experiment("More", "Idea", {"num_heads": 2}, "Idea", "Its base is of the file, with its parts.")
""")
    for name in ("Idea", "More"):
        model = march.build_model(f"{path}:{name}", impl="torch", seed=1, **SIZES)
        assert {type(block).__name__ for block in model.encoder.blocks} == {"Mine"}
        norms = [type(m).__name__ for n, m in model.named_modules() if n.endswith("norm")]
        assert set(norms) == {"Centred"}
        assert len(norms) == 2 + 3 * (2 + 3) * 2 + 6 * 2 + 3
        reference = march.build_model(f"{path}:{name}", impl="reference", seed=1, **SIZES)
        torch.testing.assert_close(logits(model), logits(reference))
    block = model.encoder.blocks[0].feedforward
    z = torch.randn(1, 3, 32)
    ctx = march.model.ForwardContext("torch", z.dtype, z.device)
    torch.testing.assert_close(block(z, ctx), torch.tanh(z @ block.up.weight.T) @ block.down.weight.T)
    assert experiments.get(f"{path}:More").control == f"{path}:Idea"


def test_a_norm_of_ones_own_is_its_formula_with_residual_dropout_and_padding(write):
    class Halved(march.model.Norm):
        def formula(self, x):
            assert x.shape[-1] == 8
            return x / 2

    norm, x, s = Halved(8), torch.randn(2, 3, 8), torch.randn(2, 3, 8)
    ctx = march.model.ForwardContext("torch", x.dtype, x.device)
    drop = kernels.Dropout(0.5, kernels.dropout_state(1, 2), 3)
    for stream, added in ((x, s), (None, s), (x, None)):
        dropped = None if added is None else drop
        y, z = norm.add(stream, added, ctx, dropped)
        plain = march.model.Norm(8)
        torch.nn.init.ones_(plain.gain)
        torch.testing.assert_close(y, plain.add(stream, added, ctx, dropped)[0])
        assert torch.equal(z, y / 2)
    wide = torch.nn.functional.pad(x, (0, 4))
    assert torch.equal(norm(wide, ctx), wide / 2)


def test_other_experiments_stay_as_they_are(write):
    before = {name: experiments.configuration(name) for name in experiments.names()}
    activations, fields = dict(ACTIVATIONS), config.activations()
    model = march.build_model("Baseline", seed=1, **SIZES)
    wanted = logits(model)
    march.build_model(f"{write()}:MyIdea", seed=1, **SIZES)
    march.build_model(str(ROOT / "examples/squareplus.py"), seed=1, **SIZES)
    assert {name: experiments.configuration(name) for name in experiments.names()} == before
    assert (dict(ACTIVATIONS), config.activations()) == (activations, fields)
    assert torch.equal(logits(march.build_model("Baseline", seed=1, **SIZES)), wanted)
    with pytest.raises(TypeError):
        march.model.Block.classes["feedforward"] = None


def test_a_file_that_changed_is_read_again(write):
    first = march.build_model(f"{write()}:MyIdea", seed=1, **SIZES)
    second = march.build_model(f"{write(TWICE.replace('2 *', '9 *') + IDEA)}:MyIdea", seed=1, **SIZES)
    assert not torch.equal(logits(first), logits(second))
    assert first.config.idea != second.config.idea


@pytest.mark.parametrize(
    ("text", "name", "said"),
    [
        (None, "my_idae.py:MyIdea", "did you mean my_idea.py"),
        (None, "my_idea:MyIdea", "write my_idea.py:MyIdea"),
        ("", "my_idea.py:MyIdea", "write MyIdea = Experiment"),
        ("", "my_idea.py", "got no name"),
        (TWICE + IDEA, "my_idea.py:MyIdeas", "did you mean MyIdea"),
        (TWICE + IDEA, "my_idea.py:Twice", "got a type of that name; did you mean MyIdea"),
        (TWICE + IDEA + IDEA.replace("MyIdea", "Two"), "my_idea.py", "got no name; did you mean MyIdea, Two"),
        (
            "MyIdea = Nothing\n",
            "my_idea.py:MyIdea",
            "NameError: name 'Nothing' is not defined line 3 (MyIdea = Nothing)",
        ),
        ("MyIdea = (\n", "my_idea.py:MyIdea", "SyntaxError: '(' was never closed line 3"),
        ("import not_there\n", "my_idea.py:MyIdea", "ModuleNotFoundError: No module named 'not_there' line 3"),
        ("import beside\n", "my_idea.py:MyIdea", "an idea is one file"),
        ("raise SystemExit(3)\n", "my_idea.py:MyIdea", "SystemExit: 3 line 3"),
        ("\0", "my_idea.py:MyIdea", "null bytes"),
        (TWICE + IDEA.replace('{"num_heads": 4}', '{"num_head": 4}'), "my_idea.py:MyIdea", "did you mean num_heads"),
        (TWICE + IDEA.replace('"Baseline", {', '"Bseline", {'), "my_idea.py:MyIdea", "did you mean Baseline"),
        (
            TWICE + IDEA.replace('"Baseline", {', '"MyIdea", {'),
            "my_idea.py:MyIdea",
            "as the base of MyIdea, got itself",
        ),
        (TWICE + IDEA.replace('"MyIdea"', '"../MyIdea"'), "my_idea.py:MyIdea", "a name that a folder can have"),
        (TWICE + IDEA.replace('"feedforward"', '"feedforwards"'), "my_idea.py:MyIdea", "did you mean feedforward"),
        (
            IDEA.replace("Twice", "Norm"),
            "my_idea.py:MyIdea",
            "subclass of march.model.Sublayer as feedforward, got the class",
        ),
        (IDEA.replace("Twice", "'Twice'"), "my_idea.py:MyIdea", "got str 'Twice'"),
        (
            IDEA.replace("feedforward", "activation").replace("Twice", "abs"),
            "my_idea.py:MyIdea",
            "Activation as activation",
        ),
    ],
)
def test_mistakes_are_one_line(text, name, said, write, monkeypatch):
    monkeypatch.chdir(write(text or "").parent)
    Path("beside.py").write_text("")
    with pytest.raises(ConfigError) as error:
        march.build_model(name, **SIZES)
    assert said in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400


def test_what_a_file_prints_leaves_json_alone(write):
    path = write("print('hello')\n" + TWICE + IDEA)
    command = [sys.executable, str(ROOT / "train.py"), "--show", f"{path}:MyIdea", "--json"]
    done = subprocess.run(command, env=process_environment(), capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["name"] == "MyIdea"
    assert "hello" in done.stderr


def _of_both(model, spec):
    return [logits(one).tolist() for one in (model, march.build_model(spec, seed=1, **SIZES))]


@pytest.mark.parametrize("name", ["my_idea.py:MyIdea", str(ROOT / "examples/squareplus.py")])
def test_a_model_goes_to_a_spawned_process(name, write, monkeypatch):
    monkeypatch.chdir(write().parent)
    model = march.build_model(name, seed=1, **SIZES)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:  # says when its process dies
        received, again = pool.submit(_of_both, model, name).result()
    assert received == again == logits(model).tolist()


# --- in training


@pytest.fixture(scope="module")
def run(corpus, tmp_path_factory):  # noqa: F811
    """Two steps of a file's experiment, by a relative path, on two processes; its folder and options."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "my_idea.py").write_text(HEAD + TWICE + IDEA.replace('{"num_heads": 4}', "{}"))
    arguments = [*corpus, "--exp", "my_idea.py:MyIdea", "--steps", "2", "--run-dir", "run", "--micro-batch", "2"]
    done = run_command(arguments, launcher=launcher(), cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder


def resumed(run, tmp_path, *more):
    """run.py --resume of a copy of the run, from a folder of its own where the file of before may not be."""
    return run_here(["--resume", str(tmp_path / "run"), "--steps", "3", *more], cwd=tmp_path)


@pytest.fixture
def copy(run, tmp_path):
    subprocess.run(["cp", "-r", str(run / "run"), str(tmp_path / "run")], check=True)
    return run, run / "my_idea.py", tmp_path


def test_a_run_keeps_the_file(run):
    kept = json.loads((run / "run" / "config.json").read_text())
    assert (run / "run" / "my_idea.py").read_bytes() == (run / "my_idea.py").read_bytes()
    assert kept["file"] == {"path": str(run / "my_idea.py"), "sha256": experiments.get(f"{run}/my_idea.py").sha256}
    assert kept["experiment"] == "MyIdea"
    assert kept["comparable"] is False
    assert kept["config"]["idea"].startswith("MyIdea@")


def test_resume_takes_the_file_renamed_or_the_copy_and_refuses_another(copy):
    run, file, folder = copy
    text = file.read_bytes()
    try:
        file.write_bytes(text + b"# changed\n")
        refused = resumed(run, folder)
        assert refused.returncode == 2, refused.stderr
        assert "--accept-changed-file" in refused.stderr
        accepted = resumed(run, folder, "--accept-changed-file")
        assert accepted.returncode == 0, accepted.stderr
        assert (folder / "run" / "my_idea.py").read_bytes() == file.read_bytes()
        assert (folder / "run" / "my_idea.1.py").read_bytes() == text
        of_changed = losses(folder / "run")
        file.unlink()
        subprocess.run(["rm", "-r", str(folder / "run")], check=True)
        subprocess.run(["cp", "-r", str(run / "run"), str(folder / "run")], check=True)
        of_copy = resumed(run, folder)
        assert of_copy.returncode == 0, of_copy.stderr
        assert losses(folder / "run") == of_changed  # a comment more
        (folder / "renamed.py").write_bytes(text)
    finally:
        file.write_bytes(text)
    renamed = run_here(["--resume", str(folder / "run"), "--steps", "4", "--exp", "renamed.py:MyIdea"], cwd=folder)
    assert renamed.returncode == 0, renamed.stderr
    other = run_here(["--resume", str(folder / "run"), "--steps", "5", "--exp", "Baseline"], cwd=folder)
    assert other.returncode == 2
    assert os.path.exists(folder / "run" / "renamed.py")


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        *sorted(str(path) for path in (ROOT / "examples").glob("*.py")),
        *("StandardCrossAttention", "SquaredReLU", "QKNorm", "RotaryPositions"),
        *("NoPositions", "GroupedKeysValues", "SandwichNorm"),
    ],
)
def test_the_worked_ideas_and_the_common_parts_train_through_deepspeed(name, corpus, tmp_path):  # noqa: F811
    arguments = [*corpus, "--exp", name, "--steps", "3", "--run-dir", "run"]
    done = run_command(arguments, launcher=launcher(1), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(losses(tmp_path / "run")) == 3
