"""Every opcode of the white list that moves data, in each of its types; and that every other has a test at all."""

import re

import numpy as np
import pytest
import torch
from snippets import ptx, run

from kernels.emulator.codegen import Code
from kernels.emulator.instructions import SPECIAL
from kernels.emulator.parse import parse
from kernels.emulator.session import execute

TESTED_BY = {
    "load": "here", "store": "here", "parameter": "here", "move": "here", "async_copy": "here", "reduce": "here",
    "compare_pairs": "test_arithmetic", "mma": "test_lanes", "load_matrix": "test_lanes", "shuffle": "test_lanes",
    "branch": "test_lanes", "commit": "test_lanes", "wait": "test_lanes", "barrier": "test_hazards",
    "warp_barrier": "test_hazards",
}  # fmt: skip
LANES = {"mma": 3, "load_matrix": 6, "shuffle": 4, "branch": 3, "barrier": 1, "warp_barrier": 1, "commit": 1, "wait": 1}
REGISTERS = {16: "%rs", 32: "%r", 64: "%rd"}
THREADS = 32


def _by(emitter: str) -> list[str]:
    return [opcode for opcode, name in SPECIAL.items() if name == emitter]


def test_every_special_opcode_has_a_test():
    """Those of `LANES` are tested one by one, by name: more of them want more tests."""
    assert set(SPECIAL.values()) == set(TESTED_BY)
    assert {name: len(_by(name)) for name in LANES} == LANES


def _form(opcode: str) -> tuple[str, int, int]:
    """(kind b, u or s; bits; elements)"""
    match = re.fullmatch(r"(?:ld|st)\.\w+\.(?:v(\d)\.)?([bus])(\d+)", opcode)
    assert match
    return match[2], int(match[3]), int(match[1] or 1)


def _copy_bytes(load: str, store: str, source: str, target: str, size: int) -> str:
    return "".join(
        f"ld.{load}.b8 {{ %rs63 }}, [ {source} + {i} ]\nst.{store}.b8 [ {target} + {i} ], {{ %rs63 }}\n"
        for i in range(size)
    )


def _places(size: int, wide: int) -> str:
    """%rd1, %rd2: a thread's `size` bytes of argument 0, `wide` bytes of argument 1; %r2: its shared memory."""
    return f"""
        mov.u32 %r1, %tid.x
        ld.param.b64 %rd1, [k_param_0]
        ld.param.b64 %rd2, [k_param_1]
        mad.wide.u32 %rd1, %r1, {size}, %rd1
        mad.wide.u32 %rd2, %r1, {wide}, %rd2
        mul.lo.s32 %r2, %r1, {max(size, wide)}
    """


def _bytes(size: int) -> torch.Tensor:
    return torch.randint(0, 256, (THREADS * size,), dtype=torch.uint8, generator=torch.Generator().manual_seed(size))


def _wider(data: torch.Tensor, kind: str, bits: int, width: int) -> np.ndarray:
    numbers = data.numpy().view(f"{'i' if kind == 's' else 'u'}{bits // 8}")
    return numbers.astype(f"{'i' if kind == 's' else 'u'}{width // 8}").view(np.uint8)


