"""The ledger of a step: what it counts, and what a step must not make.

Recording launches needs Triton without its interpreter, which the kernels' tests switch on for the whole process: what
records runs in processes of its own, and answers in JSON.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kernels.compile_only import Argument, Launch
from march import experiments
from march.cost import step
from march.cost.counter import Allocation, Counter, launch_event

ROOT = Path(__file__).resolve().parents[2]
GIB = 2**30


def fresh(*command: str) -> str:
    """Standard output of a Python process whose Triton compiles."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests/march'}"}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def baseline():
    """The ledger of Baseline with fused kernels at micro-batch 64, in bf16."""
    return json.loads(fresh("-m", "bench.ledger", "--exp", "Baseline", "--impl", "triton", "--json"))["results"][0]


# ---------------------------------------------------------------- what a step must not make


def test_baseline_keeps_at_most_2_6_gib(baseline):
    assert baseline["precision"] == "bf16"
    assert baseline["micro_batch"] == 64
    assert 0.5 * GIB < baseline["saved"] <= 2.6 * GIB


def test_baseline_moves_at_most_1_3_times_the_compulsory_traffic(baseline):
    assert baseline["over_compulsory"] <= 1.3


def test_gradients_of_keys_and_values_are_neither_copied_nor_added_between_operators(baseline):
    """What is left there: E's and T's gradients of their several uses, and the last encoder block's unused Wq."""
    (between,) = (row for row in baseline["rows"] if (row["operator"], row["phase"]) == ("other", "backward"))
    assert set(between["names"]) == {"aten::add", "aten::ones_like", "aten::slice_backward"}
    table, positions, weight = 30000 * 512 * 2, 1024 * 512 * 2, 3 * 512 * 512 * 2
    # E is read by two embeddings and the output layer, T by two embeddings; the loss is one float32
    assert between["moved"]["aten::add"] == 3 * (2 * table + positions)
    assert between["moved"]["aten::slice_backward"] == weight + weight * 2 // 3
    (attention,) = (row for row in baseline["rows"] if (row["operator"], row["phase"]) == ("attention", "backward"))
    assert set(attention["names"]) == {
        "_column_keys_kernel",
        "_attention_bwd_dq_kernel",
        "_attention_bwd_dkdv_kernel",
    }


def test_baseline_makes_nothing_forbidden(baseline):
    assert baseline["forbidden"] == []


def test_every_operator_of_baseline_is_fused(baseline):
    """No row of an operator but the linear layers and autograd's own is without launches."""
    without = {row["operator"] for row in baseline["rows"] if row["launches"] == 0}
    assert without == {"linear", "other", "adamw"}
    linear = [row for row in baseline["rows"] if row["operator"] == "linear"]
    assert all(set(row["names"]) == {"aten::mm"} for row in linear)
    assert sum(row["calls"] for row in linear) == 22 + 2 * 22


def test_rows_add_up(baseline):
    for name in step.NUMBERS:
        assert baseline["total"][name] == sum(row[name] for row in baseline["rows"])
    assert all(row["bytes_read"] + row["bytes_written"] > 0 for row in baseline["rows"])


def test_flops_agree_with_the_portable_path(baseline):
    """The same products in forward; the fused backward computes scores and dP twice, for dQ and for dK and dV."""
    config = experiments.configuration("Baseline")
    portable = step.step_costs(config, micro_batch=1, impl="torch")

    def flops(rows: list, operators: tuple, phase: str) -> int:
        return sum(r["flops"] for r in rows if r["operator"] in operators and r["phase"] == phase)

    theirs = portable.to_dict()["rows"]
    # the portable cross entropy computes its gradients in forward, the portable glu its product
    for operators in (("linear",), ("glu",)):
        for phase in ("forward", "backward"):
            assert flops(baseline["rows"], operators, phase) == 64 * flops(theirs, operators, phase)
    assert flops(baseline["rows"], ("attention",), "forward") == 64 * flops(theirs, ("attention",), "forward")
    assert 5 * flops(baseline["rows"], ("attention",), "backward") == 7 * 64 * flops(theirs, ("attention",), "backward")
    entropy = sum(flops(baseline["rows"], ("linear_cross_entropy",), phase) for phase in ("forward", "backward"))
    # and the fused cross entropy makes its logits twice: for the loss and dh, and for dE
    assert 3 * entropy == 4 * 64 * flops(theirs, ("linear_cross_entropy",), "forward")


