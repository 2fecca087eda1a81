"""Faults put into the kernels' PTX, one at a time, and what the emulator says of each.

`launches(names)` runs operators and keeps each distinct program with its arguments; `mutants(launch)` changes one line
of its PTX, the same ones every time. judge.py says what catches them.
"""

import contextlib
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import numpy as np
import torch

import kernels
from kernels import cases, emulator
from kernels.dropout import Dropout, dropout_state
from kernels.emulator import codegen
from kernels.emulator import session as sessions
from kernels.emulator.parse import Instruction, parse


def _drop(site: int, p: float = 0.1) -> Dropout:
    return Dropout(p, dropout_state(42, 1, 0, "cpu"), site)


# more than one tile each: what stands between the first and the last runs too
RUNS = {
    "attention": ({"batch": 2, "queries": 37, "keys": 53, "heads": 2, "width": 64}, {"dropout": _drop(1)}),
    "glu": (
        {"batch": 1, "length": 37, "width": 72, "hidden": 88, "kind": "gated"},
        {"kind": "gated", "activation": "gelu", "dropout": _drop(1)},
    ),
    "glu plain": (
        {"batch": 3, "length": 23, "width": 64, "hidden": 136, "kind": "plain"},
        {"kind": "plain", "activation": "relu"},
    ),
    "residual_norm": ({"batch": 2, "length": 19, "width": 72}, {"dropout": _drop(1)}),
    "linear_cross_entropy": ({"batch": 1, "length": 37, "width": 72, "vocabulary": 203}, {"scale": 72**-0.5}),
    "embedding": (
        {"batch": 2, "length": 19, "width": 72, "vocabulary": 101},
        {"combine": "average", "dropout": _drop(1), "position_dropout": _drop(2, 0.2)},
    ),
    "attention causal": (
        {"batch": 1, "queries": 150, "keys": 150, "heads": 2, "key_heads": 1, "width": 64},
        {"causal": True, "scale": 0.2},
    ),
    "attention lengths": (
        {"batch": 3, "queries": 21, "keys": 70, "heads": 2, "width": 40},
        {"key_lengths": torch.tensor([70, 9, 33], dtype=torch.int32)},
    ),
    "attention two segments": (
        {"batch": 1, "queries": 150, "keys": 70, "heads": 1, "width": 64, "segments": 2},
        {"causal": True, "dropout": _drop(1)},
    ),
    "glu recomputed": (
        {"batch": 1, "length": 37, "width": 72, "hidden": 88, "kind": "gated"},
        {"kind": "gated", "activation": "silu", "recompute": True},
    ),
    "linear_cross_entropy chunks": (
        {"batch": 1, "length": 37, "width": 72, "vocabulary": 203},
        {"scale": 72**-0.5, "logits": "chunks"},
    ),
}  # fmt: skip


def _run(operator: str, inputs: dict, kwargs: dict) -> None:
    """Forward and backward, of upstream gradients in sixteenths."""
    leaves = [x.requires_grad_() for x in inputs.values() if x.is_floating_point()]
    out = getattr(kernels, operator)(**inputs, **kwargs, impl="triton")
    outs = [x for x in (out if isinstance(out, tuple) else (out,)) if x.requires_grad]
    generator = torch.Generator().manual_seed(1)
    above = [torch.randint(-32, 33, x.shape, generator=generator) / 16 if x.dim() else torch.tensor(1.75) for x in outs]
    torch.autograd.grad(outs, leaves, [a.to(x) for a, x in zip(above, outs, strict=True)])


@dataclass
class Launched:
    """A launch that can be executed again: of its PTX, or of another, on the bytes that its arguments had then."""

    case: str
    name: str
    text: str
    grid: tuple[int, int, int]
    arguments: list[tuple[int, str, Any]]
    shared: int
    bytes: dict[int, torch.Tensor] = field(default_factory=dict)  # of storages, by address
    maps: dict[int, np.ndarray] = field(default_factory=dict)
    results: dict[int, torch.Tensor] = field(default_factory=dict)
    blocks: int = 0  # block executions of the original

    def storages(self) -> dict[int, torch.Tensor]:
        tensors = [x for _, _, x in self.arguments if isinstance(x, torch.Tensor)]
        return {
            x.untyped_storage().data_ptr(): torch.empty(0, dtype=torch.uint8).set_(x.untyped_storage()) for x in tensors
        }

    def execute(self, text: str, checks: bool = True) -> tuple[list[emulator.Finding], dict[int, torch.Tensor]]:
        now = self.storages()
        for address, storage in now.items():
            storage.copy_(self.bytes[address])
        maps = {address: known.copy() for address, known in self.maps.items()}
        with np.errstate(all="ignore"):
            findings, _ = sessions.execute(
                sessions.Code(parse(text)), self.grid, self.arguments, self.shared,
                lambda x: maps.get(x.untyped_storage().data_ptr()), checks=checks,
            )  # fmt: skip
        return findings, {address: storage.clone() for address, storage in now.items()}


