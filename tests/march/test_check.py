"""`march check`: each fault of an idea is found by the question it belongs to, and the worked ideas have none."""

import subprocess
import sys
from pathlib import Path

import broken_ideas
import pytest
import torch
from training_support import ROOT, process_environment

from march import experiments
from march.check import costs, effects, training
from march.check.probes import PROBES, Fault
from march.check.subject import Subject

BROKEN = Path(broken_ideas.__file__)
EXAMPLES = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "examples").glob("*.py"))
QUESTIONS = {**PROBES, "20 steps": training.twenty_steps}
SEVEN = [
    "StandardCrossAttention",
    "SquaredReLU",
    "QKNorm",
    "RotaryPositions",
    "NoPositions",
    "GroupedKeysValues",
    "SandwichNorm",
]


def subject(name):
    return Subject.of(experiments.get(name))


def page(*words, **environment):
    command = [sys.executable, "-m", "march.cli", "check", *words]
    return subprocess.run(
        command, cwd=ROOT, env=process_environment(**environment), capture_output=True, text=True, timeout=600
    )


@pytest.mark.parametrize("name", [n for n, q in broken_ideas.FAULTS.items() if q in QUESTIONS])
def test_each_fault_is_found(name):
    with pytest.raises((Fault, TypeError)) as found:
        QUESTIONS[broken_ideas.FAULTS[name]](subject(f"{BROKEN}:{name}"))
    assert getattr(found.value, "fix", "the page says where it was raised")


@pytest.mark.parametrize("name", ["OwnWrongValue", "OwnWrongSlope", "OwnTorchInTriton"])
def test_an_activation_whose_device_code_differs_is_found(name):
    found = page("--fused", f"{BROKEN}:{name}", TRITON_INTERPRET="1")
    assert found.returncode == 1, found.stderr
    assert "activation" in found.stdout.splitlines()[-1]


def test_a_parameter_without_a_rule_does_not_build():
    with pytest.raises(RuntimeError, match="got no rule"):
        subject(f"{BROKEN}:OwnNoRule")


@pytest.mark.parametrize("name", EXAMPLES)
@pytest.mark.parametrize(
    "question",
    [pytest.param(q, marks=[pytest.mark.slow] * (q in ("future tokens", "gradients", "20 steps"))) for q in QUESTIONS],
)
def test_the_worked_ideas_have_no_fault(name, question, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert QUESTIONS[question](subject(name))


@pytest.mark.slow
@pytest.mark.parametrize("name", [*EXAMPLES, *SEVEN, "Database", "UnifiedAttention", "MixedActSOMDropout", "Best"])
def test_the_page_of_a_sound_idea(name):
    done = page(name)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 FAIL" in done.stdout


def test_the_page_of_a_broken_idea():
    """80 columns, what fails and what to do, exit code 1; what fails does not end the rest."""
    done = page(f"{BROKEN}:OwnNoRule")
    assert done.returncode == 1, done.stderr
    lines = done.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    assert any(line.startswith("FAIL build") for line in lines)
    assert any(line.strip().startswith("->") for line in lines)
    assert "1 FAIL" in lines[-1]


RUDE = [
    "march.model.FeedForward.forward = lambda self, z, ctx: z",
    "kernels.activations.ACTIVATIONS['mine'] = kernels.activations.ACTIVATIONS['relu']",
    "torch.set_default_dtype(torch.float64)",
    "torch.manual_seed(5)",
    "torch.nn.functional.gelu = torch.relu",
    "march.model.Norm.formula = lambda self, x: x",
]
ASK = """
import os, sys
from march import experiments
from march.check import effects
before = effects.snapshot()
for path in sys.argv[1:]:
    if os.fork() == 0:  # what it changes is its own
        assert not effects.changed(before)
        experiments.get(path)
        os._exit(0 if effects.changed(before) else 3)
    assert os.wait()[1] == 0, path
"""


def test_what_a_file_changes_beside_itself_is_found(tmp_path):
    head = "import torch, kernels, march.model\nfrom march.experiments import Experiment\n"
    paths = [tmp_path / f"rude{number}.py" for number in range(len(RUDE))]
    for path, line in zip(paths, RUDE, strict=True):
        path.write_text(f"{head}{line}\nRude = Experiment('Rude', 'Baseline', {{}}, 'Baseline', '')\n")
    command = [sys.executable, "-c", ASK, *map(str, paths)]
    done = subprocess.run(command, cwd=ROOT, env=process_environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_costs_are_beside_the_controls():
    rows = {what: rest for what, *rest in costs.compared(experiments.get("SandwichNorm"))}
    assert rows["parameters"] == ["36,347,904", "+7,680 to Baseline"]
    assert rows["FLOPs a sequence"][1] == "+0.0% to Baseline"


def test_a_snapshot_is_the_same_twice():
    torch.rand(1)
    before = effects.snapshot()
    torch.rand(1)  # within a block of the generator: only its position moves on
    assert effects.changed(before) == ["torch's generator"]