def test_the_compulsory_traffic_by_hand(baseline):
    """Attention and glu of Baseline with a pencil: bytes of bf16 tensors of 64 sequences."""
    encoder, decoder = 64 * 921 * 512 * 2, 64 * 206 * 512 * 2
    lse = 64 * 8 * 4
    rows = {(row["operator"], row["phase"]): row["compulsory"] for row in baseline["rows"]}
    forward = 2 * (4 * encoder + lse * 921)  # the last encoder block's attention is dead
    forward += 3 * (4 * decoder + lse * 206) + 3 * (2 * decoder + 2 * encoder + lse * 206)
    assert rows["attention", "forward"] == forward
    # q, k, v, O, dO in, dQ, dK, dV out; in the encoder dK and dV of the decoder's cross-attention in, too
    backward = (
        2 * (10 * encoder + lse * 921) + 3 * (8 * decoder + lse * 206) + 3 * (4 * decoder + 4 * encoder + lse * 206)
    )
    assert rows["attention", "backward"] == backward
    weight = 2048 * 512 * 2
    assert rows["glu", "forward"] == 2 * 5 * encoder + 3 * 5 * decoder + 5 * weight
    assert rows["glu", "backward"] == 2 * 6 * encoder + 3 * 6 * decoder + 5 * 2 * weight


# ---------------------------------------------------------------- what is counted follows the code

INSERTED = """
import json, torch
from march import experiments
from march.cost import step_costs
from march.model import Transformer
from models import small_overrides

config = experiments.configuration("Baseline", **small_overrides("Baseline"))
before = step_costs(config, 17, 9, micro_batch=2, precision="bf16")
forward = Transformer.forward

def with_a_copy(self, *args, **kwargs):
    self.embedding.detach().clone()
    return forward(self, *args, **kwargs)

Transformer.forward = with_a_copy
after = step_costs(config, 17, 9, micro_batch=2, precision="bf16")
Transformer.forward = forward

import kernels.fused.residual_norm as module
inner = module._row_strides
module._row_strides = lambda *streams: inner(*(x if x is None else x.clone() for x in streams))
inside = step_costs(config, 17, 9, micro_batch=2, precision="bf16")
module._row_strides = inner
print(json.dumps([one.to_dict() for one in (before, after, inside)]))
"""


def test_an_inserted_copy_raises_the_bytes_by_exactly_that():
    """Outside the operators, and inside a registered one, where torch sees nothing."""
    before, after, inside = json.loads(fresh("-c", INSERTED))
    size = 97 * 32 * 2
    for name in ("bytes_read", "bytes_written"):
        assert after["total"][name] - before["total"][name] == size
    assert after["total"]["launches"] == before["total"]["launches"] > 0
    # every stream that residual_norm is given: 5 encoder and 10 decoder calls, x and s of 4 and 9, x of the first
    forward = (2 * 4 + 1) * 2 * 17 * 32 * 2 + (2 * 9 + 1) * 2 * 9 * 32 * 2
    rows = [
        next(row for row in one["rows"] if (row["operator"], row["phase"]) == ("residual_norm", "forward"))
        for one in (before, inside)
    ]
    for name in ("bytes_read", "bytes_written"):
        assert rows[1][name] - rows[0][name] == forward
    assert rows[1]["names"]["aten::clone"] == 9 + 19


EXPERIMENTS = """
import json, sys
from march import experiments
from march.cost import step_costs
from models import small_overrides

found = {}
for name in experiments.names():
    config = experiments.configuration(name, **small_overrides(name))
    one = step_costs(config, 17, 9, micro_batch=2)
    found[name] = [one.to_dict(), one.ratio]
    if name in ("Baseline", "UnifiedAttention", "Database", "MixedActSOMDropout", "NoSelfAttentionResidual"):
        # heads of a width that the fused kernels do not fill up
        config = experiments.configuration(name, **small_overrides(name) | {"dim_qkv": 16, "dim_feedforward": 32})
        found[name] += [step_costs(config, 17, 9, micro_batch=2, impl=impl).to_dict() for impl in ("triton", "torch")]
print(json.dumps(found))
"""


def test_every_experiment_has_a_ledger():
    """No kernel without its record, at sizes where that is all that is tested."""
    found = json.loads(fresh("-c", EXPERIMENTS))
    assert set(found) == set(experiments.names())
    for name, (one, ratio, *others) in found.items():
        assert ratio >= 1.0, name
        # the compulsory traffic is the operators', whoever computes them
        sides = [{(r["operator"], r["phase"]): r["compulsory"] for r in other["rows"]} for other in others]
        assert len(sides) in (0, 2)
        assert sides[:1] == sides[1:], name
        # the faulty mask of the published run exists in the reference only, which makes its scores; dK and dV of heads
        # that several heads of queries read are float32 sums of programs that share them, where the batch is small
        assert bool(one["forbidden"]) == (name in ("UnifiedAttentionAsPublished", "GroupedKeysValues")), name


def test_a_kernel_without_a_record_is_an_error():
    launch = Launch("_new_kernel", "m", "sm_86", (1, 1, 1), 4, 2, {}, (Argument("x_ptr", "float32", (4,), (1,), 16),))
    with pytest.raises(LookupError, match=r"_new_kernel.*record.*declare it"):
        launch_event(launch)


SEQUENCES = """
import json, sys
from march import experiments
from march.cost import step_costs
from models import small_overrides

config = experiments.configuration("Baseline", **small_overrides("Baseline") | {"max_length": 128})
print(json.dumps([step_costs(config, 128, 128, micro_batch=n).to_dict()["rows"] for n in (1, 2, 5)]))
"""


