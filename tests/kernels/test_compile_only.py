"""The compile-only machinery: it records and specialises as a real launch would, and its report sees what is wrong."""

import json

import pytest
import torch
from compiling import compiled

import bench.compiled
from kernels.compile_only import ARCHITECTURES, limits, recording
from kernels.compile_only.limits import ARCHITECTURE_DATA, Limit, limits_of
from kernels.compile_only.products import products, useful_fraction
from kernels.compile_only.record import launches
from kernels.compile_only.report import _failures, _loops
from kernels.compile_only.sass import Program
from march import experiments

# A loop whose cold block ptxas moved behind the code; a jump back that is no loop; an outer loop around an inner one.
LISTING = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/               @P0 BRA `(.L_x_cold) ;
.L_x_back:
        /*0020*/                   MOV R2, RZ ;
.L_x_outer:
        /*0030*/                   IADD3 R2, R2, 0x1, RZ ;
.L_x_inner:
        /*0040*/                   LDSM.16.M88.4 R4, [R2] ;
        /*0050*/                   LDSM.16.MT88.2 R4, [R2] ;
        /*0060*/                   HMMA.16816.F32.BF16 R8, R4, R6, R8 ;
        /*0070*/                   HMMA.16816.F32.BF16 R8, R4, R6, R8 ;
        /*0080*/              @!P1 LDGSTS.E.BYPASS.128 [R2], [R4.64] ;
        /*0090*/               @P2 BRA `(.L_x_rare) ;
.L_x_join:
        /*00a0*/                   LDS.64 R10, [R2] ;
        /*00b0*/               @P3 BRA `(.L_x_inner) ;
        /*00c0*/               @P4 BRA `(.L_x_outer) ;
        /*00d0*/                   STG.E.U16 [R2.64], R4 ;
        /*00e0*/                   LDG.E.128 R4, [R2.64] ;
        /*00f0*/                   STL [R1], R4 ;
        /*0100*/                   RED.E.ADD.F32.FTZ.RN.STRONG.GPU [R2.64], R4 ;
        /*0110*/                   EXIT ;
.L_x_rare:
        /*0120*/                   FADD R3, R3, R3 ;
        /*0130*/                   BRA `(.L_x_join) ;
.L_x_cold:
        /*0140*/                   MOV R3, RZ ;
        /*0150*/                   BRA `(.L_x_back) ;
