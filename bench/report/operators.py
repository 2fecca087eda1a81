"""The sections of operators: on the roofline, and as shares of a step."""

from collections import defaultdict
from typing import Any

import pandas as pd

from bench.predecessor import SEQUENCES, published_seconds
from bench.projection import Projection
from bench.report import figures
from bench.report.counted import COUNTED, MICRO_BATCH, REFERENCE, floor
from bench.report.figures import Point
from bench.report.load import Benchmark, Sources
from bench.report.page import Section
from bench.tables import joined, table
from march.cost import find_device


def _roof(benchmark: Benchmark) -> tuple[tuple[float, float] | None, str]:
    """(peak FLOP/s, bytes/s) and what they are: the data sheet's, or what a product and a copy reached here."""
    device = find_device(benchmark.device)
    dtypes = {row["dtype"] for row in benchmark.suite("kernels")}
    if device is not None:
        peak = device.peak("fp32" if dtypes == {"float32"} else "bf16")
        return (peak, device.bandwidth), f"{device.name}, data sheet"
    reached = {row["what"]: row for row in benchmark.suite("machine")}
    dtype = "bfloat16" if "bfloat16" in dtypes else "float32"
    if "copy" not in reached or f"product {dtype}" not in reached:
        return None, ""
    rates = reached[f"product {dtype}"]["flops_per_second"], reached["copy"]["bytes_per_second"]
    return rates, f"here: a {dtype} product\nof 2048, a copy of 256 MB"


def measured_roofline(given: Sources) -> list[Section]:
    rows = given.benchmark.suite("kernels", implementation=given.ours, direction="both")
    points = [
        Point(row["operator"], "both", row["flops"] / row["bytes"], row["flops"] / row["median"])
        for row in rows
        if row["flops"]  # the portable cross entropy's gradients are made in forward: only both together
    ]
    if not points:
        return []
    kind, (roof, roof_name) = given.benchmark.kind, _roof(given.benchmark)
    said = [f"{given.ours} on {given.benchmark.device}", rows[0].get("sizes", "")]
    title = f"Operators on the roofline: {kind}"
    figures.roofline(given.out / "roofline_measured.png", title, said, points, roof, roof_name)
    text = [
        "Each point is one operator call at an experiment's shape, forward and backward: FLOPs that its formula "
        "needs, over the bytes of each tensor once, and the FLOP/s reached. Those without products are below, by "
        "their bytes."
    ]
    if kind == "CPU time":
        text.append("A CPU's caches hold most of these reduced shapes, so a point may stand above the copy's slope.")
    pictures = [("roofline_measured.png", f"Roofline of {given.ours}, {kind}")]
    moved = {f"{r['operator']} {r['shape']}": {r["operator"]: r["gbs"]} for r in rows if not r["flops"]}
    if moved:
        figures.bars(
            given.out / "bandwidth_measured.png",
            f"Operators without products: {kind}",
            [*said, "forward and backward"],
            moved,
            "GB/s of each tensor once",
            dict.fromkeys(moved, roof[1] / 1e9) if roof else None,
            "a copy, here" if roof_name.startswith("here") else roof_name,
        )
        pictures.append(("bandwidth_measured.png", f"Bytes a second of operators without products, {kind}"))
    return [Section("Operators on the roofline, measured", kind, text, figures=pictures)]


def _projected_points(rows: list[dict[str, Any]], projected: Projection, micro_batch: int) -> list[Point]:
    """Operators at their projected rates, forward and backward together: the projection does not part them."""
    totals = pd.DataFrame(rows).groupby("operator", sort=False)[["flops", "dram"]].sum()
    # of a step of 1024 sequences a device computes this many micro-batches, and by_operator has the seconds of all
    steps = SEQUENCES / (projected.gpus * micro_batch)
    return [
        Point(row.Index, "both", row.flops / row.dram, row.flops * steps / projected.by_operator[row.Index])
        for row in totals.itertuples()
        if projected.by_operator.get(row.Index)
    ]


def counted_roofline(given: Sources, experiment: str) -> list[Section]:
    """Where an experiment's operators stand under the reference device's roof: at their projected rates, or at the most
    that each could reach."""
    counted = given.counted[experiment]
    micro_batch, precision = counted["micro_batch"], counted["precision"]
    peak, bandwidth = REFERENCE.peak(precision), REFERENCE.bandwidth
    rows = [row for row in counted["rows"] if row["flops"] and row["dram"]]
    projected = given.projected("triton").get(experiment)
    points = _projected_points(rows, projected, micro_batch) if projected else []
    kind = f"{COUNTED}; rates are a projection" if points else COUNTED
    said = "rates projected, nothing has run" if points else "each point on the roof, the most that it could reach"
    title = f"{experiment} under the A5000's roof: {'projection' if points else COUNTED}"
    if not points:
        intensities = [(row, row["flops"] / row["dram"]) for row in rows]
        points = [Point(row["operator"], row["phase"], x, min(peak, x * bandwidth)) for row, x in intensities]
    figures.roofline(
        given.out / "roofline_counted.png",
        title,
        [f"triton, micro-batch {micro_batch}, FLOPs and DRAM bytes of the ledger", said],
        points,
        (peak, bandwidth),
        "RTX A5000, data sheet",
    )
    floors = table(
        "operator | phase | TFLOP | DRAM GB | FLOP a byte | floor on an A5000 | bound by",
        "{operator} | {phase} | {flops:.3TFLOP} | {dram:.3GB} | {intensity:.0f} | {floor:time} | {bound}",
        [
            {
                **row,
                "intensity": row["flops"] / row["dram"],
                "floor": floor(row, precision),
                "bound": "products" if row["flops"] / peak > row["dram"] / bandwidth else "bytes",
            }
            for row in counted["rows"]
            if row["dram"] > 1e6
        ],
    )
    text = [
        "FLOPs and DRAM bytes as the ledger counts them (`python -m bench.ledger`). The floor is the longer of "
        "products at the data sheet's peak and bytes at its bandwidth: no kernel reaches it."
    ]
    pictures = [("roofline_counted.png", f"Roofline of {experiment}, {kind}")]
    return [Section(f"{experiment} under an A5000's roof", kind, text, floors, pictures)]


