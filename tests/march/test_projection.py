"""The projection: its fit recovers what was planted, its counts follow the model, its command refuses what is wrong."""

import itertools
import json
import os
import re
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from bench import cache
from bench.projection import __main__ as command
from bench.projection import collect, executed, tables
from bench.projection.collect import Counts, table_of
from bench.projection.fit import NOISE, PRIORS, fit, leave_one_out, mean_error
from bench.projection.model import FP32, NAMES, TENSOR, UNALIGNED, Efficiencies, ideal_seconds, rounds, work
from bench.projection.project import calibrate, kernels_of, project, static
from kernels.compile_only import Argument, Launch
from march import experiments
from march.cost.counter import Product
from march.cost.devices import DEVICES
from march.predecessor.runs import HALVED_EXPERIMENTS, micro_batch, published_seconds

ROOT = Path(__file__).resolve().parents[2]
A5000 = DEVICES["a5000"]
PLANTED = Efficiencies(tensor=0.62, unaligned=0.31, fp32=0.5, bandwidth=0.66, host=0.003)
WIDE = {name: prior._replace(spread=50.0) for name, prior in PRIORS.items()}


def product_call(m: int, n: int, k: int, element_size: int = 2, alignment: int = 16, count: int = 1) -> list[dict]:
    moved = {"reads": element_size * (m * k + k * n), "writes": element_size * m * n}
    product = Product(1, m, n, k, element_size, alignment)
    return count * [call("p", "aten::mm", flops=2 * m * n * k, **moved, **asdict(product))]


def call(operator: str, name: str, **more) -> dict:
    return {"phase": "forward", "operator": operator, "name": name, "flops": 0, "reads": 0, "writes": 0} | more


def added(count: int) -> list[dict]:
    return count * [call("e", "aten::add", reads=10**9, writes=10**9)]


def counts(calls: list[dict], micro: int = 64, precision: str = "bf16", impl: str = "eager") -> Counts:
    return Counts("made up", impl, "", precision, micro, 36_000_000, table_of(calls))


def made_up_works() -> dict:
    """Steps in which each efficiency matters somewhere."""
    rng = np.random.default_rng(0)
    works = {}
    for i in range(12):
        fp32 = i == 3
        size, times = 4 if fp32 else 2, rng.integers((20, 5, 10), (80, 60, 60)).tolist()
        calls = product_call(58944, 2048, 2048, size, 16, times[0]) + product_call(58944, 2048, 2048, size, 2, times[1])
        calls += added(times[2])
        works[str(i)] = work(counts(calls, 32 if i % 3 else 64, "fp32" if fp32 else "bf16"), A5000)
    return works


def test_the_fit_recovers_planted_efficiencies():
    works = made_up_works()
    seconds = {name: one.seconds(PLANTED) for name, one in works.items()}
    found = fit(works, seconds, WIDE)
    np.testing.assert_allclose(found.efficiencies, PLANTED, rtol=1e-3)
    assert mean_error(leave_one_out(works, seconds, WIDE).error.drop("3")) < 1e-3


def test_the_fit_stays_within_its_bounds():
    works = made_up_works()
    for factor in (0.1, 20.0):
        seconds = {name: factor * one.seconds(PLANTED) for name, one in works.items()}
        found = fit(works, seconds, WIDE).efficiencies
        for name in NAMES:
            assert PRIORS[name].low * (1 - 1e-9) <= getattr(found, name) <= PRIORS[name].high * (1 + 1e-9)
    assert PRIORS["tensor"].high == PRIORS["unaligned"].high == PRIORS["fp32"].high == 0.80
    assert PRIORS["bandwidth"].high == 0.85


def test_the_priors_decide_where_the_runs_cannot():
    """No run has unaligned products: their efficiency is what was expected of it."""
    only = work(counts(product_call(58944, 2048, 2048, count=40)), A5000)
    found = fit({"a": only}, {"a": only.seconds(PLANTED)})
    assert found.efficiencies.unaligned == pytest.approx(PRIORS["unaligned"].expected)


