"""What one training step costs, counted from the operators that it dispatches on meta tensors.

Nothing is computed and no device is needed: the step's forward and backward run on the meta device, and a dispatch
mode sees every operator with its shapes, every tensor that is made and every one that dies. So the numbers follow
the code; there is no second model of it to keep in step.
"""

import weakref
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

import kernels
from march.config import ModelConfig, resolve
from march.model import Transformer
from march.model.transformer import Output

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
# Views and allocations move nothing.
_FREE = ("view", "alias", "detach", "expand", "permute", "transpose", "slice", "select", "unsqueeze", "squeeze")
_ALLOCATE = ("aten::empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty")


@dataclass
class OperatorCost:
    """Calls, FLOPs and bytes of one operator of torch in one training step."""

    calls: int = 0
    flops: int = 0
    bytes_read: int = 0
    bytes_written: int = 0


@dataclass
class StepCost:
    """One training step's forward and backward of one micro-batch.

    flops: of matrix products, two for each multiply-add. bytes_read, bytes_written: each operator's tensors once.
    saved_bytes: tensors kept for backward, parameters left out, each storage once. peak_bytes: the most that lived
    at one time beyond weights, gradients included. by_operator: the rows that add up to this.
    """

    micro_batch: int
    flops: int = 0
    bytes_read: int = 0
    bytes_written: int = 0
    saved_bytes: int = 0
    peak_bytes: int = 0
    by_operator: dict[str, OperatorCost] = field(default_factory=dict)


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)


def _tensors(tree: Any) -> list[Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, Tensor)]


class _Counter(TorchDispatchMode):
    """Counts operators, and the bytes alive."""

    def __init__(self, cost: StepCost):
        super().__init__()
        self.cost, self.live = cost, 0
        self.seen: set[int] = set()

    def _track(self, x: Tensor) -> None:
        storage = x.untyped_storage()
        key = storage._cdata
        if key in self.seen:
            return
        size = storage.nbytes()
        self.seen.add(key)
        self.live += size
        self.cost.peak_bytes = max(self.cost.peak_bytes, self.live)
        weakref.finalize(storage, self._release, key, size)

    def _release(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self.live -= size

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = func._schema.name
        outputs = _tensors(out)
        for x in outputs:
            self._track(x)
        is_view = any(name.startswith(f"aten::{free}") or name == f"aten::_unsafe_{free}" for free in _FREE)
        if is_view or name in _ALLOCATE or func.is_view:
            return out
        row = self.cost.by_operator.setdefault(name, OperatorCost())
        row.calls += 1
        packet = func._overloadpacket
        if packet in flop_registry:
            row.flops += flop_registry[packet](*args, **kwargs, out_val=out)
        row.bytes_read += _bytes(_tensors((args, kwargs)))
        row.bytes_written += _bytes(outputs)
        return out


def _inputs(config: ModelConfig, encoder_length: int, decoder_length: int, batch: int) -> dict[str, Tensor]:
    def ids(length: int) -> Tensor:
        return torch.empty(batch, length, dtype=torch.int64, device="meta")

    return {
        "input_ids": ids(encoder_length),
        "decoder_input_ids": ids(decoder_length),
        "labels": ids(decoder_length),
        "dropout_state": torch.empty(3, dtype=torch.int64, device="meta"),
    }


@lru_cache(maxsize=64)
def _step_cost(
    config: ModelConfig, encoder_length: int, decoder_length: int, micro_batch: int, impl: str, precision: str
) -> StepCost:
    with torch.device("meta"):
        model = Transformer(resolve(config), kernels.parse_impl(impl)).to(DTYPES[precision]).train()
    inputs = _inputs(config, encoder_length, decoder_length, micro_batch)
    cost = StepCost(micro_batch)
    parameters = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    saved: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        key = x.untyped_storage()._cdata
        if key not in parameters:
            saved[key] = max(saved.get(key, 0), x.untyped_storage().nbytes())
        return x

    with _Counter(cost) as counter:
        counter.seen |= parameters
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            out: Output = model(**inputs)
        assert out.loss is not None
        cost.saved_bytes = sum(saved.values())
        out.loss.backward()
    for row in cost.by_operator.values():
        cost.flops += row.flops
        cost.bytes_read += row.bytes_read
        cost.bytes_written += row.bytes_written
    return cost


def step_cost(
    config: ModelConfig,
    encoder_length: int = 921,
    decoder_length: int = 206,
    *,
    micro_batch: int = 1,
    impl: str = "torch",
    precision: str | None = None,
) -> StepCost:
    """Cost of one micro-batch's forward and backward; precision "bf16" or "fp32", by default the configuration's."""
    return _step_cost(config, encoder_length, decoder_length, micro_batch, impl, precision or config.precision)


def training_flops(config: ModelConfig, encoder_length: int = 921, decoder_length: int = 206) -> int:
    """FLOPs of matrix products that one sequence's forward and backward need, by the `torch` path on meta tensors.

    The recomputation of attention scores in backward is part of it, as it is of the fused kernels.
    """
    return step_cost(config, encoder_length, decoder_length, micro_batch=1).flops
