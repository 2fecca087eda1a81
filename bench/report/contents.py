"""What report.md shows: pictures are drawn, tables are lists of items; a part without numbers is empty."""

from collections import defaultdict
from typing import Any

import pandas as pd

from bench.projection import Projection
from bench.report import figures
from bench.report.counted import COUNTED, MICRO_BATCH, REFERENCE, floor
from bench.report.figures import Point
from bench.report.load import Benchmark, Sources
from bench.tables import joined
from march.cost import find_device
from march.predecessor.runs import SEQUENCES, published_seconds

GIB = 2**30
Ratio = tuple[float, float, float]
Contents = dict[str, Any]


def _ratios(given: Sources) -> dict[str, dict[str, Ratio]]:
    """(value, low, high) beside Baseline's step, of each experiment that was counted: published, projected, measured;
    what has none is left out."""
    seconds, ours, kind = published_seconds(), given.ours, given.benchmark.kind
    found = {"published, 8 RTX A5000": {name: (s / seconds["Baseline"],) * 3 for name, s in seconds.items()}}
    for impl in ("eager", "triton"):
        own = given.projected(impl)
        if base := own.get("Baseline"):
            one = {n: (p.seconds / base.seconds, p.low / base.seconds, p.high / base.seconds) for n, p in own.items()}
            found[f"projection, {impl}"] = one
    found[f"{kind}, {ours}"] = {
        row["experiment"]: (row["ratio"], row["ratio_low"], row["ratio_high"])
        for row in given.benchmark.suite("experiments", implementation=ours)
    }
    names = [name for name in given.counted if name != "Baseline"]
    chosen = {label: {name: values[name] for name in names if name in values} for label, values in found.items()}
    return {label: values for label, values in chosen.items() if values}


def experiments(given: Sources) -> Contents:
    """Each experiment's step over Baseline's: published, projected, measured."""
    series, kind = _ratios(given), given.benchmark.kind
    # what the columns are, and nothing else
    said = ", ".join(dict.fromkeys(label.split(",")[0] for label in series))
    measured = joined(", ", f"measured on {given.benchmark.device}", given.sizes) if kind in said else ""
    if series:
        title, xlabel = f"A training step beside Baseline's: {said}", "times Baseline's step of the same column"
        figures.dots(given.out / "experiments.png", title, [measured, "lines: the range"], series, xlabel)

    def cell(ratio: Ratio | None) -> str:
        if ratio is None:
            return "-"
        value, low, high = ratio
        return f"{value:.2f}" + (f" [{low:.2f} .. {high:.2f}]" if low != high else "")

    names = [name for name in given.counted if any(name in values for values in series.values())]
    rows = [{"experiment": n} | {label: cell(values.get(n)) for label, values in series.items()} for n in names]
    return {"said": said, "ratios": rows, "steps": given.benchmark.suite("experiments")}


def measured_by_operator(given: Sources) -> Contents:
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
    if complete:
        on = joined(", ", f"{given.ours} on {given.benchmark.device}", given.sizes)
        title, said = f"A training step by operator: {kind}", [on, "operators timed alone, calls counted"]
        marks = {name: whole[name] for name in complete}
        figures.bars(given.out / "operators_measured.png", title, said, complete, "milliseconds", marks)
    return {"measured": bool(complete)}


def projected_by_operator(given: Sources) -> Contents:
    """Steps of the fused kernels on the published runs' device, by operator; all of them beside eager's."""
    projected, eager, published = given.projected("triton"), given.projected("eager"), published_seconds()
    if not projected:
        return {"projected": []}
    where = f"{next(iter(projected.values())).gpus} {REFERENCE.name}"
    # twins that cost the same, and the one that is 25 times Baseline, are in the table only
    shown = {name: p for name, p in projected.items() if name in given.counted and name != "Best"} or projected
    bars = {name: {part: 1000 * s for part, s in p.by_operator.items()} for name, p in shown.items()}
    said = [f"triton on {where}, {SEQUENCES} sequences", "projected from counts, nothing has run"]
    title = "A training step by operator: projection"
    figures.bars(given.out / "operators_projected.png", title, said, bars, "milliseconds")
    items = []
    for name, p in projected.items():
        seconds = eager[name].seconds if name in eager else None
        ratio = seconds and seconds / p.seconds
        items.append({"p": p, "eager": seconds, "published": published.get(name), "ratio": ratio})
    return {"projected": items, "where": where}


def floors_by_operator(given: Sources) -> Contents:
    bars: defaultdict[str, defaultdict[str, float]] = defaultdict(lambda: defaultdict(float))
    for name, counted in given.counted.items():
        for row in counted["rows"] if name != "Best" else ():
            bars[name][row["operator"]] += 1000 * floor(row, counted["precision"])
    title = f"The floor of a micro-batch by operator: {COUNTED}"
    what = "the longer of FLOPs at its peak and bytes at its bandwidth"
    said, xlabel = (
        [f"triton, {MICRO_BATCH} sequences on one RTX A5000: {what}"],
        "milliseconds that the data sheet allows",
    )
    figures.bars(given.out / "operators_counted.png", title, said, bars, f"{xlabel} at least")
    return {}


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


