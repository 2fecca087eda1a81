"""The loop through DeepSpeed's engine, in this process: split of the batch, state, failures."""

import models
import numpy as np
import pytest
import torch
from training_support import SMALL, VOCABULARY, build_trainer, process_world, small_recipe

import march
from march import experiments
from march.training.checkpoint import Checkpoints
from march.training.distributed import largest, together, total
from march.training.engine import deepspeed_config, gather_state, validate
from march.training.errors import RunError, UsageError
from march.training.runfolder import RunFolder


def small_model(name="Baseline", **changes):
    torch.manual_seed(3)
    return march.build_model(name, **{**SMALL, "vocab_size": VOCABULARY, **changes})


@pytest.mark.parametrize("name", experiments.names())
def test_every_experiment_trains_two_steps_and_changes_every_live_weight(name):
    model = models.small_model(name, vocab_size=VOCABULARY, max_length=64)
    before = {key: value.detach().clone() for key, value in model.named_parameters()}
    outcome = build_trainer(model, schedule__steps=2).run()
    assert outcome.steps == 2
    assert np.isfinite([outcome.first_loss, outcome.final_loss, outcome.eval_loss]).all()
    unchanged = [key for key, value in model.named_parameters() if torch.equal(value, before[key])]
    # weight decay moves dead weights too; only gains of exactly one step of zero gradient could stay
    assert not unchanged


