"""What kernels really read, recorded in Triton's interpreter, beside what march.cost.cache declares. One JSON line a
launch on standard output; run with TRITON_INTERPRET=1.

Every load is noted with its program and addresses. Memory is then simulated line by line: programs run in waves, their
loads in lockstep, least recently used lines go first. Operands that the cache model takes as read once are simulated
for themselves, with a cache far smaller than the model's.
"""

import inspect
import json
from collections import OrderedDict
from unittest import mock

import numpy as np
import torch
from triton.runtime import interpreter

from kernels import cases, dropout_state
from kernels.compile_only.record import Launch, _argument, _plain
from kernels.dropout import Dropout
from kernels.fused import (
    attention,
    embedding,
    glu,
    linear_cross_entropy,
    residual_norm,
    tiles_attention,
)
from march.cost import cache

LINE = 32
ONCE_CAPACITY = 64 << 10

traced: list[tuple[Launch, dict[str, torch.Tensor], dict[int, list]]] = []
# names of what each of these launches wrote; kernels that multiplied
written: list[set[str]] = []
products: set[str] = set()
original_init = interpreter.GridExecutor._init_args_hst
original_load = interpreter.InterpreterBuilder.create_masked_load
original_store = interpreter.InterpreterBuilder.create_masked_store
original_dot = interpreter.InterpreterBuilder.create_dot


def init(self, args, kwargs):
    host, host_kwargs = original_init(self, args, kwargs)
    values = inspect.getcallargs(self.fn, *host, **host_kwargs)
    given = [(name, value) for name, value in values.items() if name not in self.constexprs]
    grid = tuple(self.grid) + (1,) * (3 - len(self.grid))
    constants = {name: _plain(values[name]) for name in self.constexprs}
    launch = Launch(
        self.fn.__name__, self.fn.__module__, "sm_86", grid, 4, 1, constants, tuple(_argument(n, v) for n, v in given)
    )
    ranges = {name: x for name, x in given if isinstance(x, torch.Tensor) and x.numel()}
    traced.append((launch, ranges, {}))
    written.append(set())
    return host, host_kwargs


