"""A run imports nothing before it uses it, and estimates nothing that is plain: a tiny one starts in seconds."""

import json
import subprocess
import sys
import types

import pytest
import torch
from training_support import SMALL, process_environment, process_world, small_overrides, write_corpus

from march import config as configuration
from march import experiments
from march.config import resolve
from march.model import Transformer
from march.training.engine import AdamW, compiled_at_first_call, import_muon
from march.training.microbatch import sequence_bytes, trial

# torch's compiler, 3 s, and sympy; what reads and writes other data; a window system's side of matplotlib
UNUSED = ("torch._dynamo", "torch._inductor", "sympy", "datasets", "pyarrow", "pandas", "gensim", "matplotlib.pyplot")
CODE = """
import json, sys
from march.training.main import main
code = main(sys.argv[1:])
print(json.dumps(sorted(sys.modules)))
sys.exit(code)
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Options of a prepared corpus."""
    folder = tmp_path_factory.mktemp("start")
    options = ["--source", "files", "--files", str(write_corpus(folder / "text.jsonl")), "--vocab-size", "400"]
    options += ["--directory", str(folder / "data")]
    command = [sys.executable, "-m", "march.data", "prepare", *options]
    subprocess.run(command, cwd=folder, env=process_environment(), check=True, capture_output=True)
    return options


@pytest.mark.parametrize(
    "options",
    [(), ("--exp", "MixedActSOMDropout", "--precision", "fp32", "--zero", "2", "--micro-batch", "8")],
    ids=" ".join,
)
def test_a_run_imports_no_compiler_and_no_reader(data, tmp_path, options):
    arguments = [*data, "--steps", "2", *small_overrides(), "--run-dir", str(tmp_path / "run"), *options]
    done = subprocess.run(
        [sys.executable, "-c", CODE, *arguments],
        cwd=tmp_path,
        env=process_environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "curve.png").stat().st_size > 1000
    modules = json.loads(done.stdout)
    assert "deepspeed" in modules
    assert [name for name in UNUSED if name in modules] == []


@pytest.mark.parametrize(
    "name",
    ["Baseline", "GELUGatedLinearUnit", "MixedActSOMDropout", "DatabaseFromHeads", "UnifiedAttention", "QKNorm"],
)
def test_sequences_take_at_most_in_proportion_to_one(name):
    """The bound that spares the estimate."""
    config = configuration.override(experiments.configuration(name), **SMALL, vocab_size=5000)
    model, world = Transformer(resolve(config), "torch"), process_world()
    attempt = trial(model, (61, 23), 5000, config.precision, 1, world)
    one, many = (sequence_bytes(model, lambda _, size=size: attempt(size), world) for size in (1, 16))
    assert one < many <= 16 * one


def test_one_sequence_that_does_not_fit_is_no_bound():
    def attempt(size):
        raise MemoryError

    assert sequence_bytes(torch.nn.Linear(1, 1), attempt, process_world()) == float("inf")
    with pytest.raises(ZeroDivisionError):
        sequence_bytes(torch.nn.Linear(1, 1), lambda size: 1 / 0, process_world())


def test_adamw_is_torchs_bit_by_bit():
    def trained(kind):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Linear(7, 3))
        optimizer = kind(model.parameters(), lr=1e-2, weight_decay=0.1, fused=True)
        seen = []
        optimizer.register_step_pre_hook(lambda *_: seen.append(torch.is_grad_enabled()))
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.ones(2, 5)).square().sum().backward()
            optimizer.step()
        assert seen == [True] * 3
        return [*model.parameters(), *(x for state in optimizer.state.values() for x in state.values())]

    for ours, theirs in zip(trained(AdamW), trained(torch.optim.AdamW), strict=True):
        assert torch.equal(ours, theirs)


def test_a_function_is_compiled_when_it_is_called(monkeypatch):
    compiled = []

    def compile(function, **options):
        compiled.append((function.__name__, options))
        return lambda *a: ("compiled", function(*a))

    monkeypatch.setattr(torch, "compile", compile)

    @compiled_at_first_call
    def plain(x):
        return x + 1

    @compiled_at_first_call(dynamic=True)
    def configured(x):
        return x + 2

    assert compiled == []
    assert [plain(1), plain(2), configured(1)] == [("compiled", 2), ("compiled", 3), ("compiled", 3)]
    assert compiled == [("plain", {}), ("configured", {"dynamic": True})]
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert plain(1) == 2  # part of what is compiled around it


def test_deepspeeds_muon_is_still_compiled():
    import_muon()
    from deepspeed.runtime.zero.muon import muon_optimizer, original_muon

    compile = torch.compile
    assert isinstance(compile, types.FunctionType)
    assert compile.__module__ == "torch"  # put back
    assert muon_optimizer.muon_update is original_muon.muon_update
    for name in ("zeropower_via_newtonschulz5", "muon_update"):
        function = getattr(original_muon, name)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "compile", lambda function, **options: lambda *a, **k: "compiled")
            assert function() == "compiled"
