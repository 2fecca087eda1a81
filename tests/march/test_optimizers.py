"""Every optimiser and decay, under every ZeRO stage that takes it: the library's own update, resumed and divided."""

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from training_support import ROOT, SMALL, VOCABULARY, build_trainer, process_environment, process_world

import march
from march.model import Linear
from march.training.checkpoint import Checkpoints
from march.training.engine import gather_state
from march.training.errors import NonFiniteError

# ZeRO's stage, precision, and what differs from the demo's optimiser
SETTINGS = [
    *(
        {"devices.zero": zero, "precision.compute": precision, "optimizer.decay": "matrices"}
        for zero, precision in ((0, "fp32"), (1, "fp32"), (2, "fp32"), (1, "bf16"), (2, "bf16"))
    ),
    {"devices.zero": 0, "precision.compute": "fp32", "optimizer.name": "muon", "optimizer.decay": "matrices"},
]
IDS = [" ".join(map(str, setting.values())) for setting in SETTINGS]


def small_model(name="Database"):
    own = {"database_states": 8} if name == "Database" else {}
    return march.build_model(name, seed=3, **{**SMALL, **own, "vocab_size": VOCABULARY})


def is_matrix(model, name) -> bool:
    """Is it the weight of a linear layer, rather than a table or a vector?"""
    return isinstance(model.get_submodule(name.rpartition(".")[0]), Linear)


@pytest.mark.parametrize("decay", ["all", "matrices"])
@pytest.mark.parametrize("momentum", [None, 0.5])
def test_muon_is_torchs_of_linear_layers_and_adamw_of_the_rest(decay, momentum):
    changes = {"optimizer.decay": decay, "optimizer.momentum": momentum, "optimizer.weight_decay": 3.0}
    changes |= {"optimizer.name": "muon", "devices.zero": 0, "schedule.name": "linear"}
    trainer = build_trainer(small_model(), **changes)
    names = {parameter: name for name, parameter in trainer.engine.module.model.named_parameters()}
    steps = []
    trainer.engine.basic_optimizer.register_step_pre_hook(
        lambda *_: steps.append({name: p.grad.clone() for p, name in names.items() if p.grad is not None})
    )
    trainer.run()
    assert len(steps) == 4

    model = small_model()
    parameters = dict(model.named_parameters())
    matrices = [p for name, p in parameters.items() if is_matrix(model, name)]
    vectors = [p for name, p in parameters.items() if p.ndim < 2]
    tables = [p for name, p in parameters.items() if p.ndim == 2 and not is_matrix(model, name)]
    assert all((matrices, vectors, tables))
    muon = torch.optim.Muon(
        matrices, lr=1e-3, weight_decay=3.0, momentum=momentum or 0.95, adjust_lr_fn="match_rms_adamw"
    )
    undecayed = {"weight_decay": 0.0} if decay == "matrices" else {}
    groups = [{"params": tables}, {"params": vectors, **undecayed}]
    adamw = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), weight_decay=3.0, fused=True)
    for step, gradients in enumerate(steps, 1):
        for group in (*muon.param_groups, *adamw.param_groups):
            group["lr"] = 1e-3 * (1 - step / 4)
        for name, gradient in gradients.items():
            parameters[name].grad = gradient
        muon.step()
        adamw.step()
    trained = {name: parameter for parameter, name in names.items()}
    odd = [name for name, p in parameters.items() if not torch.equal(p, trained[name])]
    assert not odd


@pytest.mark.parametrize("setting", SETTINGS, ids=IDS)
def test_a_gradient_of_the_last_group_that_is_not_finite_changes_no_weight(setting):
    """ZeRO steps one group after another: the first one waits for the others' gradients to be looked at."""
    trainer = build_trainer(small_model(), **{**setting, "optimizer.gradient_clipping": 0.0})
    before = gather_state(trainer.engine, process_world())
    gain = next(p for name, p in trainer.engine.module.named_parameters() if name.endswith("decoder.final_norm.gain"))
    gain.register_hook(lambda gradient: gradient * float("nan"))
    with pytest.raises(NonFiniteError, match=r"gradient norm is (inf|nan) in step 1"):
        trainer.run()
    after = gather_state(trainer.engine, process_world())
    assert all(torch.equal(x, after[part][name]) for part, named in before.items() for name, x in named.items())


RANK = """
import json, sys
sys.path[:0] = [{root!r}, {root!r} + "/tests/march"]
from pathlib import Path
from test_optimizers import SETTINGS, small_model
from training_support import build_trainer, process_world
from march.training.checkpoint import Checkpoints
from march.training.runfolder import RunFolder

found = []
for number, setting in enumerate(SETTINGS):
    folder = RunFolder(Path(sys.argv[1]) / str(number))
    straight = build_trainer(small_model(), folder=folder, micro_batch=2, **setting)
    straight.run()
    checkpoint = Checkpoints(folder.checkpoints, 2).load(before=4)
    resumed = build_trainer(small_model(), checkpoint=checkpoint, micro_batch=2, **setting)
    resumed.run()
    found.append([[row["loss"] for row in trainer.rows] for trainer in (straight, resumed)])
if process_world().is_first:
    Path(sys.argv[1], "found.json").write_text(json.dumps(found))
"""


def test_two_processes_are_one_and_resume_bit_for_bit(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK.replace("{root!r}", repr(str(ROOT))), str(tmp_path)],
            env=process_environment(RANK=str(rank), LOCAL_RANK=str(rank), **place),
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    errors = [rank.communicate(timeout=240)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], errors
    found = json.loads(Path(tmp_path, "found.json").read_text())
    stages = {}
    for number, (setting, (straight, resumed)) in enumerate(zip(SETTINGS, found, strict=True)):
        assert resumed == straight, setting
        alone = build_trainer(small_model(), **setting)
        alone.run()
        # one process goes on where two stopped
        checkpoint = Checkpoints(tmp_path / str(number) / "checkpoints", 2).load(before=4)
        behind = build_trainer(small_model(), checkpoint=checkpoint, **setting)
        behind.run()
        key = tuple(value for name, value in setting.items() if name != "devices.zero")
        stages.setdefault(key, alone)  # what ZeRO cuts changes nothing
        for ours, theirs in zip(alone.rows, stages[key].rows, strict=True):
            assert (ours["loss"], ours["grad_norm"]) == pytest.approx((theirs["loss"], theirs["grad_norm"]), rel=2e-3)
        assert [row["loss"] for row in behind.rows[2:]] == pytest.approx(straight[2:], abs=2e-3), setting
        # what Muon orthogonalises is rounded to bf16, as gradients are between processes
        exact = setting["precision.compute"] == "fp32" and "optimizer.name" not in setting
        assert straight == pytest.approx([row["loss"] for row in alone.rows], abs=1e-5 if exact else 2e-3), setting
