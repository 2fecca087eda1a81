"""Training steps of any experiment and of its baselines, on the device that is there: build, check, time, weigh."""

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import kernels
import march
from bench import baselines, machine
from bench.kernel_calls import Sizes
from bench.portable_step import LIBRARIES
from bench.predecessor import Eager
from march import experiments
from march.config import ModelConfig
from march.model import Transformer

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


def dtype_of(config: ModelConfig) -> torch.dtype:
    """Of the parameters: float32 on a CPU, whose products may still be bfloat16; on a GPU the configuration's."""
    on_gpu = torch.cuda.is_available() and config.precision == "bf16"
    return torch.bfloat16 if on_gpu else torch.float32


def build(name: str, experiment: str, **overrides: Any) -> nn.Module:
    """A model on the device: one of OURS, EAGER, or a library's; ours and eager with the same parameters."""
    torch.manual_seed(0)
    config = experiments.configuration(experiment, **overrides)
    if name in LIBRARIES:
        function, argument, setting = LIBRARIES[name]
        return baselines.in_setting(getattr(baselines, function)(config, argument), setting).to(machine.device())
    model = march.build_model(experiment, impl=name if name in OURS else "torch", **overrides)
    model = Eager(model.config).load(model) if name == EAGER else model
    return model.to(machine.device(), dtype_of(config))


def batch(config: ModelConfig, sizes: Sizes) -> dict[str, Tensor]:
    """Random tokens; every position real, as packed text has them."""
    generator = torch.Generator().manual_seed(1)

    def draw(length: int) -> Tensor:
        return torch.randint(111, config.vocab_size, (sizes.batch, length), generator=generator)

    given = {"input_ids": draw(sizes.encoder), "decoder_input_ids": draw(sizes.decoder), "labels": draw(sizes.decoder)}
    mask = torch.ones(sizes.batch, sizes.encoder, dtype=torch.bool)
    return {key: value.to(machine.device()) for key, value in (given | {"attention_mask": mask}).items()}


def loss_of(model: nn.Module, inputs: dict[str, Tensor], step: int) -> Tensor:
    """Ours as the trainer calls it: packed sequences, so no padding mask; the baselines are made to take one."""
    if not isinstance(model, Transformer):
        return model(**inputs)
    given = {name: x for name, x in inputs.items() if name != "attention_mask"}
    return model(**given, dropout_state=kernels.dropout_state(1, step, 0, machine.device())).loss


def overrides_of(sizes: Sizes) -> dict[str, Any]:
    return {"vocab_size": sizes.vocabulary}


def loss_problem(name: str, experiment: str, sizes: Sizes) -> str:
    """What is wrong with the loss of `name` on one sequence without dropout, beside eager PyTorch's; "" if nothing."""
    losses = []
    for one in (name, EAGER):
        config = overrides_of(sizes) | {"dropout": 0.0, "slow_dropout": 0.0}
        model = build(one, experiment, **config).train()
        with torch.no_grad():
            few = {key: value[:1] for key, value in batch(model.config, sizes).items()}
            losses.append(loss_of(model, few, 1).item())
    got, expected = losses
    # a float32 model's products may be bfloat16 on a CPU
    tolerance = TOLERANCE[
        torch.bfloat16 if experiments.configuration(experiment).precision == "bf16" else torch.float32
    ]
    if abs(got - expected) <= tolerance * abs(expected):
        return ""
    return f"loss {got:.5f} without dropout, expected {expected:.5f} within {tolerance:g}"


class Step:
    """Forward, backward and AdamW of one model; the same fused AdamW for all."""

    def __init__(self, name: str, experiment: str, sizes: Sizes):
        self.model = build(name, experiment, **overrides_of(sizes)).train()
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True
        )
        self.inputs = batch(experiments.configuration(experiment, **overrides_of(sizes)), sizes)
        self.count = 0

    def __call__(self) -> None:
        self.count += 1
        loss_of(self.model, self.inputs, self.count).backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def kept_bytes(self) -> int:
        """Bytes that forward keeps for backward, parameters left out, each storage once."""
        weights = {p.untyped_storage().data_ptr() for p in self.model.parameters()}
        storages: dict[int, int] = {}

        def pack(x: Tensor) -> Tensor:
            storage = x.untyped_storage()
            if storage.data_ptr() not in weights:
                storages[storage.data_ptr()] = storage.nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            loss = loss_of(self.model, self.inputs, 1)
        size = sum(storages.values())
        del loss
        return size

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
