"""From text to batches: corpora, tokenizer, memory-mapped store, span corruption, data order."""

from march.data.corruption import Batch, Examples, SpanCorruption
from march.data.errors import DataError
from march.data.order import MicroBatch, Prefetch, step_indices

__all__ = ["Batch", "DataError", "Examples", "MicroBatch", "Prefetch", "SpanCorruption", "step_indices"]
