"""One training step's forward and backward on meta tensors, under a counter."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

import kernels
from kernels.compile_only import Launch, recording
from kernels.dispatch import OPERATORS, fused_available, observed, triton_interpreted
from march.config import ModelConfig, resolve
from march.cost.compulsory import Compulsory, Observer
from march.cost.counter import LINEAR, Allocation, Counter, Event
from march.model import Transformer

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
# the architecture whose tiles the launches take
ARCH = "sm_86"


@dataclass
class Measured:
    """saved: bytes kept for backward by the operator that keeps them, parameters left out, each storage once. peak:
    the most that lived at one time beyond weights, gradients included. live: what outlives backward."""

    events: list[Event]
    allocations: list[Allocation]
    compulsory: list[Compulsory]
    peak: int
    saved: dict[str, int] = field(default_factory=dict)


def inputs(config: ModelConfig, encoder_length: int, decoder_length: int, batch: int) -> dict[str, Tensor]:
    """A batch on the meta device as the trainer hands it over: packed sequences, so no padding mask."""

    def ids(length: int) -> Tensor:
        return torch.empty(batch, length, dtype=torch.int64, device="meta")

    return {
        "input_ids": ids(encoder_length),
        "decoder_input_ids": ids(decoder_length),
        "labels": ids(decoder_length),
        "dropout_state": torch.empty(3, dtype=torch.int64, device="meta"),
    }


def fused_operators(impl: kernels.Impl) -> list[str]:
    """Operators that `impl` computes by fused kernels on a GPU; "auto" does where there are any."""
    names = {operator: impl if isinstance(impl, str) else impl.get(operator, "auto") for operator in OPERATORS}
    return [o for o, name in names.items() if name == "triton" or (name == "auto" and fused_available(o))]


@contextlib.contextmanager
def _launches(needed: bool, arch: str, compile: bool | Callable[[str], bool]) -> Iterator[list[Launch]]:
    if not needed:
        yield []
        return
    with recording(arch, compile) as found:
        yield found


def measure(
    config: ModelConfig,
    encoder_length: int,
    decoder_length: int,
    micro_batch: int,
    impl: kernels.Impl,
    precision: str,
    arch: str = ARCH,
    compile: bool | Callable[[str], bool] = False,
) -> Measured:
    """Counts of one micro-batch. RuntimeError with fused operators under TRITON_INTERPRET=1, where nothing launches.

    arch, compile: of the launches, as kernels.compile_only.recording takes them.
    """
    fused = fused_operators(impl)
    # meta tensors are on no GPU: what "auto" takes there is said by name
    chosen = impl if impl != "auto" else {o: "triton" if o in fused else "torch" for o in OPERATORS}
    with torch.device("meta"):
        model = Transformer(resolve(config), chosen).to(DTYPES[precision]).train()
    batch = inputs(config, encoder_length, decoder_length, micro_batch)
    saved: dict[int, tuple[str, int]] = {}
    with _launches(bool(fused), arch, compile) as launches, Counter(launches) as counter:
        for parameter in model.parameters():
            counter.ignore(parameter)
        weights = set(counter.seen)
        observer = Observer(counter)

        def pack(x: Tensor) -> Tensor:
            key = x.untyped_storage()._cdata
            if key not in weights:
                saved.setdefault(key, (counter.operator or LINEAR, x.untyped_storage().nbytes()))
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x), observed(observer.wrap):
            loss = model(**batch).loss
        assert loss is not None
        observer.label_rest(loss)
        counter.phase = "backward"
        loss.backward()
        counter.note_launches()
    by_operator: dict[str, int] = {}
    for operator, size in saved.values():
        by_operator[operator] = by_operator.get(operator, 0) + size
    compulsory = observer.compulsory + observer.linear_traffic()
    return Measured(counter.events, counter.allocations, compulsory, counter.peak, by_operator)


def interpreted(impl: kernels.Impl) -> bool:
    """Whether `impl` names fused kernels that cannot be recorded, because Triton interprets them."""
    return triton_interpreted() and bool(fused_operators(impl))