def launches(names: list[str]) -> list[Launched]:
    """Each distinct program that the cases launch, forward and backward."""
    found: dict[str, Launched] = {}
    texts: list[tuple[str, str]] = []
    execute = sessions.execute

    def kept(code, grid, arguments, shared, initialised, **options):
        name, text = texts[-1]
        if text in found:
            return execute(code, grid, arguments, shared, initialised, **options)
        one = found[text] = Launched(case, name, text, grid, arguments, shared)
        one.bytes = {address: storage.clone() for address, storage in one.storages().items()}
        for _, _, x in arguments:
            if isinstance(x, torch.Tensor) and (known := initialised(x)) is not None:
                one.maps[x.untyped_storage().data_ptr()] = known.copy()
        return execute(code, grid, arguments, shared, initialised, **options)

    with mock.patch.object(sessions, "execute", kept):
        for case in names:
            dims, kwargs = RUNS[case]
            operator = case.split()[0]
            made = cases.FACTORIES[operator](**dims)
            inputs = {n: x.bfloat16() if x.is_floating_point() else x for n, x in made.items() if x is not None}
            keep: Callable[[str, str], str] = lambda name, text: (texts.append((name, text)), text)[1]  # noqa: E731
            with emulator.active("sm_86", transform=keep):
                _run(operator, inputs, kwargs)
    for one in found.values():
        with counted(1 << 30) as blocks:
            findings, one.results = one.execute(one.text)
        one.blocks = blocks[0]
        assert not findings, (one.name, findings)
    return list(found.values())


class EndlessError(Exception):
    pass


@contextlib.contextmanager
def counted(most: int) -> Iterator[list[int]]:
    """Counts the blocks that run; EndlessError beyond `most`."""
    count, block = [0], codegen.Code.block

    def counted(code, number, masked):
        count[0] += 1
        if count[0] > most:
            raise EndlessError
        return block(code, number, masked)

    with mock.patch.object(codegen.Code, "block", counted):
        yield count


# ---------------------------------------------------------------- one line, changed


def _dropped(pattern: str) -> Callable:
    return lambda one, line: "" if re.match(pattern, one.opcode) else None


def _raised(one: Instruction, line: str) -> str | None:
    if one.opcode != "cp.async.wait_group":
        return None
    return re.sub(r"wait_group\s+(\d+)", lambda m: f"wait_group {int(m[1]) + 1}", line)


def _moved(by: int, pattern: str, which: int = 0) -> Callable:
    """Adds bytes to an address."""

    def change(one, line):
        if not re.match(pattern, one.opcode):
            return None
        place = list(re.finditer(r"\[\s*(%\w+)\s*(?:\+\s*(-?\d+)\s*)?\]", line))
        if len(place) <= which:
            return None
        m = place[which]
        return f"{line[: m.start()]}[ {m[1]} + {int(m[2] or 0) + by} ]{line[m.end() :]}"

    return change


def _swapped(first: str, second: str) -> Callable:
    """Exchanges two operands, named "group.place" of mma's or "place" of others'."""

    def change(one, line):
        if not one.opcode.startswith("mma" if "." in first else "selp"):
            return None
        groups = list(re.finditer(r"\{([^}]*)\}", line)) if "." in first else [re.search(r"selp\S*\s+(.*?);", line)]
        spans = []
        for name in (first, second):
            group, _, place = name.rpartition(".")
            m = groups[int(group or 0)]
            start = m.start(1)
            parts = [(start + p.start(), start + p.end()) for p in re.finditer(r"[^,\s]+", m[1])]
            spans.append(parts[int(place)])
        (a, b), (c, d) = sorted(spans)
        changed = line[:a] + line[c:d] + line[b:c] + line[a:b] + line[d:]
        return changed if changed != line else None

    return change


def _guard(replacement: str) -> Callable:
    def change(one, line):
        if one.guard is None or (one.opcode == "bra" and replacement == "dropped"):
            return None
        inverted = f"@{'' if one.guard_negated else '!'}{one.guard} "
        return re.sub(r"@!?%p\d+\s+", "" if replacement == "dropped" else inverted, line)

    return change


def _shuffled(one: Instruction, line: str) -> str | None:
    if not one.opcode.startswith("shfl") or not str(one.operands[2]).isdigit():
        return None
    lane = int(str(one.operands[2]))
    other = lane // 2 if lane > 1 else lane + 1
    return re.sub(rf", {lane}, (\d+), -1", f", {other}, \\1, -1", line)


