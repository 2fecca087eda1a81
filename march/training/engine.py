"""DeepSpeed's engine: its configuration, checked before and after, and its state by parameter name.

The state that goes into a checkpoint is the float32 master weights and the optimiser's moments under the names of
the model's parameters, gathered from whatever partitions ZeRO made of them. So a checkpoint does not depend on
the number of processes, the ZeRO stage or the micro-batch.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
import logging
import math
import sys
from collections.abc import Callable, Mapping
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from march.model import Linear
from march.recipe import Recipe
from march.training.distributed import World, all_reduce_max, run_on_rank
from march.training.errors import UsageError

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
MOMENTS = ("exp_avg", "exp_avg_sq")

# Every key that may appear in a configuration of ours, with the type of its value; dicts nest. DeepSpeed
# ignores unknown top-level keys (`zero_optimisation`) in silence.
SCHEMA: dict[str, Any] = {
    "train_batch_size": int,
    "train_micro_batch_size_per_gpu": int,
    "gradient_accumulation_steps": int,
    "gradient_clipping": float,
    "steps_per_print": int,
    "zero_allow_untested_optimizer": bool,
    "communication_data_type": str,
    "bf16": {"enabled": bool},
    "data_types": {"grad_accum_dtype": str},
    "zero_optimization": {"stage": int, "overlap_comm": bool, "contiguous_gradients": bool},
    "wall_clock_breakdown": bool,
}


class LossOnly(nn.Module):
    """The model as the engine sees it: tensors in, the loss out (float32 scalar)."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(
        self, input_ids: Tensor, decoder_input_ids: Tensor, labels: Tensor, dropout_state: Tensor | None
    ) -> Tensor:
        """input_ids int64 [B, Le], decoder_input_ids and labels int64 [B, Ld], dropout_state int64 [3]."""
        return self.model(input_ids, decoder_input_ids, labels=labels, dropout_state=dropout_state).loss


def deepspeed_config(recipe: Recipe, micro_batch: int, world_size: int) -> dict[str, Any]:
    """The configuration for one run, as the dict that `deepspeed.initialize` takes; validated.

    Raises:
        UsageError: the global batch is no multiple of micro-batch times processes.
    """
    precision, zero = recipe.precision.compute, recipe.devices.zero
    per_step = micro_batch * world_size
    if recipe.batch.sequences % per_step:
        raise UsageError(
            f"expected a global batch of {recipe.batch.sequences} sequences: a multiple of micro-batch x processes, "
            f"got {micro_batch} x {world_size}; change --micro-batch or the number of processes"
        )
    config: dict[str, Any] = {
        "train_batch_size": recipe.batch.sequences,
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": recipe.batch.sequences // per_step,
        "gradient_clipping": recipe.optimizer.gradient_clipping,
        "steps_per_print": 2**31,  # our own lines say it
        "wall_clock_breakdown": False,
        # torch's AdamW is on DeepSpeed's list; a newer DeepSpeed may drop it
        "zero_allow_untested_optimizer": True,
        # 36M parameters, 16 micro-steps on one GPU: bf16 accumulation would lose what bf16 sums lose
        "data_types": {"grad_accum_dtype": "fp32"},
        # rounds at every hop between processes; float32 would be exact to 24 bits and cost a twentieth more of a step
        # on 8 GPUs without NVLink (docs/projection.md)
        "communication_data_type": recipe.precision.communication or precision,
        "zero_optimization": {"stage": zero, "overlap_comm": False, "contiguous_gradients": True},
    }
    if precision == "bf16":
        config["bf16"] = {"enabled": True}
    validate(config)
    return config