def measured_roofline(given: Sources) -> Contents:
    kind, (roof, roof_name) = given.benchmark.kind, _roof(given.benchmark)
    # the portable cross entropy's gradients are made in forward: only both directions together
    rows = given.benchmark.suite("kernels", implementation=given.ours, direction="both")
    products = [row for row in rows if row["flops"]]
    points = [Point(r["operator"], "both", r["flops"] / r["bytes"], r["flops"] / r["median"]) for r in products]
    if not points:
        return {"roofline": False}
    said = [f"{given.ours} on {given.benchmark.device}", rows[0].get("sizes", "")]
    title = f"Operators on the roofline: {kind}"
    figures.roofline(given.out / "roofline_measured.png", title, said, points, roof, roof_name)
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
    return {"roofline": True, "bandwidth": bool(moved)}


def _projected_points(rows: list[dict[str, Any]], projected: Projection, micro_batch: int) -> list[Point]:
    """Operators at their projected rates, forward and backward together: the projection does not part them."""
    totals = pd.DataFrame(rows).groupby("operator", sort=False)[["flops", "bytes"]].sum()
    # of a step of 1024 sequences a device computes this many micro-batches, and by_operator has the seconds of all
    steps, seconds = SEQUENCES / (projected.gpus * micro_batch), projected.by_operator
    return [
        Point(row.Index, "both", row.flops / row.bytes, row.flops * steps / seconds[row.Index])
        for row in totals.itertuples()
        if seconds.get(row.Index)
    ]


def counted_roofline(given: Sources, experiment: str) -> Contents:
    """Where an experiment's operators stand under the reference device's roof: at their projected rates, or at the most
    that each could reach."""
    counted, projected = given.counted[experiment], given.projected("triton").get(experiment)
    micro_batch, peak, bandwidth = counted["micro_batch"], REFERENCE.peak(counted["precision"]), REFERENCE.bandwidth
    rows = [row | {"intensity": row["flops"] / row["bytes"]} for row in counted["rows"] if row["bytes"]]
    products = [row for row in rows if row["flops"]]
    points = _projected_points(products, projected, micro_batch) if projected else []
    kind = f"{COUNTED}; rates are a projection" if points else COUNTED
    how = "rates projected, nothing has run" if points else "each point on the roof, the most that it could reach"
    said = [f"triton, micro-batch {micro_batch}, FLOPs and bytes of the ledger", how]
    title = f"{experiment} under the A5000's roof: {'projection' if points else COUNTED}"
    points = points or [
        Point(r["operator"], r["phase"], r["intensity"], min(peak, r["intensity"] * bandwidth)) for r in products
    ]
    roof = (peak, bandwidth), "RTX A5000, data sheet"
    figures.roofline(given.out / "roofline_counted.png", title, said, points, *roof)
    for row in rows:
        row["bound"] = "products" if row["flops"] / peak > row["bytes"] / bandwidth else "bytes"
        row["floor"] = floor(row, counted["precision"])
    return {"under_roof": kind, "floors": [row for row in rows if row["bytes"] > 1e6]}


def memory(given: Sources) -> Contents:
    counted = pd.DataFrame(given.counted).T
    counted["sequences"] = MICRO_BATCH * counted.per_sequence
    shown = counted.drop("Best", errors="ignore")
    states = "states: weights, gradients, optimiser"
    figures.memory(
        given.out / "memory.png",
        f"Memory of a step through the fused kernels: {COUNTED}",
        ["one device of one, 921 and 206 positions, estimated from counted peaks", states],
        shown[["states", "fixed", "sequences"]].astype(float) / GIB,
        shown[["fits"]].astype(int),
    )
    return {"memory": [{"name": name, **one} for name, one in given.counted.items()]}


def without(given: Sources) -> Contents:
    """What has no time, and why; what was left out."""
    merged: dict[tuple[str, str, str], dict[str, None]] = {}
    for row in given.benchmark.run.get("without", []):
        key = row.get("operator") or row.get("experiment", ""), row.get("implementation", ""), row["reason"]
        merged.setdefault(key, {})[row.get("shape", "all shapes")] = None
    rows = [{"what": a, "by": b, "shapes": ", ".join(shapes), "why": c} for (a, b, c), shapes in merged.items()]
    return {"without": rows, "left_out": given.benchmark.run.get("left_out", [])}


def contents(given: Sources, experiment: str) -> Contents:
    own = {"given": given, "kind": given.benchmark.kind, "experiment": experiment}
    own |= counted_roofline(given, experiment) | {"kernels": given.benchmark.suite("kernels")}
    parts = (experiments, measured_by_operator, projected_by_operator, floors_by_operator, measured_roofline, memory)
    for part in (*parts, without):
        own |= part(given)
    return own
