"""Counts of a training step's forward and backward, a row each distinct call, kept on disk.

`eager` counts the operators of torch that the predecessor's model dispatches on meta tensors; `triton` those of march's
model and the launches of the fused kernels, with what the compiled programs of kernels with products show. The calls
are march.cost's events; nothing here knows the network.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any

import pandas as pd
import torch
import torch.nn.functional as F

from bench.cache import LENGTHS, kept
from bench.projection import executed
from kernels.compile_only import ARCHITECTURES, Launch
from kernels.compile_only.report import report
from march import experiments
from march.cost import total_parameters
from march.cost.counter import WITH_PRODUCTS, Counter, Event
from march.cost.step import DTYPES, measure
from march.predecessor.eager import Eager

IMPLEMENTATIONS = ("eager", "triton")
COUNTED = ("phase", "operator", "name", "flops", "reads", "writes")
# of library products, of fused kernels with products
PRODUCT = ("batch", "m", "n", "k", "element_size", "alignment")
FUSED = ("slots", "issued", "programs", "warps", "beyond", "executed")


@dataclass(frozen=True)
class Counts:
    """Calls of one micro-batch's forward and backward; arch: of the compiled programs, "" of eager counts.

    calls: `count` equal ones a row; of one: flops, bytes that it reads and writes. A library product has the fields of
    march.cost.counter.Product, a fused kernel with products: slots, issue slots of the main loop for each useful HMMA,
    0 where it has none; issued, HMMA for each useful one; programs, of the launch; warps, resident on an SM; precision,
    of its products, bf16, fp32 or tf32x3; executed, FLOPs of its tiles, padding included, skipped blocks left out;
    beyond, instructions for each useful HMMA that the emulator found beyond the main loop's. What a call lacks is NaN.
    """

    experiment: str
    impl: str
    arch: str
    precision: str
    micro_batch: int
    parameters: int
    calls: pd.DataFrame

    def total(self, *columns: str) -> float:
        """Sum over all calls."""
        return float((self.calls["count"] * self.calls[list(columns)].sum(axis=1)).sum())

    @property
    def uncounted(self) -> list[str]:
        """Kernels of which the emulator's counts lack a launch: their issue slots are those of the main loop alone."""
        calls = self.calls
        lacking = calls[(calls.slots > 0) & (calls.precision == "bf16") & calls.beyond.isna()]
        return sorted(set(lacking.name.str.strip("_")))


def table_of(rows: list[dict[str, Any]]) -> pd.DataFrame:
    """`calls` of Counts from a dictionary a call."""
    frame = pd.DataFrame(rows, columns=[*COUNTED, *PRODUCT, "precision", *FUSED])
    frame = frame.astype(dict.fromkeys((*PRODUCT, *FUSED), float))
    return frame.groupby(list(frame), sort=False, dropna=False, as_index=False).size().rename(columns={"size": "count"})


def _row(event: Event, operator: str, **fused: Any) -> dict[str, Any]:
    counted = {name: getattr(event, name) for name in COUNTED} | {"operator": operator}
    return counted | (asdict(event.product) if event.product else {}) | fused


# what an operator of torch is called in the tables; the rest is "elementwise"
_EAGER = {
    "mm": "linear products",
    "bmm": "attention products",
    "masked_fill": "mask",
    **dict.fromkeys(("clone", "cat"), "copies"),
    **dict.fromkeys(("_softmax", "_softmax_backward_data"), "softmax"),
    **dict.fromkeys(("native_dropout", "native_dropout_backward"), "dropout"),
    **dict.fromkeys(("nll_loss_forward", "nll_loss_backward", "_log_softmax", "_log_softmax_backward_data"), "loss"),
}


