"""Counts of a training step's forward and backward, call by call, kept on disk.

`eager` counts the operators of torch that the predecessor's model dispatches on meta tensors; `triton` those of march's
model and the launches of the fused kernels, with what the compiled programs of kernels with products show. The calls
are the ledger's events (march.cost), grouped where they are equal; nothing here knows the network.

A file of counts carries a hash of every source that they follow from, so counts are never stale: other sources,
another file.
"""

import functools
import hashlib
import json
import os
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from bench.projection.predecessor import Predecessor
from kernels.compile_only import ARCHITECTURES, Launch
from kernels.compile_only.report import report
from march import experiments
from march.cost.counter import Counter, Event, Product
from march.cost.flops import FORMULAS
from march.cost.ledger import entry
from march.cost.measure import DTYPES, measure
from march.cost.size import total_parameters

ROOT = Path(__file__).resolve().parents[2]
ENCODER_LENGTH, DECODER_LENGTH = 921, 206
IMPLEMENTATIONS = ("eager", "triton")
_SHARED = ("march/config.py", "march/experiments", "march/cost", "bench/projection/collect.py")
SOURCES = {
    "eager": (*_SHARED, "bench/rivals.py", "bench/projection/predecessor.py"),
    "triton": (*_SHARED, "kernels", "march/model"),
}


@dataclass(frozen=True)
class Compiled:
    """A launch's compiled program. slots: issue slots of the main loop for each useful HMMA, 0 where it has none;
    issued: HMMA issued for each useful one; programs: of the launch; warps: resident on an SM; precision: of its
    products, bf16, fp32 or tf32x3."""

    slots: float
    issued: float
    programs: int
    warps: int
    precision: str


@dataclass(frozen=True)
class Call:
    """`count` equal calls of a forward and backward; of one: flops, bytes read from and written to memory. product: of
    a library product; compiled: of a fused kernel with products, and then executed: FLOPs of its tiles, padding
    included, skipped blocks left out."""

    phase: str
    operator: str
    name: str
    count: int
    flops: int
    read: int
    written: int
    product: Product | None = None
    compiled: Compiled | None = None
    executed: int = 0


@dataclass(frozen=True)
class Counts:
    """Calls of one micro-batch's forward and backward; arch: of the compiled programs, "" of eager counts."""

    experiment: str
    impl: str
    arch: str
    precision: str
    micro_batch: int
    parameters: int
    calls: tuple[Call, ...]

    @property
    def flops(self) -> int:
        return sum(call.count * call.flops for call in self.calls)

    @property
    def dram(self) -> int:
        return sum(call.count * (call.read + call.written) for call in self.calls)