_OTHER = {"lt": "le", "le": "lt", "gt": "ge", "ge": "gt", "eq": "ne", "ne": "eq"}


def _compared(one: Instruction, line: str) -> str | None:
    m = re.match(r"setp\.(lt|le|gt|ge|eq|ne)(u?)\.", one.opcode)
    return line.replace(one.opcode, one.opcode.replace(f".{m[1]}{m[2]}.", f".{_OTHER[m[1]]}{m[2]}.")) if m else None


def _truncated(one: Instruction, line: str) -> str | None:
    """Rounding to zero in place of to nearest: the upper halves as they are. To integers: to nearest, not to zero."""
    if one.opcode in ("cvt.rn.bf16x2.f32", "cvt.rn.bf16.f32"):
        result, *sources = map(str, one.operands)
        new = (
            f"prmt.b32 {result}, {sources[1]}, {sources[0]}, 0x7632U" if len(sources) == 2
            else f"mov.b32 {{_, {result}}}, {sources[0]}"
        )  # fmt: skip
        return re.sub(r"cvt\.rn\.bf16\S*\s+[^;]*", new, line) if all(s.startswith("%") for s in sources) else None
    other = {"rzi": "rni", "rni": "rzi", "rmi": "rpi", "rpi": "rmi"}
    m = re.match(r"cvt\.(r[znmp]i)\.", one.opcode)
    return line.replace(f".{m[1]}.", f".{other[m[1]]}.") if m else None


def _next_constant(one: Instruction, line: str) -> str | None:
    if not re.match(r"(add|sub|mul|mad|shl|shr|and|or|xor|min|max|setp|mov|fma|selp)\.", one.opcode):
        return None
    places = list(re.finditer(r"(?<=[\s,])(-?\d+|0f[0-9A-Fa-f]{8}|0x[0-9A-Fa-f]+U?)(?=[,;\s]|$)", line.split("//")[0]))
    if not places:
        return None
    m = places[-1]
    value = m[1].rstrip("U")
    new = f"0f{int(value[2:], 16) + 1:08X}" if value.startswith("0f") else str(int(value, 0) + 1)
    return line[: m.start()] + new + line[m.end() :]


_GLOBAL, _SHARED = r"(ld|st)\.global", r"((ld|st)\.shared|ldmatrix|cp\.async\.c)"
SYNCHRONISATION: dict[str, Callable] = {
    "barrier dropped": _dropped(r"bar\.sync"),
    "warp barrier dropped": _dropped(r"bar\.warp\.sync"),
    "wait_group dropped": _dropped(r"cp\.async\.wait_group"),
    "wait_group raised": _raised,
    "commit_group dropped": _dropped(r"cp\.async\.commit_group"),
}
VALUES: dict[str, Callable] = {
    "mma: rows of A exchanged": _swapped("1.0", "1.1"),
    "mma: halves of B exchanged": _swapped("2.0", "2.1"),
    "mma: accumulators exchanged": _swapped("3.0", "3.3"),
    **{f"global address + {n}": _moved(n, _GLOBAL) for n in (2, 4, 16)},
    **{f"shared address + {n}": _moved(n, _SHARED) for n in (2, 4, 16)},
    "source of cp.async + 16": _moved(16, r"cp\.async\.c[ag]\.", 1),
    "guard inverted": _guard("inverted"),
    "guard dropped": _guard("dropped"),
    "shuffle with another lane": _shuffled,
    "comparison changed": _compared,
    "selp exchanged": _swapped("1", "2"),
    "rounding changed": _truncated,
    "constant + 1": _next_constant,
}


@dataclass
class Mutant:
    kind: str
    one: Instruction
    text: str


def mutants(launch: Launched, most: int, values: int) -> list[Mutant]:
    """At most `most` of each kind of SYNCHRONISATION, `values` of each of VALUES; the same ones every time."""
    kernel, lines = parse(launch.text), launch.text.split("\n")
    out = []
    for kinds, limit in ((SYNCHRONISATION, most), (VALUES, values)):
        for kind, change in kinds.items():
            possible = []
            for one in kernel.instructions():
                new = change(one, lines[one.line - 1])
                if new is not None:
                    possible.append((one, new))
            chosen = random.Random(f"{launch.case} {launch.name} {kind}").sample(possible, min(limit, len(possible)))
            for one, new in sorted(chosen, key=lambda pair: pair[0].line):
                text = "\n".join([*lines[: one.line - 1], new, *lines[one.line :]])
                out.append(Mutant(kind, one, text))
    return out
