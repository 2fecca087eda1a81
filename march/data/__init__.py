"""From text to batches: corpora, tokenizer, memory-mapped store, span corruption, data order."""

from march.data.corruption import Batch, Examples, SpanCorruption
from march.data.errors import DataError
from march.data.order import MicroBatch, Prefetch, step_indices
from march.data.prepare import load_or_prepare
from march.data.store import TokenDataset

__all__ = [
    "Batch",
    "DataError",
    "Examples",
    "MicroBatch",
    "Prefetch",
    "SpanCorruption",
    "TokenDataset",
    "load_or_prepare",
    "step_indices",
]