def validate(config: Mapping[str, Any], schema: Mapping[str, Any] = SCHEMA, path: str = "") -> None:
    """Refuse keys and types that are not in the schema.

    Raises:
        UsageError: naming the key, what was expected and the nearest known key.
    """
    import difflib

    for key, value in config.items():
        where = f"{path}{key}"
        if key not in schema:
            near = difflib.get_close_matches(key, schema, n=1)
            hint = f"did you mean {path}{near[0]}?" if near else "remove it"
            raise UsageError(
                f"DeepSpeed configuration: expected one of {', '.join(sorted(schema))}, got {where}; {hint}"
            )
        expected = schema[key]
        if isinstance(expected, dict):
            if not isinstance(value, Mapping):
                raise UsageError(f"DeepSpeed configuration: expected {where} to be a table, got {value!r}; nest it")
            validate(value, expected, f"{where}.")
        elif type(value) is not expected:
            raise UsageError(
                f"DeepSpeed configuration: expected {where} of type {expected.__name__}, got {value!r}; correct it"
            )


class AdamW(torch.optim.AdamW):
    """torch's, but for what keeps torch.compile out of these methods: it imports the compiler, 1.5 s, and nobody
    compiles them here."""

    add_param_group = inspect.unwrap(torch.optim.AdamW.add_param_group)
    zero_grad = inspect.unwrap(torch.optim.AdamW.zero_grad)
    step = torch.no_grad()(inspect.unwrap(torch.optim.AdamW.step))


class Muon(torch.optim.Optimizer):
    """torch's Muon (Jordan et al., 2024) of `matrices` and its AdamW of the other groups, as one optimiser."""

    def __init__(self, matrices: list[Tensor], groups: list[dict[str, Any]], momentum: float, **settings: Any):
        """settings: AdamW's. Muon's steps are scaled to have the size of AdamW's (Liu et al., 2025), so that the
        learning rate and the decay are both's."""
        own = {name: settings[name] for name in ("lr", "weight_decay")}
        muon = torch.optim.Muon(matrices, momentum=momentum, adjust_lr_fn="match_rms_adamw", **own)
        self.parts = [muon, AdamW(groups, fused=True, **settings)]
        super().__init__([group for part in self.parts for group in part.param_groups], {})
        for part in self.parts:  # the groups are the same objects
            part.state = self.state

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for part in self.parts:
            part.step()