def holds(x: torch.Tensor, address: int) -> bool:
    """Whether an element of `x` is at `address`: tensors may be parts of one buffer, row by row."""
    rest = (address - x.data_ptr()) // x.element_size()
    inside = rest >= 0
    for stride, n in sorted(zip(x.stride(), x.shape, strict=True), reverse=True):
        inside = inside and (stride == 0 or rest // stride < n)
        rest = rest % stride if stride else rest
    return inside and rest == 0


def argument_of(ptrs, mask) -> str:
    """The one argument that all addresses of an access are in."""
    launch, ranges, _ = traced[-1]
    first, last = int(ptrs.data[mask.data].min()), int(ptrs.data[mask.data].max())
    name = next((n for n, x in ranges.items() if holds(x, first)), None)
    assert name is not None, f"{launch.kernel}: an access outside its arguments"
    assert holds(ranges[name], last), f"{launch.kernel}: an access beyond {name}"
    return name


def load(self, ptrs, mask, other, *rest):
    loads = traced[-1][2].setdefault(self.grid_idx[0], [])
    if mask.data.any():
        loads.append((argument_of(ptrs, mask), np.unique(ptrs.data[mask.data] // LINE)))
    return original_load(self, ptrs, mask, other, *rest)


def store(self, ptrs, value, mask, *rest):
    if mask.data.any():
        written[-1].add(argument_of(ptrs, mask))
    return original_store(self, ptrs, value, mask, *rest)


def dot(self, *operands):
    products.add(traced[-1][0].kernel)
    return original_dot(self, *operands)


interpreter.GridExecutor._init_args_hst = init
interpreter.InterpreterBuilder.create_masked_load = load
interpreter.InterpreterBuilder.create_masked_store = store
interpreter.InterpreterBuilder.create_dot = dot


def simulate(programs, names, wave, capacity):
    """Bytes that come from memory for operands `names`."""
    cached: OrderedDict = OrderedDict()
    missed: dict[str, int] = {}
    order = [[one for one in programs.get(pid, ()) if one[0] in names] for pid in range(max(programs, default=-1) + 1)]
    for first in range(0, len(order), wave):
        running = order[first : first + wave]
        for step in range(max(map(len, running))):
            for program in running:
                if step < len(program):
                    name, lines = program[step]
                    for line in lines.tolist():
                        if line in cached:
                            cached.move_to_end(line)
                            continue
                        missed[name] = missed.get(name, 0) + LINE
                        cached[line] = None
                        if len(cached) * LINE > capacity:
                            cached.popitem(last=False)
    return missed


def report(wave: int, capacity: int) -> None:
    cache.WAVE, cache.WORKING_SET = wave, capacity
    for (launch, ranges, programs), wrote in zip(traced, written, strict=True):
        once, access, _ = cache.ACCESS[launch.kernel]
        once = once.split()
        read = {name for loads in programs.values() for name, _ in loads}
        row = {"kernel": launch.kernel, "wave": wave, "capacity": capacity, "grid": launch.programs}
        declared = (set(names) & set(ranges) for names in cache.pointers(cache.Kernel(launch)))
        row["pointers"] = [[sorted(names) for names in sides] for sides in (declared, (read, wrote))]
        row["products"] = launch.kernel in products
        row["undeclared"] = sorted(read - set(once)) if access is None else []
        row["again"] = {}
        row["once"] = {}
        for name in sorted(read & set(once)):
            lines = {line for loads in programs.values() for n, many in loads if n == name for line in many.tolist()}
            size = next(a.bytes for a in launch.arguments if a.name == name)
            row["once"][name] = [simulate(programs, {name}, wave, ONCE_CAPACITY)[name], len(lines) * LINE, size]
        if access is not None:
            declared = access(cache.Kernel(launch))
            counted = simulate(programs, set(declared), wave, capacity)
            row["again"] = {name: [declared[name], counted.get(name, 0)] for name in declared if name in read}
            row["undeclared"] += sorted(read - set(once) - set(declared))
        print(json.dumps(row))


def dropout(site: int) -> Dropout:
    return Dropout(0.1, dropout_state(3, 5), site)


def leaves(tensors: dict) -> list:
    return [None if x is None else x.requires_grad_() if x.dtype.is_floating_point else x for x in tensors.values()]


def differentiate(out) -> None:
    outputs = [x for x in (out if isinstance(out, tuple) else (out,)) if x.requires_grad]
    torch.autograd.backward(outputs, [torch.randn(x.shape) for x in outputs])


def run(name: str) -> None:
    """One forward and backward of an operator at small shapes."""
    wide = {"dtype": torch.float32}
    common = {"scale": 1.0, "key_lengths": None, "dropout": dropout(1)}
    if name == "attention":
        q, k, v = leaves(cases.attention_inputs(1, 300, 200, 2, 16, **wide))
        mask = torch.ones(1, 200, dtype=torch.bool)
        differentiate(attention.attention(q, k, v, causal=False, key_mask=mask, **common))
    elif name == "packed":
        qkv, q = torch.randn(1, 200, 3, 2, 16, requires_grad=True), torch.randn(1, 40, 2, 16, requires_grad=True)
        out, kv = attention.attention(qkv, causal=False, return_kv=True, key_mask=None, **common)
        read = attention.attention(q, kv, causal=False, key_mask=None, **common)
        differentiate((out, read))
    elif name == "shared":
        q, k, v = leaves(cases.attention_inputs(2, 150, 260, 2, 16, key_batch=1, key_heads=1, **wide))
        differentiate(attention.attention(q, k, v, causal=False, key_mask=None, **common))
    elif name == "unified":
        tensors = leaves(cases.attention_inputs(1, 140, 200, 2, 16, segments=2, **wide))
        # five blocks of queries a head, as many as programs in a wave: the declaration does not know that early queries
        # of a causal head read fewer keys, which shows where a wave splits a head
        with mock.patch.object(tiles_attention, "tile", return_value=tiles_attention.Tile(32, 32, 4, 1)):
            differentiate(attention.attention(*tensors, causal=True, key_mask=None, **common))
    elif name == "glu":
        x, weight = torch.randn(2, 130, 128, requires_grad=True), torch.randn(400, 128, requires_grad=True)
        for recompute in (False, True):
            hidden = glu.glu(
                x, weight, kind="gated", activation="gelu", factor=1.0, dropout=dropout(2), gate_dropout=None,
                recompute=recompute,
            )  # fmt: skip
            differentiate(hidden)
        # rows of whole lines, so that tiles are too
        x, weight = torch.randn(2, 136, 128, requires_grad=True), torch.randn(344, 128, requires_grad=True)
        differentiate(
            glu.glu(x, weight, kind="plain", activation="relu", factor=1.0, dropout=dropout(2), gate_dropout=None)
        )
    elif name == "residual_norm":
        x, s, gain = torch.randn(4, 45, 64), torch.randn(4, 45, 64), torch.randn(64)
        differentiate(residual_norm.residual_norm(*leaves({"x": x, "s": s, "g": gain}), dropout=dropout(3), eps=1e-6))
    elif name == "linear_cross_entropy":
        h, weight = torch.randn(1, 592, 64, requires_grad=True), torch.randn(700, 64, requires_grad=True)
        labels = torch.randint(0, 700, (1, 592))
        for logits in linear_cross_entropy.LOGITS:
            loss, _ = linear_cross_entropy.linear_cross_entropy(
                h, weight, labels, scale=1.0, ignore_index=-100, logits=logits
            )
            loss.backward()
    elif name == "embedding":
        ids = torch.stack([torch.randperm(500)[:70] for _ in range(4)])
        tables = torch.randn(500, 64, requires_grad=True), torch.randn(80, 64, requires_grad=True)
        differentiate(
            embedding.embedding(ids, *tables, combine="average", dropout=dropout(4), position_dropout=dropout(5))
        )


CAPACITIES = {
    "attention": (5, 20 << 10),
    "packed": (5, 20 << 10),
    "shared": (5, 12 << 10),
    "unified": (5, 48 << 10),
    "glu": (4, 64 << 10),
    "residual_norm": (4, 96 << 10),
    "linear_cross_entropy": (8, 96 << 10),
    "embedding": (4, 16 << 10),
}

if __name__ == "__main__":
    torch.manual_seed(0)
    for operator, (wave, capacity) in CAPACITIES.items():
        run(operator)
        for bytes in (capacity, 1 << 30):
            report(wave, bytes)
        traced.clear()
        written.clear()