def eager_calls(name: str, micro_batch: int, lengths: tuple[int, int]) -> list[dict[str, Any]]:
    """Of the predecessor's model, its loss of logits in the working precision."""
    config = experiments.configuration(name)
    with torch.device("meta"):
        model = Eager(config).to(DTYPES[config.precision]).train()
        encoder, decoder = (torch.empty(micro_batch, length, dtype=torch.int64) for length in lengths)
        mask = torch.empty(micro_batch, lengths[0], dtype=torch.bool)
        with Counter() as counter:
            counter.backward(F.cross_entropy(model.logits(encoder, decoder, mask), decoder.flatten()))
    return [_row(event, _EAGER.get(event.name.removeprefix("aten::"), "elementwise")) for event in counter.events]


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
        rows = range(1, -(-queries // m) + 1)
        tiles = sum(-(-(min(keys, r * m) if causal else keys) // n) for keys, causal in segments for r in rows)
        return tiles * m * n / (queries * sum(keys for keys, _ in segments))
    tiled = next((tiled for start, tiled in _TILED.items() if launch.kernel.startswith(start)), {})
    if not {*tiled, *tiled.values()} <= set(values):
        return 1.0
    sizes = [(values[size], values[block]) for size, block in tiled.items()]
    return math.prod(-(-size // block) * block / size for size, block in sizes)


def _compiled(event: Event, precision: str) -> dict[str, Any]:
    """The columns of a fused kernel with products."""
    launch = event.launch
    if launch is None or launch.compiled is None:
        return {}
    row, main = report(launch), report(launch).main_loop
    slots, issued = (main.issue_per_hmma, main.hmma / main.useful_hmma) if main else (0.0, 1.0)
    if precision == "fp32" and "inputPrecision = tf32x3" in launch.compiled.asm["ttir"]:
        precision = "tf32x3"
    beyond = executed.beyond(launch) if slots and precision == "bf16" else None
    tiles = round(event.flops * executed_share(launch))
    seen = {"programs": launch.programs, "warps": row.warps_per_sm, "precision": precision, "executed": tiles}
    return seen | {"slots": slots, "issued": issued, "beyond": None if beyond is None else beyond * issued}


def fused_events(name: str, micro_batch: int, arch: str, lengths: tuple[int, int] = LENGTHS) -> list[Event]:
    """Of march's model. Kernels with products are compiled for `arch`, seconds each the first time."""
    config = experiments.configuration(name)
    options: dict[str, Any] = {"arch": arch, "compile": WITH_PRODUCTS.__contains__}
    return measure(config, *lengths, micro_batch, "triton", config.precision, **options).events


def product_launches(name: str, micro_batch: int, arch: str) -> list[Launch]:
    """Compiled launches whose issue slots the projection takes."""
    if experiments.configuration(name).precision != "bf16":
        return []
    launches = [e.launch for e in fused_events(name, micro_batch, arch) if e.launch and e.launch.compiled]
    return [launch for launch in launches if report(launch).main_loop]


@kept("march/config.py", "march/experiments", "march/cost", "march/model", "march/predecessor/eager.py", "kernels",
      "bench/projection/collect.py", "bench/projection/executed.py", "bench/projection/emulated.json")  # fmt: skip
def counts(name: str, impl: str, micro_batch: int, arch: str, lengths: tuple[int, int]) -> Counts:
    config = experiments.configuration(name)
    if impl == "eager":
        rows = eager_calls(name, micro_batch, lengths)
    else:
        events = fused_events(name, micro_batch, arch, lengths)
        rows = [_row(event, event.operator, **_compiled(event, config.precision)) for event in events]
    return Counts(name, impl, arch, config.precision, micro_batch, total_parameters(config), table_of(rows))


def collect(name: str, impl: str, micro_batch: int, arch: str = "sm_86", lengths: tuple[int, int] = LENGTHS) -> Counts:
    """Counts of one experiment. ValueError where `impl` or `arch` is none that can be counted."""
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl: expected {' or '.join(IMPLEMENTATIONS)}, got {impl!r}; choose one of these")
    if arch not in ARCHITECTURES:
        raise ValueError(f"arch: expected one of {', '.join(ARCHITECTURES)}, got {arch!r}; kernels compile for these")
    return counts(name, impl, micro_batch, arch if impl == "triton" else "", lengths)
