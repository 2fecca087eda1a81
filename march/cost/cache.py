"""The cache model: bytes that come from memory, given the order in which programs run.

Re-reads within a working set below 4 MB count once, all others each time, library products included:
- programs start in the order of their number, a wave of them at a time, and walk their steps together: what several
  programs of a wave read in the same step is read once;
- a tile that was read before is still there if less than WORKING_SET bytes of other tiles were read since (least
  recently used first out). A step whose tiles alone exceed that leaves nothing behind: its last slices are what
  remains, and the next step begins with the first ones;
- operands that each program reads for itself, and writes, pass through: they are counted once and displace nothing
  (the A5000's L2 has 6 MB, 2 MB of which are left to them);
- nothing survives from one kernel to the next.

A wave is WAVE programs of our kernels, two on each of the A5000's 64 SMs, or one tile an SM of a library product.

The operators' records say for each kernel which pointers it reads once and which it writes; WALKS has the tiles of the
others that a program reads in each step. A tensor of which nothing is said is an error: whoever adds a kernel says how
it reads.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice

from kernels.compile_only.record import Launch
from kernels.operators import OPERATORS
from march.cost.counter import Product
from march.cost.flops import Kernel

WORKING_SET = 4 << 20
WAVE = 128
# cuBLAS: tiles of 128 x 128, eight tile rows at a time (the swizzle of its kernels), one tile an SM
LIBRARY_WAVE, LIBRARY_TILE, LIBRARY_GROUP = 64, 128, 8

Tile = tuple[str, int]  # (operand, number)
Program = Sequence[Sequence[Tile]]  # for each step the tiles it reads


class AccessError(RuntimeError):
    """A kernel reads a pointer whose access is not declared."""


def reads(
    programs: Iterable[Program], size: Callable[[Tile], int], wave: int | None = None, capacity: int | None = None
) -> dict[str, int]:
    """Bytes that come from memory, by operand; wave and capacity by default WAVE and WORKING_SET."""
    wave, capacity = wave or WAVE, capacity or WORKING_SET
    cached: OrderedDict[Tile, int] = OrderedDict()
    held = 0
    total: dict[str, int] = {}
    remaining = iter(programs)
    while running := list(islice(remaining, wave)):
        for step in range(max(len(program) for program in running)):
            tiles = dict.fromkeys(tile for program in running if step < len(program) for tile in program[step])
            footprint = 0
            for tile in tiles:
                bytes = size(tile)
                footprint += bytes
                if tile in cached:
                    cached.move_to_end(tile)
                else:
                    total[tile[0]] = total.get(tile[0], 0) + bytes
                    cached[tile] = bytes
                    held += bytes
            if footprint > capacity:
                cached.clear()
                held = 0
            while held > capacity:
                held -= cached.popitem(last=False)[1]
    return total


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def grouped(rows: int, columns: int, group: int) -> Iterator[tuple[int, int]]:
    """(row, column) of tiles in the order of products: `group` rows at a time, down the rows first."""
    for first in range(0, rows, group):
        size = min(rows - first, group)
        for column in range(columns):
            for row in range(first, first + size):
                yield row, column


@lru_cache(maxsize=4096)
def product_reads(product: Product) -> int:
    """Bytes of A and B that a library product reads. Splits of k read their own parts and change nothing."""
    tile, line = LIBRARY_TILE, product.k * product.element_size
    rows, columns = cdiv(product.m, tile), cdiv(product.n, tile)

    def size(one: Tile) -> int:
        extent = product.m if one[0] == "a" else product.n
        number = one[1] % (rows if one[0] == "a" else columns)
        return min(tile, extent - number * tile) * line

    programs = (
        (((("a", batch * rows + row), ("b", batch * columns + column))),)
        for batch in range(product.batch)
        for row, column in grouped(rows, columns, LIBRARY_GROUP)
    )
    return sum(reads(programs, size, LIBRARY_WAVE).values())


def _heads(kernel: Kernel, *names: str) -> Callable[[Tile], int]:
    """Size of one head's rows of [B, L, H, K] tensors."""
    shapes = {name: kernel.bytes(name) // (kernel.shape(name)[0] * kernel.shape(name)[2]) for name in names}
    return lambda tile: shapes[tile[0]]


def _attention(kernel: Kernel) -> dict[str, int]:
    """Programs of a block of queries of one head; all blocks of a head, neighbours, read its keys and values."""
    heads = kernel["H"]
    # dQ has programs for padding queries too, which read no key
    padded = kernel["Lpad"] if "Lpad" in kernel.arguments else kernel["Lq"]
    blocks = cdiv(padded, kernel["BLOCK_M"])
    reading = cdiv(kernel["Lq"], kernel["BLOCK_M"])
    segments = [("k_ptr", "v_ptr", "GROUP"), ("k2_ptr", "v2_ptr", "GROUP2")]
    segments = [one for one in segments if kernel.arguments[one[0]].is_tensor]

    def programs() -> Iterator[Program]:
        for pid in range(kernel.launch.programs):
            block = blocks - 1 - pid % blocks if kernel["CAUSAL"] else pid % blocks
            if block >= reading:
                yield []
                continue
            b, h = divmod(pid // blocks, heads)
            yield [
                [(name, (b if kernel.shape(name)[0] > 1 else 0) * heads + h // kernel[group]) for name in (k, v)]
                for k, v, group in segments
            ]

    return reads(programs(), _heads(kernel, *(name for k, v, _ in segments for name in (k, v))))


def _dkdv(kernel: Kernel) -> dict[str, int]:
    """Programs of a block of keys: each pair of sequence and query head that reads them is a step."""
    blocks = cdiv(kernel["Lk"], kernel["BLOCK_N"])
    group, heads, shared = kernel["GROUP"], kernel["H"], kernel["Bk"]
    pairs, splits = kernel["PAIRS"], kernel["SPLITS"]

    def programs() -> Iterator[Program]:
        for pid in range(kernel.launch.programs):
            g, rest = (pid // blocks) % (heads // group), pid // blocks // (heads // group)
            bk, split = rest % shared, rest // shared
            steps = []
            for pair in range(pairs * split // splits, pairs * (split + 1) // splits):
                head = (bk + pair // group) * heads + g * group + pair % group
                steps.append([("q_ptr", head), ("do_ptr", head), ("rows_ptr", head)])
            yield steps

    size = _heads(kernel, "q_ptr", "do_ptr")
    # planes of float32, read by blocks of queries: the padding behind the last block is not
    rows = kernel.shape("rows_ptr")[0] * cdiv(kernel["Lq"], kernel["BLOCK_M"]) * kernel["BLOCK_M"] * 4
    return reads(programs(), lambda tile: rows if tile[0] == "rows_ptr" else size(tile))


def _extents(extent: int, block: int) -> Callable[[int], int]:
    """Of each block of a dimension how much exists."""
    return lambda number: max(0, min(block, extent - number * block))


def _matrix_tiles(kernel: Kernel, a: str, b: str, rows: int, columns: int, block_m: int, block_n: int):
    """Size of a tile row of a and of a tile column of b."""
    width = kernel.shape(a)[-1] * kernel.element_size(a)
    extents = {a: _extents(rows, block_m), b: _extents(columns, block_n)}
    return lambda tile: extents[tile[0]](tile[1]) * width


def _glu(kernel: Kernel) -> dict[str, int]:
    """Row-major tiles of the hidden layer; a tile column of w is that of all halves."""
    rows, width, padded = kernel["M"], kernel["F"], kernel["N"]
    tiles_n = cdiv(padded, kernel["BLOCK_N"])
    halves = 1 if kernel["KIND"] == "plain" else 2
    one = _matrix_tiles(kernel, "x_ptr", "w_ptr", rows, width, kernel["BLOCK_M"], kernel["BLOCK_N"])
    programs = (
        [[("x_ptr", pid // tiles_n), ("w_ptr", pid % tiles_n)]]
        for pid in range(cdiv(rows, kernel["BLOCK_M"]) * tiles_n)
    )
    return reads(programs, lambda tile: one(tile) * (halves if tile[0] == "w_ptr" else 1))


def _walked(blocks: int, sizes: Mapping[str, Callable[[int, int], int]]) -> Callable[[Tile], int]:
    """Size of tiles that are numbered outer block * `blocks` + step."""
    return lambda tile: sizes[tile[0]](*divmod(tile[1], blocks))


def _glu_dx(kernel: Kernel) -> dict[str, int]:
    """Row-major tiles of dx, which walk the hidden columns together."""
    blocks, element = kernel["blocks"], kernel.element_size("w_ptr")
    tiles_n = cdiv(kernel["D"], kernel["BLOCK_N"])
    rows, columns = _extents(kernel["M"], kernel["BLOCK_M"]), _extents(kernel["D"], kernel["BLOCK_N"])
    inner = _extents(kernel["F"], kernel["BLOCK_K"])
    sizes = {
        "bits_ptr": lambda row, step: rows(row) * cdiv(inner(step), 32) * 4,
        "d_ptr": lambda row, step: rows(row) * inner(step) * element,
        "w_ptr": lambda column, step: columns(column) * inner(step) * element,
    }

    def programs() -> Iterator[Program]:
        for pid in range(kernel.launch.programs):
            row, column = (number * blocks for number in divmod(pid, tiles_n))
            yield [[("bits_ptr", row + i), ("d_ptr", row + i), ("w_ptr", column + i)] for i in range(blocks)]

    return reads(programs(), _walked(blocks, sizes))


def _glu_dw(kernel: Kernel) -> dict[str, int]:
    """Tiles of dw, one split of the rows after the other; all tiles of a split walk its rows together."""
    block, share, element = kernel["BLOCK_K"], kernel["share"], kernel.element_size("x_ptr")
    blocks, tiles_n = cdiv(kernel["M"], block), cdiv(kernel["D"], kernel["BLOCK_N"])
    tiles = cdiv(kernel["F"], kernel["BLOCK_M"]) * tiles_n
    rows, hidden = _extents(kernel["M"], block), _extents(kernel["F"], kernel["BLOCK_M"])
    columns = _extents(kernel["D"], kernel["BLOCK_N"])
    sizes = {
        "bits_ptr": lambda row, step: rows(step) * cdiv(hidden(row), 32) * 4,
        "d_ptr": lambda row, step: rows(step) * hidden(row) * element,
        "x_ptr": lambda column, step: rows(step) * columns(column) * element,
    }

    def programs() -> Iterator[Program]:
        for pid in range(kernel.launch.programs):
            split, tile = divmod(pid, tiles)
            row, column = (number * blocks for number in divmod(tile, tiles_n))
            steps = range(split * share // block, min(blocks, (split + 1) * share // block))
            yield [[("bits_ptr", row + i), ("d_ptr", row + i), ("x_ptr", column + i)] for i in steps]

    return reads(programs(), _walked(blocks, sizes))


def _cross_entropy_gradient(kernel: Kernel) -> dict[str, int]:
    """A program loads its own rows and walks a share of the other ones; neighbours have the same share."""
    other, block, share = kernel["other_rows"], kernel["BLOCK_N"], kernel["share"]
    tiles = cdiv(kernel["own_rows"], kernel["BLOCK_M"])
    width = kernel["D"] * kernel.element_size("own_ptr")
    rows = {"own_ptr": _extents(kernel["own_rows"], kernel["BLOCK_M"]), "other_ptr": _extents(other, block)}
    # operands that come together, with the bytes of a row
    line = {"own_ptr": {"own_ptr": width}, "other_ptr": {"other_ptr": width}}
    if not kernel["TOKENS"]:
        line["other_ptr"] |= {"lse_ptr": 4, "labels_ptr": 8}
    of = {name: (rows[operand], bytes) for operand, names in line.items() for name, bytes in names.items()}

    def programs() -> Iterator[Program]:
        for pid in range(kernel.launch.programs):
            split, row = divmod(pid, tiles)
            walked = range(split * share // block, cdiv(min(other, (split + 1) * share), block))
            yield [
                [(name, row) for name in line["own_ptr"]],
                *([(name, step) for name in line["other_ptr"]] for step in walked),
            ]

    return reads(programs(), lambda tile: of[tile[0]][0](tile[1]) * of[tile[0]][1])


def _cross_entropy_forward(kernel: Kernel) -> dict[str, int]:
    """A program walks a share of the vocabulary for one tile of tokens; `GROUP` tiles of tokens at a time."""
    tokens, vocabulary, splits = kernel["tokens"], kernel["vocabulary"], kernel["SPLITS"]
    tiles = cdiv(vocabulary, kernel["BLOCK_N"])
    share = cdiv(tiles, splits)
    programs = (
        [[("h_ptr", row), ("w_ptr", tile)] for tile in range(split * share, min((split + 1) * share, tiles))]
        for row, split in grouped(cdiv(tokens, kernel["BLOCK_M"]), splits, kernel["GROUP"])
    )
    size = _matrix_tiles(kernel, "h_ptr", "w_ptr", tokens, vocabulary, kernel["BLOCK_M"], kernel["BLOCK_N"])
    return reads(programs, size)


def _cross_entropy_backward(kernel: Kernel) -> dict[str, int]:
    tokens, columns = kernel["tokens"], kernel["columns"]
    rows, tiles = cdiv(tokens, kernel["BLOCK_M"]), cdiv(columns, kernel["BLOCK_N"])
    programs = ([[("h_ptr", row), ("w_ptr", column)]] for row, column in grouped(rows, tiles, kernel["GROUP"]))
    size = _matrix_tiles(kernel, "h_ptr", "w_ptr", tokens, columns, kernel["BLOCK_M"], kernel["BLOCK_N"])
    return reads(programs, size)


def _looked_up(kernel: Kernel, name: str = "w_ptr", rows: str = "tokens") -> dict[str, int]:
    """A row of the table for each token, in no order."""
    bytes, table = kernel[rows] * kernel["D"] * kernel.element_size(name), kernel.bytes(name)
    return {name: min(bytes, table) if table <= WORKING_SET else bytes}


def _embedding(kernel: Kernel) -> dict[str, int]:
    """Rows of E are looked up; rows of T come again a sequence later."""
    rows, line = kernel["rows"], kernel["D"] * kernel.element_size("table_ptr")
    again = kernel["length"] if 2 * kernel["length"] * line <= WORKING_SET else rows
    return _looked_up(kernel, "table_ptr", "rows") | {"positions_ptr": again * line}


Access = Callable[[Kernel], dict[str, int]]
# kernel -> the access of what it reads more than once
WALKS: dict[str, Access] = {
    "_attention_fwd_kernel": _attention,
    "_attention_bwd_dq_kernel": _attention,
    "_attention_bwd_dkdv_kernel": _dkdv,
    "_glu_forward_kernel": _glu,
    "_glu_recompute_kernel": _glu,
    "_glu_dx_kernel": _glu_dx,
    "_glu_dw_kernel": _glu_dw,
    "_linear_cross_entropy_fwd_kernel": _cross_entropy_forward,
    "_linear_cross_entropy_dlogits_kernel": _cross_entropy_backward,
    "_linear_cross_entropy_gradient_kernel": _cross_entropy_gradient,
    "_linear_cross_entropy_dh_kernel": _looked_up,
    "_embedding_fwd_kernel": _embedding,
}
# kernel -> pointers that it reads once, the access of the others that it reads, those that it writes
ACCESS: dict[str, tuple[str, Access | None, str]] = {
    name: (kernel.once, WALKS.get(name), kernel.writes)
    for record in OPERATORS.values()
    for name, kernel in record.kernels.items()
}
# kernel, pointer -> when a launch is given what it does not read
UNREAD: dict[tuple[str, str], Callable[[Kernel], bool]] = {
    ("_attention_bwd_dkdv_kernel", "v_ptr"): lambda kernel: not kernel.arguments["dk_ptr"].is_tensor,
    ("_linear_cross_entropy_gradient_kernel", "labels_ptr"): lambda kernel: kernel["TOKENS"],
}


def _chunk_written(kernel: Kernel) -> int:
    """The last chunk of the vocabulary is narrower than the buffer; it is filled in whole tiles."""
    columns = cdiv(kernel["columns"], kernel["BLOCK_N"]) * kernel["BLOCK_N"]
    return kernel["tokens"] * columns * kernel.element_size("g_ptr")


# kernel, pointer -> bytes written, where a launch fills part of what it is given
WRITES: dict[tuple[str, str], Callable[[Kernel], int]] = {
    ("_linear_cross_entropy_dlogits_kernel", "g_ptr"): _chunk_written
}


@dataclass(frozen=True)
class Traffic:
    """Bytes of a launch: each of its tensors once, and what of its reads comes from memory under the model."""

    reads: int
    writes: int
    dram_reads: int


def launch_traffic(launch: Launch) -> Traffic:
    """Traffic of a recorded launch; AccessError where its kernel or a tensor is not declared."""
    kernel = Kernel(launch)
    if launch.kernel not in ACCESS:
        raise AccessError(
            f"{launch.kernel}: expected it in a record, where march/cost/cache.py looks, got none; declare it"
        )
    once, access = ACCESS[launch.kernel][0].split(), ACCESS[launch.kernel][1]
    read, written = pointers(kernel)
    counted = access(kernel) if access is not None and set(read) - set(once) else {}
    missing = sorted(set(read) - set(once) - set(counted))
    if missing:
        raise AccessError(
            f"{launch.kernel}: expected the access of {', '.join(missing)} in its operator's record or in a walk of "
            "march/cost/cache.py, got neither; declare it"
        )
    stored = sum(WRITES.get((launch.kernel, name), lambda k, name=name: k.bytes(name))(kernel) for name in written)
    fetched = sum(kernel.bytes(name) if name in once else counted[name] for name in read)
    return Traffic(sum(kernel.bytes(name) for name in read), stored, fetched)


def pointers(kernel: Kernel) -> tuple[list[str], list[str]]:
    """Tensors of a launch that it reads, and those that it writes."""
    name, tensors = kernel.launch.kernel, [x.name for x in kernel.launch.arguments if x.is_tensor]
    unread = {pointer for (of, pointer), when in UNREAD.items() if of == name and pointer in tensors and when(kernel)}
    writes = ACCESS[name][2].split()
    return [x for x in tensors if x not in writes and x not in unread], [x for x in tensors if x in writes]
