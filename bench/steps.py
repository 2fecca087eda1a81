"""Training steps of any experiment and of its baselines, on the device that is there: build, check, time, weigh."""

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import kernels
import march
from bench import baselines, machine, timing
from bench.baselines import LIBRARIES
from bench.kernel_calls import Sizes
from march import experiments
from march.config import ModelConfig
from march.model import Transformer
from march.predecessor.eager import Eager
from march.predecessor.runs import known

EAGER = "eager PyTorch"
OURS = ("triton", "torch")
# of the formula's loss without dropout, from docs/portable.md's checks
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-3}


def ours() -> str:
    """Our implementation whose steps are reported on this machine."""
    return "triton" if torch.cuda.is_available() else "torch"


def baseline_names() -> list[str]:
    """Baselines of Baseline's step on this device; on a GPU those in bfloat16, whatever their parameters are in."""
    cuda = torch.cuda.is_available()
    names = [name for name in LIBRARIES if not cuda or not name.endswith("float32")]
    return [EAGER, *(["torch"] if cuda else []), *names]


def library_of(name: str) -> str | None:
    """The module that a baseline needs, None where none."""
    if name not in LIBRARIES:
        return None
    return {"hugging_face_t5": "transformers", "x_transformers": "x_transformers"}[LIBRARIES[name][0]]


def distinct(**fields: Any) -> dict[str, list[str]]:
    """Experiments of the predecessor's architecture that compute different things, the first of each with all that cost
    the same; `fields` of their configurations are taken for equal, initial positions always."""
    groups: dict[object, list[str]] = {}
    for name in known():
        groups.setdefault(experiments.configuration(name, position_init="scaled", **fields), []).append(name)
    return {alike[0]: alike for alike in groups.values()}


def build(name: str, experiment: str, device: torch.device, **overrides: Any) -> nn.Module:
    """One of OURS, EAGER, or a library's model; ours and eager with the same parameters: float32 on a CPU, whose
    products may still be bfloat16, on a GPU in the configuration's precision."""
    torch.manual_seed(0)
    config = experiments.configuration(experiment, **overrides)
    if name in LIBRARIES:
        function, argument, setting = LIBRARIES[name]
        return baselines.in_setting(getattr(baselines, function)(config, argument), setting).to(device)
    model = march.build_model(experiment, impl=name if name in OURS else "torch", **overrides)
    model = Eager(model.config).load(model) if name == EAGER else model
    return model.to(device, torch.bfloat16 if device.type == "cuda" and config.precision == "bf16" else torch.float32)


def batch(config: ModelConfig, sizes: Sizes, device: torch.device) -> dict[str, Tensor]:
    """Random tokens; every position real, as packed text has them."""
    generator = torch.Generator().manual_seed(1)
    lengths = {"input_ids": sizes.encoder, "decoder_input_ids": sizes.decoder, "labels": sizes.decoder}
    given = {
        name: torch.randint(111, config.vocab_size, (sizes.batch, length), generator=generator)
        for name, length in lengths.items()
    }
    given["attention_mask"] = torch.ones(sizes.batch, sizes.encoder, dtype=torch.bool)
    return {key: value.to(device) for key, value in given.items()}


def loss_of(model: nn.Module, inputs: dict[str, Tensor], step: int) -> Tensor:
    """Ours as the trainer calls it: packed sequences, so no padding mask; the others are made to take one."""
    if not isinstance(model, Transformer):
        return model(**inputs)
    given = {name: x for name, x in inputs.items() if name != "attention_mask"}
    return model(**given, dropout_state=kernels.dropout_state(1, step, 0, inputs["labels"].device)).loss


def loss_problem(name: str, experiment: str, sizes: Sizes, device: torch.device | None = None, **overrides: Any) -> str:
    """What is wrong with the loss of `name` on one sequence without dropout, beside eager PyTorch's; "" if nothing."""
    losses, device = [], device or machine.device()
    config = experiments.configuration(experiment, vocab_size=sizes.vocabulary, **overrides)
    no_dropout = {"vocab_size": sizes.vocabulary, "dropout": 0.0, "slow_dropout": 0.0}
    for one, fields in ((name, no_dropout | overrides), (EAGER, no_dropout)):
        model = build(one, experiment, device, **fields).train()
        with torch.no_grad():
            few = {key: value[:1] for key, value in batch(config, sizes, device).items()}
            losses.append(loss_of(model, few, 1).item())
    got, expected = losses
    # a float32 model's products may be bfloat16 on a CPU
    tolerance = TOLERANCE[torch.bfloat16 if config.precision == "bf16" else torch.float32]
    if abs(got - expected) <= tolerance * abs(expected):
        return ""
    return f"loss {got:.5f} without dropout, expected {expected:.5f} within {tolerance:g}"


class Step:
    """Forward, backward and AdamW of one model on `device`, by default the machine's; the same fused AdamW for all."""

    def __init__(self, name: str, experiment: str, sizes: Sizes, device: torch.device | None = None, **overrides: Any):
        device, overrides = device or machine.device(), {"vocab_size": sizes.vocabulary} | overrides
        self.model = build(name, experiment, device, **overrides).train()
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True
        )
        self.inputs = batch(experiments.configuration(experiment, **overrides), sizes, device)
        self.count = 0

    def __call__(self) -> None:
        self.count += 1
        loss_of(self.model, self.inputs, self.count).backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def kept_bytes(self) -> int:
        """Bytes that forward keeps for backward, parameters left out, each storage once."""
        return timing.kept_bytes(lambda: loss_of(self.model, self.inputs, 1), self.model.parameters())

    def peak_bytes(self) -> int | None:
        """The most that a GPU holds during a step, weights and optimiser state included; None on a CPU."""
        if not torch.cuda.is_available():
            return None
        torch.cuda.reset_peak_memory_stats()
        self()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()


def timed(run: Callable[[], None]) -> float:
    """Seconds of one step, to the end of what it launched."""
    start = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start
