"""Wrong kernels and wrong PTX are found, each at its line."""

import inspect
import re

import pytest
import torch
import triton
import triton.language as tl
from snippets import run

from kernels import emulator
from kernels.dispatch import ImplementationError


@triton.jit
def _copy(x_ptr, out_ptr, n, stride, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i * stride, mask=i < n, other=0.0)  # the read
    tl.store(out_ptr + i, x, mask=i < n)  # the write


@triton.jit
def _shift(x_ptr, BARRIER: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(x_ptr + i, i)
    if BARRIER:
        tl.debug_barrier()
    tl.store(x_ptr + BLOCK + i, tl.load(x_ptr + BLOCK - 1 - i))  # the neighbour


@triton.jit
def _across(x_ptr, out_ptr, BLOCK: tl.constexpr):
    p = tl.program_id(0)
    x = tl.load(x_ptr + (p + 1) % tl.num_programs(0) * BLOCK + tl.arange(0, BLOCK))  # of another program
    tl.store(out_ptr + p * BLOCK + tl.arange(0, BLOCK), x + 1)


@triton.jit
def _transpose(x_ptr, out_ptr, N: tl.constexpr):
    rows, columns = tl.arange(0, N)[:, None], tl.arange(0, N)[None, :]
    x = tl.load(x_ptr + rows * N + columns)
    tl.store(out_ptr + rows * N + columns, tl.trans(x))


def _line(kernel, text):
    """Line of the file where the kernel's source has `text`."""
    lines, first = inspect.getsourcelines(kernel.fn)
    return first + next(i for i, line in enumerate(lines) if text in line)


def _launch(launch, **options):
    with emulator.active("sm_86", raises=False, **options) as session:
        launch()
    return session


def _found(launch, kind, kernel, text, **options):
    findings = _launch(launch, **options).findings
    assert [f for f in findings if kind in f.kind and f.source.line == _line(kernel, text)], findings
    assert all(f.source.file == __file__ for f in findings)
    return findings


def test_a_right_kernel_has_no_findings_and_the_session_its_counts():
    x = torch.randn(96)
    out = torch.zeros(96)
    session = _launch(lambda: _copy[(2,)](x, out, 96, 1, BLOCK=64, num_warps=1), profile=True)
    assert torch.equal(out, x)
    assert not session.findings
    (launch,) = session.launches
    assert launch.recorded.kernel == "_copy"
    assert {where.line for where in launch.counts.by_source() if where.file == __file__} >= {_line(_copy, "the read")}
    assert sum(sectors for sectors, _, _ in launch.counts.sectors.values()) == 2 * 12


def test_bytes_past_the_end():
    x, out = torch.zeros(64, dtype=torch.bfloat16), torch.zeros(63, dtype=torch.bfloat16)
    findings = _found(lambda: _copy[(1,)](x, out, 64, 1, BLOCK=64, num_warps=1), "out of bounds", _copy, "the write")
    assert "got byte 126" in str(findings[0]) or "byte 124" in str(findings[0])
    with pytest.raises(emulator.EmulationError, match="out_ptr"), emulator.active():
        _copy[(1,)](x, out, 64, 1, BLOCK=64, num_warps=1)


def test_outside_a_view_but_inside_its_storage():
    """The gaps of a strided view, and a neighbour packed into the same storage."""
    out, packed = torch.zeros(64), torch.zeros(8, 2, 8)
    q = packed[:, 0]
    _found(lambda: _copy[(1,)](q, out, 64, 1, BLOCK=64, num_warps=1), "out of bounds", _copy, "the read")
    _found(lambda: _copy[(1,)](packed[:4], out, 33, 2, BLOCK=64, num_warps=1), "out of bounds", _copy, "the read")
    assert not _launch(lambda: _copy[(1,)](packed, out, 64, 2, BLOCK=64, num_warps=1)).findings


def test_two_programs_on_one_place():
    x, out = torch.zeros(64), torch.zeros(64)
    overlapping = out.as_strided((2, 48), (16, 1))

    @triton.jit
    def _overlap(out_ptr, BLOCK: tl.constexpr):
        i = tl.program_id(0) * 16 + tl.arange(0, BLOCK)
        tl.store(out_ptr + i, i * 1.0)  # two writers

    _found(lambda: _overlap[(2,)](overlapping, BLOCK=32, num_warps=1), "race in global", _overlap, "two writers")
    for seed in (None, 1, 2):  # a write before and after the read of it
        findings = _launch(lambda: _across[(2,)](x, x, BLOCK=32, num_warps=1), seed=seed, lanes=32).findings
        assert [f for f in findings if f.kind == "race in global memory"], seed
    assert not _launch(lambda: _across[(2,)](x, out, BLOCK=32, num_warps=1)).findings


def test_threads_of_a_program_without_a_barrier():
    x = torch.zeros(256, dtype=torch.int32)
    _found(lambda: _shift[(1,)](x, BARRIER=False, BLOCK=128, num_warps=4), "race in global", _shift, "the neighbour")
    assert not _launch(lambda: _shift[(1,)](x, BARRIER=True, BLOCK=128, num_warps=4)).findings
    assert x[128:].tolist() == list(range(127, -1, -1))


def test_a_read_of_memory_that_nobody_wrote():
    out = torch.zeros(64)

    def launch(fill):
        x = torch.empty(64)
        if fill:
            x[:63] = 1.0
            x[63:].zero_()
        _copy[(1,)](x, out, 64, 1, BLOCK=64, num_warps=1)

    _found(lambda: launch(False), "uninitialised", _copy, "the read")
    assert out.isnan().all()
    assert not _launch(lambda: launch(True)).findings
    with emulator.active() as session:
        y = torch.empty(64)
        _copy[(1,)](out, y, 64, 1, BLOCK=64, num_warps=1)
        _copy[(1,)](y, out, 64, 1, BLOCK=64, num_warps=1)
    assert len(session.launches) == 2


def _without(pattern, number):
    """A transform that drops the numbered instruction that matches."""

    def transform(name, ptx):
        places = list(re.finditer(rf"^\t{pattern}.*;$", ptx, re.M))
        place = places[number]
        return ptx[: place.start()] + ptx[place.end() :]

    return transform


def test_a_dropped_barrier():
    x = torch.randn(64, 64).to(torch.bfloat16)
    out = torch.zeros_like(x)

    def launch():
        _transpose[(1,)](x, out, N=64, num_warps=4)

    assert not _launch(launch).findings
    assert torch.equal(out, x.T)
    findings = _launch(launch, transform=_without("bar.sync", 0)).findings
    assert {f.kind for f in findings} == {"race in shared memory"}
    assert all(f.source.file == __file__ for f in findings)


SHARED = """
    mov.u32 %r1, %tid.x
    shl.b32 %r2, %r1, 2
    st.shared.b32 [%r2], %r1
    {sync}
    xor.b32 %r3, %r2, {other}
    ld.shared.b32 %r4, [%r3]
    ret
"""


@pytest.mark.parametrize(
    ("sync", "other", "fault"),
    [("", 0, None), ("", 4, "race"), ("bar.warp.sync -1", 4, None), ("bar.warp.sync -1", 128, "race"),
     ("bar.sync 0", 128, None), ("bar.sync 0", 256, "uninitialised"), ("bar.sync 0", 1024, "out of bounds"),
     ("bar.sync 0", 2, "misaligned")],
)  # fmt: skip
def test_hazards_in_shared_memory(sync, other, fault):
    findings, _ = run(SHARED.format(sync=sync, other=other), [], threads=64, shared=512)
    assert [fault in f.kind for f in findings] == ([] if fault is None else [True])


@pytest.mark.parametrize("barrier", [True, False])
def test_a_write_after_anothers_read(barrier):
    body = SHARED.format(sync="bar.sync 0", other=128)
    body = body.replace("ret", ("bar.sync 0\n" if barrier else "") + "st.shared.b32 [%r2], %r4\nret")
    findings, _ = run(body, [], threads=64, programs=2, shared=256)
    assert bool(findings) != barrier
    assert all("after another thread read it" in f.message for f in findings)


def test_a_barrier_that_some_threads_miss():
    body = "mov.u32 %r1, %tid.x\nsetp.lt.u32 %p1, %r1, 40\n@%p1 bra $L__BB0_1\nbar.sync 0\n$L__BB0_1:\nret"
    findings, _ = run(body, [], threads=64)
    assert [f.kind for f in findings] == ["divergent barrier"]


def test_a_register_that_nobody_wrote():
    findings, _ = run("add.s32 %r1, %r2, 1\nret", [])
    assert [f.kind for f in findings] == ["uninitialised register"]
    assert not run("mov.b32 %r1, 3\nprmt.b32 %r3, %r1, %r2, 0x3210U\nadd.s32 %r4, %r3, 1\nret", [])[0]
    assert run("mov.b32 %r1, 3\nprmt.b32 %r3, %r1, %r2, 0x4210U\nadd.s32 %r4, %r3, 1\nret", [])[0]


def test_cpu_tensors_are_refused_outside_a_session():
    import kernels

    x = torch.zeros(1, 4, 16)
    with emulator.active():
        kernels.residual_norm(x, x, torch.ones(16), impl="triton")
    with pytest.raises(ImplementationError, match="CUDA"):
        kernels.residual_norm(x, x, torch.ones(16), impl="triton")
    with pytest.raises(ValueError, match="sm_90"), emulator.active("sm_90"):
        pass