def test_a_run_that_is_off_is_seen_when_left_out():
    works = made_up_works()
    seconds = {name: one.seconds(PLANTED) for name, one in works.items()}
    seconds["5"] *= 1.5
    rows = leave_one_out(works, seconds)
    assert rows.error["5"] == pytest.approx(1 / 1.5 - 1, abs=0.05)
    assert abs(rows.error["7"]) < 0.1
    assert rows.naive["7"] == pytest.approx(np.median([value for name, value in seconds.items() if name != "7"]))


# ---------------------------------------------------------------- the time of a call


def test_more_bandwidth_is_never_slower_and_faster_where_bytes_decide():
    steps = counts(product_call(58944, 512, 512, count=30) + added(50))
    slow, fast = (work(steps, replace(A5000, bandwidth=b)).call_seconds(PLANTED) for b in (5e11, 1e12))
    assert (fast <= slow).all()
    assert fast[1] == pytest.approx(slow[1] / 2, rel=1e-3)


def test_overlap_adds_the_shorter_part():
    steps = counts(product_call(58944, 2048, 512))
    times = [float(work(steps, A5000, overlap=x).call_seconds(PLANTED)[0]) for x in (1.0, 0.5, 0.0)]
    assert times[0] < times[1] < times[2]
    assert times[1] == pytest.approx((times[0] + times[2]) / 2)


@pytest.mark.parametrize(
    ("call", "kind"),
    [
        (product_call(4096, 4096, 512), TENSOR),
        (product_call(4096, 4096, 512, alignment=2), UNALIGNED),
        (product_call(4096, 4096, 512, element_size=4, alignment=4), FP32),
    ],
)
def test_products_take_the_efficiency_of_their_kind(call, kind):
    (found,), (seconds,) = ideal_seconds(table_of(call), A5000)
    assert found == kind
    peak = A5000.fp32 if kind == FP32 else A5000.bf16
    assert seconds == pytest.approx(call[0]["flops"] / peak, rel=0.05)


def test_tiles_are_whole_and_rounds_are_full():
    assert rounds(np.array([64, 128, 3, 65]), 64) == pytest.approx([1, 1, 1, 128 / 65])
    narrow, wide = ideal_seconds(table_of(product_call(8192, 8, 512) + product_call(8192, 64, 512)), A5000)[1]
    assert narrow == wide


def fused_call(name: str = "k", flops: int = 10**12, **more) -> dict:
    seen = {"precision": "bf16", "programs": 6400, "issued": 1.0, "executed": flops, "warps": 8, "slots": 8}
    return call("attention", name, flops=flops) | seen | more


def fused(slots: float, warps: int, precision: str = "bf16", **more: float) -> float:
    calls = table_of([fused_call(slots=slots, warps=warps, precision=precision, **more)])
    return ideal_seconds(calls, A5000)[1][0] * A5000.bf16 / 10**12


def test_issue_slots_and_warps_bound_a_fused_loop():
    assert fused(1, 8) == 1
    assert fused(9, 4) == pytest.approx((16 + 8) / 16)
    assert fused(9, 16) == pytest.approx((16 + 2) / 16)
    assert fused(33, 32) == pytest.approx(33 / 16)
    assert fused(9, 16, programs=6401) == pytest.approx(18 / 16 * 6464 / 6401)
    assert fused(9, 16, "tf32x3") == 6
    assert fused(10, 16, issued=2) == pytest.approx((32 + 2) / 16)
    assert fused(9, 16, beyond=0) == fused(9, 16)
    assert fused(9, 16, beyond=4) == fused(13, 16)
    assert fused(9, 16, beyond=24) == pytest.approx(33 / 16)
    assert fused(9, 16, "tf32x3", beyond=24) == 6


PTX = """.visible .entry _k_kernel()
{
\t.loc\t1 10 4                          // k.py:10:4
$L__tmp0:
\tmov.b32 \t%r1, 0;
\tret;
}
\t.file\t1 "/a/k.py"
\t.section\t.debug_abbrev
"""


