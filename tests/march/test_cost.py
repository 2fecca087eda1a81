"""The cost module: counted from what is dispatched, so it follows the code."""

import argparse
import json

import pytest
import torch
from models import small_overrides

from march import cost, experiments
from march.config import ConfigError
from march.cost.counter import Counter
from march.cost.fitting import Memory
from march.model import Transformer
from march.report import listing


def step_cost(config, *lengths, micro_batch=1, **options):
    return cost.step_costs(config, *lengths, micro_batch=micro_batch, impl="torch", **options).step


def small(name: str, **overrides):
    return experiments.configuration(name, **{**small_overrides(name), **overrides})


def test_flops_of_a_plain_model_by_hand():
    """Products of one block pair, forward and backward, counted with a pencil; two FLOPs a multiply-add."""
    d, h, k, f, v, le, ld = 32, 2, 4, 48, 97, 17, 9
    config = small("Baseline", num_layers=2, num_heads=h, dim_qkv=k, dropout=0.0)
    inner = h * k
    encoder_kv = le * d * 2 * inner  # the one encoder block is dead but for its keys and values
    decoder = ld * (d * 3 * inner + inner * d) + ld * (d * inner + inner * d) + ld * 2 * d * f
    logits = ld * d * v
    linear = 3 * (encoder_kv + decoder + logits)  # forward, input gradient, weight gradient
    scores = h * k * (ld * ld + ld * le)
    attention = (2 + 5) * scores  # forward QK', PV; backward recomputes QK' and has dP, dV, dQ, dK
    counted = step_cost(config, le, ld).flops
    assert counted == 2 * (linear + attention)


def test_flops_scale_with_the_batch_and_dropout_costs_none():
    config = small("Baseline")
    one = step_cost(config, 17, 9, micro_batch=1)
    assert step_cost(config, 17, 9, micro_batch=4).flops == 4 * one.flops
    assert step_cost(small("Baseline", dropout=0.0), 17, 9).flops == one.flops


def test_an_inserted_copy_raises_the_bytes_by_exactly_that(monkeypatch):
    config = small("Baseline")
    before = step_cost(config, 17, 9, precision="fp32")
    forward = Transformer.forward

    def with_a_copy(self, *args, **kwargs):
        self.embedding.detach().clone()
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(Transformer, "forward", with_a_copy)
    after = step_cost(config, 17, 9, precision="fp32")
    size = config.vocab_size * config.dim_model * 4
    assert after.bytes_read - before.bytes_read == size
    assert after.bytes_written - before.bytes_written == size


def test_peak_is_what_lives_at_one_time():
    """A chain of in-place-free operators: two buffers live, not ten."""
    with Counter() as counter:
        x = torch.empty(1000, device="meta")
        for _ in range(10):
            x = x + 1
    assert counter.peak == 2 * 4000


def test_the_micro_batch_follows_from_memory():
    config = experiments.configuration("Baseline")
    sizes = [cost.fitting_micro_batch(config, 921, 206, gib * 2**30) for gib in (4, 12, 24, 48)]
    assert sizes == sorted(sizes)
    assert sizes[0] < sizes[-1]
    estimate = cost.memory(config)
    assert estimate.total(sizes[2]) <= 24 * 2**30 < estimate.total(sizes[2] * 2)
    assert cost.fitting_micro_batch(config, 921, 206, 0) == 1
    reference = cost.fitting_micro_batch(config, 921, 206, 24 * 2**30, impl="reference")
    assert reference < sizes[2]  # materialised probabilities cost memory


@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_a_larger_micro_batch_needs_no_more_than_the_line_says(impl):
    """Beyond the two sizes that the line goes through: chunks of logits must not end its rise."""
    config = experiments.configuration("Baseline")
    estimate = cost.memory(config, impl=impl)
    peak = cost.step_costs(config, micro_batch=32, impl=impl).peak
    assert peak <= estimate.total(32) - estimate.states < 1.15 * peak


def test_what_is_dead_is_not_counted():
    config = small("Baseline")
    counted = step_cost(config, 17, 9)
    wider = small("Baseline", dim_feedforward=96)
    rows = 2 * 17 + 3 * 9  # feedforwards that live: two in the encoder, three in the decoder
    extra = 2 * 3 * rows * 2 * config.dim_model * 48
    assert step_cost(wider, 17, 9).flops - counted.flops == extra


@pytest.mark.parametrize("name", experiments.names())
def test_show_works_for_every_experiment(name, capsys, monkeypatch):
    # measured below; for each of them it takes a second
    monkeypatch.setattr(cost, "fitting_micro_batch", lambda *_, **options: 7)
    monkeypatch.setattr(cost, "memory", lambda *_, **options: Memory(1 << 30, 1 << 20, 1 << 20))
    overrides = [
        f"{k}={','.join(map(str, v)) if isinstance(v, tuple) else v}" for k, v in small_overrides(name).items()
    ]
    arguments = argparse.Namespace(list=False, show=name, set=overrides, json=False, recipe=None, impl=None)
    assert listing.main(arguments) == 0
    out = capsys.readouterr().out
    assert out.startswith(name)
    assert "micro-batch that fits" in out


def test_list_is_a_table_and_json(capsys):
    assert listing.main(argparse.Namespace(list=True, show=None, set=None, json=False, recipe=None, impl=None)) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(experiments.names()) + 1
    assert listing.main(argparse.Namespace(list=True, show=None, set=None, json=True, recipe=None, impl=None)) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in rows] == experiments.names()
    assert rows[0]["parameters"] == 36_340_224


def test_show_json_has_the_difference_from_the_base(capsys):
    arguments = argparse.Namespace(
        list=False, show="databasefromheads", set=["dropout=0"], json=True, recipe=None, impl=None
    )
    assert listing.main(arguments) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["difference_from_base"] == {
        "num_heads": [8, 4],
        "database_states": [512, 1536],
        "dropout": [0.1, 0.0],
    }
    assert sum(shown["parameters_by_part"].values()) == shown["parameters"] == 34_180_608


def test_show_refuses_a_wrong_name():
    with pytest.raises(ConfigError, match="did you mean"):
        listing.main(argparse.Namespace(list=False, show="Databse", set=None, json=False, recipe=None, impl=None))


def test_devices_are_found_by_the_name_that_cuda_reports():
    assert cost.find_device("NVIDIA RTX A5000").arch == "sm_86"
    assert cost.find_device("NVIDIA H100 80GB HBM3").bandwidth == 3350e9
    assert cost.device_peak("AMD EPYC", "bf16") is None
