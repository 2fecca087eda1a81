"""What the compiled attention kernels show: compiled for sm_86 and its siblings, never
run. `kernels.compile_only.limits` holds the numbers."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kernels.compile_only import ARCHITECTURES

ROOT = Path(__file__).parents[2]
PAPER = [(64, 921, 921)]
CROSS = [(64, 206, 921)]


def compiled(*cases):
    environment = {n: x for n, x in os.environ.items() if n != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(ROOT)
    program = Path(__file__).with_name("compiled_attention.py")
    done = subprocess.run(
        [sys.executable, str(program), json.dumps(cases)], capture_output=True, text=True, env=environment, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def _assert_passes(rows):
    failures = [f"{row['kernel']} {row['configuration']}: {row['failures']}" for row in rows if row["failures"]]
    assert not failures, "\n".join(failures)


def _products(rows):
    return [row for row in rows if row["hmma"]]


PADDED = {"dropout": True, "padding": "lengths"}
OF_CI = {
    64: {"width": 64, **PADDED, "sizes": PAPER},
    128: {"width": 128, **PADDED, "sizes": PAPER},
    "sizes": {"width": 64, **PADDED, "sizes": [(64, 921, 921), (7, 206, 921), (256, 63, 17), (16, 16, 16)]},
    "float32": {"width": 64, "dtype": "float32", **PADDED, "sizes": PAPER},
}


@pytest.fixture(scope="module")
def found():
    """Rows by name, of one process."""
    cases = {name: json.loads(json.dumps(case)) for name, case in OF_CI.items()}
    rows = compiled(*cases.values())
    return {name: [row for row in rows if row["case"] == case] for name, case in cases.items()}


@pytest.mark.parametrize("width", [64, 128])
def test_kernels_of_the_paper_keep_the_limits(found, width):
    rows = found[width]
    _assert_passes(rows)
    assert {row["kernel"] for row in _products(rows)} == {
        "_attention_fwd_kernel",
        "_attention_bwd_dq_kernel",
        "_attention_bwd_dkdv_kernel",
    }
    for row in _products(rows):
        # operands of products arrive by cp.async, 128 bits wide, and by ldmatrix; so do no other wide global loads
        assert row["async_copies"].get("128", 0) > 0
        assert row["ldsm"] > 0
        assert set(row["loads"]) <= {"128", "32"}


def test_lengths_batch_sites_and_probabilities_do_not_recompile(found):
    rows, sizes = found["sizes"], OF_CI["sizes"]["sizes"]
    names = [row["kernel"] for row in rows]
    assert len(names) == len(set(names)) == 4
    # the keys of the columns are made in forward and again in backward
    launches = {row["kernel"]: row["launches"] for row in rows}
    assert launches.pop("_column_keys_kernel") == 2 * len(sizes)
    assert set(launches.values()) == {len(sizes)}


def test_float32_products_are_three_of_tf32(found):
    """Plain tf32 would be one: the number of products for a tile is three times what its size asks for."""
    (row,) = (row for row in found["float32"] if row["kernel"] == "_attention_fwd_kernel")
    settings = dict(pair.split("=") for pair in row["configuration"].split())
    m, n, warps = (int(settings[name]) for name in ("BLOCK_M", "BLOCK_N", "warps"))
    # an HMMA.1688 of tf32 is 16 x 8 x 8; two products of m x n x 64 a block, in two loops
    one = 2 * 2 * (m * n * 64) // (16 * 8 * 8) // warps
    assert row["hmma"] == 3 * one
    assert not row["failures"]


EXPERIMENTS = [
    {"width": 64, "dropout": True, "causal": True, "sizes": [(64, 206, 206)]},
    {"width": 64, "padding": "lengths", "sizes": CROSS},
    {"width": 64, "dropout": True, "bank": True, "sizes": [(64, 921, 512)]},
    {"width": 32, "dropout": True, "padding": "lengths", "sizes": PAPER},
    {"width": 32, "dropout": True, "causal": True, "sizes": [(64, 206, 206)]},
    {"width": 128, "padding": "lengths", "sizes": PAPER},
    {"width": 128, "dropout": True, "causal": True, "sizes": [(64, 206, 206)]},
    {"width": 112, "dropout": True, "padding": "lengths", "sizes": PAPER},
    {"width": 190, "dropout": True, "padding": "lengths", "sizes": PAPER},
    {"width": 380, "dropout": True, "padding": "lengths", "sizes": PAPER},
    {"width": 64, "dropout": True, "padding": "mask", "sizes": CROSS},
    {"segments": 2, "width": 64, "dropout": True, "padding": "lengths", "sizes": CROSS},
]


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("case", EXPERIMENTS, ids=lambda case: "-".join(str(x) for x in case.values()))
def test_every_experiment_compiles_within_the_limits(case, arch):
    _assert_passes(compiled(case | {"arch": arch}))
