"""Counts of a training step's forward and backward, call by call, kept on disk.

`eager` counts the operators of torch that the predecessor's model dispatches on meta tensors; `triton` those of march's
model and the launches of the fused kernels, with what the compiled programs of kernels with products show. The calls
are the ledger's events (march.cost), grouped where they are equal; nothing here knows the network.
"""

import collections
import importlib.metadata
import math
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import TypeAdapter

from bench.cache import LENGTHS, ROOT, sources_hash, write
from bench.projection import executed
from kernels.compile_only import ARCHITECTURES, Launch
from kernels.compile_only.report import report
from march import experiments
from march.cost import total_parameters
from march.cost.counter import WITH_PRODUCTS, Counter, Event, Product
from march.cost.step import DTYPES, measure
from march.predecessor.eager import Eager

IMPLEMENTATIONS = ("eager", "triton")
_SHARED = ("march/config.py", "march/experiments", "march/cost", "bench/projection/collect.py")
_EXECUTED = ("bench/projection/executed.py", str(executed.FILE.relative_to(ROOT)))
SOURCES = {
    "eager": (*_SHARED, "march/predecessor/eager.py"),
    "triton": (*_SHARED, *_EXECUTED, "kernels", "march/model"),
}


def versions(impl: str) -> str:
    """Of what dispatches and compiles."""
    return torch.__version__ + (f" {importlib.metadata.version('triton')}" if impl == "triton" else "")


@dataclass(frozen=True)
class Compiled:
    """A launch's compiled program. slots: issue slots of the main loop for each useful HMMA, 0 where it has none;
    issued: HMMA issued for each useful one; programs: of the launch; warps: resident on an SM; precision: of its
    products, bf16, fp32 or tf32x3. beyond: instructions for each useful HMMA that the emulator found beyond the main
    loop's, None where nothing was counted."""

    slots: float
    issued: float
    programs: int
    warps: int
    precision: str
    beyond: float | None = None

    @property
    def uncounted(self) -> bool:
        """Its issue slots are those of its main loop alone."""
        return self.slots > 0 and self.precision == "bf16" and self.beyond is None


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
    def uncounted(self) -> list[str]:
        """Kernels of which the emulator's counts lack a launch."""
        return sorted({call.name.strip("_") for call in self.calls if call.compiled and call.compiled.uncounted})

    @property
    def dram(self) -> int:
        return sum(call.count * (call.read + call.written) for call in self.calls)


_FILE = TypeAdapter(Counts)


def cache_folder() -> Path:
    """$MARCH_PROJECTION_CACHE, else build/projection of the repository."""
    return Path(os.environ.get("MARCH_PROJECTION_CACHE") or ROOT / "build" / "projection")


def group(calls: Iterable[Call]) -> tuple[Call, ...]:
    """Equal calls as one with their number, in the order of the first."""
    return tuple(replace(call, count=count) for call, count in collections.Counter(calls).items())


def _call(event: Event, operator: str, compiled: Compiled | None = None) -> Call:
    executed = round(event.flops * executed_share(event.launch)) if event.launch and compiled else 0
    moved = event.reads, event.writes
    return Call(event.phase, operator, event.name, 1, event.flops, *moved, event.product, compiled, executed)


# what an operator of torch is called in the tables; the rest is "elementwise"
_EAGER = {
    "mm": "linear products",
    "bmm": "attention products",
    "masked_fill": "mask",
    "clone": "copies",
    "cat": "copies",
}
_EAGER |= dict.fromkeys(("_softmax", "_softmax_backward_data"), "softmax")
_EAGER |= dict.fromkeys(("native_dropout", "native_dropout_backward"), "dropout")
_EAGER |= dict.fromkeys(("nll_loss_forward", "nll_loss_backward", "_log_softmax", "_log_softmax_backward_data"), "loss")


def eager_calls(name: str, micro_batch: int, lengths: tuple[int, int]) -> tuple[Call, ...]:
    """Of the predecessor's model, its loss of logits in the working precision."""
    config = experiments.configuration(name)
    with torch.device("meta"):
        model = Eager(config).to(DTYPES[config.precision]).train()
        encoder, decoder = (torch.empty(micro_batch, length, dtype=torch.int64) for length in lengths)
        mask = torch.empty(micro_batch, lengths[0], dtype=torch.bool)
        with Counter() as counter:
            for parameter in model.parameters():
                counter.ignore(parameter)
            loss = F.cross_entropy(model.logits(encoder, decoder, mask), decoder.flatten())
            counter.backward(loss)
    return group(_call(event, _EAGER.get(event.name.removeprefix("aten::"), "elementwise")) for event in counter.events)


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


