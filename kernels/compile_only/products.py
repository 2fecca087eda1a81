"""The products of a kernel as the compiler laid them out, read from its TTGIR: what each loop needs and what it issues.

A product of [M, K] by [K, N] needs M N K / 2048 instructions HMMA.16816. More warps than the tile has rows of 16 and
columns of 8 compute parts of it twice or more; the layout says how often.
"""

import re
from dataclasses import dataclass

_LAYOUT = re.compile(r"^(#\w+) = #ttg\.nvidia_mma<\{(.*)\}>", re.MULTILINE)
_DOT = re.compile(
    r"tt\.dot .*: tensor<([\dx]+)x\w+, .*?> \* tensor<([\dx]+)x\w+, .*?> -> tensor<([\dx]+)x\w+, (#\w+)>(?: |$)"
)


@dataclass(frozen=True)
class Product:
    """One tt.dot: its size, how often its layout computes it, the loop that holds it (-1: none)."""

    m: int
    n: int
    k: int
    duplicates: float
    loop: int

    @property
    def flops(self) -> int:
        return 2 * self.m * self.n * self.k


def _list(text: str, key: str) -> list[int]:
    match = re.search(rf"{key} = \[([\d, ]+)\]", text)
    return [int(n) for n in match.group(1).split(",")] if match else []


def products(ttgir: str) -> list[Product]:
    """Every tt.dot with the innermost scf.for or scf.while around it, loops numbered in the order of the text."""
    layouts = dict(_LAYOUT.findall(ttgir))
    found: list[Product] = []
    # what each open brace belongs to: a loop's number, or None
    open_braces: list[int | None] = []
    loops = 0
    for line in ttgir.splitlines():
        code = line.split(" loc(", 1)[0]
        dot = _DOT.search(code + " ")
        if dot:
            a, _, out, layout = dot.groups()
            m, n = (int(size) for size in out.split("x")[-2:])
            k = int(a.split("x")[-1])
            inside = next((loop for loop in reversed(open_braces) if loop is not None), -1)
            found.append(Product(m, n, k, _duplicates(layouts.get(layout, ""), m, n), inside))
        is_loop = re.search(r"scf\.(for|while)\b", code) is not None
        for brace in re.findall(r"[{}]", re.sub(r"\{[^{}]*\}", "", code)):
            if brace == "{":
                open_braces.append(loops if is_loop else None)
                loops += is_loop
                is_loop = False
            elif open_braces:
                open_braces.pop()
    return found


def _duplicates(layout: str, m: int, n: int) -> float:
    warps, shape = _list(layout, "warpsPerCTA"), _list(layout, "instrShape")
    if len(warps) < 2 or len(shape) < 2:
        return 1.0
    rows, columns = shape[-2:] if len(shape) != 3 or warps[0] == 1 else shape[:2]
    return max(1.0, warps[-2] * rows / m) * max(1.0, warps[-1] * columns / n)


def useful_fraction(ttgir: str) -> list[float]:
    """For each innermost loop with products, the share of the issued products that the formula needs."""
    by_loop: dict[int, list[Product]] = {}
    for product in products(ttgir):
        by_loop.setdefault(product.loop, []).append(product)
    return [
        sum(p.flops for p in group) / sum(p.flops * p.duplicates for p in group)
        for loop, group in sorted(by_loop.items())
        if loop >= 0
    ]