def recorded(ptx: str, **sizes: object) -> Launch:
    arguments = tuple(Argument(name, "int", value=value) for name, value in sizes.items())
    return Launch("_k_kernel", "m", "sm_86", (6, 2, 1), 4, 2, {}, arguments, SimpleNamespace(asm={"ptx": ptx}))


def test_counts_follow_the_instructions_and_the_sizes():
    """Other lines, files and places are the same launch; another instruction, size or number of programs is not."""
    name = executed.name_of(recorded(PTX, Lq=5, stride_q=64, site=7))
    assert name.startswith("k sm_86 x12 Lq=5 ")
    moved = PTX.replace("1 10 4", "1 99 8").replace("k.py:10", "k.py:99").replace("/a/", "/b/").replace("tmp0", "tmp9")
    assert executed.name_of(recorded(moved, Lq=5, stride_q=32, site=8)) == name
    assert executed.name_of(recorded(PTX.replace("%r1, 0", "%r1, 1"), Lq=5)) != name
    assert executed.name_of(recorded(PTX, Lq=6)) != name


def test_a_launch_without_counts_is_static_and_named(monkeypatch, tmp_path):
    launch = recorded(PTX, Lq=5)
    monkeypatch.setattr(executed, "FILE", tmp_path / "emulated.json")
    assert executed.beyond(launch) is None
    monkeypatch.setattr(executed, "count", lambda _: {"loop": 4.0, "all": 5.5})
    said = []
    executed.save([launch, launch], said.append, executed.FILE)
    executed.save([launch], said.append, executed.FILE)
    assert said == [f"executing {executed.name_of(launch)}"]
    assert executed.beyond(launch) == 1.5
    other = recorded(PTX, Lq=6)
    executed.save([other], said.append, executed.FILE)
    assert list(executed.known(executed.FILE)) == [executed.name_of(other)]
    kinds = (("a", "bf16", None), ("b", "bf16", 0.0), ("c", "tf32x3", None))
    calls = [fused_call(f"_{name}_kernel", precision=precision, beyond=beyond) for name, precision, beyond in kinds]
    found = counts(calls, impl="triton")
    assert found.uncounted == ["a_kernel"]
    assert static(found).uncounted == ["a_kernel", "b_kernel"]
    for arch, advice in (("sm_86", "--count"), ("sm_90", "sm_90 is not emulated")):
        step = SimpleNamespace(experiment="X", device="a5000", counts=replace(found, arch=arch))
        assert re.fullmatch(rf"X, a5000: .* alone for a_kernel: .*{advice}.*", tables.uncounted(step))


def test_the_committed_counts_are_of_whole_launches():
    found = executed.known(executed.FILE)
    assert {name.split()[1] for name in found} == {"sm_80", "sm_86", "sm_89"}
    assert all(1 < one["loop"] <= one["all"] for one in found.values())


@pytest.mark.parametrize("programs", [3, 64, 1000])
def test_a_sample_is_spread_over_the_programs(programs):
    assert executed.sampled(programs, 1e12).tolist() == sorted({0, int(0.618034 * programs)})
    many = executed.sampled(programs, 1)
    assert len(many) == min(programs, 64)
    for step in (2, 8):  # whatever lies innermost: tiles, heads
        assert np.bincount(many % step, minlength=step).max() <= len(many) / step * 1.5 + 1


