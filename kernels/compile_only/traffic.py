"""Which pointers a kernel reads and which it writes, followed through its TTIR from arguments to loads and stores."""

import re

_FUNCTION = re.compile(r"tt\.func public @\w+\((.*?)\)(?: attributes| \{)")
_VALUE = re.compile(r"%[\w.\-$]+(?:#\d+)?")
_RESULT = re.compile(r"^\s*((?:%[\w.\-$]+(?::\d+)?(?:, )?)+) = (.*)$")
_ITERATION = re.compile(r"(%[\w.\-$]+) = (%[\w.\-$]+(?:#\d+)?)")
_READS = ("tt.load", "tt.gather", "tt.descriptor_load", "tt.experimental_descriptor_load")
_WRITES = ("tt.store", "tt.descriptor_store")
_BOTH = ("tt.atomic_rmw", "tt.atomic_cas")


class _Flow:
    """For each value the arguments whose memory it may point to."""

    def __init__(self) -> None:
        self.sources: dict[str, set[int]] = {}

    def of(self, *values: str) -> set[int]:
        return set().union(*(self.sources.get(value, set()) for value in values))

    def add(self, value: str, sources: set[int]) -> None:
        if sources:
            self.sources.setdefault(value, set()).update(sources)


def pointers(ttir: str) -> tuple[set[int], set[int]]:
    """Numbers, among the pointer arguments, of those loaded from, and of those stored to; atomics count as both.

    Numbers, since the TTIR renames an argument after the variable that it is assigned to.
    """
    function = _FUNCTION.search(ttir)
    if function is None:
        raise ValueError("traffic: expected one public tt.func in the TTIR, got none; pass CompiledKernel.asm['ttir']")
    flow = _Flow()
    for number, name in enumerate(re.findall(r"(%[\w.]+): !tt\.(?:ptr|tensordesc)", function.group(1))):
        flow.add(name, {number})
    reads: set[int] = set()
    writes: set[int] = set()
    # results of the open regions: their yields name what the results point to
    regions: list[str | None] = []
    for line in ttir[function.end() :].splitlines():
        code = line.split(" loc(", 1)[0]
        match = _RESULT.match(code)
        names, operation = (match.group(1), match.group(2)) if match else ("", code.strip())
        if operation.startswith("}"):
            if "{" not in operation and regions:  # `} else {` stays within the same operation
                regions.pop()
            continue
        kind = operation.split(" ", 1)[0].strip('"')
        operands = _VALUE.findall(operation)
        if kind in _READS + _BOTH and operands:
            reads |= flow.of(operands[0])
        if kind in _WRITES + _BOTH and operands:
            writes |= flow.of(operands[0])
        if kind == "scf.yield" and regions and regions[-1]:
            for index, operand in enumerate(operands):
                flow.add(f"{regions[-1]}#{index}", flow.of(operand))
                flow.add(regions[-1], flow.of(operand) if len(operands) == 1 else set())
        first = names.split(",")[0].split(":")[0].strip()
        if kind in ("scf.for", "scf.while"):
            for index, (inside, start) in enumerate(_carried(operation)):
                flow.add(inside, flow.of(start))
                flow.add(f"{first}#{index}", flow.of(start))
                flow.add(first, flow.of(start) if ":" not in names else set())
        elif names and "!tt.ptr" in operation and kind not in _READS + _BOTH:
            flow.add(first, flow.of(*operands))
        if operation.endswith("{"):
            regions.append(first or None)
    return reads, writes


def _carried(operation: str) -> list[tuple[str, str]]:
    """(name inside, first value) of each value that a loop carries."""
    listed = re.search(r"(?:iter_args)?\(((?:%[\w.\-$]+ = %[\w.\-$]+(?:#\d+)?(?:, )?)+)\)", operation)
    return _ITERATION.findall(listed.group(1)) if listed else []
