"""The dynamic profile: what it counts, how its counts scale with sequences, its command."""

import collections
import json
import re
from dataclasses import asdict

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

import kernels
from bench import emulated
from bench.projection import executed
from bench.projection.collect import executed_share
from kernels import cases, dropout_state, emulator
from kernels.compile_only import recording
from kernels.dropout import Dropout
from kernels.emulator.instructions import RULES, SPECIAL, kind_of
from kernels.fused import glu
from march.cost.counter import KERNELS, launch_event

SMALL = {
    "num_layers": 2, "vocab_size": 211, "dim_model": 128, "num_heads": 2, "dim_feedforward": 256, "max_length": 128,
}  # fmt: skip
KINDS = {
    "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32": "mma",
    "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16": "ldmatrix",
    "ld.shared.v4.b32": "shared load",
    "st.shared.b16": "shared store",
    "ld.global.v4.b32": "global load",
    "st.global.b16": "global store",
    "ld.param.b64": "move",
    "mov.pred": "move",
    "cp.async.cg.shared.global": "async copy",
    "cp.async.ca.shared.global": "async copy",
    "cp.async.commit_group": "async control",
    "cp.async.wait_group": "async control",
    "bar.sync": "barrier",
    "bar.warp.sync": "barrier",
    "shfl.sync.bfly.b32": "shuffle",
    "redux.sync.add.s32": "shuffle",
    "bra.uni": "control",
    "ret": "control",
    "ex2.approx.ftz.f32": "special",
    "rsqrt.approx.f32": "special",
    "cvt.rn.bf16x2.f32": "conversion",
    "setp.lt.f32": "predicate",
    "selp.f32": "predicate",
    "and.pred": "predicate",
    "fma.rn.f32": "float",
    "max.NaN.bf16x2": "float",
    "div.full.f32": "float",
    "add.rn.bf16x2": "float",
    "add.s32": "integer",
    "mad.wide.u32": "integer",
    "prmt.b32": "integer",
    "div.s32": "integer",
}


def test_every_opcode_of_the_white_list_has_its_class():
    assert {opcode: kind_of(opcode) for opcode in KINDS} == KINDS
    by_kind = {}
    for opcode in (*RULES, *SPECIAL):
        by_kind.setdefault(kind_of(opcode), []).append(opcode)
    assert set(by_kind) == set(KINDS.values())
    assert all(re.search(r"\.b?f16(x2)?$|\.f32$", opcode) for opcode in by_kind["float"])
    assert not [opcode for opcode in by_kind["integer"] if re.search(r"\.b?f(16|32)|pred|global|shared", opcode)]


@triton.jit
def _strided(x_ptr, out_ptr, turns, STEP: tl.constexpr):
    i = tl.arange(0, 32)
    total = tl.zeros((32,), tl.float32)
    for turn in range(turns):
        total += tl.load(x_ptr + (turn * 32 + i) * STEP)  # the loop
    tl.store(out_ptr + i, total)  # the epilogue


@pytest.mark.parametrize("step", [1, 2, 8, 16])
def test_loops_sectors_and_bytes_of_a_strided_read(step):
    """A warp's 32 floats, `step` apart: 4 sectors a request, up to one a lane; nothing is fetched twice or left out."""
    turns, x, out = 7, torch.ones(7 * 32 * step), torch.zeros(32)
    with emulator.active("sm_86", profile=True) as session:
        _strided[(1,)](x, out, turns, STEP=step, num_warps=1)
    p = emulated.profile(session.launches)
    assert out.tolist() == [turns] * 32
    assert (p.read.asked, p.read.requests, p.read.sectors) == (4 * 32 * turns, turns, turns * min(32, 4 * step))
    assert (p.written.asked, p.written.requests, p.written.sectors) == (128, 1, 4)
    assert p.classes["global load"] == turns
    by_code = {line.code: line for line in p.lines}
    loop = next(line for code, line in by_code.items() if code.endswith("# the loop"))
    epilogue = next(line for code, line in by_code.items() if code.endswith("# the epilogue"))
    assert loop.in_loops >= 2 * turns
    assert loop.in_loops % turns == 0
    assert epilogue.slots > epilogue.in_loops == 0
    assert p.slots == sum(p.classes.values()) == sum(line.slots for line in p.lines)


@triton.jit
def _product(x_ptr, out_ptr, N: tl.constexpr):
    at = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    x = tl.load(x_ptr + at)
    tl.store(out_ptr + at, tl.dot(x, x))