def build_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """torch's AdamW over every parameter, or Muon. One group, or a second one without decay: norms' weights, biases."""
    settings: dict[str, Any] = {
        "lr": recipe.optimizer.lr,
        "betas": (recipe.optimizer.beta1, recipe.optimizer.beta2),
        "eps": recipe.optimizer.epsilon,
        "weight_decay": recipe.optimizer.weight_decay,
    }
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    muon = recipe.optimizer.name == "muon"
    linear = {module.weight for module in model.modules() if muon and isinstance(module, Linear | nn.Linear)}
    rest = [p for p in trained if p not in linear]
    groups: list[dict[str, Any]] = [{"params": rest}]
    if recipe.optimizer.decay == "matrices":
        groups = [{"params": [p for p in rest if p.ndim > 1]}]
        groups += [{"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    if muon:
        matrices: list[Tensor] = [p for p in trained if p in linear]
        momentum = 0.95 if recipe.optimizer.momentum is None else recipe.optimizer.momentum
        return Muon(matrices, groups, momentum, **settings)
    # fused: one pass over 36M parameters instead of one for each operation
    return AdamW(groups, fused=True, **settings)


def compiled_at_first_call(function: Callable | None = None, **options: Any) -> Callable:
    """torch.compile, whose compiler is imported when the compiled function is called first instead of at once."""
    if function is None:
        return functools.partial(compiled_at_first_call, **options)

    @functools.cache
    def compiled() -> Callable:
        return torch.compile(function, **options)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        # inside of another compiled function this one is a part of it
        return (function if torch.compiler.is_compiling() else compiled())(*args, **kwargs)

    return call


def import_muon() -> None:
    """Import DeepSpeed's Muon, as its engine does to see whether an optimiser is one, without torch's compiler.

    Three of its functions are compiled by a decorator, which imports torch._dynamo and torch._inductor: 4 of the 9 s
    of a run of 20 small steps. They are compiled when they are called.
    """
    name = "deepspeed.runtime.zero.muon.original_muon"
    try:
        known = importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # a DeepSpeed without Muon
        return
    if known and name not in sys.modules:
        with mock.patch.object(torch, "compile", compiled_at_first_call):
            importlib.import_module(name)


def build_engine(model: nn.Module, config: dict[str, Any], recipe: Recipe, world: World):
    """The engine around `model` (which it casts and moves in place), checked against what was asked.

    Raises:
        RuntimeError: DeepSpeed's engine does not report the settings it was given.
    """
    import deepspeed

    # DeepSpeed reports its memory, buckets and groups at INFO and WARNING, some 60 lines a process
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    validate(config)
    import_muon()
    wrapped = LossOnly(model)
    parameters = [parameter for parameter in wrapped.parameters() if parameter.requires_grad]
    model.to(world.device)
    optimizer = build_optimizer(wrapped, recipe)
    engine, *_ = deepspeed.initialize(
        model=wrapped, model_parameters=parameters, optimizer=optimizer, config=config, dist_init_required=False
    )
    reported = {
        "stage": engine.zero_optimization_stage(),
        "gradient_clipping": engine.gradient_clipping(),
        "accumulation": engine.gradient_accumulation_steps(),
        "micro_batch": engine.train_micro_batch_size_per_gpu(),
        "bf16": engine.bfloat16_enabled(),
        "processes": engine.dp_world_size,
    }
    asked = {
        "stage": config["zero_optimization"]["stage"],
        "gradient_clipping": config["gradient_clipping"],
        "accumulation": config["gradient_accumulation_steps"],
        "micro_batch": config["train_micro_batch_size_per_gpu"],
        "bf16": "bf16" in config,
        "processes": world.size,
    }
    if reported != asked:
        raise RuntimeError(f"DeepSpeed's engine runs with {reported}, not with {asked}")
    _create_optimizer_state(engine)
    return engine


def guard_gradients(engine, world: World, refuse: Callable[[str, float], object]) -> None:
    """Has `refuse(what, value)` called on every rank when what is about to change the weights is not finite on any.

    It looks where every setting passes: at the gradients that the basic optimiser is about to use, averaged, unscaled
    and clipped. DeepSpeed's own check is a setting of its own, and is not there without ZeRO.
    """
    optimizer = engine.basic_optimizer

    def before_step(*_: Any) -> None:
        norm = 0.0 if _is_plain(engine) else global_norm(engine)
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        bad = not math.isfinite(norm) or not all(bool(torch.isfinite(gradient).all()) for gradient in gradients)
        if all_reduce_max(world, float(bad)):
            refuse("gradient norm", math.nan if math.isfinite(norm) else norm)

    optimizer.register_step_pre_hook(before_step)


def plain_norm(engine) -> float | None:
    """The norm of the averaged gradients before they are clipped, which DeepSpeed does not keep without ZeRO; None
    with it."""
    if not _is_plain(engine):
        return None
    gradients = [p.grad for p in engine.module.parameters() if p.grad is not None]
    return float(torch.nn.utils.get_total_norm(gradients))


def global_norm(engine) -> float:
    """ZeRO's norm of the averaged gradients before they are clipped; NaN where it found one that is not finite."""
    norm = float(engine.optimizer._global_grad_norm)
    return norm if norm >= 0 else math.nan  # -1 stands for infinite and for NaN


def gather_state(engine, world: World) -> dict[str, dict[str, Tensor]] | None:
    """{"model" | "exp_avg" | ...: {parameter name: float32 CPU tensor of its shape}}; rank 0 only.

    Collective: every rank calls it, between two steps.
    """
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    gathered: dict[str, dict[str, Tensor]] = {}
    for name, parameter in engine.module.model.named_parameters():
        for key in (None, *_moments(engine, parameter)):
            if _is_plain(engine):
                full = parameter if key is None else engine.optimizer.state[parameter][key]
            elif key is None:
                full = safe_get_full_fp32_param(parameter)
            else:
                full = safe_get_full_optimizer_state(parameter, key)
            if full is None:
                raise RuntimeError(f"DeepSpeed gave no {key or 'master weight'} for {name}")
            if world.is_first:
                gathered.setdefault(key or "model", {})[name] = full.detach().to("cpu", torch.float32, copy=True)
    return gathered if world.is_first else None


def scatter_state(engine, state: Mapping[str, Mapping[str, Tensor]], step: int, world: World) -> None:
    """Put a gathered state back into the engine's partitions; the inverse of gather_state. Collective.

    Only rank 0 needs `state`: it sends each tensor to the others, so nodes need not share a disk.

    Raises:
        UsageError: names or shapes are not the model's (on rank 0; RunError on the others).
    """
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

    named = dict(engine.module.model.named_parameters())
    shapes: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, parameter in named.items():
        for part in ("model", *_moments(engine, parameter)):
            shapes.setdefault(part, {})[name] = tuple(parameter.shape)
    run_on_rank(world, lambda: _check_state(state, shapes), when=world.is_first)
    for moments in engine.basic_optimizer.state.values():
        if "step" in moments:
            moments["step"].fill_(step)
    for part, name in ((part, name) for part, names in shapes.items() for name in names):
        parameter = named[name]
        if world.is_first:
            full = state[part][name].to(world.device, torch.float32)
        else:
            full = torch.empty(shapes[part][name], dtype=torch.float32, device=world.device)
        if world.size > 1:
            torch.distributed.broadcast(full, src=0)
        if part == "model":
            parameter.data.copy_(full)  # rounded to bf16 where that is the parameter's type
            if not _is_plain(engine):
                safe_set_full_fp32_param(parameter, full)
        elif _is_plain(engine):
            engine.optimizer.state[parameter][part].copy_(full)
        else:
            safe_set_full_optimizer_state(parameter, full, part)


def _check_state(
    state: Mapping[str, Mapping[str, Tensor]], shapes: Mapping[str, Mapping[str, tuple[int, ...]]]
) -> None:
    for part, expected in shapes.items():
        tensors = state.get(part, {})
        if tensors.keys() != expected.keys():
            odd = ", ".join(sorted(tensors.keys() ^ expected.keys())[:3])
            raise UsageError(f"expected the model's parameters in {part}, got a difference in {odd}; use its own run")
        for name, tensor in tensors.items():
            if tuple(tensor.shape) != expected[name]:
                raise UsageError(
                    f"expected {part} of {name} with shape {expected[name]}, got {tuple(tensor.shape)}; use its own run"
                )


def _moments(engine, parameter: nn.Parameter) -> tuple[str, ...]:
    """The names of the optimiser's tensors for a parameter."""
    if not _is_plain(engine):
        return MOMENTS
    return tuple(key for key in engine.optimizer.state[parameter] if key != "step")


def _is_plain(engine) -> bool:
    """No ZeRO and float32: DeepSpeed then runs the optimiser as it is, over the model's own parameters."""
    return engine.zero_optimization_stage() == 0


def _create_optimizer_state(engine) -> None:
    """Give the optimiser the state that it would create at its first step.

    So there is something to load into, and to save: ZeRO steps one group of parameters after another, and links all of
    them to their state after the first group's first step, when the other groups have none.
    """
    optimizer = engine.basic_optimizer
    for group in optimizer.param_groups:
        for flat in group["params"]:
            muon = "momentum" in group
            keys = ("momentum_buffer",) if muon else MOMENTS
            optimizer.state[flat] = {key: torch.zeros_like(flat, dtype=torch.float32) for key in keys}
            if not muon:
                optimizer.state[flat]["step"] = torch.zeros((), device=flat.device)
    link = getattr(engine.optimizer, "_lazy_init_hp_params_optimizer_state", None)
    if link is not None:
        link()
