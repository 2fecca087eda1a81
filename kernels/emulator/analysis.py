"""What follows from a kernel's PTX alone: which arguments an access may reach, and reads of registers never written."""

from kernels.emulator.parse import Instruction, Kernel, Memory, immediate, is_register, width_of


def reached_arguments(kernel: Kernel) -> dict[int, frozenset[str]]:
    """By PTX line of each access to global memory: the parameters its address may come from, whatever the flow."""
    origin: dict[str, frozenset[str]] = {}
    instructions = list(kernel.instructions())
    changed = True
    while changed:
        changed = False
        for one in instructions:
            if one.opcode.startswith("ld.param"):
                source = one.operands[1]
                found = frozenset([source.base]) if isinstance(source, Memory) else frozenset()
            elif one.opcode.startswith(("ld.", "cp.", "st.", "setp")):
                continue
            else:
                found = frozenset().union(*(origin.get(name, frozenset()) for name in one.reads))
            for name in one.writes:
                if not found <= origin.get(name, frozenset()):
                    origin[name] = origin.get(name, frozenset()) | found
                    changed = True
    reached = {}
    for one in instructions:
        if ".global" in one.opcode and one.opcode.startswith(("ld", "st", "cp.async")):
            address = one.operands[0 if one.opcode.startswith("st") else 1]
            assert isinstance(address, Memory)
            reached[one.line] = origin.get(address.base, frozenset())
    return reached


def undefined_reads(kernel: Kernel) -> list[tuple[int, Instruction, str]]:
    """(block, instruction, register) of reads of registers that some path never wrote. prmt and mov, which packs and
    unpacks too, may move undefined bytes about, as long as nothing else reads them."""
    undefined = {name: (1 << max(1, width_of(name) // 8)) - 1 for name in kernel.blocks[0].live_in}
    found: dict[tuple[int, str], tuple[int, Instruction, str]] = {}
    size = -1
    while undefined and size != sum(undefined.values()):
        size = sum(undefined.values())
        for block in kernel.blocks:
            for one in block.instructions:
                bad = [name for name in one.reads if undefined.get(name)]
                if not bad:
                    continue
                moved = None if one.guard in bad else _moved(one, undefined)
                if moved is None:
                    for name in bad:
                        found[one.line, name] = (block.index, one, name)
                    continue
                for name, mask in moved.items():
                    undefined[name] = undefined.get(name, 0) | mask
    return list(found.values())


def _moved(one: Instruction, undefined: dict[str, int]) -> dict[str, int] | None:
    """Undefined bytes, as a mask, of each register that an instruction only moves bytes to; None for other ones."""
    if one.opcode == "prmt.b32" and not is_register(one.operands[3]):
        a, b = (undefined.get(str(one.operands[i]), 0) for i in (1, 2))
        both, selector = a | b << 4, immediate(str(one.operands[3]))
        return {one.writes[0]: sum((both >> (selector >> 4 * i & 7) & 1) << i for i in range(4))}
    if not one.opcode.startswith("mov."):
        return None
    results, sources = (x if isinstance(x, tuple) else (str(x),) for x in one.operands)
    total = max(width_of(name) for name in one.writes + one.reads if name != one.guard) // 8
    whole, size = 0, total // len(sources)
    for i, name in enumerate(sources):
        whole |= undefined.get(name, 0) << i * size
    size = total // len(results)
    return {name: whole >> i * size & (1 << max(1, size)) - 1 for i, name in enumerate(results) if is_register(name)}