def test_products_of_a_warp():
    x, out = torch.ones(32, 32, dtype=torch.bfloat16), torch.zeros(32, 32)
    with emulator.active("sm_86", profile=True) as session:
        _product[(1,)](x, out, N=32, num_warps=1)
    (launch,) = session.launches
    assert sum(n for kind, n in launch.counts.by_opcode().items() if kind.startswith("mma")) == 2 * 32**3 // 4096


def _numbers(one: emulated.Profile) -> dict:
    """Every number of a profile by its place."""
    found = {}

    def walk(place, value):
        if isinstance(value, dict):
            for name, inner in value.items():
                walk((*place, name), inner)
        elif isinstance(value, list):
            for line in value:
                walk((*place, line["source"]), line)
        elif not isinstance(value, str):
            found[place] = value

    walk((), asdict(one))
    return found


@pytest.fixture(scope="module")
def by_sequences():
    """Profiles by kernel of a two-block Baseline with 1, 2 and 3 sequences of 128 and 128 positions: whole tiles."""
    steps = (emulated.emulated_step("Baseline", micro_batch=n, lengths=(128, 128), **SMALL) for n in (1, 2, 3))
    return [{p.kernel: _numbers(p) for p in emulated.profiles(step.launches)} for step in steps]


# numbers of a profile that are no linear function of the sequences, and why
NOT_LINEAR = {
    "_embedding_table_bwd_kernel": None,  # walks the positions of each token that occurs
    "_embedding_fwd_kernel": ("read", "sectors"),  # which rows the tokens of a warp share
    "_linear_cross_entropy_dh_kernel": ("read", "sectors"),  # the same of labels
    "_embedding_positions_bwd_kernel": ("read", "requests"),  # tiles of several sequences
    "_linear_cross_entropy_mean_kernel": None,  # one warp reads 4 bytes a tile of tokens: whole requests and sectors
}


def test_one_and_two_sequences_predict_three(by_sequences):
    one, two, three = by_sequences
    assert len(one) > 15
    wrong: dict[str, list] = {}
    for kernel in three:
        assert one[kernel].keys() == two[kernel].keys() == three[kernel].keys()
        for place, value in three[kernel].items():
            if 2 * two[kernel][place] - one[kernel][place] != value:
                wrong.setdefault(kernel, []).append(place)
    assert wrong.keys() == NOT_LINEAR.keys(), wrong
    for kernel, number in NOT_LINEAR.items():
        assert number is None or wrong[kernel] == [number], kernel


def test_the_command(capsys):
    """Of the step of one sequence above: tables at 100 columns, JSON with the same numbers."""
    arguments = ["--encoder", "128", "--decoder", "128", "--kernel", "glu", "--top", "3"]
    arguments += [part for name, value in SMALL.items() for part in ("--set", f"{name}={value}")]
    assert emulated.main([*arguments, "--json"]) == 0
    shown = capsys.readouterr()
    found = json.loads(shown.out)
    assert {one["kernel"] for one in found["kernels"]} == {f"_glu_{part}_kernel" for part in ("forward", "dx", "dw")}
    assert all(one["mma"] == one["formula"] for one in found["kernels"])  # whole tiles
    assert found["findings"] == []
    assert re.search(r"41 of 41: \w+, [\d.]+ s", shown.err)
    assert emulated.main(arguments) == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= emulated.WIDTH
    for one in found["kernels"]:
        assert f"{emulated.short(one['kernel'])}: {one['slots']:,} instructions of warps, {one['mma']:,} mma" in text
        assert one["lines"][0]["code"][:40] in text


