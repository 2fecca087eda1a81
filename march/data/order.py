"""Which sequences a step sees, and a thread that has them ready."""

import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from march.data import hashing
from march.data.corruption import Batch, Examples
from march.data.errors import DataError

_ORDER = 0x6F72646572  # keeps the words of the data order apart from those of the span draws


@lru_cache(maxsize=2)
def _permutation(size: int, seed: int, epoch: int) -> np.ndarray:
    """A uniform permutation of range(size). Two are kept: a step may lie across the border of two epochs."""
    row = hashing.keys(_ORDER, seed, epoch)
    # sorted by 64-bit words: 4.4M Wikipedia sequences take 0.5 s once an epoch and 35 MB, in the thread below
    order = np.argsort(hashing.words(row, size)[0], kind="stable").astype(np.int64)
    order.setflags(write=False)
    return order


def step_indices(step: int, global_batch: int, size: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Sequence indices and epochs, int64 [global_batch] each, of the step (counted from 0).

    Every epoch is a permutation of range(size), keyed by (seed, epoch); the next one starts inside a step where
    the last one ends. A pure function: ranks and resumed runs agree without talking to each other.
    """
    if step < 0 or global_batch < 1 or size < 1:
        raise DataError(
            "step >= 0, global_batch >= 1, size >= 1",
            f"{step}, {global_batch}, {size}",
            "count steps from 0, and take size from len(examples)",
        )
    positions = np.arange(step * global_batch, (step + 1) * global_batch, dtype=np.int64)
    epochs, within = np.divmod(positions, size)
    indices = np.empty_like(within)
    for epoch in range(int(epochs[0]), int(epochs[-1]) + 1):
        here = epochs == epoch
        indices[here] = _permutation(size, seed, epoch)[within[here]]
    return indices, epochs


@dataclass(frozen=True)
class MicroBatch:
    """first_sequence: the position of row 0 inside the global step, which the dropout contract counts from."""

    first_sequence: int
    batch: Batch


class Prefetch:
    """Yields (step, [MicroBatch, ...]) of one rank, collated by a thread ahead of the training loop.

    Micro-step m of rank r takes the positions [(m * world + r) * micro_batch, ... + micro_batch) of the step's
    global_batch sequences, so the global batch is the same set for every world size and micro-batch. Endless
    unless stop_step is given. Close it, or use it in a `with`; an error in the thread is raised in the loop.
    """

    def __init__(
        self,
        examples: Examples,
        seed: int,
        global_batch: int,
        rank: int = 0,
        world: int = 1,
        micro_batch: int | None = None,
        start_step: int = 0,
        stop_step: int | None = None,
        depth: int = 2,
    ):
        micro_batch = global_batch // world if micro_batch is None else micro_batch
        if not 0 <= rank < world:
            raise DataError("a rank from 0 to world - 1", f"rank {rank} of {world}", "pass the process's own rank")
        if micro_batch < 1 or global_batch % (world * micro_batch):
            raise DataError(
                "a global batch that is a multiple of world times micro-batch",
                f"{global_batch} sequences, world {world}, micro-batch {micro_batch}",
                "choose a micro-batch that divides global_batch / world",
            )
        self._examples, self._seed, self._global_batch = examples, seed, global_batch
        self._micro_batch = micro_batch
        self._firsts = range(rank * micro_batch, global_batch, world * micro_batch)
        self._steps = (start_step, stop_step)
        self._ready: queue.Queue = queue.Queue(maxsize=depth)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._work, name="march-prefetch", daemon=True)
        self._thread.start()

    def collate(self, step: int) -> list[MicroBatch]:
        """This rank's micro-batches of one step, without the thread."""
        indices, epochs = step_indices(step, self._global_batch, len(self._examples), self._seed)
        size = self._micro_batch
        return [
            MicroBatch(first, self._examples.batch(indices[first : first + size], epochs[first : first + size]))
            for first in self._firsts
        ]

    def _work(self) -> None:
        step, stop = self._steps
        try:
            while stop is None or step < stop:
                if not self._put((step, self.collate(step))):
                    return
                step += 1
            self._put(None)
        except BaseException as error:  # handed to the training loop, which raises it
            self._put(error)

    def _put(self, item) -> bool:
        while not self._closed.is_set():
            try:
                self._ready.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def __iter__(self) -> Iterator[tuple[int, list[MicroBatch]]]:
        return self

    def __next__(self) -> tuple[int, list[MicroBatch]]:
        if self._closed.is_set():
            raise StopIteration
        item = self._ready.get()
        if item is None or isinstance(item, BaseException):
            self.close()
            if item is None:
                raise StopIteration
            raise item
        return item

    def close(self) -> None:
        """Stops the thread; what it had ready is dropped."""
        self._closed.set()
        self._thread.join()

    def __enter__(self) -> "Prefetch":
        return self

    def __exit__(self, *_) -> None:
        self.close()
