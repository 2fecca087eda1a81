"""The embedded default: real English Wikipedia articles that the gensim wheel carries as test data."""

import bz2
import importlib.util
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from march.data.corpora import wikitext
from march.data.corpora.base import Corpus
from march.data.errors import DataError
from march.data.progress import bar

DUMP = "test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
DUMP_BYTES = 1_695_871
# counted upwards whenever the cleaning changes what it returns: stores of the old text become stale
CLEANING = 1


@dataclass(frozen=True)
class Article:
    title: str
    page: int
    revision: int
    wikitext: str


@dataclass(frozen=True)
class Excerpt(Corpus):
    """106 articles of the dump of May 2016, most of them under A: 2.8M characters of prose. A demonstration, not a
    corpus to judge architectures by: Wikipedia has 6.4M articles.

    Vocabulary of 4096: 19 of 20 entries occur at least 15 times in the text (0.8M tokens, 3.4 characters each). At
    8192 a third occurs less than 20 times, at the recipe's 30,000 four of five occur less than 10 times: rows of the
    embedding that would hardly leave their initial values.
    """

    source = "excerpt"
    vocab_size = 4096
    note = "a demonstration: 106 articles of the English Wikipedia, May 2016, from the package gensim (CC BY-SA)"

    @property
    def name(self) -> str:
        return "excerpt"

    def fingerprint(self) -> dict[str, Any]:
        return {"file": DUMP.rsplit("/", 1)[1], "bytes": DUMP_BYTES, "cleaning": CLEANING}

    def documents(self) -> Iterator[str]:
        for _, text in _cleaned():
            yield text

    def count(self) -> int:
        return len(_cleaned())

    def attribution(self) -> str:
        lines = [
            "The tokens beside this file were made from the articles of the English Wikipedia listed below, in the",
            "revisions given, by their contributors, licensed CC BY-SA 3.0",
            "(https://creativecommons.org/licenses/by-sa/3.0/). Changes: markup, references, tables, files, formulas",
            "and lists of literature were removed, the text was tokenised. The result is under the same licence.",
            "The articles come with the package gensim, as " + DUMP + ".",
            "",
        ]
        for article, _ in _cleaned():
            url = f"https://en.wikipedia.org/w/index.php?curid={article.page}&oldid={article.revision}"
            lines.append(f"{article.title}: {url}")
        return "\n".join(lines) + "\n"


@cache
def _cleaned() -> list[tuple[Article, str]]:
    """The articles that have prose, read and cleaned once a process: 3 s, 6 MB."""
    found = []
    with bar("cleaning articles", total=None, unit="article") as progress:
        for article in articles_of(dump_path()):
            if text := wikitext.clean(article.wikitext):
                found.append((article, text))
            progress.update(1)
    return found


def dump_path() -> Path:
    """The dump inside the installed gensim, found without importing gensim (1 s, and scipy)."""
    spec = importlib.util.find_spec("gensim")
    fix = "install it again with pip install --force-reinstall gensim==4.4.0, or use --source files"
    if spec is None or spec.origin is None:
        raise DataError("the package gensim, which carries the excerpt", "no such package", fix)
    path = Path(spec.origin).parent / DUMP
    size = path.stat().st_size if path.is_file() else None
    if size != DUMP_BYTES:
        got = "no such file" if size is None else f"{size} bytes"
        raise DataError(f"the excerpt inside gensim ({DUMP}, {DUMP_BYTES} bytes)", got, fix)
    return path


def articles_of(path: Path) -> Iterator[Article]:
    """Articles of a MediaWiki dump (bz2), streamed: no redirects, no pages of other namespaces."""
    with bz2.open(path) as stream:
        root = None
        for event, element in ElementTree.iterparse(stream, events=("start", "end")):
            root = element if root is None else root
            if event == "start" or not element.tag.endswith("}page"):
                continue
            prefix = element.tag[: -len("page")]
            if element.findtext(prefix + "ns") == "0" and element.find(prefix + "redirect") is None:
                revision = element.find(prefix + "revision")
                assert revision is not None
                yield Article(
                    title=element.findtext(prefix + "title", ""),
                    page=int(element.findtext(prefix + "id", "0")),
                    revision=int(revision.findtext(prefix + "id", "0")),
                    wikitext=revision.findtext(prefix + "text", ""),
                )
            root.clear()  # iterparse keeps every element it has seen otherwise
