"""The operator calls that `pytest bench/` times: what they compute, what they move at least, how they are named."""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import kernels
import march
from kernels import cases, packed
from kernels.dispatch import observed
from kernels.dropout import Dropout, dropout_state
from kernels.operators import OPERATORS
from march.cost.counter import Counter

DIRECTIONS = ("forward", "backward", "both")
# arguments that a call is named by, given or not; of the others what is not their default
CHOICES = ("scale", "causal", "kind", "activation", "factor", "combine")


@dataclass(frozen=True)
class Sizes:
    """Sequences and positions of a step. label: what they are beside the paper's."""

    label: str
    batch: int
    encoder: int
    decoder: int
    vocabulary: int = cases.VOCABULARY

    @property
    def tokens(self) -> int:
        return self.batch * (self.encoder + self.decoder)

    def __str__(self) -> str:
        text = f"batch {self.batch}, {self.encoder}/{self.decoder} positions"
        return text + ("" if self.vocabulary == cases.VOCABULARY else f", vocabulary {self.vocabulary}")


PAPER = Sizes("the paper's shapes", cases.MICRO_BATCH, cases.ENCODER_LENGTH, cases.DECODER_LENGTH)
# a quarter of the positions, a 32nd of the batch: Baseline's step takes half a second on two cores
REDUCED = Sizes("reduced for a CPU", 2, 231, 52)
SMOKE = Sizes("smoke: too small to mean anything", 1, 24, 10, 500)


@dataclass(frozen=True)
class Call:
    """A call of an operator, without its tensors. dims: as its record's `sizes` takes them; kwargs: plain arguments;
    dropouts: its arguments that drop, with their probabilities; absent: tensors that are not given."""

    operator: str
    dims: dict[str, Any]
    kwargs: dict[str, Any]
    dropouts: dict[str, float]
    absent: tuple[str, ...] = ()

    def inputs(
        self, seed: int = 0, dtype: torch.dtype = torch.float64, device: torch.device | str = "cpu"
    ) -> dict[str, Tensor | None]:
        """The operator's tensors, without key lengths."""
        inputs = OPERATORS[self.operator].inputs(**self.dims, seed=seed, dtype=dtype, device=device)
        return inputs | dict.fromkeys(self.absent)