def test_tiles_of_a_launch_are_whole_and_causal_blocks_skipped():
    def share(kernel: str, sizes: dict[str, int], **constants: object) -> float:
        arguments = tuple(Argument(name, "i32", value=value) for name, value in sizes.items())
        constants |= {"BLOCK_M": 64, "BLOCK_N": 32, "BLOCK_K": 16}
        return collect.executed_share(Launch(kernel, "m", "sm_86", (1, 1, 1), 4, 2, constants, arguments))

    assert share("_attention_fwd_kernel", {"Lq": 65, "Lk": 33}, CAUSAL=False) == 128 * 64 / (65 * 33)
    # rows of queries 0..63 reach two of four blocks of keys, 64..127 all
    assert share("_attention_fwd_kernel", {"Lq": 128, "Lk": 128}, CAUSAL=True) == 6 / 8
    assert share("_attention_fwd_kernel", {"Lq": 128, "Lk": 128, "Lk2": 64}, CAUSAL=True) == (6 + 4) / (8 + 4)
    assert share("_glu_forward_kernel", {"M": 64, "F": 40, "D": 32}) == 64 / 40
    assert share("_glu_dw_kernel", {"M": 40, "F": 40, "D": 32}) == pytest.approx(64 / 40 * 48 / 40)
    assert share("_linear_cross_entropy_fwd_kernel", {"tokens": 60, "vocabulary": 32}) == 64 / 60


def test_the_exchange_grows_with_the_gpus_and_is_none_alone():
    calls = product_call(4096, 4096, 512)
    alone, two, eight = (work(counts(calls, 1), A5000, gpus).others(PLANTED)["exchange"] for gpus in (1, 2, 8))
    assert alone == 0
    assert eight / two == pytest.approx((7 / 8) / (1 / 2))
    fused_step = work(counts(calls, 1, impl="triton"), A5000, 8).others(PLANTED)
    assert fused_step["exchange"] == eight
    assert "host" not in fused_step
    assert "evaluation" not in fused_step


# ---------------------------------------------------------------- counts


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory):
    """Counts of these tests are kept apart."""
    path = tmp_path_factory.mktemp("projection")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MARCH_COUNTS", str(path))
        yield path


def small(name: str, micro: int = 2) -> Counts:
    return collect.collect(name, "eager", micro, lengths=(33, 18))


def of(found: Counts, operator: str) -> pd.DataFrame:
    return found.calls[found.calls.operator == operator]


def total(found: Counts, operator: str, column: str) -> int:
    return (of(found, operator)["count"] * of(found, operator)[column]).sum()


def test_eager_counts_are_the_models_products():
    found = small("Baseline")
    scores = 2 * 8 * (3 * 33 * 33 + 3 * 18 * 18 + 3 * 18 * 33)
    last = 2 * 8 * 33 * 33  # the last encoder block's have no backward
    assert total(found, "attention products", "flops") == 2 * 64 * (2 * scores + 4 * (scores - last))
    assert of(found, "softmax")["count"].sum() == 9 + 8
    assert set(of(found, "linear products").alignment) == {16}
    # rows of 33 keys in bf16 start at multiples of 2 bytes, of 18 at multiples of 4
    assert set(of(found, "attention products").alignment) == {2, 4, 16}


def test_eager_dropout_is_the_one_of_cuda():
    names = set(small("Baseline").calls.name)
    assert {"aten::native_dropout", "aten::native_dropout_backward"} <= names
    assert "aten::bernoulli_" not in names


def test_the_bank_has_no_mask_and_heads_drive_the_scores():
    def masks(name: str) -> int:
        found = of(small(name), "mask")
        return found[found.phase == "forward"]["count"].sum()

    assert masks("Baseline") == masks("Database") == 9
    assert 2 * total(small("LessHeadsMoreQKVDim"), "softmax", "reads") == total(small("Baseline"), "softmax", "reads")


def test_counts_are_read_again_until_a_source_changes(monkeypatch):
    first = small("APEUnitVariance")
    monkeypatch.setattr(collect, "eager_calls", lambda *_: pytest.fail("counted again"))
    pd.testing.assert_frame_equal(small("APEUnitVariance").calls, first.calls)
    monkeypatch.setattr(cache, "sources_hash", lambda *_: "other")
    with pytest.raises(pytest.fail.Exception, match="counted again"):
        small("APEUnitVariance")


def test_what_cannot_be_counted_is_refused():
    with pytest.raises(ValueError, match="expected eager or triton, got 'torch'"):
        collect.collect("Baseline", "torch", 2)