@pytest.mark.parametrize(
    "arguments",
    ["--exp Nope", "--arch sm_90", "--micro-batch 0", "--encoder 1025", "--kernel zzz", "--set dim_model=x", "--sets"],
)
def test_a_wrong_argument_is_one_line(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        emulated.main(arguments.split())
    assert stopped.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


@triton.jit
def _sum_of_products(x_ptr, out_ptr, turns, N: tl.constexpr):
    at = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    total = tl.zeros((N, N), tl.float32)
    for turn in range(turns):
        x = tl.load(x_ptr + turn * N * N + at)
        total = tl.dot(x, x, total)
    tl.store(out_ptr + tl.program_id(0) * N * N + at, total)


def test_what_a_loop_does_not_show_is_shared_by_its_products():
    """Of a launch that was recorded, not run: the same instructions around a loop twice as long are half as many a
    product, however many programs are looked at."""

    def beyond(turns: int, numbers: list[int]) -> float:
        with recording("sm_86") as launches:
            x, out = (
                torch.empty(n, 32, 32, dtype=d, device="meta") for n, d in ((64, torch.bfloat16), (5, torch.float))
            )
            _sum_of_products[(5,)](x, out, turns, N=32, num_warps=1)
        found = executed.count(launches[0], np.array(numbers))
        assert found["all"] > found["loop"] > 1
        return found["all"] - found["loop"]

    short = beyond(32, [0, 4])
    assert short > 0.2
    assert beyond(32, [3]) == pytest.approx(short)
    assert beyond(64, [1, 2, 3]) == pytest.approx(short / 2, abs=2e-3)


# sizes that are no multiple of their tiles; heads, and the width of the loss, whose padding nobody counts, are
_ATTENTION = {"batch": 2, "queries": 37, "keys": 53, "heads": 2, "width": 64}
_GLU = {"batch": 1, "length": 37, "width": 72, "hidden": 88}
_LOSS = {"batch": 1, "length": 37, "vocabulary": 203}
_GATED = {"kind": "gated", "activation": "gelu"}
RAGGED = {
    "attention": ("attention", _ATTENTION, {}),
    "dropout": ("attention", _ATTENTION, {"dropout": 0.1}),
    "shared keys": ("attention", _ATTENTION | {"key_batch": 1, "key_heads": 1}, {}),
    "two segments": ("attention", _ATTENTION | {"segments": 2}, {"causal": True}),
    "gated": ("glu", _GLU | {"kind": "gated"}, _GATED),
    "plain": ("glu", _GLU | {"kind": "plain"}, {"kind": "plain", "activation": "relu"}),
    "recomputed": ("glu", _GLU | {"kind": "gated"}, _GATED | {"recompute": True}),
    "loss": ("linear_cross_entropy", _LOSS | {"width": 64}, {"scale": 0.125}),
    "loss in chunks": ("linear_cross_entropy", _LOSS | {"width": 640}, {"scale": 0.125}),
    "residual_norm": ("residual_norm", {"batch": 2, "length": 37, "width": 72}, {}),
    "embedding": ("embedding", {"batch": 2, "length": 37, "width": 72, "vocabulary": 203}, {}),
}


def ragged_step(case, device):
    """Forward and backward of a case in bf16."""
    operator, dims, options = RAGGED[case]
    made = {n: x.to(device) for n, x in cases.FACTORIES[operator](**dims).items() if x is not None}
    given = {n: x.bfloat16().requires_grad_() if x.is_floating_point() else x for n, x in made.items()}
    if "dropout" in options:
        options = options | {"dropout": Dropout(options["dropout"], dropout_state(3, 5, device=device), 1)}
    if "recompute" in options:
        out = glu.glu(**given, **options, factor=1.0, dropout=None, gate_dropout=None)
    else:
        out = getattr(kernels, operator)(**given, **options, impl="triton")
    (out[0] if isinstance(out, tuple) else out).sum().backward()


def test_every_kernel_is_held_against_its_record():
    with recording("sm_86", compile=False) as launches:
        for case in RAGGED:
            ragged_step(case, "meta")
    assert {launch.kernel for launch in launches} == set(KERNELS)


# given whole, read in part: rows of tokens alone, the largest of all programs' parts
READ_IN_PART = {"_embedding_fwd_kernel", "_linear_cross_entropy_dh_kernel"}


@pytest.mark.parametrize("case", RAGGED)
def test_what_a_launch_is_said_to_move_and_multiply_is_what_it_does(case):
    """FLOPs, bytes written and bytes read of every launch by its record, beside what the emulator executed of it; and a
    launch that was only recorded has the same counts."""
    with emulator.active("sm_86", profile=True) as session:
        ragged_step(case, "cpu")
    with recording("sm_86") as launches:
        ragged_step(case, "meta")
    assert [x.kernel for x in launches] == [x.recorded.kernel for x in session.launches]
    for launch, only_recorded in zip(session.launches, launches, strict=True):
        kernel, ran, counted = only_recorded.kernel, emulated.profile([launch]), launch_event(only_recorded)
        assert ran.written.asked == counted.writes, kernel
        # rows of the softmax are padded to whole blocks, which are not read
        assert counted.reads <= 1.05 * 32 * ran.read.sectors or kernel in READ_IN_PART, kernel
        mma = sum(n for opcode, n in launch.counts.by_opcode().items() if opcode.startswith("mma"))
        assert bool(mma) == bool(KERNELS[kernel].flops), kernel
        if not mma:
            continue
        assert mma * 4096 == pytest.approx(counted.flops * executed_share(only_recorded)), kernel
        every = np.arange(only_recorded.programs)
        parts = [emulator.sample(only_recorded, part).counts.warps for part in (every[:1], every[1:])]
        run = sum(map(collections.Counter, parts), collections.Counter())
        if kernel.startswith("_glu"):  # whose activation is computed by branches
            assert run.total() == pytest.approx(sum(launch.counts.warps.values()), rel=0.01)
        else:
            assert run == launch.counts.warps
