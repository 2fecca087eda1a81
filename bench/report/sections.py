"""The report's sections: from a benchmark, the ledger's counts and projections to text, tables and pictures."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.report import figures
from bench.report.counted import MEMORY_GIB, MICRO_BATCH, Counted, floor
from bench.report.figures import Point
from bench.report.load import Benchmark, Projection, published
from bench.report.page import Section
from bench.results import duration, rate
from march.cost import DEVICES, find_device

COUNTED = "counted, not run"
OURS = ("triton", "torch")
# the device of the published runs, whose data sheet the counts are held against
REFERENCE = DEVICES["a5000"]
GIB, MIB = 2**30, 2**20


@dataclass(frozen=True)
class Sources:
    benchmark: Benchmark
    counted: Mapping[str, Counted]
    projections: Sequence[Projection]
    out: Path

    @property
    def ours(self) -> str:
        """Which of our implementations was measured."""
        names = {row["implementation"] for row in self.benchmark.suite("kernels") + self.benchmark.suite("experiments")}
        return next((name for name in OURS if name in names), OURS[0])

    def fused(self) -> dict[str, Projection]:
        """Projections of the fused kernels on the reference device, by experiment."""
        return {p.experiment: p for p in self.projections if p.impl == "triton" and find_device(p.device) == REFERENCE}


def _roof(benchmark: Benchmark) -> tuple[tuple[float, float] | None, str]:
    """(peak FLOP/s, bytes/s) and what they are: the data sheet's, or what a product and a copy reached here."""
    device = find_device(benchmark.device)
    dtypes = {row["dtype"] for row in benchmark.suite("kernels")}
    if device is not None:
        return (
            device.peak("fp32" if dtypes == {"float32"} else "bf16"),
            device.bandwidth,
        ), f"{device.name}, data sheet"
    reached = {row["what"]: row for row in benchmark.suite("machine")}
    if "copy" not in reached or "product float32" not in reached:
        return None, ""
    return (
        reached["product float32"]["flops_per_second"],
        reached["copy"]["bytes_per_second"],
    ), "a float32 product of 2048,\na copy of 256 MB, here"


def measured_roofline(given: Sources) -> list[Section]:
    rows = [row for row in given.benchmark.suite("kernels") if row["implementation"] == given.ours]
    points = [
        Point(row["operator"], row["direction"], row["flops"] / row["bytes"], row["flops"] / row["median"])
        for row in rows
        if row["flops"] and row["direction"] != "both"
    ]
    if not points:
        return []
    kind, (roof, roof_name) = given.benchmark.kind, _roof(given.benchmark)
    sizes = rows[0].get("sizes", "")
    figures.roofline(
        given.out / "roofline_measured.png",
        f"Operators on the roofline: {kind}",
        f"`{given.ours}` on {given.benchmark.device}; {sizes}".replace("`", ""),
        points,
        roof,
        roof_name,
    )
    text = [
        "Each point is one operator call at an experiment's shape: FLOPs that its formula needs, over the bytes of each "
        "tensor once, and the FLOP/s reached. Operators without products are in the table only.",
    ]
    if kind == "CPU time":
        text.append("A CPU's caches hold most of these reduced shapes, so a point may stand above the copy's slope.")
    return [
        Section(
            "Operators on the roofline, measured",
            kind,
            text,
            figure="roofline_measured.png",
            alt=f"Roofline of {given.ours}, {kind}",
        )
    ]


def counted_roofline(given: Sources, experiment: str) -> list[Section]:
    counted = given.counted[experiment]
    peak, bandwidth = REFERENCE.peak(counted["precision"]), REFERENCE.bandwidth
    rows = [row for row in counted["rows"] if row["flops"] and row["dram"]]
    points = [
        Point(r["operator"], r["phase"], r["flops"] / r["dram"], min(peak, r["flops"] / r["dram"] * bandwidth))
        for r in rows
    ]
    projected = given.fused().get(experiment)
    kind, rates = COUNTED, {}
    if projected is not None:
        kind = f"{COUNTED}; rates are a projection"
        totals: dict[str, float] = {}
        for row in rows:
            totals[row["operator"]] = totals.get(row["operator"], 0.0) + row["flops"]
        # a step is accumulation micro-batches: its operators' seconds are those of all of them
        steps = 1024 / (projected.gpus * counted["micro_batch"])
        rates = {o: f * steps / projected.by_operator[o] for o, f in totals.items() if projected.by_operator.get(o)}
        points = [
            Point(
                o,
                "both",
                sum(r["flops"] for r in rows if r["operator"] == o)
                / sum(r["dram"] for r in rows if r["operator"] == o),
                value,
            )
            for o, value in rates.items()
        ] or points
    figures.roofline(
        given.out / "roofline_counted.png",
        f"{experiment}'s operators under the A5000's roof: {'projection' if rates else COUNTED}",
        f"triton, micro-batch {counted['micro_batch']}, FLOPs and DRAM bytes of the ledger; "
        + (
            "rates projected, nothing has run" if rates else "each point stands on the roof, at the most it could reach"
        ),
        points,
        (peak, bandwidth),
        "RTX A5000, data sheet",
    )
    header = ["operator", "phase", "TFLOP", "DRAM GB", "FLOP a byte", "floor on an A5000", "bound by"]
    table = [
        [
            row["operator"],
            row["phase"],
            f"{row['flops'] / 1e12:.3f}",
            f"{row['dram'] / 1e9:.3f}",
            f"{row['flops'] / row['dram']:.0f}" if row["dram"] else "-",
            duration(floor(row, REFERENCE, counted["precision"])),
            "products" if row["flops"] / peak > row["dram"] / bandwidth else "bytes",
        ]
        for row in counted["rows"]
    ]
    text = [
        "FLOPs and DRAM bytes as the ledger counts them (`python -m bench.ledger`). The floor is the longer of products at "
        "the data sheet's peak and bytes at its bandwidth: no kernel reaches it."
    ]
    return [
        Section(
            f"{experiment} under an A5000's roof",
            kind,
            text,
            header,
            table,
            "roofline_counted.png",
            f"Roofline of {experiment}, {kind}",
        )
    ]


