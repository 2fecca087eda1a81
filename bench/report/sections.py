"""The report's sections: from a benchmark, the ledger's counts and projections to text, tables and pictures."""

from bench.report import figures
from bench.report.counted import MEMORY_GIB, MICRO_BATCH
from bench.report.load import published
from bench.report.operators import by_operator, counted_roofline, measured_roofline
from bench.report.page import Section
from bench.report.sources import COUNTED, Sources
from bench.results import duration, rate

GIB, MIB = 2**30, 2**20


def experiments(given: Sources) -> list[Section]:
    """Each experiment's step over Baseline's: published, projected, measured."""
    series: dict[str, dict[str, tuple[float, float, float]]] = {}
    seconds = published()
    series["published, 8 RTX A5000"] = {n: (s / seconds["Baseline"],) * 3 for n, s in seconds.items()}
    for impl in ("eager", "triton"):
        own = given.projected(impl)
        if "Baseline" in own:
            base = own["Baseline"].seconds
            series[f"projection, {impl}"] = {n: (p.seconds / base, p.low / base, p.high / base) for n, p in own.items()}
    kind = given.benchmark.kind
    measured = {
        row["experiment"]: (row["ratio"], row["ratio_low"], row["ratio_high"])
        for row in given.benchmark.suite("experiments")
        if row["implementation"] == given.ours
    }
    series[f"{kind}, {given.ours}"] = measured
    names = [n for n in given.counted if any(n in values for values in series.values()) and n != "Baseline"]
    series = {label: {n: v[n] for n in names if n in v} for label, v in series.items()}
    series = {label: v for label, v in series.items() if v}
    if not series:
        return []
    said = "published, " + ("projection, " if len(given.projections) else "") + kind
    figures.dots(
        given.out / "experiments.png",
        f"A training step beside Baseline's: {said}",
        f"measured on {given.benchmark.device}, {given.sizes}; lines: the range",
        series,
        "times Baseline's step of the same column",
    )
    header = ["experiment", *series]
    table = [
        [
            n,
            *(
                f"{v[n][0]:.2f}" + (f" [{v[n][1]:.2f} .. {v[n][2]:.2f}]" if v[n][1] != v[n][2] else "")
                if n in v
                else "-"
                for v in series.values()
            ),
        ]
        for n in names
    ]
    text = [
        "Published: seconds a step of the original runs, eager PyTorch, at the paper's shapes. Measured ratios are of "
        "steps run in turn, with the smallest and the largest. Ratios at reduced shapes on a CPU are not those of a "
        "GPU at the paper's: widths weigh more there, lengths less."
    ]
    return [
        Section(
            "Experiments beside Baseline", said, text, header, table, "experiments.png", f"Ratios to Baseline: {said}"
        )
    ]


def steps(given: Sources) -> list[Section]:
    rows = given.benchmark.suite("experiments")
    header = ["experiment", "by", "a step", "20% .. 80%", "tokens/s", "times Baseline's", "kept for backward", "peak"]
    table = [
        [
            row["experiment"],
            row["implementation"],
            duration(row["median"]),
            f"{duration(row['p20'])} .. {duration(row['p80'])}",
            f"{row['tokens_per_second']:.0f}",
            f"{row['ratio']:.2f}",
            f"{row['kept_bytes'] / MIB:.0f} MiB",
            "-" if row["peak_bytes"] is None else f"{row['peak_bytes'] / GIB:.2f} GiB",
        ]
        for row in rows
    ]
    text = [
        f"Forward, backward and AdamW, {given.sizes}. Rivals at Baseline's widths and depths; "
        "`times Baseline's` is against ours, of steps run in turn: seconds of different rows met different loads."
    ]
    return [Section("Training steps", given.benchmark.kind, text, header, table)] if rows else []


def kernels(given: Sources) -> list[Section]:
    rows = given.benchmark.suite("kernels")
    header = [
        "operator",
        "shape",
        "by",
        "direction",
        "median",
        "20% .. 80%",
        "TFLOP/s",
        "GB/s",
        "of peak",
        "first call",
        "kept MiB",
        "peak MiB",
    ]
    table = [
        [
            row["operator"],
            row["shape"],
            row["implementation"],
            row["direction"],
            duration(row["median"]),
            f"{duration(row['p20'])} .. {duration(row['p80'])}",
            rate(row["tflops"]),
            rate(row["gbs"]),
            "-" if row["share_of_peak"] is None else f"{row['share_of_peak']:.0%}",
            duration(row["first_call"]),
            f"{row['kept_bytes'] / MIB:.1f}",
            "-" if row["peak_bytes"] is None else f"{row['peak_bytes'] / MIB:.0f}",
        ]
        for row in rows
    ]
    text = [
        "Every time here belongs to an implementation whose outputs and gradients agreed with the float64 formula. "
        "First call: with compilation and warm-up. Rates: of the formula's FLOPs and bytes, whatever is done."
    ]
    return [Section("Operators", given.benchmark.kind, text, header, table)] if rows else []


def memory(given: Sources) -> list[Section]:
    rows = {
        name: (
            {
                "states": c["states"] / GIB,
                "fixed": c["fixed"] / GIB,
                "sequences": MICRO_BATCH * c["per_sequence"] / GIB,
            },
            c["fits"],
        )
        for name, c in given.counted.items()
    }
    shown = {name: row for name, row in rows.items() if name != "Best"}
    figures.memory(
        given.out / "memory.png",
        f"Memory of a step through the fused kernels: {COUNTED}",
        "one device of one, 921 and 206 positions, estimated from counted peaks; states: weights, gradients, optimiser",
        shown,
    )
    header = [
        "experiment",
        "states GiB",
        "fixed GiB",
        "a sequence MiB",
        "kept at 64 GiB",
        f"micro-batch in {MEMORY_GIB} GiB",
    ]
    table = [
        [
            n,
            f"{c['states'] / GIB:.2f}",
            f"{c['fixed'] / GIB:.2f}",
            f"{c['per_sequence'] / MIB:.1f}",
            f"{c['kept'] / GIB:.2f}",
            str(c["fits"]),
        ]
        for n, c in given.counted.items()
    ]
    text = ["Best (686M parameters) is in the table only."] if "Best" in rows else []
    return [
        Section("Memory, and the largest micro-batch", COUNTED, text, header, table, "memory.png", f"Memory, {COUNTED}")
    ]


def without(given: Sources) -> list[Section]:
    """What has no time, and why; what was left out."""
    rows = given.benchmark.run.get("without", [])
    merged: dict[tuple[str, str, str], list[str]] = {}
    for row in rows:
        what = row.get("operator") or row.get("experiment", "")
        merged.setdefault((what, row.get("implementation", ""), row["reason"]), []).append(
            row.get("shape", "all shapes")
        )
    table = [[what, name, ", ".join(dict.fromkeys(shapes)), reason] for (what, name, reason), shapes in merged.items()]
    text = [
        f"Left out of this run, `pytest bench/ --full` has it: {line}."
        for line in given.benchmark.run.get("left_out", [])
    ]
    return [Section("Without a time", "", text, ["what", "by", "shape", "why"], table)] if table or text else []


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
