"""The report's sections: from a benchmark, the ledger's counts and projections to text, tables and pictures."""

import pandas as pd

from bench.predecessor import published_seconds
from bench.report import figures
from bench.report.counted import COUNTED, MEMORY_GIB, MICRO_BATCH
from bench.report.load import Sources
from bench.report.operators import by_operator, counted_roofline, measured_roofline
from bench.report.page import Section
from bench.tables import joined, table

GIB = 2**30
Ratio = tuple[float, float, float]


def _ratios(given: Sources) -> dict[str, dict[str, Ratio]]:
    """(value, low, high) beside Baseline's step, of each experiment that was counted: published, projected, measured;
    what has none is left out."""
    seconds, ours, kind = published_seconds(), given.ours, given.benchmark.kind
    found = {"published, 8 RTX A5000": {name: (s / seconds["Baseline"],) * 3 for name, s in seconds.items()}}
    for impl in ("eager", "triton"):
        own = given.projected(impl)
        if base := own.get("Baseline"):
            ratios = {
                n: (p.seconds / base.seconds, p.low / base.seconds, p.high / base.seconds) for n, p in own.items()
            }
            found[f"projection, {impl}"] = ratios
    found[f"{kind}, {ours}"] = {
        row["experiment"]: (row["ratio"], row["ratio_low"], row["ratio_high"])
        for row in given.benchmark.suite("experiments", implementation=ours)
    }
    names = [name for name in given.counted if name != "Baseline"]
    chosen = {label: {name: values[name] for name in names if name in values} for label, values in found.items()}
    return {label: values for label, values in chosen.items() if values}


def experiments(given: Sources) -> list[Section]:
    """Each experiment's step over Baseline's: published, projected, measured."""
    series, kind = _ratios(given), given.benchmark.kind
    if not series:
        return []
    # what the columns are, and nothing else
    said = ", ".join(dict.fromkeys(label.split(",")[0] for label in series))
    measured = kind in said
    on = joined(", ", f"measured on {given.benchmark.device}", given.sizes) if measured else ""
    title, xlabel = f"A training step beside Baseline's: {said}", "times Baseline's step of the same column"
    figures.dots(given.out / "experiments.png", title, [on, "lines: the range"], series, xlabel)

    def cell(values: dict[str, Ratio], name: str) -> str:
        if name not in values:
            return "-"
        value, low, high = values[name]
        return f"{value:.2f}" + (f" [{low:.2f} .. {high:.2f}]" if low != high else "")

    names = [name for name in given.counted if any(name in values for values in series.values())]
    rows = [{"experiment": n} | {label: cell(values, n) for label, values in series.items()} for n in names]
    text = [
        "Published: seconds per step of the original runs, eager PyTorch, at the paper's shapes. Measured ratios are "
        "of steps run in turn, with the smallest and the largest. Ratios at reduced shapes on a CPU are not those of a "
        "GPU at the paper's: widths weigh more there, lengths less."
    ]
    pictures = [("experiments.png", f"Ratios to Baseline: {said}")]
    return [Section("Experiments beside Baseline", said, text, rows, pictures)]


def steps(given: Sources) -> list[Section]:
    rows = table(
        "experiment | by | per step | 20% .. 80% | tokens/s | times Baseline's | kept for backward | peak GiB",
        "{experiment} | {implementation} | {median:time} | {p20:time} .. {p80:time} | {tokens_per_second:.0f} | "
        "{ratio:.2f} | {kept_bytes:.0MiB} MiB | {peak_bytes:.2GiB}",
        given.benchmark.suite("experiments"),
    )
    text = [
        f"{joined(', ', 'Forward, backward and AdamW', given.sizes)}. Libraries and eager PyTorch at Baseline's widths "
        "and depths; `times Baseline's` is against ours, of steps run in turn: seconds of different rows met different "
        "loads."
    ]
    return [Section("Training steps", given.benchmark.kind, text, rows)] if rows else []


def kernels(given: Sources) -> list[Section]:
    rows = table(
        "operator | shape | by | direction | median | 20% .. 80% | TFLOP/s | GB/s | of peak | first call | kept MiB | "
        "peak MiB",
        "{operator} | {shape} | {implementation} | {direction} | {median:time} | {p20:time} .. {p80:time} | "
        "{tflops:.3g} | {gbs:.3g} | {share_of_peak:.0%} | {first_call:time} | {kept_bytes:.1MiB} | {peak_bytes:.0MiB}",
        given.benchmark.suite("kernels"),
    )
    text = [
        "Every time here belongs to an implementation whose outputs and gradients agreed with the float64 formula. "
        "First call: with compilation and warm-up. Rates: of the formula's FLOPs and bytes, whatever is done."
    ]
    return [Section("Operators", given.benchmark.kind, text, rows)] if rows else []


def memory(given: Sources) -> list[Section]:
    counted = pd.DataFrame(given.counted).T
    counted["sequences"] = MICRO_BATCH * counted.per_sequence
    shown = counted.drop("Best", errors="ignore")
    figures.memory(
        given.out / "memory.png",
        f"Memory of a step through the fused kernels: {COUNTED}",
        [
            "one device of one, 921 and 206 positions, estimated from counted peaks",
            "states: weights, gradients, optimiser",
        ],
        shown[["states", "fixed", "sequences"]].astype(float) / GIB,
        shown[["fits"]].astype(int),
    )
    rows = table(
        f"experiment | states GiB | fixed GiB | MiB per sequence | kept at 64 GiB | micro-batch in {MEMORY_GIB} GiB",
        "{name} | {states:.2GiB} | {fixed:.2GiB} | {per_sequence:.1MiB} | {kept:.2GiB} | {fits}",
        [{"name": name, **one} for name, one in given.counted.items()],
    )
    text = ["Best (686M parameters) is in the table only."] if "Best" in counted.index else []
    pictures = [("memory.png", f"Memory, {COUNTED}")]
    return [Section("Memory, and the largest micro-batch", COUNTED, text, rows, pictures)]


def without(given: Sources) -> list[Section]:
    """What has no time, and why; what was left out."""
    run = given.benchmark.run
    merged: dict[tuple[str, str, str], dict[str, None]] = {}
    for row in run.get("without", []):
        key = row.get("operator") or row.get("experiment", ""), row.get("implementation", ""), row["reason"]
        merged.setdefault(key, {})[row.get("shape", "all shapes")] = None
    rows = [{"what": a, "by": b, "shape": ", ".join(shapes), "why": c} for (a, b, c), shapes in merged.items()]
    text = [f"Left out of this run, `pytest bench/ --full` has it: {line}." for line in run.get("left_out", [])]
    return [Section("Without a time", "", text, rows)] if rows or text else []


def all_sections(given: Sources, experiment: str) -> list[Section]:
    return [
        *experiments(given),
        *steps(given),
        *by_operator(given),
        *measured_roofline(given),
        *counted_roofline(given, experiment),
        *memory(given),
        *kernels(given),
        *without(given),
    ]
