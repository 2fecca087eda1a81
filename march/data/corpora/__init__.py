"""Where text comes from: the embedded excerpt, Wikipedia, a dataset of the Hugging Face hub, or a user's files."""

from march.data.corpora.base import Corpus
from march.data.corpora.excerpt import Excerpt
from march.data.corpora.files import Files
from march.data.corpora.huggingface import HuggingFace
from march.data.corpora.wikipedia import Wikipedia
from march.data.errors import DataError

SOURCES: dict[str, type[Corpus]] = {kind.source: kind for kind in (Excerpt, Wikipedia, HuggingFace, Files)}

__all__ = ["SOURCES", "Corpus", "DataError", "Excerpt", "Files", "HuggingFace", "Wikipedia", "open_corpus"]


def open_corpus(source: str, **options) -> Corpus:
    """The corpus of that name; DataError for an unknown name or an option that it does not have."""
    if source not in SOURCES:
        raise DataError(f"a source of {', '.join(SOURCES)}", repr(source), "choose one with --source")
    return SOURCES[source].create(**options)