.L_x_end:
        /*0160*/                   BRA `(.L_x_end);
"""


def test_innermost_loops_come_from_the_control_flow():
    program = Program(LISTING)
    (loop,) = _loops(program, [0.5])
    # 8 in line, and the 2 of the block behind EXIT
    assert loop.issue_slots == 10
    assert loop.hmma == 2
    assert loop.useful_hmma == 1
    assert loop.issue_per_hmma == 10
    assert loop.shared_cycles == 16 + 8 + 8
    assert loop.fill_cycles == 16
    assert loop.shared_per_tensor == 32 / 16


def test_counts_of_the_whole_program():
    program = Program(LISTING)
    assert program.count("RED", "ATOM") == 1
    assert program.count("STL") == 1
    assert program.widths("LDG") == {128: 1}
    assert program.widths("STG") == {16: 1}


TTGIR = """
#blocked = #ttg.blocked<{sizePerThread = [1, 8], warpsPerCTA = [4, 1], order = [1, 0]}>
#mma = #ttg.nvidia_mma<{versionMajor = 2, versionMinor = 0, warpsPerCTA = [4, 2], instrShape = [16, 8]}>
module attributes {"ttg.num-warps" = 8 : i32} {
  tt.func public @k(%x: !tt.ptr<bf16> {tt.divisibility = 16 : i32} loc("x"(#loc))) {
    %a = tt.dot %q, %r, %c : tensor<32x16xbf16, #ttg.dot_op<{opIdx = 0, parent = #mma}>> * tensor<16x64xbf16, #ttg.dot_op<{opIdx = 1, parent = #mma}>> -> tensor<32x64xf32, #mma> loc(#l)
    %o = scf.for %i = %c0 to %n step %c1 iter_args(%acc = %c)  -> (tensor<32x64xf32, #mma>)  : i32 {
      %d = tt.dot %q, %r, %acc : tensor<32x16xbf16, #ttg.dot_op<{opIdx = 0, parent = #mma}>> * tensor<16x64xbf16, #ttg.dot_op<{opIdx = 1, parent = #mma}>> -> tensor<32x64xf32, #mma> loc(#l)
      scf.if %p {
        %e = tt.dot %q, %r, %acc : tensor<64x32xbf16, #ttg.dot_op<{opIdx = 0, parent = #mma}>> * tensor<32x64xbf16, #ttg.dot_op<{opIdx = 1, parent = #mma}>> -> tensor<64x64xf32, #mma> loc(#l)
      } loc(#l)
      scf.yield %d : tensor<32x64xf32, #mma> loc(#l)
    } loc(#l)
    tt.return
  }
}
"""  # noqa: E501


def test_products_and_their_duplicates():
    outside, twice, once = products(TTGIR)
    assert (outside.loop, twice.loop, once.loop) == (-1, 0, 0)
    # 4 warps of 16 rows on 32 rows: each product is computed twice
    assert (outside.duplicates, twice.duplicates, once.duplicates) == (2, 2, 1)
    assert (once.m, once.n, once.k) == (64, 64, 32)
    small, large = 32 * 64 * 16, 64 * 64 * 32
    assert useful_fraction(TTGIR) == [(small + large) / (2 * small + large)]


@pytest.mark.parametrize(
    ("registers", "shared", "warps", "blocks"),
    # by registers (2 warps a sub-core); by shared memory; by warps; by registers and blocks; registers come in eights
    [(254, 32768, 4, 2), (32, 49152, 4, 2), (32, 0, 8, 6), (16, 0, 1, 12), (168, 0, 4, 3), (169, 0, 4, 2)],
)
def test_occupancy_of_sm_86(registers, shared, warps, blocks):
    assert ARCHITECTURE_DATA["sm_86"].resident_blocks(registers, shared, warps) == blocks


def test_recording_refuses_what_it_cannot_do():
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET"), recording():
        pass
    with pytest.raises(ValueError, match="sm_80"), recording("sm_12"):
        pass


def test_meta_tensors_launch_only_within_a_recording():
    assert not launches(torch.empty(1, device="meta"))
    assert launches(torch.empty(1))


KERNELS = """
import triton
import triton.language as tl

@triton.jit
def _copy_kernel(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + offsets, tl.load(x_ptr + offsets, mask=offsets < n, other=0.0), mask=offsets < n)

@triton.jit
def _sum_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    tl.atomic_add(out_ptr, tl.sum(tl.load(x_ptr + tl.arange(0, BLOCK))))

@triton.jit
def _product_kernel(x_ptr, out_ptr, blocks, M: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr):
    rows = tl.arange(0, M)
    total = tl.zeros((M, M), tl.float32)
    for block in range(blocks):
        x = tl.load(x_ptr + rows[:, None] * 1024 + block * K + tl.arange(0, K)[None, :])
        total = tl.dot(x, x.trans(), total, input_precision=PRECISION)
    tl.store(out_ptr + rows[:, None] * M + rows[None, :], total)
"""

SESSION = """
import json, sys
sys.path.insert(0, sys.argv[1])
import torch
import compile_only_kernels as k
from kernels.compile_only import recording, reports, table

def meta(*shape, dtype=torch.bfloat16):
    return torch.empty(*shape, dtype=dtype, device="meta")

def copy(x, n):
    k._copy_kernel[(3,)](x, torch.empty_like(x), n, BLOCK=1024)

results = {}
def session(name, run, arch="sm_86"):
    with recording(arch) as launches:
        run()
    rows = [row.row() for row in reports(launches)]
    results[name] = {"rows": rows, "launches": [[x.kernel, x.grid, x.constants, x.num_warps] for x in launches],
                     "arguments": [[a.name, a.shape, a.strides, a.bytes, a.value] for a in launches[0].arguments]}

session("aligned", lambda: [copy(meta(4096), 4096) for _ in range(2)])
session("offset", lambda: copy(meta(4097)[1:], 4096))
session("odd", lambda: copy(meta(4096), 4095))
session("expanded", lambda: copy(meta(1, 8).expand(5, 8), 4096))
wide = meta(1024, dtype=torch.float32)
session("atomic", lambda: k._sum_kernel[(1,)](wide, wide[:1], BLOCK=1024))
def product(m, k_, warps, dtype=torch.bfloat16, precision="ieee", stages=2):
    x, out = meta(m, 1024, dtype=dtype), meta(m, m, dtype=torch.float32)
    k._product_kernel[(1,)](x, out, 1024 // k_, M=m, K=k_, PRECISION=precision, num_warps=warps, num_stages=stages)
session("product", lambda: product(64, 32, 4))
session("duplicated", lambda: product(32, 32, 16))
session("spilled", lambda: product(256, 32, 4))
session("shared", lambda: product(128, 128, 8, stages=5))
session("tf32", lambda: product(64, 32, 4, torch.float32, "tf32"))
session("tf32x3", lambda: product(64, 32, 4, torch.float32, "tf32x3"))
session("sm_90", lambda: product(64, 32, 4), "sm_90")
print(json.dumps(results))
"""


@pytest.fixture(scope="module")
def session(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kernels")
    (folder / "compile_only_kernels.py").write_text(KERNELS)
    return compiled(SESSION, str(folder))


def _row(session, name):
    (row,) = session[name]["rows"]
    return row


def test_every_target_has_its_resources():
    """Shared memory of a block by the CUDA programming guide: 99 KiB on consumer parts, 227 on H100 and B200."""
    assert tuple(ARCHITECTURE_DATA) == ARCHITECTURES
    blocks = {arch: data.shared_memory_block // 1024 for arch, data in ARCHITECTURE_DATA.items()}
    assert blocks == {"sm_80": 163, "sm_86": 99, "sm_89": 99, "sm_90": 227, "sm_100": 227, "sm_120": 99}


def test_launches_are_recorded(session):
    recorded = session["aligned"]
    assert recorded["launches"] == [["_copy_kernel", [3, 1, 1], {"BLOCK": 1024}, 4]] * 2
    assert recorded["arguments"] == [
        ["x_ptr", [4096], [1], 8192, None],
        ["out_ptr", [4096], [1], 8192, None],
        ["n", None, None, 0, 4096],
    ]
    row = _row(session, "aligned")
    assert (row["launches"], row["programs"]) == (2, 6)


def test_bytes_count_distinct_elements(session):
    assert session["expanded"]["arguments"][0][3] == 8 * 2


def test_specialisation_is_that_of_a_real_launch(session):
    """Aligned pointers and a size divisible by 16 give 128-bit accesses; a view off by one element does not."""
    assert set(_row(session, "aligned")["loads"]) == set(_row(session, "aligned")["stores"]) == {"128"}
    assert "128" not in _row(session, "offset")["loads"]
    assert "128" not in _row(session, "odd")["loads"]


def test_the_report_sees_what_is_wrong(session):
    assert _row(session, "aligned")["failures"] == []
    assert _row(session, "product")["failures"] == []
    assert any("atomics" in failure for failure in _row(session, "atomic")["failures"])
    assert any("shared memory" in failure for failure in _row(session, "shared")["failures"])
    assert any("plain tf32" in failure for failure in _row(session, "tf32")["failures"])
    assert not any("tf32" in failure for failure in _row(session, "tf32x3")["failures"])
    assert _row(session, "spilled")["spill_stores"] > 0
    assert _row(session, "duplicated")["duplicated"] > 1


def test_useful_products_are_counted(session):
    """64 x 64 x 32 by 4 warps: 64 * 64 * 32 / 2048 / 4 = 16 HMMA a warp and step, times the unrolling."""
    for name, needed in (("product", 16), ("duplicated", 32 * 32 * 32 / 2048 / 16)):
        (loop,) = [loop for loop in _row(session, name)["loops"] if loop["hmma"]]
        assert loop["useful_hmma"] % needed == 0
    assert loop["hmma"] == loop["useful_hmma"] * _row(session, "duplicated")["duplicated"]


def test_spills_and_slots_break_limits(session, monkeypatch):
    from kernels.compile_only.report import Report
    from kernels.compile_only.sass import Loop

    row = dict(_row(session, "spilled"))
    row.pop("passed")
    loop = Loop(Program(LISTING).innermost_loops()[0], 2.0)
    report = Report(**{**row, "loops": (loop,), "failures": ()})
    limit = Limit("*", no_spills=True, issue_per_hmma=5.0, shared_per_tensor=0.99, resident_warps=99)
    failures = list(_failures(report, [limit]))
    for part in ("spills", "issue slots", "shared-memory pipe", "resident warps"):
        assert any(part in failure for failure in failures), part
    monkeypatch.setattr(limits, "LIMITS", [limit, Limit("_copy_*")])
    assert limits_of("_copy_kernel", {}, "sm_86") == [limit, Limit("_copy_*")]
    assert limits_of("_copy_kernel", {}, "sm_90") == []


def test_command_line_report_and_its_files(tmp_path):
    """The rows of one kernel as JSON; the saved disassembly and cubin let anyone recount."""
    result = compiled(STEP, "--kernel", "_glu_forward", "--save", str(tmp_path))
    report = result["report"]
    assert report["status"] == "compiled, not run"
    assert result["status"] == int(bool(result["missing"]) or not report["passed"])
    (entry,) = report["results"]
    assert entry["experiment"] == "Baseline"
    assert {row["kernel"] for row in entry["rows"]} == {"_glu_forward_kernel"}
    assert all(row["passed"] for row in entry["rows"])
    for row, file in zip(entry["rows"], sorted(tmp_path.glob("sm_86/Baseline/*.sass")), strict=True):
        assert file.with_suffix(".cubin").read_bytes()[:4] == b"\x7fELF"
        assert Program(file.read_text()).count("HMMA") == row["hmma"]
        assert json.loads(file.with_suffix(".json").read_text())["registers"] == row["registers"]


BRIEF = """
import contextlib, io, json, sys
from bench import compiled
from kernels.compile_only import limits
with contextlib.redirect_stdout(io.StringIO()) as out:
    status = [compiled.main(["--brief", "--kernel", "_glu_dw"])]
    limits.LIMITS.append(limits.Limit("_glu_dw_kernel", issue_per_hmma=1.0))
    status.append(compiled.main(["--brief", "--kernel", "_glu_dw"]))
print(json.dumps([status, out.getvalue().splitlines()]))
"""


def test_brief_is_one_line_an_experiment_with_its_verdict():
    status, lines = compiled(BRIEF)
    assert status == [0, 1]
    header, passed = ([cell.strip() for cell in line.strip("|").split("|")] for line in (lines[0], lines[2]))
    row = dict(zip(header, passed, strict=True))
    assert (row["experiment"], row["target"], row["verdict"]) == ("Baseline", "sm_86", "pass")
    assert row["spilling"] == "-"
    assert 0 < float(row["most slots/HMMA"]) < 4.2
    assert [line for line in lines if "FAIL: " in line and "limit 1" in line]
    assert lines.count("compiled, not run") == 2


STEP = """
import contextlib, io, json, sys
from bench.compiled import main, missing_operators
with contextlib.redirect_stdout(io.StringIO()) as out:
    status = main(["--json", *sys.argv[1:]])
print(json.dumps({"status": status, "missing": missing_operators(), "report": json.loads(out.getvalue())}))
"""


def _assert_step_passes(*arguments):
    result = compiled(STEP, *arguments)
    for entry in result["report"]["results"]:
        assert entry["rows"]
        for row in entry["rows"]:
            assert row["passed"], (entry["experiment"], row["kernel"], row["configuration"], row["failures"])
    assert result["status"] == int(bool(result["missing"]))


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in experiments.names() if name != "Baseline"])
def test_a_training_step_of_every_experiment_breaks_no_limit(name):
    _assert_step_passes("--exp", name)


@pytest.mark.slow
@pytest.mark.parametrize("arch", [arch for arch in ARCHITECTURES if arch != "sm_86"])
def test_a_training_step_on_other_targets_breaks_no_limit(arch):
    _assert_step_passes("--exp", "Baseline,UnifiedAttention,Database,BigHeads", "--arch", arch)


def test_command_line_names_its_choices(capsys):
    with pytest.raises(SystemExit):
        bench.compiled.main(["--arch", "sm_12"])
    assert "sm_86" in capsys.readouterr().err
