"""NaN and infinity, wherever they arise: the step is named with its sequences, the weights do not see it, nothing of it
is saved."""

import json
import math

import pytest
import torch
from models import batch  # noqa: F401 the helpers are found
from training_support import SMALL, VOCABULARY, build_trainer, process_world

import march
from march.data.order import step_indices
from march.training.checkpoint import Checkpoints, tag_of
from march.training.engine import gather_state
from march.training.errors import NonFiniteError, RunError
from march.training.replay import replay
from march.training.runfolder import RunFolder

SETTINGS = {
    "float32": {"zero": 1},
    "float32, no ZeRO": {"zero": 0},
    "float32, ZeRO 2": {"zero": 2},
    "bf16": {"precision": "bf16"},
    "bf16, ZeRO 2": {"precision": "bf16", "zero": 2},
    "float32, accumulation": {"micro_batch": 2},
    "no ZeRO, accumulation": {"micro_batch": 2, "zero": 0},
    "bf16, accumulation": {"micro_batch": 4, "precision": "bf16"},
    "float32, no clipping": {"clipping": 0.0},
    "no ZeRO, no clipping": {"zero": 0, "clipping": 0.0},
    "bf16, ZeRO 2, no clipping": {"precision": "bf16", "zero": 2, "clipping": 0.0},
}


def small_model():
    torch.manual_seed(3)
    return march.build_model("Baseline", **{**SMALL, "vocab_size": VOCABULARY})


def trainer_of(folder, *, clipping=1.0, checkpoint_every=100, steps=4, **settings):
    changes = {"optimizer.gradient_clipping": clipping, "schedule.steps": steps, "checkpoints.every": checkpoint_every}
    changes |= {"devices.zero": settings.pop("zero", 1), "checkpoints.keep": 1}
    return build_trainer(small_model(), folder=folder, **changes, **settings)


def state_of(trainer):
    return gather_state(trainer.engine, trainer.step, process_world())


def poison_gradient(trainer, step, value):
    """The gradient of one weight of the step, in its last micro-batch."""
    parameter = next(p for p in trainer.engine.module.parameters() if p.ndim == 2)
    calls = [0]

    def hook(gradient):
        calls[0] += 1
        if calls[0] == step * trainer.accumulation:
            gradient = gradient.clone()
            gradient[0, 0] = value
        return gradient

    parameter.register_hook(hook)


@pytest.mark.fault("gradient not finite, loss finite", "stopped before the weights saw it, step and sequences named")
@pytest.mark.parametrize("value", [math.inf, math.nan], ids=str)
@pytest.mark.parametrize("setting", SETTINGS)
def test_a_gradient_that_is_not_finite_reaches_no_weight(tmp_path, setting, value):
    straight = trainer_of(None, steps=2, **SETTINGS[setting])
    straight.run()
    before = state_of(straight)
    trainer = trainer_of(RunFolder(tmp_path), **SETTINGS[setting])
    poison_gradient(trainer, 3, value)
    with pytest.raises(
        NonFiniteError, match=r"gradient norm is (inf|nan) in step 3, sequences \d+, .*--replay 3"
    ) as raised:
        trainer.run()
    after = state_of(trainer)
    for part, named in before.items():
        for name, tensor in named.items():
            assert torch.equal(tensor, after[part][name]), (part, name)
    rows = step_indices(2, 8, len(trainer.plan.train), 7)[0].tolist()
    assert raised.value.facts == {"failed_step": 3, "sequences": rows}
    saved = Checkpoints(tmp_path / "checkpoints", 1).load()  # the steps before it are not lost
    assert (saved.step, [row["step"] for row in saved.state["rows"]]) == (2, [1, 2])
    assert all(torch.equal(saved.tensors[part][name], before[part][name]) for part in before for name in before[part])


@pytest.mark.fault("gradient not finite, DeepSpeed's own check off", "stopped before the weights saw it")
@pytest.mark.parametrize("clipping", [0.0, 1.0], ids=lambda clipping: f"clipping {clipping:g}")
def test_no_weight_depends_on_deepspeeds_check(clipping, monkeypatch):
    """It is a setting there, and off for some precisions in some versions."""
    from deepspeed.runtime.zero import stage_1_and_2

    monkeypatch.setattr(stage_1_and_2, "is_invalid_grad_norm", lambda norm: False)
    trainer = trainer_of(None, precision="bf16", zero=2, clipping=clipping)
    trainer.engine.optimizer.check_grad_overflow = False
    poison_gradient(trainer, 1, math.nan)
    before = state_of(trainer)["model"]
    with pytest.raises(NonFiniteError, match=r"gradient norm is (inf|nan) in step 1"):
        trainer.run()
    after = state_of(trainer)["model"]
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.fault("a gradient whose norm overflows float32", "stopped before the weights saw it")
@pytest.mark.parametrize("zero", [0, 1])
def test_a_norm_that_overflows_stops_the_run(zero):
    """Every element finite, the sum of squares not: clipping would multiply by zero, and nothing would be learnt."""
    trainer = trainer_of(None, zero=zero)
    poison_gradient(trainer, 2, 1e30)
    with pytest.raises(NonFiniteError, match="in step 2"):
        trainer.run()