def by_operator(given: Sources) -> list[Section]:
    """Time by operator, stacked: measured where every call of an experiment was, projected, and as a floor for all."""
    return [*_measured(given), *_projected(given), *_floors(given)]


def _measured(given: Sources) -> list[Section]:
    """Of experiments whose calls were all timed by ours, beside their steps."""
    wanted, kind = {"implementation": given.ours}, given.benchmark.kind
    whole = {row["experiment"]: 1000 * row["median"] for row in given.benchmark.suite("experiments", **wanted)}
    sums: defaultdict[str, defaultdict[str, float]] = defaultdict(lambda: defaultdict(float))
    for row in given.benchmark.suite("kernels", **wanted, direction="both"):
        for name, count in row["experiments"].items():
            sums[name][row["operator"]] += 1000 * count * row["median"]
    without = given.benchmark.run.get("without", [])
    refused = {row.get("operator") for row in without if row.get("implementation") == given.ours}
    complete = {
        name: parts
        for name, parts in sums.items()
        if name in whole and "linear_cross_entropy" in parts and not refused & set(parts)
    }
    if not complete:
        return []
    figures.bars(
        given.out / "operators_measured.png",
        f"A training step by operator: {kind}",
        [
            joined(", ", f"{given.ours} on {given.benchmark.device}", given.sizes),
            "operators timed alone, calls counted",
        ],
        complete,
        "milliseconds",
        {name: whole[name] for name in complete},
    )
    text = [
        "Forward and backward of each operator timed alone, times its calls in a step. The black line is the step "
        "itself: what lies between is linear layers, optimiser and sums. Operators alone may add up to more than "
        "the step, whose caches are warm."
    ]
    pictures = [("operators_measured.png", f"Time by operator, {kind}")]
    return [Section("Time by operator, measured", kind, text, figures=pictures)]


def _projected(given: Sources) -> list[Section]:
    """Steps of the fused kernels on the published runs' device, by operator; a table of all, beside eager's."""
    projected, eager, measured = given.projected("triton"), given.projected("eager"), published_seconds()
    if not projected:
        return []
    where = f"{next(iter(projected.values())).gpus} {REFERENCE.name}"
    # twins that cost the same, and the one that is 25 times Baseline, are in the table only
    shown = {name: p for name, p in projected.items() if name in given.counted and name != "Best"} or projected
    figures.bars(
        given.out / "operators_projected.png",
        "A training step by operator: projection",
        [f"triton on {where}, {SEQUENCES} sequences", "projected from counts, nothing has run"],
        {name: {part: 1000 * s for part, s in p.by_operator.items()} for name, p in shown.items()},
        "milliseconds",
    )
    seconds = {name: one.seconds for name, one in eager.items()}
    items = [
        {
            "p": p,
            "eager": seconds.get(n),
            "published": measured.get(n),
            "ratio": seconds[n] / p.seconds if n in seconds else None,
        }
        for n, p in projected.items()
    ]
    rows = table(
        "experiment | triton s | low .. high | eager s | published s | eager over triton",
        "{p.experiment} | {p.seconds:.3f} | {p.low:.3f} .. {p.high:.3f} | {eager:.3f} | {published:.3f} | {ratio:.1f}",
        items,
    )
    text = [f"Seconds of a step on {where}, as bench.projection gives them; published: measured, eager."]
    pictures = [("operators_projected.png", "Time by operator, projection")]
    return [Section("Time by operator, projected", "projection", text, rows, pictures)]


def _floors(given: Sources) -> list[Section]:
    rows: defaultdict[str, defaultdict[str, float]] = defaultdict(lambda: defaultdict(float))
    for name, counted in given.counted.items():
        for row in counted["rows"] if name != "Best" else ():
            rows[name][row["operator"]] += 1000 * floor(row, counted["precision"])
    figures.bars(
        given.out / "operators_counted.png",
        f"The floor of a micro-batch by operator: {COUNTED}",
        [
            f"triton, {MICRO_BATCH} sequences on one RTX A5000: the longer of FLOPs at its peak and bytes at its "
            "bandwidth"
        ],
        rows,
        "milliseconds that the data sheet allows at least",
    )
    text = [
        "Not a time that anything took: the sum over operators of the longer of products and bytes, and one optimiser "
        "step."
    ]
    pictures = [("operators_counted.png", f"Floor by operator, {COUNTED}")]
    return [Section("The floor by operator", COUNTED, text, figures=pictures)]
