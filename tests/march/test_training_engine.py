"""The loop through DeepSpeed's engine, in this process: split of the batch, state, failures."""

import json

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


def reduced(name):
    """Overrides that shrink `name` without changing what it is about."""
    config = experiments.configuration(name)
    small = {"dim_model": 48, "dim_feedforward": 64, "max_length": 64, "vocab_size": VOCABULARY}
    if config.num_layers > 8:
        small["num_layers"] = 4
    if config.database_states:
        small["database_states"] = 24
    for field in ("num_heads", "dim_qkv"):
        value = getattr(config, field)
        factor = 4 if field == "num_heads" else 8
        small[field] = [max(1, v // factor) for v in value] if isinstance(value, tuple) else max(1, value // factor)
    return small


@pytest.mark.parametrize("name", experiments.names())
def test_every_experiment_trains_two_steps_and_changes_every_live_weight(name):
    model = march.build_model(name, **reduced(name))
    before = {key: value.detach().clone() for key, value in model.named_parameters()}
    outcome = build_trainer(model, schedule__steps=2).run()
    assert outcome.steps == 2
    assert np.isfinite([outcome.first_loss, outcome.final_loss, outcome.eval_loss]).all()
    unchanged = [key for key, value in model.named_parameters() if torch.equal(value, before[key])]
    # weight decay moves dead weights too; only gains of exactly one step of zero gradient could stay
    assert not unchanged


def test_loss_does_not_depend_on_the_micro_batch_with_dropout_on():
    whole = build_trainer(small_model(), micro_batch=8)
    whole.run()
    quarter = build_trainer(small_model(), micro_batch=2)
    quarter.run()
    assert quarter.accumulation == 4
    for a, b in zip(whole.rows, quarter.rows, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)
    assert whole.rows[-1]["eval_loss"] == pytest.approx(quarter.rows[-1]["eval_loss"], abs=1e-5)


def test_dropout_is_on_in_training_and_off_in_evaluation():
    first = {p: build_trainer(small_model(dropout=p), schedule__steps=1, evaluation__every=1) for p in (0.0, 0.4)}
    for trainer in first.values():
        trainer.run()
    assert abs(first[0.0].rows[0]["loss"] - first[0.4].rows[0]["loss"]) > 1e-3
    trainer = build_trainer(small_model(dropout=0.4))
    assert trainer.evaluate() == trainer.evaluate()
    assert trainer.engine.module.training


def test_accumulated_gradient_is_the_mean_over_the_global_batch():
    """Against autograd over the whole batch at once, without an engine."""
    trainer = build_trainer(small_model(), micro_batch=2, schedule__steps=1, optimizer__gradient_clipping=1e9)
    trainer.run()
    plain = small_model()
    (micro,) = build_trainer(small_model(), micro_batch=8)._batches().collate(0)
    batch = [torch.from_numpy(getattr(micro.batch, n)) for n in ("input_ids", "decoder_input_ids", "labels")]
    output = plain(*batch[:2], labels=batch[2], dropout_state=torch.tensor([7, 0, 0]))
    output.loss.backward()
    norm = torch.cat([p.grad.flatten() for p in plain.parameters() if p.grad is not None]).norm()
    assert trainer.rows[0]["loss"] == pytest.approx(output.loss.item(), abs=1e-5)
    assert trainer.rows[0]["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)


@pytest.mark.parametrize(("precision", "zero"), [("fp32", 0), ("fp32", 1), ("bf16", 1), ("fp32", 2), ("bf16", 2)])
def test_resume_is_bitwise(tmp_path, precision, zero):
    settings = {"precision.compute": precision, "devices.zero": zero, "micro_batch": 4}
    straight = build_trainer(small_model(), **settings)
    straight.run()
    folder = RunFolder(tmp_path)
    build_trainer(small_model(), schedule__steps=2, folder=folder, **settings).run()
    checkpoint = Checkpoints(folder.checkpoints, 2).load()
    assert checkpoint.step == 2
    other = small_model()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.fill_(0.5)  # what is not loaded would show
    resumed = build_trainer(other, folder=folder, checkpoint=checkpoint, **settings)
    resumed.run()
    assert [row["loss"] for row in resumed.rows] == [row["loss"] for row in straight.rows]
    assert resumed.rows[-1]["eval_loss"] == straight.rows[-1]["eval_loss"]
    ours, theirs = gather_state(resumed.engine, process_world()), gather_state(straight.engine, process_world())
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


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_nan_stops_the_run_before_the_weights_see_it(tmp_path, precision):
    trainer = build_trainer(small_model(), folder=RunFolder(tmp_path), precision__compute=precision)
    model, calls = trainer.engine.module, []
    healthy = model.forward

    def poisoned(*inputs):
        calls.append(1)
        loss = healthy(*inputs)
        return loss * float("nan") if trainer.step == 2 and model.training else loss

    model.forward = poisoned
    with pytest.raises(RunError, match=r"loss is nan in step 3.*--resume continues from step 2"):
        trainer.run()
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_infinite_gradient_with_a_finite_loss_stops_the_run(precision):
    model = small_model()
    trainer = build_trainer(model, precision__compute=precision)
    parameter = next(p for p in model.parameters() if p.ndim == 2)
    parameter.register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(RunError, match=r"gradient norm is (inf|nan|-1\.0) in step 1"):
        trainer.run()


def test_out_of_memory_in_a_step_says_what_to_do():
    trainer = build_trainer(small_model(), micro_batch=4)

    def full(*inputs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    trainer.engine.module.forward = full
    with pytest.raises(RunError, match=r"out of memory in step 1 at micro-batch 4; .*--micro-batch 2"):
        trainer.run()


def test_a_tiny_run_overfits_a_few_sequences():
    often = {"evaluation.every": 1000, "checkpoints.every": 1000}
    changes = {"schedule.steps": 150, "batch.sequences": 4, "optimizer.lr": 1e-2, **often}
    trainer = build_trainer(small_model(dropout=0.0), micro_batch=4, **changes)
    trainer.plan.train._rows = trainer.plan.train._rows[:4]
    outcome = trainer.run()
    assert outcome.first_loss > 5.0
    assert outcome.final_loss < 2.0


def test_configuration_is_checked_key_by_key():
    config = deepspeed_config(small_recipe(precision__compute="bf16"), 2, 2)
    assert config["gradient_accumulation_steps"] == 2
    assert config["train_batch_size"] == 8
    with pytest.raises(UsageError, match="zero_optimisation; did you mean zero_optimization"):
        validate({**config, "zero_optimisation": {"stage": 3}})
    with pytest.raises(UsageError, match=r"zero_optimization\.stag; did you mean zero_optimization\.stage"):
        validate({"zero_optimization": {"stag": 1}})
    with pytest.raises(UsageError, match=r"gradient_clipping of type float, got '1\.0'"):
        validate({"gradient_clipping": "1.0"})
    with pytest.raises(UsageError, match="multiple of micro-batch x processes, got 3 x 1"):
        deepspeed_config(small_recipe(precision__compute="bf16"), 3, 1)
    with pytest.raises(UsageError, match="--zero 1 or higher with bf16"):
        deepspeed_config(small_recipe(precision__compute="bf16", devices__zero=0), 2, 1)


def test_agreement_helpers_with_one_process():
    world = process_world()
    assert total(world, 1.5, 2.0) == [1.5, 2.0]
    assert largest(world, -3.0) == -3.0
    assert together(world, lambda: 5) == 5
    assert together(world, lambda: 5, when=False) is None
    with pytest.raises(OSError, match="disk") as caught:
        together(world, lambda: (_ for _ in ()).throw(OSError("disk")))
    assert caught.value.report
