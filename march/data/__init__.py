"""From text to batches: corpora, tokenizer, memory-mapped store, span corruption, data order."""

from march.data.corruption import Batch, Examples, SpanCorruption
from march.data.errors import DataError
from march.data.order import MicroBatch, Prefetch, step_indices
from march.data.prepare import ensure
from march.data.store import Store

__all__ = [
    "Batch",
    "DataError",
    "Examples",
    "MicroBatch",
    "Prefetch",
    "SpanCorruption",
    "Store",
    "ensure",
    "step_indices",
]
