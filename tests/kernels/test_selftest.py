"""The self-test: it covers every program of a run, works wherever a kernel is first used, and never while tracing."""

import contextlib
import json

import pytest
import torch
from compiling import compiled
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import kernels
from kernels import dispatch, portable, selftest
from kernels.fused import measured

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def fresh(monkeypatch, tmp_path):
    """Nothing loaded, and a cache of its own."""
    monkeypatch.setattr(dispatch, "_LOADED", {})
    monkeypatch.setenv("MARCH_CACHE", str(tmp_path))


# ---------------------------------------------------------------- every program of a step

COVERED = """
import json, sys
from bench.compiled import training_step
from kernels.calls import cases_of, record
from march import config, experiments
from march.training.selftest import meta_step
results = {}
for name, micro_batch, encoder, decoder, arch, overrides in json.loads(sys.argv[1]):
    configuration = experiments.configuration(name, **overrides)
    step = meta_step(configuration, (encoder, decoder), micro_batch, "triton", configuration.precision, "cuda")
    cases, programs = cases_of(step, arch)
    launched = {program for call in cases for program in record(call, arch)}
    lengths = {"micro_batch": micro_batch, "encoder_length": encoder, "decoder_length": decoder}
    training = set()
    if sys.argv[2] == "compare":  # with what bench.compiled records of a training step, by code of its own
        training = {x.program for x in training_step(name, arch, **lengths, compile=False, **overrides)}
    elements = max(sum(layout.elements() for layout in call.tensors.values() if layout) for call in cases)
    results[f"{name} {micro_batch} {encoder} {decoder} {arch} {overrides}"] = [
        sorted(launched ^ programs), sorted(training - launched), len(training), len(programs), elements]
print(json.dumps(results))
"""


def _assert_covered(runs, how=""):
    results = compiled(COVERED, json.dumps(runs), how)
    assert len(results) == len(runs)
    for run, (different, missing, training, programs, elements) in results.items():
        assert different == [], run
        assert missing == [], run
        assert training < programs >= 20, run  # an evaluation's forward is another program
        assert elements < 30e6, run  # small enough for float64: the widest is a product of 1024 x 4096


def test_every_program_of_every_experiment_is_compared():
    from march import experiments

    _assert_covered([(name, 64, 921, 206, "sm_86", {}) for name in experiments.names()])


def test_every_program_is_compared_at_other_sizes_and_targets():
    small = {"dim_model": 60, "dim_feedforward": 133, "dim_qkv": 12}
    _assert_covered(
        [
            (name, *sizes, "sm_86", {})
            for name in ("Database", "UnifiedAttention")
            for sizes in ((1, 921, 206), (3, 37, 1))
        ]
        + [("BigHeads2", 16, 128, 64, arch, {}) for arch in ("sm_80", "sm_90", "sm_120")]
        + [(name, 5, 48, 17, "sm_86", small) for name in ("Baseline", "BaselineFP32", "MixedActSOMDropout")]
        + [("GELUGatedLinearUnit", 64, 921, 206, "sm_86", {"dropout": 0.0, "vocab_size": 1031})],
        "compare",
    )


STEP = """
import json, sys, tempfile, os
os.environ["MARCH_CACHE"] = tempfile.mkdtemp()
import torch
from kernels import calls, portable, selftest
from kernels.compile_only import recording
from kernels.dispatch import ImplementationError
from march import experiments
from march.training.selftest import meta_step
from triton.runtime.jit import JITFunction

cpu = torch.device("cpu")
configuration = experiments.configuration("Baseline")
step = meta_step(configuration, (921, 206), 64, "triton", "bf16", "cuda")
compared = []

class Kernel:
    function = packed_metadata = None
    def launch_metadata(self, *arguments): return None
    def run(self, *arguments): pass
JITFunction._do_compile = lambda *arguments: Kernel()

def launch(call, lost=None):
    # what a device would launch, from meta tensors
    if call.operator == lost:
        return
    compared.append(call.operator)
    inputs, kwargs = call.draw(torch.device("meta"))
    with recording("sm_86"):
        calls.results(call.operator, calls.fused_function(call.operator), inputs, kwargs, call.upstream)

results = {}
try:
    selftest.verify_step(step, cpu, lambda call: launch(call, "glu"))
except ImplementationError as error:
    results["lost"] = str(error)
results["first"] = selftest.verify_step(step, cpu, launch)[0]
results["operators"] = sorted(set(compared))
results["again"] = selftest.verify_step(step, cpu, launch)[0]
cases, _ = calls.cases_of(step, "sm_86")
for call in cases:
    right = getattr(portable, call.operator)
    assert selftest.disagreements(call, right, cpu) == [], call
    def wrong(*a, **k):
        out = right(*a, **k)
        return (out[0] * 1.05, *out[1:]) if isinstance(out, tuple) else out * 1.05
    assert selftest.disagreements(call, wrong, cpu), call
print(json.dumps(results))
"""


def test_a_step_passes_by_all_its_programs_or_is_refused_by_the_name_of_one():
    results = compiled(STEP)
    assert "got none of" in results["lost"]
    assert "_glu_dw_kernel" in results["lost"]
    assert "_glu_forward_kernel" in results["lost"]
    assert results["first"].startswith("passed in")
    assert results["again"] == "remembered"
    assert results["operators"] == ["attention", "embedding", "glu", "linear_cross_entropy", "residual_norm"]


# ---------------------------------------------------------------- where a kernel is first used