def by_operator(given: Sources) -> list[Section]:
    """Time by operator, stacked: measured where every call of an experiment was, projected or as a floor for all."""
    found = []
    measured, whole = _measured_by_operator(given)
    if measured:
        kind = given.benchmark.kind
        figures.bars(
            given.out / "operators_measured.png",
            f"A training step by operator: {kind}",
            f"{given.ours} on {given.benchmark.device}, {_sizes(given)}; operators timed alone, calls counted",
            measured,
            "milliseconds",
            whole,
        )
        text = [
            "Forward and backward of each operator timed alone, times its calls in a step. The black line is the step "
            "itself: what lies between is linear layers, optimiser and sums. Operators alone may add up to more than the "
            "step, whose caches are warm."
        ]
        found.append(
            Section(
                "Time by operator, measured",
                kind,
                text,
                figure="operators_measured.png",
                alt=f"Time by operator, {kind}",
            )
        )
    projected = given.fused()
    if projected:
        one = next(iter(projected.values()))
        figures.bars(
            given.out / "operators_projected.png",
            "A training step by operator: projection",
            f"triton on {one.gpus} RTX A5000, 1024 sequences; projected from counts, nothing has run",
            {name: {part: 1000 * s for part, s in p.by_operator.items()} for name, p in projected.items()},
            "milliseconds",
        )
        found.append(
            Section(
                "Time by operator, projected",
                "projection",
                figure="operators_projected.png",
                alt="Time by operator, projection",
            )
        )
    rows = {
        name: {k: 1000 * v for k, v in _floors(counted).items()}
        for name, counted in given.counted.items()
        if name != "Best"
    }
    figures.bars(
        given.out / "operators_counted.png",
        f"The floor of a micro-batch by operator: {COUNTED}",
        f"triton, {MICRO_BATCH} sequences on one RTX A5000: the longer of FLOPs at its peak and bytes at its bandwidth",
        rows,
        "milliseconds that the data sheet allows at least",
    )
    text = [
        "Not a time that anything took: the sum over operators of the longer of products and bytes, and one optimiser step."
    ]
    found.append(
        Section(
            "The floor by operator", COUNTED, text, figure="operators_counted.png", alt=f"Floor by operator, {COUNTED}"
        )
    )
    return found


def _floors(counted: Counted) -> dict[str, float]:
    totals: dict[str, float] = {}
    for row in counted["rows"]:
        seconds = floor(row, REFERENCE, counted["precision"])
        totals[row["operator"]] = totals.get(row["operator"], 0.0) + seconds
    return totals


def _sizes(given: Sources) -> str:
    return next((row["sizes"] for row in given.benchmark.suite("experiments")), "")


def _measured_by_operator(given: Sources) -> tuple[dict[str, dict[str, float]], dict[str, float]]:
    """Milliseconds by operator of experiments whose calls were all timed by ours, and of their steps."""
    whole = {
        row["experiment"]: 1000 * row["median"]
        for row in given.benchmark.suite("experiments")
        if row["implementation"] == given.ours
    }
    sums: dict[str, dict[str, float]] = {}
    for row in given.benchmark.suite("kernels"):
        if row["implementation"] == given.ours and row["direction"] == "both":
            for name, count in row["experiments"].items():
                parts = sums.setdefault(name, {})
                parts[row["operator"]] = parts.get(row["operator"], 0.0) + 1000 * count * row["median"]
    refused = {
        row.get("operator") for row in given.benchmark.run.get("without", []) if row.get("implementation") == given.ours
    }
    complete = {
        name: parts
        for name, parts in sums.items()
        if name in whole and "linear_cross_entropy" in parts and not refused & set(parts)
    }
    return complete, {name: whole[name] for name in complete}


def experiments(given: Sources) -> list[Section]:
    """Each experiment's step over Baseline's: published, projected, measured."""
    series: dict[str, dict[str, tuple[float, float, float]]] = {}
    seconds = published()
    series["published, 8 RTX A5000"] = {n: (s / seconds["Baseline"],) * 3 for n, s in seconds.items()}
    for impl in ("eager", "triton"):
        own = {p.experiment: p for p in given.projections if p.impl == impl and find_device(p.device) == REFERENCE}
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
        f"measured on {given.benchmark.device}, {_sizes(given)}; lines: the range",
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
        "Published: seconds a step of the original runs, eager PyTorch, at the paper's shapes. Measured ratios are of steps "
        "run in turn, with the smallest and the largest. Ratios at reduced shapes on a CPU are not those of a GPU at the "
        "paper's: widths weigh more there, lengths less."
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
        f"Forward, backward and AdamW, {_sizes(given)}. Rivals at Baseline's widths and depths; `times Baseline's` is against ours."
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
        "Every time here belongs to an implementation whose outputs and gradients agreed with the float64 formula. First call: "
        "with compilation and warm-up. Rates: FLOPs and bytes of the formula, whatever the implementation does."
    ]
    return [Section("Operators", given.benchmark.kind, text, header, table)] if rows else []


def memory(given: Sources) -> list[Section]:
    rows = {
        name: (
            {
                "weights, gradients, optimiser": c["states"] / GIB,
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
        "one device of one, 921 and 206 positions; an estimate from counted peaks (march.cost)",
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