def _call(operator: str, tensors: Sequence[Tensor | None], arguments: dict[str, Any]) -> Call:
    """Of a call that a model made; packed tensors are named by what they hold."""
    given = packed.unpack(*tensors) if operator == "attention" else tensors
    shapes = [None if x is None else tuple(x.shape) for x in given]
    first = next(shape for shape in shapes if shape is not None)
    if operator == "attention":
        dims = {"batch": first[0], "queries": first[1], "heads": first[2], "width": first[3]}
        batch, keys, key_heads, _ = shapes[-1]  # type: ignore[misc]
        dims |= {"keys": keys} | ({"segments": 2} if len(given) > 3 else {})
        dims |= {"key_heads": key_heads} if key_heads != first[2] else {}
        dims |= {"key_batch": 1} if batch == key_heads == 1 and first[2] > 1 else {}
    else:
        last = shapes[1] if operator in ("glu", "embedding", "linear_cross_entropy") else None
        width = last[1] if last else first[2]
        dims = {"batch": first[0], "length": first[1], "width": width}
        if operator == "glu":
            halves = 1 if arguments["kind"] == "plain" else 2
            dims |= {"hidden": last[0] // halves, "kind": arguments["kind"]}  # type: ignore[index]
        elif last:
            dims |= {"vocabulary": last[0]} | ({"positions": shapes[2][0]} if operator == "embedding" else {})  # type: ignore[index]
    dropouts = {name: x.p for name, x in arguments.items() if isinstance(x, Dropout)}
    defaults = inspect.signature(getattr(kernels, operator)).parameters
    plain = {
        n: x
        for n, x in arguments.items()
        if x is not None and not isinstance(x, Dropout | Tensor) and (n in CHOICES or x != defaults[n].default)
        if n != "return_kv"  # of packed tensors, which are named by what they hold
    }
    plain.pop("return_kv", None)  # of packed tensors, which are timed apart
    absent = tuple(n for n, s in zip(OPERATORS[operator].contract.tensors, shapes, strict=False) if s is None)
    return Call(operator, dims, plain, dropouts, absent)


def calls(name: str, sizes: Sizes) -> list[Call]:
    """The operator calls of one forward pass of an experiment's model, recorded on meta tensors, where nothing runs."""
    found = []

    def wrap(operator: str, function: Callable) -> Callable:
        def call(*tensors: Tensor | None, **arguments: Any) -> Any:
            found.append(_call(operator, tensors, arguments))
            return function(*tensors, **arguments)

        return call

    with torch.device("meta"), observed(wrap):
        model = march.build_model(name, impl="torch", vocab_size=sizes.vocabulary).train()
        encoder, decoder = (torch.empty(sizes.batch, n, dtype=torch.int64) for n in (sizes.encoder, sizes.decoder))
        model(encoder, decoder, decoder, dropout_state=torch.empty(3, dtype=torch.int64))
    return found


def distinct(names: Sequence[str], sizes: Sizes) -> list[tuple[Call, dict[str, int]]]:
    """Each call once, with how often a forward pass of each experiment makes it. Without key lengths: training's
    sequences are packed and have no padding."""
    found: dict[str, tuple[Call, dict[str, int]]] = {}
    for name in names:
        for call in calls(name, sizes):
            counts = found.setdefault(repr(call), (call, {}))[1]
            counts[name] = counts.get(name, 0) + 1
    return list(found.values())


def with_batch(call: Call, batch: int) -> Call:
    """The same call of fewer sequences."""
    return replace(call, dims=call.dims | {"batch": batch})


def shape_name(call: Call) -> str:
    """Short and unique among the calls of one set of sizes: "64x921x921 8x64 causal"."""
    d, kind = call.dims, call.kwargs
    if call.operator == "attention":
        keys = f"{d['queries']}+{d['keys']}" if "segments" in d else d["keys"]
        bank = " shared keys" if d.get("key_batch") == 1 else ""
        causal = " causal" if kind.get("causal") else ""
        return f"{d['batch']}x{d['queries']}x{keys} {d['heads']}x{d['width']}{bank}{causal}"
    base = f"{d['batch']}x{d['length']} {d['width']}"
    if call.operator == "glu":
        what = kind["kind"] if kind["kind"] == "mixed" else f"{kind['kind']} {kind['activation']}"
        extra = (" halved" if kind["factor"] == 0.5 else "") + (
            " two dropouts" if "gate_dropout" in call.dropouts else ""
        )
        return f"{base}->{d['hidden']} {what}{extra}"
    if call.operator == "residual_norm":
        return base + {(): "", ("x",): " no residual", ("s",): " norm alone"}[call.absent]
    return f"{base} V{d['vocabulary']}" + (f" {kind['combine']}" if call.operator == "embedding" else "")


def arguments(call: Call, device: torch.device, dropout: bool = True) -> dict[str, Any]:
    """Everything of a call but its tensors; dropout False leaves every mask out."""
    rng = dropout_state(42, 1, 0, device)
    drops = {name: Dropout(p, rng, site) for site, (name, p) in enumerate(call.dropouts.items())} if dropout else {}
    return dict(call.kwargs) | drops


# ---------------------------------------------------------------- what a call computes and moves


def _sizes(call: Call) -> dict[str, int]:
    """Of the axes of the operator's contract."""
    return OPERATORS[call.operator].sizes(**call.dims)


def flops(call: Call, direction: str) -> int:
    """FLOPs of the products that the formula needs, two for each multiply-add. Scores that a causal mask hides are
    left out; so is whatever an implementation computes again, but for attention's scores in backward."""
    forward, backward = OPERATORS[call.operator].flops(_sizes(call), call.kwargs)
    return {"forward": forward, "backward": backward, "both": forward + backward}[direction]


def least_bytes(call: Call, direction: str, dtype: torch.dtype) -> int:
    """Bytes at the operator's boundary, each tensor once, as the ledger counts them (docs/ledger.md)."""
    meta = torch.device("meta")
    inputs = call.inputs(dtype=dtype, device=meta)
    given = [x.requires_grad_() if x is not None and x.is_floating_point() else x for x in inputs.values()]
    with Counter() as counter, observed(counter.wrap):
        out = getattr(kernels, call.operator)(*given, **arguments(call, meta), impl="torch")
        outputs = [x for x in (out if isinstance(out, tuple) else (out,)) if x.requires_grad]
        outputs = outputs[1:] if "s" in call.absent else outputs  # y is x
        torch.autograd.backward(outputs, [torch.empty_like(x) for x in outputs])
    phases = ("forward", "backward") if direction == "both" else (direction,)
    return sum(counter.compulsory[call.operator, phase] for phase in phases)
