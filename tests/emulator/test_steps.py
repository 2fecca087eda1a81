"""Whole training steps through the emulator, beside torch in the same type and the formula in float64.

CI has a step of a Baseline with two blocks a stack (of the encoder's last one only the keys and values are used) and
the true vocabulary, and three of AdamW with one block. The experiments' steps at the paper's lengths are slow, half a
minute of one core for Baseline; `-s` prints what they measured.
"""

import time

import pytest
import steps
import torch

import kernels
from kernels import cases, emulator

PAPER = (921, 206)
NAMES = [alike[0] for alike in steps.distinct() if alike[0] != "UnifiedAttentionAsPublished"]


def test_a_step_with_the_true_vocabulary():
    print(steps.check("Baseline", (19, 17), num_layers=4))


def test_three_updates():
    """Learning rate 1e-2, where a wrong gradient shows: losses, and where every weight went."""
    got, plain, exact = steps.three(
        "Baseline", (45, 37), batch=2, padded=True, updates=3, num_layers=4, vocab_size=1008
    )
    assert not got.session.findings
    for ours, theirs, want in zip(got.losses, plain.losses, exact.losses, strict=True):
        assert abs(ours - want) <= steps.FACTOR * abs(theirs - want) + 1e-3 * want, (got.losses, exact.losses)
    assert exact.losses[0] - exact.losses[-1] > 0.5, "nothing was learnt that could be wrong"
    moved = steps.distances(got.weights, plain.weights, exact.weights)
    # an update of AdamW is +-1e-2 at first, so a gradient near 0 of either sign moves a weight far
    assert max(moved.values()) <= 1.5, moved


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_the_step_at_the_papers_lengths(name):
    """Of `Best` four layers in place of 48; the formula alone computes UnifiedAttentionAsPublished."""
    print("\n" + steps.check(name, PAPER, **steps.affordable(name)))


def test_the_published_mask_has_no_kernel():
    """The one experiment that is left out above."""
    step = steps.run("UnifiedAttentionAsPublished", "triton", torch.bfloat16, (9, 7), num_layers=2, vocab_size=50)
    kernels_used = {launch.recorded.kernel for launch in step.session.launches}
    assert kernels_used
    assert not [kernel for kernel in kernels_used if "attention" in kernel]


def _attention(checks: bool) -> None:
    inputs = cases.attention_inputs(1, *PAPER[::-1], 2, 64, dtype=torch.bfloat16)
    with emulator.active("sm_86", checks=checks):
        out = kernels.attention(**{n: x.requires_grad_() for n, x in inputs.items()}, impl="triton")
        out.sum().backward()


def _baseline(checks: bool) -> None:
    steps.run("Baseline", "triton", torch.bfloat16, PAPER, emulation={"checks": checks})


# most seconds of one core
SPEEDS = [(_attention, True, 2.0), (_baseline, True, 75.0), (_baseline, False, 40.0)]


@pytest.mark.slow
@pytest.mark.parametrize(("run", "checks", "most"), SPEEDS, ids=["attention", "Baseline", "Baseline without checks"])
def test_speed(run, checks, most):
    """CPU time of the process, once compiled: the time of one core that does nothing else."""
    if run is _attention:
        run(checks)  # compiles; Baseline's step costs more to run than to compile
    cpu, wall = time.process_time(), time.perf_counter()
    run(checks)
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    print(f"\n{run.__name__.strip('_')} {'with' if checks else 'without'} checks: {cpu:.1f} s of CPU, {wall:.1f} s")
    assert cpu <= most