def test_micro_batches_are_the_published_ones():
    assert {name for name in experiments.names() if micro_batch(name) == 32} >= HALVED_EXPERIMENTS
    assert micro_batch("Baseline") == micro_batch("Database", "triton") == 64
    assert micro_batch("MoreHeadsLessQKVDimLessLayersControlled") == 32


# ---------------------------------------------------------------- the published runs


@pytest.fixture(scope="module")
def calibration(folder):
    return calibrate()


def test_left_out_runs_are_closer_than_the_naive_baseline(calibration):
    assert len(calibration.left_out) == len(published_seconds()) == 12
    for runs in (calibration.left_out, calibration.left_out.drop("BaselineFP32")):
        assert mean_error(runs.error) < 0.5 * mean_error(runs.naive_error)
    assert mean_error(calibration.left_out.error) < NOISE


@pytest.mark.parametrize(
    "name", ["UnifiedAttention", "LessHeadsMoreQKVDim", "DatabaseFromLayers", "Database", "BaselineFP32"]
)
def test_large_differences_have_their_direction_and_half_their_size(calibration, name):
    fitted, published = calibration.fit.seconds, calibration.published
    ratio = (fitted[name] - fitted["Baseline"]) / (published[name] - published["Baseline"])
    assert 0.5 <= ratio <= 2


def test_a_projection_adds_up(calibration):
    one = project("Baseline", "eager", calibration)
    assert sum(one.by_operator.values()) == pytest.approx(one.seconds)
    calls = kernels_of(one, calibration).seconds.sum()
    assert calls + sum(one.work.others(calibration.fit.efficiencies).values()) == pytest.approx(one.seconds)
    assert one.low < one.seconds < one.high
    assert one.arithmetic_seconds < one.seconds
    assert one.published_seconds == 0.9262
    faster = project("Baseline", "eager", calibration, "a100")
    assert faster.seconds < one.seconds
    assert faster.published_seconds is None


# ---------------------------------------------------------------- the command


def test_the_command_prints_and_saves_a_list(calibration, tmp_path, capsys):
    path = tmp_path / "some_projection.json"
    assert command.main(["--exp", "baseline,Database", "--impl", "eager", "--json", "--save", str(path)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads(path.read_text())
    assert [row["experiment"] for row in found] == ["Baseline", "Database"]
    for row in found:
        assert row["status"] == "projection, not measured"
        assert sum(row["by_operator"].values()) == pytest.approx(row["seconds"])
        assert {"impl", "device", "gpus", "low", "high", "published_seconds"} <= set(row)


def test_every_table_says_that_it_is_a_projection(calibration, capsys):
    assert command.main(["--exp", "Baseline", "--impl", "eager", "--kernels"]) == 0
    tables = capsys.readouterr().out.split("\n\n")
    for before, one in itertools.pairwise(tables):
        if one.startswith("|"):
            assert before.startswith("Projection, not measured")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--device", "a500"], "expected one of a5000, a6000"),
        (["--device", "a5000,h100"], "got 'a5000,h100'"),
        (["--impl", "torch"], "expected one of eager, triton, got 'torch'"),
        (["--exp", "Basline"], "did you mean Baseline"),
        (["--gpus", "0"], "expected 1 to 1024, got 0"),
        (["--exchange", "-1"], "expected GB/s above 0"),
        (["--save", "seconds.json"], "expected a name with 'projection'"),
    ],
)
def test_the_command_says_what_it_expected(arguments, said, capsys):
    with pytest.raises(SystemExit):
        command.main(arguments)
    assert said in capsys.readouterr().err


@pytest.mark.slow
def test_the_fused_step_of_baseline(folder):
    """Compiles the kernels with products, in a process whose Triton compiles."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, "-m", "bench.projection", "--impl", "triton", "--json"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    (row,) = json.loads(done.stdout)
    assert row["arithmetic_seconds"] < row["seconds"] < 0.3
    assert row["static_slots"] == [], "python -m bench.projection --count, then the page anew"
    assert {"attention", "glu", "linear", "linear_cross_entropy", "exchange"} <= set(row["by_operator"])
