"""What moves numbers between lanes, against the fragment tables of the PTX manual; control flow; vectors."""

import numpy as np
import pytest
import torch
from snippets import run

from kernels.emulator import UnsupportedPtx

LANES = np.arange(32)
GROUP, IN_GROUP = LANES // 4, LANES % 4


def _int32(x: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(x).view(np.int32).copy())


def _mma(opcode: str, a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """Registers of D [4, 32] from registers of A [4, 32], B [2, 32], C [4, 32]."""
    tensors = [_int32(x) for x in (a, b, c, np.zeros((4, 32), np.uint32))]
    body = "mov.u32 %r1, %tid.x\n"
    for number, (first, count) in enumerate([(10, 4), (20, 2), (30, 4)]):
        body += f"ld.param.b64 %rd1, [k_param_{number}]\nmad.wide.u32 %rd1, %r1, 4, %rd1\n"
        body += "".join(f"ld.global.b32 {{ %r{first + i} }}, [ %rd1 + {128 * i} ]\n" for i in range(count))
    names = [
        "{ " + ", ".join(f"%r{first + i}" for i in range(n)) + " }" for first, n in ((40, 4), (10, 4), (20, 2), (30, 4))
    ]
    body += f"{opcode} {', '.join(names)}\nld.param.b64 %rd2, [k_param_3]\nmad.wide.u32 %rd2, %r1, 4, %rd2\n"
    body += "".join(f"st.global.b32 [ %rd2 + {128 * i} ], {{ %r{40 + i} }}\n" for i in range(4)) + "ret\n"
    findings, _ = run(body, tensors)
    assert not findings
    return tensors[3].numpy().view(np.float32).reshape(4, 32)


@pytest.mark.parametrize("kind", ["bf16", "f16"])
def test_mma_m16n8k16(kind):
    """a_i: row g (+ 8 for i in 2, 3, 6, 7), column 2 t + i % 2 (+ 8 for i >= 4); b_i: row 2 t + i % 2 (+ 8 for i >= 2),
    column g; c_i: row g (+ 8 for i >= 2), column 2 t + i % 2."""
    dtype = torch.bfloat16 if kind == "bf16" else torch.float16
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(shape, generator=generator).to(dtype) for shape in ((16, 16), (16, 8)))
    c = torch.randn(16, 8, generator=generator).numpy()
    a_bits, b_bits = (x.view(torch.int16).numpy().view(np.uint16).astype(np.uint32) for x in (a, b))

    def a_at(i):
        return a_bits[GROUP + 8 * (i in (2, 3, 6, 7)), 2 * IN_GROUP + i % 2 + 8 * (i >= 4)]

    def b_at(i):
        return b_bits[2 * IN_GROUP + i % 2 + 8 * (i >= 2), GROUP]

    a_registers = np.stack([a_at(2 * r) | a_at(2 * r + 1) << 16 for r in range(4)])
    b_registers = np.stack([b_at(2 * r) | b_at(2 * r + 1) << 16 for r in range(2)])
    places = [(GROUP + 8 * (i >= 2), 2 * IN_GROUP + i % 2) for i in range(4)]
    c_registers = np.stack([c[place] for place in places]).view(np.uint32)
    d = _mma(f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32", a_registers, b_registers, c_registers)
    wanted = a.double().numpy() @ b.double().numpy() + c
    np.testing.assert_allclose(d, np.stack([wanted[place] for place in places]), rtol=1e-6, atol=1e-6)


def test_mma_m16n8k8_ignores_the_low_bits_of_tf32():
    """a_i: row g (+ 8 for odd i), column t (+ 4 for i >= 2); b_i: row t (+ 4 for i = 1), column g."""
    rng = np.random.default_rng(0)
    a, b, c = (rng.standard_normal(shape).astype(np.float32) for shape in ((16, 8), (8, 8), (16, 8)))
    a_registers = np.stack([a[GROUP + 8 * (i % 2), IN_GROUP + 4 * (i >= 2)] for i in range(4)]).view(np.uint32)
    b_registers = np.stack([b[IN_GROUP + 4 * i, GROUP] for i in range(2)]).view(np.uint32)
    places = [(GROUP + 8 * (i >= 2), 2 * IN_GROUP + i % 2) for i in range(4)]
    c_registers = np.stack([c[place] for place in places]).view(np.uint32)
    d = _mma("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32", a_registers, b_registers, c_registers)
    cut = [(x.view(np.uint32) & 0xFFFFE000).view(np.float32).astype(np.float64) for x in (a, b)]
    wanted = cut[0] @ cut[1] + c
    np.testing.assert_allclose(d, np.stack([wanted[place] for place in places]), rtol=1e-6, atol=1e-6)
    assert np.abs(d - np.stack([(a.astype(np.float64) @ b + c)[place] for place in places])).max() > 1e-4


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("transposed", [False, True])
def test_ldmatrix(count, transposed):
    """Thread 8 i + r points to row r of matrix i; lane l gets numbers 2 (l % 4), 2 (l % 4) + 1 of row l // 4."""
    numbers = np.arange(4 * 64, dtype=np.uint16).reshape(4, 8, 8)
    rows = np.random.default_rng(0).permutation(32)  # where each row of 16 bytes lies
    memory = np.zeros((32, 8), np.uint16)
    memory[rows] = numbers.reshape(32, 8)
    source, places, out = (
        _int32(memory),
        torch.from_numpy(rows.astype(np.int32) * 16),
        torch.zeros(4 * 32, dtype=torch.int32),
    )
    registers = ", ".join(f"%r{20 + i}" for i in range(count))
    body = f"""
        mov.u32 %r1, %tid.x
        ld.param.b64 %rd1, [k_param_0]
        mad.wide.u32 %rd1, %r1, 16, %rd1
        ld.global.v4.b32 {{ %r10, %r11, %r12, %r13 }}, [ %rd1 + 0 ]
        shl.b32 %r2, %r1, 4
        st.shared.v4.b32 [%r2], {{%r10, %r11, %r12, %r13}}
        bar.sync 0
        ld.param.b64 %rd2, [k_param_1]
        mad.wide.u32 %rd2, %r1, 4, %rd2
        ld.global.b32 {{ %r3 }}, [ %rd2 + 0 ]
        ldmatrix.sync.aligned.m8n8.x{count}{".trans" if transposed else ""}.shared.b16 {{{registers}}}, [%r3]
        ld.param.b64 %rd3, [k_param_2]
        mad.wide.u32 %rd3, %r1, 4, %rd3
    """
    body += "".join(f"st.global.b32 [ %rd3 + {128 * i} ], {{ %r{20 + i} }}\n" for i in range(count)) + "ret\n"
    findings, counts = run(body, [source, places, out], shared=512, profile=True)
    assert not findings
    got = out.numpy().view(np.uint16).reshape(4, 32, 2)[:count]
    if transposed:
        numbers = numbers.swapaxes(1, 2)
    np.testing.assert_array_equal(got, numbers.reshape(4, 32, 2)[:count])
    assert counts.by_opcode()["bar.sync"] == 1


@pytest.mark.parametrize(
    ("instruction", "wanted"),
    [
        ("shfl.sync.bfly.b32 %r3, %r2, 5, 31, -1", LANES ^ 5),
        ("shfl.sync.idx.b32 %r3, %r2, 7, 31, -1", LANES * 0 + 7),
        ("shfl.sync.up.b32 %r3, %r2, 3, 0, -1", np.where(LANES >= 3, LANES - 3, LANES)),
        ("shfl.sync.down.b32 %r3, %r2, 3, 31, -1", np.where(LANES + 3 < 32, LANES + 3, LANES)),
    ],
)
def test_shuffles(instruction, wanted):
    out = torch.zeros(64, dtype=torch.int32)
    body = f"""
        mov.u32 %r1, %tid.x
        mul.lo.s32 %r2, %r1, 10
        {instruction}
        ld.param.b64 %rd1, [k_param_0]
        mad.wide.u32 %rd1, %r1, 4, %rd1
        st.global.b32 [ %rd1 + 0 ], {{ %r3 }}
        ret
    """
    findings, _ = run(body, [out], threads=64)
    assert not findings
    assert out.tolist() == (10 * np.concatenate([wanted, wanted + 32])).tolist()


def test_lanes_and_programs_that_part_come_together():
    """Each lane counts tid + program in a loop of its own length; even lanes then take another branch."""
    out = torch.zeros(3 * 32, dtype=torch.int32)
    body = """
        mov.u32 %r1, %tid.x
        mov.u32 %r2, %ctaid.x
        add.s32 %r3, %r1, %r2
        mov.b32 %r4, 0
        $L__BB0_1:
        setp.ge.s32 %p1, %r4, %r3
        @%p1 bra $L__BB0_2
        add.s32 %r4, %r4, 1
        bra.uni $L__BB0_1
        $L__BB0_2:
        and.b32 %r5, %r1, 1
        setp.eq.b32 %p2, %r5, 0
        @!%p2 bra $L__BB0_3
        add.s32 %r4, %r4, 1000
        $L__BB0_3:
        bar.sync 0
        mad.lo.s32 %r6, %r2, 32, %r1
        ld.param.b64 %rd1, [k_param_0]
        mad.wide.u32 %rd1, %r6, 4, %rd1
        st.global.b32 [ %rd1 + 0 ], { %r4 }
        ret
    """
    findings, counts = run(body, [out], programs=3)
    assert not findings
    assert out.view(3, 32).tolist() == [[t + p + 1000 * (t % 2 == 0) for t in range(32)] for p in range(3)]
    assert counts.by_opcode()["bar.sync"] == 3


def test_asynchronous_copies_fill_with_zeros():
    source, out = torch.arange(32, dtype=torch.int32), torch.full((32,), -1, dtype=torch.int32)
    body = """
        mov.u32 %r1, %tid.x
        shl.b32 %r2, %r1, 2
        ld.param.b64 %rd1, [k_param_0]
        mad.wide.u32 %rd1, %r1, 4, %rd1
        setp.lt.u32 %p1, %r1, 20
        selp.b32 %r3, 4, 0, %p1
        cp.async.ca.shared.global [ %r2 + 0 ], [ %rd1 + 0 ], 0x4, %r3
        cp.async.commit_group
        cp.async.wait_group 0
        bar.sync 0
        xor.b32 %r4, %r2, 124
        ld.shared.b32 %r5, [%r4]
        ld.param.b64 %rd2, [k_param_1]
        mad.wide.u32 %rd2, %r1, 4, %rd2
        st.global.b32 [ %rd2 + 0 ], { %r5 }
        ret
    """
    assert not run(body, [source, out], shared=128)[0]
    assert out.tolist() == [31 - t if 31 - t < 20 else 0 for t in range(32)]
    for dropped, kind in (("cp.async.wait_group 0\n", "asynchronous"), ("bar.sync 0\n", "no barrier")):
        findings, _ = run(body.replace(dropped, ""), [source, out], shared=128)
        assert any(kind in str(finding) for finding in findings), dropped


def test_unknown_opcodes_are_refused_by_name():
    with pytest.raises(UnsupportedPtx, match=r"atom\.global\.add\.u32.*white list"):
        run("ld.param.b64 %rd1, [k_param_0]\natom.global.add.u32 %r1, [%rd1], 1\nret", [torch.zeros(1)])
