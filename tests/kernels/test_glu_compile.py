"""What the glu kernels compile to at the paper's shapes, through their own launch code.

Nothing runs on a GPU here. `make test-all` adds every target, dtype and activation.
"""

import json

import pytest
from compiling import compiled

from kernels.activations import ACTIVATIONS
from kernels.compile_only import ARCHITECTURES
from kernels.fused.tiles_glu import TABLE, product_tile

SESSION = """
import json, sys
import torch
import kernels
from kernels import Dropout
from kernels.compile_only import ARCHITECTURES, recording, reports

rng = torch.empty(3, dtype=torch.int64, device="meta")
arch, cases = sys.argv[1], json.loads(sys.argv[2])
results = []
for case in cases:
    batch, length, depth, width = case.pop("shape")
    dtype = getattr(torch, case.pop("dtype", "bfloat16"))
    rows = width if case["kind"] == "plain" else 2 * width
    for name, site in (("dropout", 2), ("gate_dropout", 3)):
        if name in case:
            case[name] = Dropout(case[name], rng, site)
    x = torch.empty(batch, length, depth, dtype=dtype, device="meta", requires_grad=True)
    weight = torch.empty(rows, depth, dtype=dtype, device="meta", requires_grad=True)
    with recording(arch) as launches:
        hidden = kernels.glu(x, weight, impl="triton", **case)
        hidden.backward(torch.empty_like(hidden))
    pairs = zip(reports(launches), launches, strict=True)
    results.append([{**row.row(), "binary": launch.compiled.hash} for row, launch in pairs])
print(json.dumps(results))
"""

ENCODER = (64, 921)
BASELINE = {"kind": "plain", "activation": "relu", "dropout": 0.1, "shape": (*ENCODER, 512, 2048)}
GATED = {"kind": "gated", "dropout": 0.1, "shape": (*ENCODER, 512, 1365)}
CASES = {
    "Baseline": BASELINE,
    "Baseline decoder": {**BASELINE, "shape": (64, 206, 512, 2048)},
    "Baseline micro-batch 1": {**BASELINE, "shape": (1, 921, 512, 2048)},
    "ReLU": {**GATED, "activation": "relu"},
    "GELU": {**GATED, "activation": "gelu"},
    "SiLU": {**GATED, "activation": "silu"},
    "SquaredReLU": {**BASELINE, "activation": "relu2"},
    "SquaredReLU gated": {**GATED, "activation": "relu2"},
    "GELU recomputed": {**GATED, "activation": "gelu", "recompute": True},
    "MixedActSOMDropout": {**GATED, "kind": "mixed", "gate_dropout": 0.5},
    "BigHeads2": {**BASELINE, "shape": (*ENCODER, 380, 1520)},
    "BaselineFP32": {**BASELINE, "dtype": "float32"},
}


def _session(arch, cases):
    return compiled(SESSION, arch, json.dumps(cases))


@pytest.fixture(scope="module")
def rows():
    return dict(zip(CASES, _session("sm_86", list(CASES.values())), strict=True))


def _backward(case):
    """The kernels of a case's backward."""
    if case.get("recompute"):
        return ["_glu_recompute_kernel"]
    if case["kind"] == "plain" and case["activation"] == "relu":
        return ["_glu_dx_kernel", "_glu_dw_kernel", "_sum_partials_kernel"]
    return ["_glu_backward_kernel"]


@pytest.mark.parametrize("name", CASES)
def test_limits_on_sm_86(rows, name):
    assert [row["failures"] for row in rows[name]] == [[]] * len(rows[name])
    assert [row["kernel"] for row in rows[name]] == ["_glu_forward_kernel", *_backward(CASES[name])]


@pytest.mark.parametrize("name", [name for name in CASES if name != "BaselineFP32"])
def test_products_on_sm_86(rows, name):
    """Below 4.2 issue slots a product, nothing computed twice, operands by cp.async and LDSM, stores of 128 bits."""
    forward = rows[name][0]
    (loop,) = [loop for loop in forward["loops"] if loop["hmma"]]
    assert loop["issue_per_hmma"] < 4.2
    assert loop["useful_hmma"] == loop["hmma"]
    assert loop["ldsm"] > 0
    assert loop["ldgsts"] > 0
    assert loop["shared_per_tensor"] < 0.95
    # rows of 380 start at multiples of 8 bytes and are copied into rows of 384
    assert set(forward["async_copies"]) == {"128"}
    # words of bits are 32 wide
    assert set(forward["stores"]) == ({"128", "32"} if "_glu_dx_kernel" in _backward(CASES[name]) else {"128"})
    assert forward["warps_per_sm"] >= 8


@pytest.mark.parametrize("name", ["Baseline", "BigHeads2"])
def test_the_gradients_of_a_plain_relu_on_sm_86(rows, name):
    """Masked operands go through shared memory: cp.async in, LDSM out, no narrow access, two blocks of 4 warps."""
    for row in rows[name][1:3]:
        # of dw's two loops the one over whole blocks of rows
        loop = min((loop for loop in row["loops"] if loop["hmma"]), key=lambda loop: loop["issue_per_hmma"])
        assert loop["issue_per_hmma"] < 4.2, row["kernel"]
        assert loop["useful_hmma"] == loop["hmma"]
        assert loop["ldsm"] > 0
        assert loop["shared_per_tensor"] < 0.5
        # 32: a word of bits a row
        assert set(row["async_copies"]) == {"128", "32"}
        assert row["loads"] == {}
        assert row["warps_per_sm"] == 8


def test_the_hidden_width_1365_costs_no_narrow_stores(rows):
    for name in ("ReLU", "GELU", "SiLU", "MixedActSOMDropout"):
        for row in rows[name]:
            assert set(row["stores"]) == {"128"}, name


def test_float32_multiplies_as_ieee(rows):
    assert all(row["hmma"] == 0 for row in rows["BaselineFP32"])


def test_lengths_and_batches_compile_nothing_anew(rows):
    for name in ("Baseline decoder", "Baseline micro-batch 1"):
        assert [row["binary"] for row in rows[name]] == [row["binary"] for row in rows["Baseline"]]


def test_every_architecture_has_tiles():
    for arch in (*TABLE, "sm_86", "sm_120"):
        for pair in (False, True):
            for bits in (16, 32):
                assert product_tile(arch, pair, bits).precision in ("ieee", "tf32x3")


EVERYTHING = [
    {"kind": kind, "activation": activation, "shape": (8, 921, depth, 1365), "dtype": dtype, **extra}
    for depth in (512, 380, 40)
    for dtype in ("bfloat16", "float32")
    for kind in ("plain", "gated")
    for activation in ACTIVATIONS
    for extra in ({"dropout": 0.1}, {}, {"dropout": 0.1, "recompute": True})
    if depth == 512 or (activation == "relu" and extra == {"dropout": 0.1})
] + [
    {"kind": "mixed", "shape": (8, 921, 512, 1365), "dtype": dtype, "gate_dropout": 0.5, **extra}
    for dtype in ("bfloat16", "float32")
    for extra in ({"dropout": 0.1}, {"factor": 0.5}, {"dropout": 0.1, "recompute": True})
]


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_everything_on_every_target(arch):
    for case, rows in zip(EVERYTHING, _session(arch, EVERYTHING), strict=True):
        for row in rows:
            assert row["passed"], (case, row["configuration"], row["failures"])