@functools.cache
def sources_hash(impl: str) -> str:
    """Of all sources that counts follow from, and of the versions that dispatch and compile."""
    digest = hashlib.sha256(f"{torch.__version__} {impl}".encode())
    if impl == "triton":
        import triton

        digest.update(triton.__version__.encode())
    for place in SOURCES[impl]:
        path = ROOT / place
        for file in [path] if path.is_file() else sorted(path.rglob("*.py")):
            digest.update(str(file.relative_to(ROOT)).encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def cache_folder() -> Path:
    """$MARCH_PROJECTION_CACHE, else build/projection of the repository."""
    return Path(os.environ.get("MARCH_PROJECTION_CACHE") or ROOT / "build" / "projection")


def group(calls: Iterable[Call]) -> tuple[Call, ...]:
    """Equal calls as one with their number, in the order of the first."""
    counted: dict[Call, int] = {}
    for call in calls:
        counted[call] = counted.get(call, 0) + 1
    return tuple(Call(**{**call.__dict__, "count": count}) for call, count in counted.items())


# ---------------------------------------------------------------- eager

# what an operator of torch is called in the tables; the rest is "elementwise"
_EAGER = {
    "mm": "linear products",
    "bmm": "attention products",
    "_softmax": "softmax",
    "_softmax_backward_data": "softmax",
    "masked_fill": "mask",
    "native_dropout": "dropout",
    "native_dropout_backward": "dropout",
    "clone": "copies",
    "cat": "copies",
    "nll_loss_forward": "loss",
    "nll_loss_backward": "loss",
    "_log_softmax": "loss",
    "_log_softmax_backward_data": "loss",
}


def _torch_call(event: Event, operator: str) -> Call:
    counted = entry(event)
    read, written = counted.dram_read, counted.dram_written
    return Call(event.phase, operator, event.name, 1, counted.flops, read, written, event.product)


def eager_calls(name: str, micro_batch: int, lengths: tuple[int, int]) -> tuple[Call, ...]:
    """Of the predecessor's model."""
    config = experiments.configuration(name)
    with torch.device("meta"):
        model = Predecessor(config).to(DTYPES[config.precision]).train()
        encoder, decoder = (torch.empty(micro_batch, length, dtype=torch.int64) for length in lengths)
        mask = torch.empty(micro_batch, lengths[0], dtype=torch.bool)
        with Counter() as counter:
            for parameter in model.parameters():
                counter.ignore(parameter)
            loss = model(encoder, decoder, decoder, mask)
            counter.phase = "backward"
            loss.backward()
    return group(
        _torch_call(event, _EAGER.get(event.name.removeprefix("aten::"), "elementwise")) for event in counter.events
    )


# ---------------------------------------------------------------- fused


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def executed_share(launch: Launch) -> float:
    """FLOPs of a launch's tiles over those of its formula: tiles are computed whole, causal blocks above the diagonal
    not at all. 1 for a kernel whose sizes are not known here."""
    values: dict[str, Any] = {a.name: a.value for a in launch.arguments} | launch.constants
    m, n = values.get("BLOCK_M"), values.get("BLOCK_N")
    if m is None or n is None:
        return 1.0
    if {"Lq", "Lk"} <= set(values):
        queries, segments = values["Lq"], [(values["Lk"], bool(values.get("CAUSAL")))]
        if "Lo" in values:
            segments = [(values["Lk"], True), (values["Lo"], False)]
        tiles = 0
        for keys, causal in segments:
            for row in range(cdiv(queries, m)):
                reach = min(keys, (row + 1) * m) if causal else keys
                tiles += cdiv(reach, n)
        return tiles * m * n / (queries * sum(keys for keys, _ in segments))
    sizes = {
        "_glu": ("M", "F"),
        "_linear_cross_entropy_fwd": ("tokens", "vocabulary"),
        "_linear_cross_entropy_gradient": ("own_rows", "other_rows"),
        "_linear_cross_entropy": ("tokens", "columns"),
    }
    rows, columns = next((names for start, names in sizes.items() if launch.kernel.startswith(start)), ("", ""))
    if rows not in values or columns not in values:
        return 1.0
    rows, columns = values[rows], values[columns]
    return cdiv(rows, m) * m * cdiv(columns, n) * n / (rows * columns)


def _compiled(launch: Launch, precision: str) -> Compiled:
    row = report(launch)
    main = row.main_loop
    slots, issued = (main.issue_per_hmma, main.hmma / main.useful_hmma) if main else (0.0, 1.0)
    if precision == "fp32":
        precision = "tf32x3" if "inputPrecision = tf32x3" in launch.compiled.asm["ttir"] else "fp32"
    return Compiled(slots, issued, launch.programs, row.warps_per_sm, precision)


def fused_calls(name: str, micro_batch: int, arch: str, lengths: tuple[int, int]) -> tuple[Call, ...]:
    """Of march's model. Kernels with products are compiled for `arch`, seconds each the first time."""
    config = experiments.configuration(name)
    measured = measure(
        config, *lengths, micro_batch, "triton", config.precision, arch, compile=lambda kernel: kernel in FORMULAS
    )
    calls = []
    for event in measured.events:
        if event.launch is None:
            calls.append(_torch_call(event, event.operator))
            continue
        counted = entry(event)
        compiled = _compiled(event.launch, config.precision) if event.launch.compiled is not None else None
        calls.append(
            Call(
                event.phase,
                event.operator,
                event.name,
                1,
                counted.flops,
                counted.dram_read,
                counted.dram_written,
                compiled=compiled,
                executed=round(counted.flops * executed_share(event.launch)) if compiled else 0,
            )
        )
    return group(calls)


# ---------------------------------------------------------------- on disk


def collect(
    name: str,
    impl: str,
    micro_batch: int,
    arch: str = "sm_86",
    lengths: tuple[int, int] = (ENCODER_LENGTH, DECODER_LENGTH),
    progress: Callable[[str], None] = lambda line: None,
) -> Counts:
    """Counts of one experiment, from the file of these sources where there is one, else counted and written.

    ValueError where `impl` or `arch` is none that can be counted.
    """
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl: expected {' or '.join(IMPLEMENTATIONS)}, got {impl!r}; choose one of these")
    if impl == "triton" and arch not in ARCHITECTURES:
        raise ValueError(f"arch: expected one of {', '.join(ARCHITECTURES)}, got {arch!r}; kernels compile for these")
    arch = arch if impl == "triton" else ""
    label = "_".join((name, impl, *([arch] if arch else []), f"{micro_batch}x{lengths[0]}x{lengths[1]}"))
    path = cache_folder() / "counts" / f"{label}_{sources_hash(impl)}.json"
    if path.exists():
        return _read(path)
    progress(f"counting {label}")
    config = experiments.configuration(name)
    if impl == "eager":
        calls = eager_calls(name, micro_batch, lengths)
    else:
        calls = fused_calls(name, micro_batch, arch, lengths)
    counts = Counts(name, impl, arch, config.precision, micro_batch, total_parameters(config), calls)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}")
    partial.write_text(json.dumps(asdict(counts)) + "\n", encoding="utf-8")
    partial.replace(path)
    return counts


def _read(path: Path) -> Counts:
    values = json.loads(path.read_text(encoding="utf-8"))
    calls = tuple(
        Call(
            **{
                **call,
                "product": call["product"] and Product(**call["product"]),
                "compiled": call["compiled"] and Compiled(**call["compiled"]),
            }
        )
        for call in values["calls"]
    )
    return Counts(**{**values, "calls": calls})