@pytest.mark.parametrize("opcode", _by("load"))
def test_loads(opcode):
    """Into registers of their width and of every wider one, which s fills with the sign, u and b with zeros."""
    kind, bits, count = _form(opcode)
    size, shared = bits * count // 8, ".shared." in opcode
    for width in (w for w in REGISTERS if w >= bits):
        data, out = _bytes(size), torch.zeros(THREADS * count * width // 8, dtype=torch.uint8)
        names = [f"{REGISTERS[width]}{10 + i}" for i in range(count)]
        body = _places(size, count * width // 8) + (
            _copy_bytes("global", "shared", "%rd1", "%r2", size) if shared else ""
        )
        body += f"{opcode} {{ {', '.join(names)} }}, [ {'%r2' if shared else '%rd1'} + 0 ]\n"
        body += "".join(
            f"st.global.b{width} [ %rd2 + {i * width // 8} ], {{ {name} }}\n" for i, name in enumerate(names)
        )
        assert not run(body + "ret", [data, out], shared=THREADS * max(size, count * width // 8))[0]
        np.testing.assert_array_equal(out.numpy(), _wider(data, kind, bits, width), err_msg=f"{opcode} {width}")


@pytest.mark.parametrize("opcode", _by("store"))
def test_stores(opcode):
    """Of registers of their width and of every wider one, whose lowest bits they store; the bytes beside stay."""
    _, bits, count = _form(opcode)
    size, shared = bits * count // 8, ".shared." in opcode
    for width in (w for w in REGISTERS if w >= bits):
        wide = count * width // 8
        data, out = _bytes(wide), torch.full((THREADS * 2 * size,), 7, dtype=torch.uint8)
        names = [f"{REGISTERS[width]}{10 + i}" for i in range(count)]
        body = _places(wide, 2 * size)
        body += "".join(
            f"ld.global.b{width} {{ {name} }}, [ %rd1 + {i * width // 8} ]\n" for i, name in enumerate(names)
        )
        target = "%r2" if shared else "%rd2"
        body += f"{opcode} [ {target} + 0 ], {{ {', '.join(names)} }}\n"
        body += _copy_bytes("shared", "global", "%r2", "%rd2", size) if shared else ""
        assert not run(body + "ret", [data, out], shared=THREADS * max(wide, 2 * size))[0]
        wanted = data.numpy().view(f"u{width // 8}").astype(f"u{bits // 8}").view(np.uint8).reshape(THREADS, size)
        np.testing.assert_array_equal(out.numpy().reshape(THREADS, 2 * size)[:, :size], wanted, err_msg=opcode)
        assert (out.numpy().reshape(THREADS, 2 * size)[:, size:] == 7).all()


@pytest.mark.parametrize("opcode", _by("parameter"))
def test_parameters(opcode):
    """ld.param.s32 into 64 bits extends the sign: what ignore_index -100 arrives by."""
    kind, bits, _ = _form(opcode)
    for width in (w for w in REGISTERS if w >= bits):
        for value in (5, -100, -(1 << bits - 1), (1 << bits - 1) - 1):
            text = ptx(
                f"ld.param.b64 %rd1, [k_param_0]\n{opcode} {REGISTERS[width]}2, [k_param_1]\n"
                f"st.global.b{width} [ %rd1 + 0 ], {{ {REGISTERS[width]}2 }}\nret", 2, threads=1,
            )  # fmt: skip
            text = text.replace(".param .u64 .ptr .global .align 1 k_param_1", f".param .u{bits} k_param_1")
            out = torch.zeros(8, dtype=torch.uint8)
            execute(Code(parse(text)), (1, 1, 1), [(0, "out", out), (1, "n", value)], 0)
            wanted = value if kind == "s" else value & ((1 << bits) - 1)
            assert out.numpy().view(np.uint64)[0] == wanted & ((1 << width) - 1), (opcode, width, value)


@pytest.mark.parametrize("opcode", _by("move"))
def test_moves(opcode):
    kind = opcode.split(".")[1]
    data, out = _bytes(8), torch.zeros(THREADS * 8, dtype=torch.uint8)
    body = _places(8, 8) + "ld.global.b64 { %rd10 }, [ %rd1 + 0 ]\n"
    wanted = data.numpy().copy()
    if kind == "pred":
        body += "setp.lt.s64 %p1, %rd10, 0\nmov.pred %p2, %p1\nselp.b64 %rd11, 1, 0, %p2\n"
        wanted = (data.numpy().view(np.int64) < 0).astype(np.int64).view(np.uint8)
    elif kind[1:] == "64":  # through the parts too
        body += f"mov.b64 {{%r10, %r11}}, %rd10\n{opcode} %rd12, %rd10\nmov.b64 %rd11, {{%r11, %r10}}\n"
        body += "xor.b64 %rd11, %rd11, %rd12\n"
        halves = data.numpy().view(np.uint32).reshape(-1, 2)
        wanted = (halves[:, ::-1] ^ halves).reshape(-1).view(np.uint8)
    else:
        half = kind[1:] == "16"
        body += f"mov.b64 {{{'%rs10, %rs11, %rs12, %rs13' if half else '%r10, %r11'}}}, %rd10\n"
        name = "%rs" if half else "%r"
        body += f"{opcode} {name}20, {name}11\n"
        body += f"mov.b64 %rd11, {{{'%rs20, %rs12, %rs10, %rs13' if half else '%r20, %r10'}}}\n"
        parts = data.numpy().view(np.uint16 if half else np.uint32).reshape(THREADS, -1)
        wanted = np.ascontiguousarray(parts[:, [1, 2, 0, 3] if half else [1, 0]]).reshape(-1).view(np.uint8)
    assert not run(body + "st.global.b64 [ %rd2 + 0 ], { %rd11 }\nret", [data, out])[0]
    np.testing.assert_array_equal(out.numpy(), wanted)


@pytest.mark.parametrize("opcode", _by("async_copy"))
def test_asynchronous_copies(opcode):
    for size in (4, 8, 16) if ".ca." in opcode else (16,):
        data, out = _bytes(size), torch.zeros(THREADS * size, dtype=torch.uint8)
        body = _places(size, size) + f"setp.ne.s32 %p1, %r1, 3\nselp.b32 %r3, {size}, 0, %p1\n"
        body += f"{opcode} [ %r2 + 0 ], [ %rd1 + 0 ], {size:#x}, %r3\ncp.async.commit_group\ncp.async.wait_group 0\n"
        body += _copy_bytes("shared", "global", "%r2", "%rd2", size)
        assert not run(body + "ret", [data, out], shared=THREADS * size)[0]
        wanted = data.view(THREADS, size).clone()
        wanted[3] = 0
        assert torch.equal(out.view(THREADS, size), wanted)


@pytest.mark.parametrize("opcode", _by("reduce"))
def test_reductions(opcode):
    _, _, how, kind = opcode.split(".")
    data, out = _bytes(8).repeat(2), torch.zeros(2 * THREADS * 4, dtype=torch.uint8)
    body = (
        _places(8, 4)
        + f"""
        ld.global.b32 {{ %r10 }}, [ %rd1 + 4 ]
        {opcode} %r11, %r10, -1
        st.global.b32 [ %rd2 + 0 ], {{ %r11 }}
        ret
    """
    )
    assert not run(body, [data, out], threads=2 * THREADS)[0]
    numbers = data.numpy().view(np.int32 if kind[0] == "s" else np.uint32).reshape(2, THREADS, 2)[:, :, 1]
    function = {"add": np.sum, "min": np.min, "max": np.max}[how]
    wanted = [int(function(row.astype(np.int64))) & 0xFFFFFFFF for row in numbers]
    assert out.numpy().view(np.uint32).reshape(2, THREADS).tolist() == [[x] * THREADS for x in wanted]
