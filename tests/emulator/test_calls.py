"""Every distinct call of a fused operator that an experiment's training step makes, at 83 / 37 positions and 211 words.

As the model makes it: packed, heads filled up, a padding mask, its layouts; in the experiment's type, judged against
float64 with the budget of the interpreter's tests. CI takes one; a step of
Baseline is elsewhere.
"""

import pytest
import steps
import torch

import march
from kernels import calls, emulator, selftest
from kernels.dispatch import OPERATORS
from kernels.fused import embedding, tiles_rows
from march import experiments

EXPERIMENTS = ("UnifiedAttention",)
# the formula alone computes it
NAMES = [alike[0] for alike in steps.distinct() if alike[0] != "UnifiedAttentionAsPublished"]
JUDGED: dict[str, list[str]] = {}


def _calls(name: str, **overrides) -> list[calls.Call]:
    config = experiments.configuration(name, vocab_size=211, **overrides)
    with torch.device("meta"):
        model = march.build_model(name, impl="triton", vocab_size=211, **overrides).train()
        given = steps.tokens(config, (83, 37), 2, 0, True)
    model = model.to(steps.DTYPES[config.precision])
    given = {n: x.to("meta") for n, x in given.items()} | {
        "dropout_state": torch.empty(3, dtype=torch.int64, device="meta")
    }
    return calls.observe(lambda: model(**given).loss.backward(), "sm_86")[0]


@pytest.fixture(autouse=True)
def budget(monkeypatch):
    monkeypatch.setattr(selftest, "ERROR_FACTOR", 2.0)
    monkeypatch.setattr(selftest, "ERROR_FLOOR", 1e-5)


def _judge(call: calls.Call, arch: str = "sm_86") -> list[str]:
    with emulator.active(arch, seed=1) as session:
        problems = selftest.disagreements(call, calls.fused_function(call.operator), torch.device("cpu"))
    assert session.launches
    return [f"{call}: {problem}" for problem in problems]


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in EXPERIMENTS else pytest.mark.slow) for n in NAMES])
def test_calls(name):
    found = _calls(name, **steps.affordable(name))
    assert len(found) >= 6
    for call in found:
        if repr(call) not in JUDGED:
            JUDGED[repr(call)] = _judge(call)
    assert [problem for call in found for problem in JUDGED[repr(call)]] == []


# of each operator its forms: in CI the first, and of attention two segments
FORMS = [(name, i) for name in OPERATORS for i, _ in enumerate(calls.generic_calls(name, torch.float32))]
FORMS = [pytest.param(*x, marks=() if x[1] < 2 else pytest.mark.slow, id=f"{x[0]}-{x[1]}") for x in FORMS]


@pytest.mark.parametrize(("operator", "form"), FORMS)
def test_the_order_of_programs_changes_no_bit(operator, form, monkeypatch):
    """Several programs share each sum: rows of a gain, runs of a table, chunks of a vocabulary, queries of a bank."""
    monkeypatch.setattr(tiles_rows, "PROGRAMS", 4)
    monkeypatch.setattr(embedding, "ROWS_OF_E", 64)
    call = calls.generic_calls(operator, torch.bfloat16)[form]
    found = []
    for seed in (None, 1):
        inputs, kwargs = call.draw(torch.device("cpu"))
        with emulator.active("sm_86", seed=seed) as session:
            found.append(calls.results(operator, calls.fused_function(operator), inputs, kwargs))
        assert max(launch.recorded.programs for launch in session.launches) >= 4
    assert [name for name, first in found[0].items() if not torch.equal(first, found[1][name])] == []


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_80", "sm_89"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("operator", "form"), FORMS)
def test_other_targets(operator, form, dtype, arch):
    assert _judge(calls.generic_calls(operator, dtype)[form], arch) == []
