"""Twenty steps, and the fused kernels in Triton's interpreter, which needs a process of its own."""

from dataclasses import replace

import torch

import march
from march import cost, experiments
from march.check.probes import Fault
from march.check.subject import Batch, Subject, seeded
from march.config import ConfigError

STEPS = 20
LARGEST = 80e6  # parameters that are trained here at their own widths


def twenty_steps(subject: Subject) -> str:
    """Loss over 20 steps of AdamW at the experiment's own widths, on 4 sequences that it can learn by heart."""
    config = experiments.configuration(subject.experiment)
    wide = cost.total_parameters(config) <= LARGEST
    fields = {"vocab_size": 500} if wide else subject.small
    with seeded(0):
        model = march.build_model(subject.experiment, impl="torch", seed=0, **fields).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        # packed sequences have no padding, and so no mask
        batch, losses = replace(Batch.draw(4, 48, 16, vocabulary=200), attention_mask=None), []
        for step in range(STEPS):
            loss = subject.loss(model, batch, step=step)
            losses.append(loss.item())
            if not torch.isfinite(loss):
                raise Fault(f"the loss is {losses[-1]} in step {step + 1}", "see above; else lower the idea's scale")
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    if not losses[-1] < 0.9 * losses[0]:
        text = f"the loss goes from {losses[0]:.3f} to {losses[-1]:.3f} on 4 sequences that repeat"
        raise Fault(text, "is the gradient there, and of the right sign? is the residual kept?")
    how = "at its own widths" if wide else f"at dim_model {fields.get('dim_model', config.dim_model)}"
    return f"loss {losses[0]:.2f} to {losses[-1]:.2f} on 4 sequences, {how}"


def fused(name: str) -> str:
    """Loss and gradients of one block a stack by the fused kernels against the plain formulas, both in float32."""
    experiment = experiments.get(name)
    subject, batch = Subject.of(experiment, blocks=1), Batch.draw(2, 9, 5)
    found = []
    for impl in ("reference", "triton"):
        model = subject.build(impl=impl)
        try:
            loss = subject.loss(model, batch)
            loss.backward()
        except ConfigError:
            raise
        except Exception as error:
            if impl == "reference":
                raise
            fix = "value and slope of an activation are Triton code: tl.exp and the like, of a float32 block"
            raise Fault(f"{type(error).__name__}: {' '.join(str(error).split())[-160:]}", fix) from error
        found.append(
            {"the loss": loss.detach()} | {n: x.grad for n, x in model.named_parameters() if x.grad is not None}
        )
    for key, wanted in found[0].items():
        off = float((found[1][key] - wanted).abs().max() / wanted.abs().max().clamp(min=1e-12))
        if not off < 1e-4:
            fix = "value and slope of the activation are not its formula, or a part takes padded widths for its own"
            raise Fault(f"{key}: the fused kernels differ from the formulas (by {off:.1e} of the largest)", fix)
    return "agree with the formulas in float32, in Triton's interpreter"
