"""The sections of operators: on the roofline, and as shares of a step."""

from bench.report import figures
from bench.report.counted import MICRO_BATCH, Counted, floor
from bench.report.figures import Point
from bench.report.load import Benchmark, Projection, published
from bench.report.page import Section
from bench.report.sources import COUNTED, REFERENCE, Sources
from bench.results import duration
from march.cost import find_device


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
    product = f"product {'bfloat16' if 'bfloat16' in dtypes else 'float32'}"
    if "copy" not in reached or product not in reached:
        return None, ""
    rates = reached[product]["flops_per_second"], reached["copy"]["bytes_per_second"]
    return rates, f"here: a {product.split()[1]} product\nof 2048, a copy of 256 MB"


def measured_roofline(given: Sources) -> list[Section]:
    rows = [row for row in given.benchmark.suite("kernels") if row["implementation"] == given.ours]
    points = [
        Point(row["operator"], row["direction"], row["flops"] / row["bytes"], row["flops"] / row["median"])
        for row in rows
        if row["flops"] and row["direction"] == "both"  # the portable cross entropy's gradients are made in forward
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
        "Each point is one operator call at an experiment's shape, forward and backward: FLOPs that its formula "
        "needs, over the bytes of each tensor once, and the FLOP/s reached. Those without products are below, by "
        "their bytes."
    ]
    if kind == "CPU time":
        text.append("A CPU's caches hold most of these reduced shapes, so a point may stand above the copy's slope.")
    pictures = [("roofline_measured.png", f"Roofline of {given.ours}, {kind}")]
    moved = {
        f"{row['operator']} {row['shape']}": {row["operator"]: row["gbs"]}
        for row in rows
        if not row["flops"] and row["direction"] == "both"
    }
    if moved:
        figures.bars(
            given.out / "bandwidth_measured.png",
            f"Operators without products: {kind}",
            f"{given.ours} on {given.benchmark.device}; {sizes}; forward and backward",
            moved,
            "GB/s of each tensor once",
            dict.fromkeys(moved, roof[1] / 1e9) if roof else None,
            "a copy, here" if roof_name.startswith("here") else roof_name,
        )
        pictures.append(("bandwidth_measured.png", f"Bytes a second of operators without products, {kind}"))
    return [Section("Operators on the roofline, measured", kind, text, figures=pictures)]


def _projected_points(rows: list[dict], projected: Projection, micro_batch: int) -> list[Point]:
    """Operators at their projected rates, forward and backward together: the projection does not part them."""
    totals: dict[str, list[int]] = {}
    for row in rows:
        sums = totals.setdefault(row["operator"], [0, 0])
        sums[0], sums[1] = sums[0] + row["flops"], sums[1] + row["dram"]
    # of a step of 1024 sequences a device computes this many micro-batches, and by_operator has the seconds of all
    steps = 1024 / (projected.gpus * micro_batch)
    seconds = projected.by_operator
    return [
        Point(name, "both", flops / dram, flops * steps / seconds[name])
        for name, (flops, dram) in totals.items()
        if seconds.get(name)
    ]


def counted_roofline(given: Sources, experiment: str) -> list[Section]:
    """Where an experiment's operators stand under the reference device's roof: at their projected rates, or at the most
    that each could reach."""
    counted = given.counted[experiment]
    micro_batch, peak, bandwidth = counted["micro_batch"], REFERENCE.peak(counted["precision"]), REFERENCE.bandwidth
    rows = [row for row in counted["rows"] if row["flops"] and row["dram"]]
    projected = given.fused().get(experiment)
    points = _projected_points(rows, projected, micro_batch) if projected else []
    kind = f"{COUNTED}; rates are a projection" if points else COUNTED
    said = "rates projected, nothing has run" if points else "each point on the roof, the most that it could reach"
    if not points:
        points = [
            Point(r["operator"], r["phase"], r["flops"] / r["dram"], min(peak, r["flops"] / r["dram"] * bandwidth))
            for r in rows
        ]
    figures.roofline(
        given.out / "roofline_counted.png",
        f"{experiment} under the A5000's roof: {'projection' if 'projection' in kind else COUNTED}",
        f"triton, micro-batch {micro_batch}, FLOPs and DRAM bytes of the ledger; {said}",
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
        if row["dram"] > 1e6
    ]
    text = [
        "FLOPs and DRAM bytes as the ledger counts them (`python -m bench.ledger`). The floor is the longer of "
        "products at the data sheet's peak and bytes at its bandwidth: no kernel reaches it."
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
            f"{given.ours} on {given.benchmark.device}, {given.sizes}; operators timed alone, calls counted",
            measured,
            "milliseconds",
            whole,
        )
        text = [
            "Forward and backward of each operator timed alone, times its calls in a step. The black line is the step "
            "itself: what lies between is linear layers, optimiser and sums. Operators alone may add up to more than "
            "the step, whose caches are warm."
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
    found += _projected(given)
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
        "Not a time that anything took: the sum over operators of the longer of products and bytes, and one optimiser "
        "step."
    ]
    found.append(
        Section(
            "The floor by operator", COUNTED, text, figure="operators_counted.png", alt=f"Floor by operator, {COUNTED}"
        )
    )
    return found


def _projected(given: Sources) -> list[Section]:
    """Steps of the fused kernels on the published runs' device, by operator; a table of all, beside eager's."""
    projected, eager = given.fused(), given.projected("eager")
    if not projected:
        return []
    gpus = next(iter(projected.values())).gpus
    # twins that cost the same, and the one that is 25 times Baseline, are in the table only
    shown = {name: p for name, p in projected.items() if name in given.counted and name != "Best"}
    figures.bars(
        given.out / "operators_projected.png",
        "A training step by operator: projection",
        f"triton on {gpus} {REFERENCE.name}, 1024 sequences; projected from counts, nothing has run",
        {name: {part: 1000 * s for part, s in p.by_operator.items()} for name, p in (shown or projected).items()},
        "milliseconds",
    )
    measured = published()
    header = ["experiment", "triton s", "low .. high", "eager s", "published s", "eager over triton"]
    table = [
        [
            name,
            f"{p.seconds:.3f}",
            f"{p.low:.3f} .. {p.high:.3f}",
            f"{eager[name].seconds:.3f}" if name in eager else "-",
            f"{measured[name]:.3f}" if name in measured else "-",
            f"{eager[name].seconds / p.seconds:.1f}" if name in eager else "-",
        ]
        for name, p in projected.items()
    ]
    text = [
        f"Seconds of a step on {gpus} {REFERENCE.name}, as bench.projection gives them; published: measured, eager."
    ]
    alt = "Time by operator, projection"
    return [Section("Time by operator, projected", "projection", text, header, table, "operators_projected.png", alt)]


def _floors(counted: Counted) -> dict[str, float]:
    totals: dict[str, float] = {}
    for row in counted["rows"]:
        seconds = floor(row, REFERENCE, counted["precision"])
        totals[row["operator"]] = totals.get(row["operator"], 0.0) + seconds
    return totals


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
