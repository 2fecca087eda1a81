"""Hazards in shared memory between lanes of a warp and between warps, in hand-written PTX."""

import byte_model
import pytest
import torch
from snippets import run


def _both_say(body: str, hazard: bool) -> None:
    """The emulator, and the model that follows each byte."""
    found = []
    recorded = byte_model.recorded(lambda: found.extend(run(body, [], threads=64, programs=2, shared=256)[0]))
    assert bool(found) == hazard, found
    assert (byte_model.hazard(recorded) is not None) == hazard


# Lanes of a warp read, one of them writes: a read, lanes that synchronise (or not), more reads, the write.
WARP = """
    mov.u32 %r1, %tid.x
    shl.b32 %r2, %r1, 2
    st.shared.b32 [%r2], %r1
    bar.sync 0
    setp.eq.u32 %p1, %r1, {first}
    setp.eq.u32 %p2, %r1, {second}
    setp.eq.u32 %p3, %r1, {writer}
    mov.b32 %r3, 16
    {reads}
    @%p3 st.shared.b32 [%r3], %r1
    ret
"""
FIRST, SECOND, SYNC = (
    "@%p1 ld.shared.b32 %r4, [%r3]",
    "@%p2 ld.shared.b32 %r5, [%r3]",
    "bar.warp.sync -1",
)


@pytest.mark.parametrize("first", [0, 5, 31])
@pytest.mark.parametrize(
    ("reads", "second", "writer", "hazard"),
    [
        ([FIRST], 9, 7, True),  # lane 0's read as any other's
        ([FIRST], 9, None, False),  # its own
        ([FIRST, SYNC], 9, 7, False),
        ([FIRST, SECOND], 9, 9, True),
        ([FIRST, SYNC, SECOND], 9, 9, False),  # what was before the barrier no longer matters
        ([FIRST, SYNC, SECOND], 9, 7, True),
        ([FIRST, SECOND, SYNC, FIRST], 9, None, False),  # the same access again: its latest time counts
        ([FIRST, SECOND, SYNC, SECOND], 9, 7, True),
        ([FIRST, SYNC, SECOND, FIRST], 9, 9, True),
        ([FIRST, SYNC, SECOND, FIRST], 9, None, True),
        ([FIRST], 9, 40, True),  # of another warp
        ([FIRST, SYNC], 9, 40, True),  # which bar.warp.sync does not hold back
        ([FIRST, SECOND], 40, 7, True),
        ([FIRST, SYNC, SECOND], 40, None, True),
    ],
)
def test_a_write_after_a_read_in_a_warp(first, reads, second, writer, hazard):
    """writer None: the first reader itself."""
    lines = "\n".join(reads)
    body = WARP.format(first=first, second=second, writer=first if writer is None else writer, reads=lines)
    _both_say(body, hazard)


MATRIX = """
    mov.u32 %r1, %tid.x
    and.b32 %r2, %r1, 7
    shl.b32 %r2, %r2, 4
    setp.lt.u32 %p1, %r1, 8
    @%p1 st.shared.v4.b32 [%r2], {{%r1, %r1, %r1, %r1}}
    bar.sync 0
    setp.eq.u32 %p2, %r1, 3
    setp.eq.u32 %p3, %r1, {writer}
    setp.lt.u32 %p4, %r1, 32
    mov.b32 %r3, 16
    @!%p4 bra $L__BB0_1
    {before}
    ldmatrix.sync.aligned.m8n8.x1.shared.b16 {{%r6}}, [%r2]
    {after}
    $L__BB0_1:
    @%p3 st.shared.b32 [%r3], %r1
    ret
"""
LANE = "@%p2 ld.shared.b32 %r4, [%r3]"


@pytest.mark.parametrize("plain", [None, "before", "after"])
@pytest.mark.parametrize("writer", [7, 0, 40])
def test_a_write_after_a_read_by_all_lanes_at_once(plain, writer):
    """ldmatrix is over for the whole warp when it is for a lane, which a plain read next to it is not."""
    reads = {"before": "", "after": ""} | ({plain: LANE} if plain else {})
    _both_say(MATRIX.format(writer=writer, **reads), writer == 40 or plain is not None)


def test_an_access_whose_every_lane_is_out_of_bounds():
    """It is reported, and the rest of the loop runs, while copies are under way too."""
    body = """
        mov.u32 %r1, %tid.x
        shl.b32 %r2, %r1, 2
        ld.param.b64 %rd1, [k_param_0]
        mov.b32 %r4, 0
        $L__BB0_1:
        cp.async.ca.shared.global [ %r2 + 0 ], [ %rd1 + 0 ], 0x4
        cp.async.commit_group
        ld.shared.b32 %r3, [%r2 + 4096]
        add.s32 %r4, %r4, 1
        setp.lt.s32 %p1, %r4, 3
        @%p1 bra $L__BB0_1
        ret
    """
    findings, _ = run(body, [torch.zeros(4)], shared=256)
    assert "out of bounds" in {f.kind for f in findings}
