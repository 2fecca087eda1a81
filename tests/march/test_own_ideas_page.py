"""docs/own_ideas.md: its diffs apply and do what it says, each in one file; its example runs."""

import re
import shutil
import subprocess
import sys

import pytest
from training_support import ROOT, process_environment

from march import experiments

PAGE = (ROOT / "docs" / "own_ideas.md").read_text(encoding="utf-8")
DIFFS = re.findall(r"```diff\n(.*?)```", PAGE, re.DOTALL)
SIZES = "vocab_size=97, max_length=24, dim_model=32, dim_feedforward=48, seed=1"
AGREE = """
import torch, march
from march import cost, experiments
def logits(impl):
    ids = torch.arange(24).view(2, 12)
    return model(impl).eval()(ids, ids[:, :7]).logits
def model(impl):
    return march.build_model(NAME, impl=impl, **dict(SIZES), **FIELDS)
torch.testing.assert_close(logits("torch"), logits("reference"))
print(cost.total_parameters(experiments.configuration(NAME, **FIELDS)))
"""


@pytest.mark.parametrize(
    ("number", "file", "name", "fields", "parameters"),
    [
        (0, "kernels/activations.py", "Baseline", "dict(activation='leaky')", 36_340_224),
        (1, "examples/sandwich_norm.py", "examples/sandwich_norm.py:Sandwich", "{}", 36_340_224 + 15 * 512),
        # gains of 64 for queries and keys, and a temperature of 8 heads, in 6 self-attentions
        (2, "examples/qk_norm.py", "examples/qk_norm.py:NormalisedScores", "{}", 36_340_224 + 6 * (128 + 8)),
    ],
)
def test_a_diff_of_one_file_is_enough(number, file, name, fields, parameters, tmp_path):
    assert re.findall(r"^\+\+\+ b/(.*)$", DIFFS[number], re.MULTILINE) == [file]
    for folder in ("kernels", "march", "examples"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    subprocess.run(["git", "apply", "-p1"], input=DIFFS[number], text=True, cwd=tmp_path, check=True)
    code = AGREE.replace("NAME", repr(name)).replace("FIELDS", fields).replace("dict(SIZES)", f"dict({SIZES})")
    environment = process_environment(PYTHONPATH=str(tmp_path))
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == parameters


def test_the_file_of_the_page_is_an_experiment(tmp_path):
    (tmp_path / "my_idea.py").write_text(re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)[0])
    assert experiments.get(f"{tmp_path}/my_idea.py:MyIdea").parts.keys() == {"feedforward"}
