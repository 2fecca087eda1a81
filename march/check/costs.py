"""What an idea adds to its control: parameters, FLOPs, memory; counted on meta tensors, at the experiment's widths."""

from march import cost, experiments
from march.experiments import Experiment

PAPER = (921, 206)  # positions of the paper's sequences


def compared(experiment: Experiment) -> list[tuple[str, str, str]]:
    """(what, how much, beside the control)."""
    control = experiments.get(experiment.control or experiment.base or "Baseline")
    ours, theirs = (experiments.configuration(one) for one in (experiment, control))
    counts = [cost.total_parameters(config) for config in (ours, theirs)]
    steps = [cost.step_costs(config, *PAPER, micro_batch=1, impl="torch").step for config in (ours, theirs)]
    rows = [("parameters", f"{counts[0]:,}", f"{counts[0] - counts[1]:+,}")]
    for name, unit, scale, of in (
        ("FLOPs a sequence", "G", 1e9, lambda step: step.flops),
        ("kept for backward", "MiB a sequence", 2**20, lambda step: step.saved),
        ("bytes moved", "MiB a sequence", 2**20, lambda step: step.bytes_read + step.bytes_written),
    ):
        a, b = (of(step) / scale for step in steps)
        rows.append((name, f"{a:,.1f} {unit}", f"{a / b - 1:+.1%}"))
    return [(what, much, f"{more} to {control.name}") for what, much, more in rows]
