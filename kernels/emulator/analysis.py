"""What follows from a kernel's PTX alone: which arguments an access may reach, and reads of registers never written."""

from kernels.emulator.parse import Instruction, Kernel, Memory, immediate, is_register


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
    """(block, instruction, register) of reads of registers that some path never wrote. prmt may move undefined bytes
    about, as long as nothing else reads them."""
    undefined = dict.fromkeys(kernel.blocks[0].live_in, 15)
    found: dict[tuple[int, str], tuple[int, Instruction, str]] = {}
    size = -1
    while undefined and size != sum(undefined.values()):
        size = sum(undefined.values())
        for block in kernel.blocks:
            for one in block.instructions:
                bad = [name for name in one.reads if undefined.get(name)]
                if not bad:
                    continue
                if one.opcode == "prmt.b32" and not is_register(one.operands[3]):
                    a, b = (undefined.get(str(one.operands[i]), 0) for i in (1, 2))
                    both, selector = a | b << 4, immediate(str(one.operands[3]))
                    bits = sum((both >> (selector >> 4 * i & 7) & 1) << i for i in range(4))
                    undefined[one.writes[0]] = undefined.get(one.writes[0], 0) | bits
                else:
                    for name in bad:
                        found[one.line, name] = (block.index, one, name)
    return list(found.values())