@pytest.mark.fault("loss not finite", "stopped before the weights saw it, its micro-batch's sequences named")
@pytest.mark.parametrize("step", [1, 4])
@pytest.mark.parametrize("setting", ["float32", "no ZeRO, accumulation", "bf16, accumulation"])
def test_a_loss_that_is_not_finite_names_its_sequences(tmp_path, setting, step):
    trainer = trainer_of(RunFolder(tmp_path), checkpoint_every=2, **SETTINGS[setting])
    module, healthy, calls = trainer.engine.module, trainer.engine.module.forward, [0]

    def forward(*inputs):
        calls[0] += module.training
        loss = healthy(*inputs)
        return loss * math.nan if module.training and calls[0] == step * trainer.accumulation else loss

    module.forward = forward
    with pytest.raises(NonFiniteError, match=rf"loss is nan in step {step}, sequences") as raised:
        trainer.run()
    rows = step_indices(step - 1, 8, len(trainer.plan.train), 7)[0].tolist()
    assert raised.value.facts["sequences"] == rows[-trainer.plan.micro_batch :]
    # the steps before it are saved beside what was there, whatever is to be kept
    assert Checkpoints(tmp_path / "checkpoints", 1).tags() == [tag_of(n) for n in ([0] if step == 1 else [2, 3])]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == step - 1


STATE = {"a weight": "param", "a first moment": "exp_avg", "a second moment": "exp_avg_sq"}


@pytest.mark.fault(
    "the optimiser's state not finite, loss and gradient finite", "not saved, the older checkpoint stays"
)
@pytest.mark.parametrize("value", [math.nan, math.inf], ids=str)
@pytest.mark.parametrize("zero", [0, 1])
@pytest.mark.parametrize("part", ["exp_avg", "exp_avg_sq"])
def test_a_moment_that_is_not_finite_is_never_saved(tmp_path, part, zero, value):
    trainer = trainer_of(RunFolder(tmp_path), zero=zero, checkpoint_every=2, steps=4)
    record = trainer._record

    def poison(row):
        record(row)
        if row["step"] == 3:
            for moments in trainer.engine.basic_optimizer.state.values():
                moments[part].view(-1)[5] = value

    trainer._record = poison
    with pytest.raises(RunError, match=r"not finite|evaluation loss is nan|is nan in step"):
        trainer.run()
    directory = tmp_path / "checkpoints"
    assert [path.name for path in sorted(directory.glob("step-*"))] == ["step-00000002"]
    assert Checkpoints(directory, 1).load().warning is None


@pytest.mark.fault("evaluation not finite", "said, nothing saved, the older checkpoint stays")
def test_an_evaluation_that_is_not_finite_ends_the_run(tmp_path):
    trainer = trainer_of(RunFolder(tmp_path), checkpoint_every=2)
    module, healthy = trainer.engine.module, trainer.engine.module.forward
    module.forward = lambda *inputs: healthy(*inputs) * (1.0 if module.training or trainer.step < 4 else math.nan)
    with pytest.raises(RunError, match=r"evaluation loss is nan after step 4.*--resume continues from step 2"):
        trainer.run()
    assert Checkpoints(tmp_path / "checkpoints", 1).load().step == 2
    assert all(
        math.isfinite(json.loads(line)["loss"]) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()
    )


@pytest.mark.fault("replay of a step that was not finite", "says which sequence and which gradients")
def test_replay_says_what_is_not_finite(tmp_path):
    def poisoned(folder, checkpoint=None):
        trainer = build_trainer(
            small_model(),
            checkpoints__every=100,
            folder=folder,
            checkpoint=checkpoint,
            micro_batch=4,
        )
        guilty = trainer.plan.train.batch(*[part[5:6] for part in step_indices(2, 8, len(trainer.plan.train), 7)])
        module, healthy = trainer.engine.module, trainer.engine.module.forward

        def forward(ids, *rest):
            loss = healthy(ids, *rest)
            found = module.training and (ids == torch.from_numpy(guilty.input_ids)).all(1).any()
            return loss * math.nan if found else loss

        module.forward = forward
        return trainer

    with pytest.raises(NonFiniteError, match="loss is nan in step 3"):
        poisoned(RunFolder(tmp_path)).run()
    checkpoint = Checkpoints(tmp_path / "checkpoints", 1).load(before=3)
    report = replay(poisoned(None, checkpoint), 3)
    row = step_indices(2, 8, len(build_trainer(small_model()).plan.train), 7)[0][5]
    assert "replay of step 3 from the checkpoint of step 2" in report
    assert "sequences 4 to 7 of the step: loss is nan" in report
    assert f"training sequence {row}: loss is nan" in report
    assert "sequences 0 to 3" not in report
    assert "gradient of" in report
    healthy = replay(build_trainer(small_model(), checkpoint=checkpoint, micro_batch=4), 3)
    assert "everything is finite" in healthy
