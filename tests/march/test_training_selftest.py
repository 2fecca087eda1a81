"""The kernels' self-test before a run: who compiles while who waits for what, and when it runs."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from training_support import ROOT, free_port, process_world, small_recipe

import kernels
from march import experiments
from march.training import selftest, session
from march.training.errors import UsageError

RANK = """
import sys, time
import torch
import torch.distributed as dist
from march.training import distributed, selftest
rank, port, folder = int(sys.argv[1]), sys.argv[2], sys.argv[3]
dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
world = distributed.World(rank, 2, rank, 2, torch.device("cpu"))

def say(what):
    with open(f"{folder}/{fails}", "a") as file:
        file.write(f"{rank} {what}\\n")

true = dist.all_reduce
dist.all_reduce = lambda *a, **k: say("collective") or true(*a, **k)

def compile():
    say("begins")
    time.sleep(1.0 if rank == 0 else 0.0)
    say("ends")
    if str(rank) in fails:
        raise distributed.UsageError("disagrees")
    return rank

for fails in ("nobody", "0", "1", "01"):
    try:
        say(f"result {selftest.first_of_node(world, compile)}")
    except Exception as error:
        say(type(error).__name__)
# a process that ends inside its group is now and then aborted: its threads still wait for the other
dist.barrier()
dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    """What two processes said in turn, by which of them fail."""
    folder = tmp_path_factory.mktemp("ranks")
    port, command = free_port(), [sys.executable, "-c", RANK]
    ranks = [subprocess.Popen([*command, str(r), port, str(folder)], cwd=ROOT) for r in range(2)]
    assert [rank.wait(timeout=600) for rank in ranks] == [0, 0]
    return {file.name: file.read_text().splitlines() for file in folder.iterdir()}


def test_the_first_of_a_node_compiles_before_anybody_waits_in_a_collective(said):
    lines = said["nobody"]
    assert lines[:2] == ["0 begins", "0 ends"]
    assert lines.index("0 ends") < lines.index("1 begins")
    assert min(i for i, line in enumerate(lines) if "collective" in line) > lines.index("0 ends")
    assert lines.index("1 ends") < lines.index("1 collective")
    assert {"0 result 0", "1 result 1"} <= set(lines)


@pytest.mark.parametrize("fails", ["0", "1", "01"])
def test_a_rank_that_disagrees_ends_all(said, fails):
    assert {"0 UsageError", "1 UsageError"} <= set(said[fails])
    assert not any("result" in line for line in said[fails])


SMALL = {"dim_model": 32, "num_layers": 2, "num_heads": 2, "dim_qkv": 16, "dim_feedforward": 64, "vocab_size": 200}


def _configuration(name="Baseline"):
    return experiments.configuration(name, **SMALL)


def test_a_kernel_that_disagrees_refuses_the_run(monkeypatch):
    def refuse(impl, device, dtype, step):
        assert (impl, device.type, dtype) == ("torch", "cpu", torch.bfloat16)
        step()  # runs on meta tensors
        raise kernels.ImplementationError("glu: impl='triton' disagrees")

    monkeypatch.setattr(kernels, "self_test", refuse)
    with pytest.raises(UsageError, match="disagrees"):
        selftest.check(_configuration(), (31, 13), 4, "torch", "bf16", process_world())


def test_the_step_trains_and_evaluates():
    """Twice the forward calls of one pass: the evaluation has no dropout and no graph."""
    seen = []

    def wrap(operator, function):
        def call(*tensors, **kwargs):
            seen.append((operator, torch.is_grad_enabled(), kwargs.get("dropout") is not None, tensors[0].device.type))
            return function(*tensors, **kwargs)

        return call

    step = selftest.meta_step(_configuration(), (31, 13), 4, "auto", "fp32", "cpu")
    with kernels.dispatch.observed(wrap):
        step()
    training, evaluation = (seen[: len(seen) // 2], seen[len(seen) // 2 :])
    assert [x[0] for x in training] == [x[0] for x in evaluation]
    assert all(x[1] and x[3] == "meta" for x in training)
    assert not any(x[1] or x[2] for x in evaluation)
    assert any(x[2] for x in training)


@pytest.mark.parametrize(("chosen", "checked"), [(4, [4]), (2, [4, 2])])
def test_kernels_are_checked_before_the_trial_that_uses_them(monkeypatch, chosen, checked):
    """At the micro-batch of the trial, and again where the trial ends with another."""
    seen = []
    monkeypatch.setattr(session.selftest, "check", lambda config, lengths, size, *_: seen.append(("check", size)))
    monkeypatch.setattr(session, "trial", lambda *a: lambda size: None)

    def choose(attempt, share, start, world, say):
        seen.append(("trial", start))
        return chosen

    monkeypatch.setattr(session, "choose_micro_batch", choose)
    request = small_recipe(**{"batch.sequences": 4, "batch.micro": 4, "devices.impl": "torch"})
    corruption = SimpleNamespace(input_length=31, label_length=13)
    size = session.fit_micro_batch(request, _configuration(), torch.nn.Linear(1, 1), corruption, process_world())
    assert size == chosen
    assert seen == [("check", 4), ("trial", 4), *(("check", n) for n in checked[1:])]
