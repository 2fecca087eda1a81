"""Registers that were never written: bytes of them may be moved about, nothing may read them."""

import pytest
import torch
from snippets import run

READS = {
    "a sum": ("add.s32 %r2, %r1, 1", "%r1"),
    "the half of a pair": ("mov.b32 %r1, {%rs1, %rs2}\nmov.b32 {_, %rs3}, %r1\ncvt.u32.u16 %r2, %rs3", "%rs3"),
    "a whole pair": ("mov.b32 %r1, {%rs1, %rs2}\nadd.s32 %r2, %r1, 1", "%r1"),
    "a copy": ("mov.b32 %r3, %r1\nadd.s32 %r2, %r3, 1", "%r3"),
    "a wider pair": ("mov.b64 %rd2, {%r3, %r1}\nmov.b64 {_, %r2}, %rd2", "%r2"),
    "a byte": ("prmt.b32 %r2, %r3, %r1, 0x4210", "%r2"),
    "a guard": ("mov.b32 %r2, 1\n@%p1 mov.b32 %r2, 2", "%p1"),
}
NOT_READ = {
    "the other half of a pair": "mov.b32 %r1, {%rs1, %rs2}\nmov.b32 {%rs3, _}, %r1\ncvt.u32.u16 %r2, %rs3",
    "half of a wider pair": "mov.b64 %rd2, {%r3, %r1}\nmov.b64 {%r2, _}, %rd2",
    "bytes left out": "prmt.b32 %r2, %r3, %r1, 0x3210",
}


def _run(body):
    start = "mov.b16 %rs1, 7\nmov.b32 %r3, 7\nld.param.b64 %rd1, [k_param_0]\n"
    body = f"{start}{body}\nst.global.b32 [ %rd1 + 0 ], {{ %r2 }}\nret"
    findings, _ = run(body, [torch.zeros(1, dtype=torch.int32)])
    return [f.message.split()[0] for f in findings if f.kind == "uninitialised register"]


@pytest.mark.parametrize("name", READS)
def test_a_read_is_found(name):
    body, register = READS[name]
    assert _run(body) == [register]


@pytest.mark.parametrize("name", NOT_READ)
def test_what_is_moved_and_not_read_is_no_finding(name):
    assert not _run(NOT_READ[name])
