"""The questions that `march check` asks of an idea: functions of a `Subject`.

Each returns what holds, or raises `Fault`: what does not, and what to do.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from march.check.subject import Batch, Subject, seeded
from march.model import Transformer
from march.model.modules import Dropout

# (training, encoder positions, decoder positions): short, and beyond the blocks that code goes by (16 ... 512)
MODES = ((False, 19, 11), (True, 19, 11), (False, 150, 301), (True, 150, 301), (False, 20, 999))
PADDED_MODES = ((False, 19, 5), (True, 19, 5), (False, 301, 40), (True, 301, 40), (False, 999, 9))
CUTS: dict[int, Iterable[int]] = {
    11: range(1, 11),
    301: (1, 2, 3, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257, 300),
    999: (31, 257, 512, 998),
}
# of the largest logit in float64: the same shapes give the same sums; other shapes, and parts in float32, others
SAME, CLOSE = 1e-10, 1e-5


class Fault(Exception):
    """What is wrong; fix: what to do about it."""

    def __init__(self, text: str, fix: str):
        super().__init__(text)
        self.fix = fix


def _where(training: bool, encoder: int, decoder: int) -> str:
    return f"in {'training' if training else 'evaluation'}, {encoder} + {decoder} positions"


def _compare(got: Tensor, wanted: Tensor, tolerance: float, text: str, fix: str) -> None:
    if not got.numel():
        return
    difference = float((got - wanted).abs().max() / wanted.abs().max().clamp(min=1e-300))
    if not difference <= tolerance:  # NaN is not
        raise Fault(f"{text} (by {difference:.1e} of the largest)", fix)


def future(subject: Subject) -> str:
    """Logits at position i from tokens behind it."""
    model = subject.model()
    for training, encoder, decoder in MODES:
        batch = Batch.draw(2, encoder, decoder)
        before = subject.outputs(model, batch, training)
        for cut in CUTS[decoder]:
            other = batch.decoder_input_ids.clone()
            other[:, cut:] = (other[:, cut:] + 1 + torch.arange(decoder - cut) % 50) % 211
            got = subject.outputs(model, replace(batch, decoder_input_ids=other), training)[:, :cut]
            text = f"logits before position {cut} change with tokens from it on, {_where(training, encoder, decoder)}"
            _compare(got, before[:, :cut], SAME, text, "mask later positions: causal=True, no means over positions")
        half, batch = 1 + decoder // 2, Batch.draw(2, encoder, decoder, seed=9)
        before = subject.outputs(model, batch, training)
        ids, labels = batch.decoder_input_ids[:, :half], batch.labels[:, :half]
        got = subject.outputs(model, replace(batch, decoder_input_ids=ids, labels=labels), training)
        text = f"logits of {half} positions change when there are {decoder}, {_where(training, encoder, decoder)}"
        _compare(got, before[:, :half], CLOSE, text, "use no length of the decoder's, and keep nothing by shape")
    return "no logit changes with later tokens, or with how many there are, up to 999"


def padding(subject: Subject) -> str:
    """Logits from tokens that the mask hides, or from how many there are."""
    model = subject.model()
    fix = "in the encoder and across, hide keys by ctx.key_mask, and leave them out of means"
    for training, encoder, decoder in PADDED_MODES:
        where, batch = _where(training, encoder, decoder), Batch.draw(3, encoder, decoder)
        before, mask = subject.outputs(model, batch, training), batch.attention_mask
        assert mask is not None
        ids = torch.where(mask, batch.input_ids, (batch.input_ids + 57) % 211)
        got = subject.outputs(model, replace(batch, input_ids=ids), training)
        _compare(got, before, SAME, f"logits change with tokens of padding, {where}", fix)
        wider = replace(
            batch,
            input_ids=torch.nn.functional.pad(ids, (0, 13), value=5),
            attention_mask=torch.nn.functional.pad(mask, (0, 13)),
        )
        got = subject.outputs(model, wider, training)
        _compare(got, before, CLOSE, f"logits change when 13 positions of padding are added, {where}", fix)
    return "no logit changes with padding's tokens or their number"


def sequences(subject: Subject) -> str:
    """Logits of one sequence from the others of its batch: a loss would depend on the micro-batch."""
    model = subject.model()
    fix = "sum over positions and features only, never dimension 0; no statistics of a batch"
    for training, encoder, decoder in MODES[:-1]:
        where, batch = _where(training, encoder, decoder), Batch.draw(5, encoder, decoder)
        before, other = subject.outputs(model, batch, training), Batch.draw(5, encoder, decoder, seed=5)
        for changed in (0, 3):
            kept = torch.arange(5) != changed

            def mix(name: str, kept: Tensor = kept) -> Tensor:
                return torch.where(kept[:, None], getattr(batch, name), getattr(other, name).flip(0))  # noqa: B023

            ids, decoder_ids = mix("input_ids"), mix("decoder_input_ids")
            mixed = Batch(ids, decoder_ids, mix("labels"), mix("attention_mask"))
            got = subject.outputs(model, mixed, training)[kept]
            _compare(got, before[kept], SAME, f"logits change with another sequence of the batch, {where}", fix)
        for index in (0, 2, 4):
            alone = subject.outputs(model, batch.row(index), training)
            _compare(alone[0], before[index], CLOSE, f"logits change when a sequence is alone, {where}", fix)
    return "each sequence alone gives the logits that it has in a batch"


def generators(subject: Subject) -> str:
    """Numbers from global generators: dropout that no resumed run, no other split repeats."""
    model, batch = subject.model(), Batch.draw(2, 19, 11)
    fix = "draw in training by march.model.Dropout(p): self.drop = Dropout(p), then self.drop.drop(x, ctx)"
    for training in (False, True):
        mode = "training" if training else "evaluation"
        a, b = (subject.outputs(model, batch, training, torch_seed=seed) for seed in (0, 1))
        _compare(b, a, SAME, f"logits of one batch and step differ between two calls in {mode}", fix)
    a, b = (subject.outputs(model, batch, False, step=step) for step in (3, 4))
    _compare(
        b, a, SAME, "logits in evaluation change with the step", "drop in training only: nothing where ctx.rng is None"
    )
    return "the same logits from the same seed and step, whatever else draws"


def dropout_places(subject: Subject) -> str:
    """Two places that drop by one mask; and what training does beside dropping."""
    model, batch = subject.model(), Batch.draw(2, 19, 11)
    names = {id(module): name for name, module in model.named_modules()}
    calls: list[tuple[str, int]] = []

    def spy(place: Dropout, ctx: Any) -> Any:
        dropout = original(place, ctx)
        if dropout is not None:
            calls.append((names.get(id(place), "one outside the model's modules"), dropout.site))
        return dropout

    original = Dropout.forward
    with mock.patch.object(Dropout, "forward", spy):
        subject.outputs(model, batch, True)
    fix = "give every place its own: self.my_dropout = Dropout(config.dropout) in __init__"
    for place, count in Counter(calls).items():
        if count > 1:
            raise Fault(f"{place[0]} drops {count} times in a pass, by the same mask", fix)
    sites = Counter(site for _, site in set(calls))
    for name, site in calls:
        if sites[site] > 1:
            raise Fault(f"{name} drops by the mask of another place", fix)
    evaluated = subject.outputs(model, batch)
    for module in model.modules():
        if isinstance(module, Dropout):
            module.p = 0.0
    text = "training without dropout differs from evaluation"
    fix = "what drops, or adds noise, is a march.model.Dropout; nothing else asks self.training"
    _compare(subject.outputs(model, batch, True), evaluated, CLOSE, text, fix)
    return f"{len(calls)} places drop, each by a mask of its own; training adds nothing else"


def state(subject: Subject) -> str:
    """What a forward leaves behind: state that a resumed run, or another order of batches, does not have."""
    model, batch = subject.model(), Batch.draw(2, 19, 11)
    names = [name for name, _ in model.named_parameters()]
    values = {name: x.detach().clone() for name, x in model.state_dict(keep_vars=True).items()}
    values |= {name: x.detach().clone() for name, x in model.named_buffers()}
    before = subject.outputs(model, batch)
    for _ in range(2):
        subject.loss(model, Batch.draw(3, 9, 6, seed=2)).backward()
    for name, x in (*model.named_parameters(), *model.named_buffers()):
        if name not in values:
            raise Fault(f"{name} is made by forward", "make parameters in __init__, with a rule in init_rules")
        if not torch.equal(x, values[name]):
            raise Fault(f"forward changes {name}", "a model is a function of its parameters: keep no running values")
    if names != [name for name, _ in model.named_parameters()]:
        raise Fault("forward removes a parameter", "make parameters in __init__")
    text = "logits change after other batches went through"
    fix = "keep nothing from one call to the next, on self, in a class or in the file"
    _compare(subject.outputs(model, batch), before, SAME, text, fix)
    for name, held in _unregistered(model):
        raise Fault(
            f"{name} holds {held} that torch does not know: not trained, saved or moved to a GPU",
            "nn.Parameter or nn.ModuleList on self; a constant by register_buffer(..., persistent=False)",
        )
    twin = subject.build(seed=9).double()
    twin.load_state_dict(model.state_dict())
    text = "a model with the same state_dict gives other logits"
    _compare(
        subject.outputs(twin, batch), before, SAME, text, "what a model learns is a parameter; what it draws has a rule"
    )
    return "a forward changes nothing; the state_dict is all of the model"


def _unregistered(model: nn.Module) -> Iterator[tuple[str, str]]:
    known = {id(x) for x in (*model.modules(), *model.parameters(), *model.buffers())}

    def inside(value: Any, depth: int = 0) -> Iterable[str]:
        if isinstance(value, Tensor | nn.Module) and id(value) not in known:
            yield f"a {type(value).__name__}"
        elif isinstance(value, list | tuple | set | dict) and depth < 3:
            for part in value.values() if isinstance(value, dict) else value:
                yield from inside(part, depth + 1)

    for prefix, module in model.named_modules():
        for name, value in vars(module).items():
            if name not in ("_parameters", "_buffers", "_modules"):
                yield from ((f"{prefix}.{name}".lstrip("."), held) for held in inside(value))


def initial_values(subject: Subject) -> str:
    """Initial values: all drawn, finite, by the seed and their names alone."""
    fix = "in init_rules, draw with the generator that the rule is given: lambda x, g: x.normal_(0, 0.02, generator=g)"
    torch.use_deterministic_algorithms(True)  # torch.empty is NaN
    try:
        models = []
        for torch_seed in (0, 1):
            with seeded(torch_seed):
                models.append(subject.build(seed=5))
    finally:
        torch.use_deterministic_algorithms(False)
    tensors = [dict([*model.named_parameters(), *model.named_buffers()]) for model in models]
    for name, x in tensors[0].items():
        if not torch.isfinite(x).all():
            raise Fault(f"{name}: {int((~torch.isfinite(x)).sum()):,} values are never set, or not finite", fix)
        if not torch.equal(x, tensors[1][name]):
            raise Fault(f"{name} begins otherwise with the same seed: it draws from a global generator", fix)
    for name, x in tensors[0].items():
        if isinstance(x, nn.Parameter) and not x.requires_grad:
            raise Fault(f"{name} is a parameter that is not trained", "a constant is a buffer: register_buffer")
    return f"{len(tensors[0])} tensors, each drawn by seed and name"


def gradients(subject: Subject) -> str:
    """A gradient for every parameter that the loss can depend on, finite, and that of the formula."""
    model, batch = subject.model(), Batch.draw(3, 19, 11)
    loss = subject.loss(model, batch)
    loss.backward()
    last = f"encoder.blocks.{len(model.encoder.blocks) - 1}."
    unread = (last, "encoder.final_norm.") if model.encoder.stops_early else ()
    dead = 0
    for name, x in model.named_parameters():
        if x.grad is not None and not torch.isfinite(x.grad).all():
            raise Fault(f"the gradient of {name} is not finite", "guard divisions, roots and logarithms near 0")
        if x.grad is None or not x.grad.any():
            dead += 1
            if not name.startswith(unread):
                got = "no gradient" if x.grad is None else "a gradient of zeros"
                raise Fault(f"{name} has {got}: it is never trained", "use it in forward, without detach or no_grad")
    for name, x in model.named_parameters():
        # another direction where one disagrees: a kink, such as a ReLU's, may lie on the first
        if x.grad is not None and not any(_slope_agrees(subject, model, batch, x, seed) for seed in (3, 4, 5)):
            fix = "mend the backward of your autograd.Function; one that is meant to differ fails here"
            raise Fault(f"{name}: the loss does not change as its gradient says", fix)
    return "every parameter's is finite, and what the loss changes by" + (f"; {dead} unread by design" if dead else "")


def _slope_agrees(subject: Subject, model: nn.Module, batch: Batch, x: Tensor, seed: int) -> bool:
    """Whether the loss changes along a random direction of parameter `x` by what its gradient says."""
    assert x.grad is not None
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed), dtype=x.dtype)
    direction /= direction.norm()
    before, ends = x.detach().clone(), []
    with torch.no_grad():
        for sign in (1e-6, -1e-6):
            x += sign * direction
            ends.append(subject.loss(model, batch).item())
            x.copy_(before)
    got, wanted = (ends[0] - ends[1]) / 2e-6, (x.grad * direction).sum().item()
    return abs(got - wanted) <= 2e-3 * max(abs(got), abs(wanted)) + 1e-8


def implementations(subject: Subject) -> str:
    """Loss and gradients of the fast path against the plain formulas, both in float64."""
    batch, found = Batch.draw(3, 19, 11), []
    for impl in ("reference", "torch"):
        model = subject.model(impl)
        loss = subject.loss(model, batch)
        loss.backward()
        found.append(
            {"the loss": loss.detach()} | {n: x.grad for n, x in model.named_parameters() if x.grad is not None}
        )
    for name, wanted in found[0].items():
        got = found[1].get(name)
        fix = "formula and backward of the activation, or what your part does to its inputs in place, differ"
        if got is None:
            raise Fault(f"{name} has a gradient by the formulas, none on the torch path", fix)
        _compare(got, wanted, CLOSE, f"{name}: the torch path differs from the formulas", fix)
    return "torch path and formulas agree in float64, loss and gradients"


def sixteen_bits(subject: Subject) -> str:
    """The forward and backward of a model in bfloat16, as a GPU trains it."""
    batch, losses = Batch.draw(3, 19, 11), []
    fix = "convert own parameters and constants to the input's dtype: self.w.to(x.dtype)"
    # in bfloat16 as on a GPU, then weights in float32 and products in bfloat16 as on a CPU
    for dtype, products in ((torch.float64, None), (torch.bfloat16, None), (torch.float32, torch.bfloat16)):
        model = subject.model().to(dtype)
        try:
            with mock.patch.object(Transformer, "compute_dtype", lambda _, products=products: products):
                loss = subject.loss(model, batch)
            loss.backward()
        except Exception as error:  # of torch, or of an operator's checks
            raise Fault(
                f"bfloat16, weights in {dtype}, does not run: {' '.join(str(error).split())[:150]}", fix
            ) from error
        losses.append(loss.item())
        if not all(torch.isfinite(x.grad).all() for x in model.parameters() if x.grad is not None):
            raise Fault("a gradient in bfloat16 is not finite", "sum and divide in float32, then convert back")
    for got in losses[1:]:
        if not abs(got - losses[0]) <= 0.03 * abs(losses[0]):
            raise Fault(f"the loss is {got:.4f} in bfloat16, {losses[0]:.4f} in float64", "sum in float32")
    return f"loss {losses[1]:.4f} in bfloat16, {losses[0]:.4f} in float64"


PROBES: dict[str, Callable[[Subject], str]] = {
    "initial values": initial_values,
    "future tokens": future,
    "padding": padding,
    "other sequences": sequences,
    "generators": generators,
    "dropout": dropout_places,
    "state": state,
    "gradients": gradients,
    "torch path": implementations,
    "bfloat16": sixteen_bits,
}