def test_one_and_two_sequences_predict_five():
    """Launches are as many, their FLOPs and bytes, and what backward keeps, a line through micro-batches 1 and 2, of
    whole tiles."""
    one, two, five = (
        {(row["operator"], row["phase"]): row for row in rows} for rows in json.loads(fresh("-c", SEQUENCES))
    )
    assert one.keys() == two.keys() == five.keys()
    for key, row in five.items():
        for name in step.NUMBERS:
            assert row[name] == one[key][name] + 4 * (two[key][name] - one[key][name]), (key, name)


# ---------------------------------------------------------------- what is forbidden


def allocation(shape: tuple, dtype: torch.dtype = torch.bfloat16, operator: str = "attention", phase: str = "forward"):
    size = dtype.itemsize
    for n in shape:
        size *= n
    return Allocation(operator, phase, "aten::mm", dtype, shape, size)


@pytest.mark.parametrize(
    ("one", "reason"),
    [
        (allocation((64, 8, 921, 921)), "[L, L]"),
        (allocation((512, 256, 1024)), "[L, L]"),
        (allocation((206, 206), torch.bool), "[L, L]"),
        (allocation((64, 206, 8, 1127), torch.bool), "keys or values concatenated"),
        (allocation((64, 1127, 8, 64)), "keys or values concatenated"),
        (allocation((64 * 206, 512), torch.float32), "float32 copy of an activation"),
        (allocation((64, 921, 2048), torch.float32), "float32 copy of an activation"),
        (allocation((64 * 206, 30000), operator="other"), "logits over 200 MB"),
        (allocation((64 * 206, 8192), operator="linear_cross_entropy"), "logits over 200 MB"),
    ],
)
def test_the_forbidden_is_found(one, reason):
    config = experiments.configuration("Baseline")
    found = step.forbidden([one], config, (921, 206), 64)
    assert reason in [why for why, _ in found]


def test_what_a_step_makes_is_not_forbidden():
    config = experiments.configuration("Baseline")
    fine = [
        allocation((64, 921, 512)),
        allocation((64 * 921, 2048)),
        allocation((30000, 512), torch.float32),
        allocation((4, 64, 8, 1024), torch.float32),
        allocation((64 * 206, 7552), operator="linear_cross_entropy"),
        allocation((64 * 206, 512), torch.float32, "linear_cross_entropy", "backward"),
    ]
    assert step.forbidden(fine, config, (921, 206), 64) == []


def test_the_reference_makes_what_is_forbidden():
    config = experiments.configuration("Baseline")
    found = step.step_costs(config, 921, 206, micro_batch=1, impl="reference").forbidden
    assert {"[L, L]", "float32 copy of an activation"} <= {why for why, _ in found}


# ---------------------------------------------------------------- labels and memory


def test_backward_is_labelled_by_the_operator_that_it_belongs_to():
    """On real tensors: three operators in a row, one of them not observed."""
    counter = Counter()
    double = counter.wrap("glu", lambda x, weight: x * weight)
    with counter:
        x = torch.ones(4, 4, requires_grad=True)
        weight = torch.ones(4, 4, requires_grad=True)
        hidden: Tensor = double(x, weight)
        product = hidden @ weight
        loss = product.exp().sum()
        counter.backward(loss)
    labels = {(e.phase, e.operator, e.name) for e in counter.events}
    assert ("forward", "glu", "aten::mul") in labels
    assert ("backward", "glu", "aten::mul") in labels
    assert ("forward", "linear", "aten::mm") in labels
    assert ("backward", "linear", "aten::mm") in labels
    assert ("forward", "other", "aten::exp") in labels
    # forward x, W, y; backward dy, x, W, dx, dW: each 64 bytes
    assert counter.compulsory["linear", "forward"] == 3 * 64
    assert counter.compulsory["linear", "backward"] == 5 * 64


FITS = """
import json, sys
from march import cost, experiments
config = experiments.configuration(sys.argv[1])
fits = {i: cost.fitting_micro_batch(config, 921, 206, 24 * 2**30, i) for i in ("triton", "torch", "reference")}
fits["auto"] = cost.fitting_micro_batch(config, 921, 206, 24 * 2**30, "auto", device_type="cuda")
peak, estimate = cost.step_costs(config, micro_batch=256).peak, cost.memory(config, impl="triton")
print(json.dumps([fits, peak, estimate.total(256) - estimate.states]))
"""
WIDER = ("UnifiedAttention", "Database", "SiLUGatedLinearUnit")


@pytest.mark.parametrize("name", ["Baseline", *(pytest.param(n, marks=pytest.mark.slow) for n in WIDER)])
def test_256_sequences_fit_24_gib(name):
    fits, peak, line = json.loads(fresh("-c", FITS, name))
    assert fits["triton"] >= 256
    assert fits["auto"] == fits["triton"] > fits["reference"]
    assert fits["torch"] > fits["reference"]
    # the line through 64 and 512 sequences covers what 256 need, but for some sums of blocks
    assert peak <= line + 4096 < 1.05 * peak
