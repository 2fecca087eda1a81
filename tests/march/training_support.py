"""What the training tests share: a small corpus, a small model, and DeepSpeed's engine inside the test process."""

import contextlib
import io
import itertools
import json
import os
import random
import socket
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import pytest

from march.data import Examples, SpanCorruption
from march.recipe import Recipe, build, merge, tree_of
from march.training import distributed
from march.training.arguments import nested
from march.training.distributed import World, start
from march.training.loop import Plan, Trainer
from march.training.main import main

ROOT = Path(__file__).resolve().parents[2]
LAUNCHER = (str(Path(sys.executable).with_name("deepspeed")),)
_PORTS = itertools.count(10_000 + os.getpid() % 400 * 50)

# Overrides that shrink any experiment to some ten thousand parameters. Per-block lists and the database keep
# their own values: an override changes the field named and nothing else.
SMALL = {"dim_model": 32, "num_layers": 2, "num_heads": 2, "dim_qkv": 16, "dim_feedforward": 64, "max_length": 128}
VOCABULARY = 200


def small_overrides(**more) -> list[str]:
    """SMALL as --set options."""
    return [part for name, value in {**SMALL, **more}.items() for part in ("--set", f"{name}={value}")]


def write_corpus(path: Path) -> Path:
    """400 documents of words with a skewed frequency, as JSON lines."""
    draw = random.Random(0)
    words = [f"{head}{tail}" for head in ("ba", "do", "ki", "lu", "ne", "so") for tail in ("r", "mo", "st", "gri")]
    weights = [1 / (rank + 1) for rank in range(len(words))]
    documents = (" ".join(draw.choices(words, weights, k=60)) + "." for _ in range(400))
    path.write_text("\n".join(json.dumps({"text": text}) for text in documents), encoding="utf-8")
    return path


def small_recipe(**changes) -> Recipe:
    """Four steps of 8 sequences of 32 tokens, in float32; changes: leaves, dotted or with __ for the dot."""
    small = {
        "schedule.steps": 4,
        "batch.sequences": 8,
        "batch.sequence_length": 32,
        "evaluation.every": 2,
        "evaluation.sequences": 5,
        "checkpoints.every": 2,
        "checkpoints.keep": 2,
        "precision": "fp32",
        "seed": 7,
    }
    named = {name.replace("__", "."): value for name, value in changes.items()}
    return build(merge(tree_of("demo"), nested({**small, **named})))


def process_world() -> World:
    """This test process as the only one, its process group started once."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    return start()


def build_trainer(model, *, micro_batch=8, folder=None, checkpoint=None, **changes):
    """A trainer over tokens drawn from a skewed distribution; the model is built by the caller."""
    recipe = small_recipe(**changes)
    tokens = np.random.default_rng(0).zipf(1.3, 8000).clip(max=VOCABULARY - 112) + 111
    corruption = SpanCorruption(raw_length=recipe.batch.sequence_length)
    plan = Plan(
        recipe=recipe,
        micro_batch=micro_batch,
        train=Examples(tokens.astype(np.uint16), corruption, recipe.seed),
        validation=Examples(tokens[:2000].astype(np.uint16), corruption, 0),
    )
    return Trainer(plan, model, process_world(), folder, checkpoint, quiet=True)


def run_command(
    arguments: list[str], *, launcher=(), cwd: Path, timeout=600, **environment
) -> subprocess.CompletedProcess:
    """train.py in processes of its own, from `cwd`; `launcher` goes before it instead of the Python interpreter."""
    command = [*(launcher or (sys.executable,)), str(ROOT / "train.py"), *arguments]
    return subprocess.run(
        command, cwd=cwd, env=process_environment(**environment), capture_output=True, text=True, timeout=timeout
    )


def run_here(arguments: list[str], *, cwd: Path) -> subprocess.CompletedProcess:
    """As run_command, in this process: two imports of torch and DeepSpeed less."""
    out, errors = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(errors):
        patch.chdir(cwd)
        patch.setattr(distributed, "stop", lambda world: None)  # a process group can be made once a process
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
            patch.delenv(name, raising=False)
        code = main(arguments)
    return subprocess.CompletedProcess(arguments, code, out.getvalue(), errors.getvalue())


def process_environment(**changes) -> dict[str, str]:
    """This process's environment without what a process group of the test process left in it."""
    group = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "LOCAL_SIZE", "CROSS_RANK", "CROSS_SIZE")
    kept = {name: value for name, value in os.environ.items() if name not in group}
    return {**kept, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **changes}


def free_port() -> str:
    """One of this process's share of the ports below those that a system gives away: between here and its use no
    neighbour takes it."""
    for port in _PORTS:
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return str(port)


def launcher(processes: int = 2) -> tuple[str, ...]:
    """DeepSpeed's, for run_command."""
    return (*LAUNCHER, "--num_gpus", str(processes), "--master_port", free_port())


def one_line(text: str) -> str:
    """The only line that starts with the program's name, after checking that nothing was thrown."""
    assert "Traceback" not in text
    lines = [line for line in text.splitlines() if line.startswith("train.py: ")]
    assert len(lines) == 1, text
    assert len(lines[0]) < 600
    return lines[0]


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in metrics(folder)]


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