def _verify(operator="glu"):
    return selftest.verify(operator, "triton", getattr(portable, operator), CPU, torch.float32)


@contextlib.contextmanager
def _default_dtype():
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


SURROUNDINGS = {
    "inference_mode": torch.inference_mode,
    "no_grad": torch.no_grad,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "fake tensors": FakeTensorMode,
    "default device": lambda: torch.device("meta"),
    "default dtype": _default_dtype,
    "flop counter": lambda: FlopCounterMode(display=False),
    "saved tensor hooks": lambda: torch.autograd.graph.saved_tensors_hooks(lambda x: None, lambda x: 1 / 0),
    "two": lambda: _both(torch.inference_mode(), FakeTensorMode()),
}


@contextlib.contextmanager
def _both(first, second):
    with first, second:
        yield


@pytest.mark.parametrize("surrounding", SURROUNDINGS)
@pytest.mark.parametrize("operator", ["glu", "embedding"])
def test_the_first_use_may_be_anywhere(surrounding, operator):
    with SURROUNDINGS[surrounding]():
        assert _verify(operator).startswith("passed")
        with pytest.raises(kernels.ImplementationError, match="disagrees"):
            selftest.verify("glu", "triton", lambda **kw: 2 * portable.glu(**kw), CPU, torch.bfloat16)


@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.vmap, torch.func.functionalize, torch.func.jacfwd])
def test_the_first_use_may_be_in_a_transform(transform):
    outcome = []

    def function(x):
        outcome.append(_verify())
        return x.sum()

    transform(function)(torch.ones(3))
    assert outcome[0].startswith("passed")


# ---------------------------------------------------------------- tracing and capture


@pytest.fixture
def checked(monkeypatch):
    """The CPU's implementations are checked before their first use, as a CUDA device's are; the checks are counted."""
    seen = []
    plain = dispatch._PLAIN
    monkeypatch.setattr(dispatch, "_PLAIN", {})
    monkeypatch.setattr(dispatch, "_function", lambda called, name, device_type: plain[name, called])
    monkeypatch.setattr(dispatch, "_is_checked", lambda name, device: True)
    true = selftest.disagreements
    monkeypatch.setattr(selftest, "disagreements", lambda *a: seen.append(a[0].operator) or true(*a))
    torch.compiler.reset()
    return seen


def _norm(x):
    return kernels.residual_norm(x, None, x[0, 0], impl="torch")[1]


@pytest.mark.parametrize("fullgraph", [False, True])
def test_nothing_is_compared_while_tracing(checked, fullgraph):
    x = torch.randn(2, 3, 8)
    function = torch.compile(_norm, backend="eager", fullgraph=fullgraph)
    with pytest.raises(Exception, match=r"residual_norm: expected .* call kernels.self_test\(.*\) first"):
        function(x)
    assert checked == []
    kernels.self_test("torch", CPU, torch.float32, ("residual_norm",))
    assert checked == ["residual_norm"]
    torch.testing.assert_close(function(x), _norm(x))
    assert checked == ["residual_norm"]


def test_a_remembered_pass_is_enough_for_tracing(checked, monkeypatch):
    kernels.self_test("torch", CPU, torch.float32, ("residual_norm",))
    monkeypatch.setattr(dispatch, "_LOADED", {})  # another process
    torch.compile(_norm, backend="eager", fullgraph=True)(torch.randn(2, 3, 8))
    assert checked == ["residual_norm"]


def test_nothing_is_compared_while_a_graph_is_captured(checked, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(kernels.ImplementationError, match=r"capture.* call kernels.self_test\(.*\) first"):
        _norm(torch.randn(2, 3, 8))
    assert checked == []


# ---------------------------------------------------------------- what a pass is remembered by


def test_a_changed_tile_table_is_checked_anew(monkeypatch, tmp_path):
    table = tmp_path / "measured" / "sm_86.json"
    monkeypatch.setattr(measured, "DIRECTORY", table.parent)
    seen = [selftest.fingerprint(CPU)]
    table.parent.mkdir()
    for elements in (8, 16):
        table.write_text(json.dumps({"entries": {"rows.stream": {"tile": {"elements": elements}}}}))
        seen.append(selftest.fingerprint(CPU))
    with measured.trying("rows.stream", {"elements": 8}):
        seen.append(selftest.fingerprint(CPU))
    assert len(set(seen)) == 4
    assert selftest.fingerprint(CPU) == seen[2]


@pytest.mark.parametrize("package", ["torch", "triton"])
def test_other_versions_are_checked_anew(monkeypatch, package):
    before = selftest.fingerprint(CPU)
    if package == "torch":
        monkeypatch.setattr(torch, "__version__", "9.9")
    else:
        monkeypatch.setattr(selftest.importlib.metadata, "version", lambda name: "9.9")
    assert selftest.fingerprint(CPU) != before


def test_every_source_of_the_kernels_counts(monkeypatch, tmp_path):
    """Also of the packages below: what is launched is decided in all of them."""
    import shutil
    from pathlib import Path

    root = tmp_path / "kernels"
    shutil.copytree(Path(selftest.__file__).parent, root, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(selftest, "__file__", str(root / "selftest.py"))
    seen = {selftest.fingerprint(CPU)}
    paths = list(root.rglob("*.py"))
    for path in paths:
        path.write_text(path.read_text() + "\n# edited\n")
        seen.add(selftest.fingerprint(CPU))
    assert len(seen) == len(paths) + 1