@pytest.mark.parametrize("clipping", [0.0, 0.05, 1e9])
@pytest.mark.parametrize(("zero", "decay"), [(0, "all"), (0, "matrices"), (1, "all"), (2, "all")])
def test_steps_are_those_of_plain_torch(zero, decay, clipping):
    """Weights, moments, losses, norms against autograd over the global batch at once, torch's clip and torch's AdamW:
    dropout by (seed, step, sequence) in training alone, micro-batches accumulated, a schedule that moves at every step,
    an epsilon that shows a gradient's scale, a decay that shows in three steps."""
    changes = {"optimizer.epsilon": 0.1, "optimizer.lr": 0.05, "optimizer.weight_decay": 2.0, "optimizer.decay": decay}
    changes |= {"schedule.name": "cosine", "schedule.warmup": 2, "schedule.steps": 3, "devices.zero": zero}
    trainer = build_trainer(small_model(), micro_batch=2, **changes, **{"optimizer.gradient_clipping": clipping})
    trainer.run()
    recipe = trainer.plan.recipe
    plain = small_model()
    named = dict(plain.named_parameters())
    groups = [{"params": [p], "weight_decay": 2.0 if decay == "all" or p.ndim > 1 else 0.0} for p in named.values()]
    adamw = torch.optim.AdamW(groups, betas=(recipe.optimizer.beta1, recipe.optimizer.beta2), eps=0.1)
    whole = build_trainer(small_model(), micro_batch=8, **changes)._batches()

    def loss_of(batch, state):
        batch = [torch.from_numpy(getattr(batch, n)) for n in ("input_ids", "decoder_input_ids", "labels")]
        return plain(*batch[:2], labels=batch[2], dropout_state=state).loss

    for step, row in enumerate(trainer.rows):
        (micro,) = whole.collate(step)
        loss = loss_of(micro.batch, torch.tensor([recipe.seed, step, 0]))
        loss.backward()
        for parameter in named.values():  # a dead weight decays too
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), clipping or float("inf"))
        assert norm > 0.05  # so that the smaller limit clips
        assert row["loss"] == pytest.approx(loss.item(), abs=1e-5)
        assert row["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
        assert row["lr"] == recipe.learning_rate(step + 1)
        for group in adamw.param_groups:
            group["lr"] = recipe.learning_rate(step + 1)
        adamw.step()
        adamw.zero_grad()
    state = gather_state(trainer.engine, 3, process_world())
    for name, parameter in named.items():
        expected = {"model": parameter, **{key: adamw.state[parameter][key] for key in ("exp_avg", "exp_avg_sq")}}
        for part, tensor in expected.items():
            wrong = (state[part][name] - tensor).norm() / (tensor.norm() + 1e-9)
            assert wrong < 1e-4, f"{part} of {name} differs by {wrong:.1e} of its norm"
    plain.eval()
    sequences = range(recipe.evaluation.sequences)  # no multiple of the micro-batch
    expected = loss_of(trainer.plan.validation.batch(sequences, 0), None).item()
    assert trainer.rows[-1]["eval_loss"] == pytest.approx(expected, abs=1e-5)
    assert trainer.evaluate() == trainer.evaluate() == trainer.rows[-1]["eval_loss"]
    assert trainer.engine.module.training


@pytest.mark.parametrize(("precision", "zero"), [("fp32", 0), ("fp32", 1), ("bf16", 1), ("fp32", 2), ("bf16", 2)])
def test_resume_is_bitwise(tmp_path, precision, zero):
    settings = {"precision": precision, "devices.zero": zero, "micro_batch": 4}
    settings |= {"schedule.name": "cosine", "schedule.warmup": 3, "schedule.final": 0.1}
    settings |= {"optimizer.decay": "matrices"} if zero == 0 else {}
    straight = build_trainer(small_model(), **settings)
    straight.run()
    folder = RunFolder(tmp_path)
    build_trainer(small_model(), folder=folder, **settings).run()
    checkpoint = Checkpoints(folder.checkpoints, 2).load(before=4)
    assert checkpoint.step == 2
    other = small_model()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.fill_(0.5)  # what is not loaded would show
    resumed = build_trainer(other, folder=folder, checkpoint=checkpoint, **settings)
    outcome = resumed.run()
    for key in ("loss", "lr", "grad_norm"):
        assert [row[key] for row in resumed.rows] == [row[key] for row in straight.rows]
    assert resumed.rows[-1]["eval_loss"] == straight.rows[-1]["eval_loss"]
    spent = np.cumsum([row["seconds"] for row in resumed.rows])  # over both starts
    assert [row["elapsed"] for row in resumed.rows] == pytest.approx(spent, abs=2e-3)
    assert outcome.training_seconds == pytest.approx(spent[-1], abs=2e-3)
    assert outcome.first_loss == straight.rows[0]["loss"]
    ours, theirs = gather_state(resumed.engine, 4, process_world()), gather_state(straight.engine, 4, process_world())
    assert ours.keys() == theirs.keys() == {"model", "exp_avg", "exp_avg_sq"}
    for part in ours:
        assert all(torch.equal(ours[part][name], theirs[part][name]) for name in ours[part])


def test_a_checkpoint_of_one_zero_stage_continues_on_another(tmp_path):
    folder = RunFolder(tmp_path)
    build_trainer(small_model(), schedule__steps=2, folder=folder, devices__zero=0).run()
    straight = build_trainer(small_model(), devices__zero=1)
    straight.run()
    checkpoint = Checkpoints(folder.checkpoints, 2).load()
    resumed = build_trainer(small_model(), folder=folder, checkpoint=checkpoint, devices__zero=1)
    resumed.run()
    assert [row["loss"] for row in resumed.rows] == pytest.approx([row["loss"] for row in straight.rows], abs=1e-6)


@pytest.mark.parametrize(("every", "steps"), [(1, 3), (2, 5), (3, 6), (4, 3)])
def test_there_is_a_checkpoint_of_every_interval_and_of_the_last_step(tmp_path, every, steps):
    folder = RunFolder(tmp_path)
    changes = {"checkpoints.every": every, "checkpoints.keep": 9, "schedule.steps": steps, "evaluation.every": 100}
    trainer = build_trainer(small_model(), folder=folder, **changes)
    trainer.run()
    assert [row["step"] for row in trainer.rows if "eval_loss" in row] == [steps]
    due = {step for step in range(1, steps + 1) if step % every == 0 or step == steps}
    assert [loaded["step"] for loaded in Checkpoints(folder.checkpoints, 9).states()] == sorted(due, reverse=True)


def test_out_of_memory_in_a_step_says_what_to_do():
    trainer = build_trainer(small_model(), micro_batch=4)

    def full(*inputs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    trainer.engine.module.forward = full
    with pytest.raises(RunError, match=r"out of memory in step 1 at micro-batch 4; .*--micro-batch 2"):
        trainer.run()


def test_configuration_is_checked_key_by_key():
    config = deepspeed_config(small_recipe(precision="bf16"), 2, 2)
    assert config["gradient_accumulation_steps"] == 2
    assert config["train_batch_size"] == 8
    with pytest.raises(UsageError, match="zero_optimisation; did you mean zero_optimization"):
        validate({**config, "zero_optimisation": {"stage": 3}})
    with pytest.raises(UsageError, match=r"zero_optimization\.stag; did you mean zero_optimization\.stage"):
        validate({"zero_optimization": {"stag": 1}})
    with pytest.raises(UsageError, match=r"gradient_clipping of type float, got '1\.0'"):
        validate({"gradient_clipping": "1.0"})
    with pytest.raises(UsageError, match="multiple of micro-batch x processes, got 3 x 1"):
        deepspeed_config(small_recipe(precision="bf16"), 3, 1)
    with pytest.raises(UsageError, match="--zero 1 or higher with bf16"):
        deepspeed_config(small_recipe(precision="bf16", devices__zero=0), 2, 1)


def test_agreement_helpers_with_one_process():
    world = process_world()
    assert total(world, 1.5, 2.0) == [1.5, 2.0]
    assert largest(world, -3.0) == -3.0
    assert together(world, lambda: 5) == 5
    assert together(world, lambda: 5, when=False) is None
    with pytest.raises(OSError, match="disk") as caught:
        together(world, lambda: (_ for _ in ()).throw(OSError("disk")))
    assert caught.value.report