# sizes of a kernel's products that are padded to whole tiles, each with its tile
_TILED = {
    "_glu_dx": {"M": "BLOCK_M", "D": "BLOCK_N", "F": "BLOCK_K"},
    "_glu_dw": {"F": "BLOCK_M", "D": "BLOCK_N", "M": "BLOCK_K"},
    "_glu": {"M": "BLOCK_M", "F": "BLOCK_N", "D": "BLOCK_K"},
    "_linear_cross_entropy_fwd_kernel": {"tokens": "BLOCK_M", "vocabulary": "BLOCK_N"},
    "_linear_cross_entropy_gradient": {"own_rows": "BLOCK_M", "other_rows": "BLOCK_N"},
    "_linear_cross_entropy": {"tokens": "BLOCK_M", "columns": "BLOCK_N"},
}


def executed_share(launch: Launch) -> float:
    """FLOPs of a launch's tiles over those of its formula: tiles are computed whole, causal blocks above the diagonal
    not at all. 1 for a kernel whose sizes are not known here."""
    values: dict[str, Any] = {a.name: a.value for a in launch.arguments} | launch.constants
    m, n = values.get("BLOCK_M"), values.get("BLOCK_N")
    if m is None or n is None:
        return 1.0
    if {"Lq", "Lk"} <= set(values):
        queries, segments = values["Lq"], [(values["Lk"], bool(values.get("CAUSAL")))]
        if values.get("Lk2") is not None:
            segments.append((values["Lk2"], False))
        rows = range(1, cdiv(queries, m) + 1)
        tiles = sum(cdiv(min(keys, r * m) if causal else keys, n) for keys, causal in segments for r in rows)
        return tiles * m * n / (queries * sum(keys for keys, _ in segments))
    tiled = next((tiled for start, tiled in _TILED.items() if launch.kernel.startswith(start)), {})
    if not {*tiled, *tiled.values()} <= set(values):
        return 1.0
    sizes = [(values[size], values[block]) for size, block in tiled.items()]
    return math.prod(cdiv(size, block) * block / size for size, block in sizes)


def _compiled(launch: Launch, precision: str) -> Compiled | None:
    if launch.compiled is None:
        return None
    row = report(launch)
    main = row.main_loop
    slots, issued = (main.issue_per_hmma, main.hmma / main.useful_hmma) if main else (0.0, 1.0)
    if precision == "fp32":
        precision = "tf32x3" if "inputPrecision = tf32x3" in launch.compiled.asm["ttir"] else "fp32"
    beyond = executed.beyond(launch) if slots and precision == "bf16" else None
    return Compiled(
        slots, issued, launch.programs, row.warps_per_sm, precision, None if beyond is None else beyond * issued
    )


def fused_events(name: str, micro_batch: int, arch: str, lengths: tuple[int, int] = LENGTHS) -> list[Event]:
    """Of march's model. Kernels with products are compiled for `arch`, seconds each the first time."""
    precision = experiments.configuration(name).precision
    return measure(
        experiments.configuration(name),
        *lengths,
        micro_batch,
        "triton",
        precision,
        arch,
        compile=lambda kernel: kernel in WITH_PRODUCTS,
    ).events


def product_launches(name: str, micro_batch: int, arch: str) -> list[Launch]:
    """Compiled launches whose issue slots the projection takes."""
    if experiments.configuration(name).precision != "bf16":
        return []
    launches = [e.launch for e in fused_events(name, micro_batch, arch) if e.launch and e.launch.compiled]
    return [launch for launch in launches if report(launch).main_loop]


def fused_calls(name: str, micro_batch: int, arch: str, lengths: tuple[int, int]) -> tuple[Call, ...]:
    """Of `fused_events`."""
    precision, events = experiments.configuration(name).precision, fused_events(name, micro_batch, arch, lengths)
    return group(_call(e, e.operator, _compiled(e.launch, precision) if e.launch else None) for e in events)


def collect(
    name: str,
    impl: str,
    micro_batch: int,
    arch: str = "sm_86",
    lengths: tuple[int, int] = LENGTHS,
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
    label = "_".join(filter(None, (name, impl, arch, f"{micro_batch}x{lengths[0]}x{lengths[1]}")))
    path = cache_folder() / "counts" / f"{label}_{sources_hash(*SOURCES[impl], versions=versions(impl))}.json"
    if path.exists():
        return _FILE.validate_json(path.read_bytes())
    progress(f"counting {label}")
    config = experiments.configuration(name)
    if impl == "eager":
        calls = eager_calls(name, micro_batch, lengths)
    else:
        calls = fused_calls(name, micro_batch, arch, lengths)
    counts = Counts(name, impl, arch, config.precision, micro_batch, total_parameters(config), calls)
    write(path, _FILE.dump_json(counts))
    return counts
