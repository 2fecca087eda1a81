"""A page of sections, as Markdown and as HTML (page.html): what stands in one stands in the other."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2
from markupsafe import Markup, escape

from bench.tables import Row, is_numeric, markdown


@dataclass(frozen=True)
class Section:
    """kind: what its numbers are ("CPU time", "GPU time", "projection", "counted, not run"), "" where it has none.
    rows: a table's, {column: text}; figures: file and what it shows."""

    title: str
    kind: str
    text: Sequence[str] = ()
    rows: Sequence[Row] = ()
    figures: Sequence[tuple[str, str]] = ()

    def columns(self) -> dict[str, Markup]:
        """Attributes of each column's cells: numbers stand to the right, long texts wrap."""

        def attributes(column: str) -> Markup:
            kinds = [] if is_numeric(self.rows, column) else ["text"]
            kinds += ["wide"] if max(len(row[column]) for row in self.rows) > 60 else []
            return Markup(' class="{}"').format(" ".join(kinds)) if kinds else Markup("")

        return {column: attributes(column) for column in self.rows[0]}

    def markdown(self) -> str:
        kind, figures = [f"**{self.kind}**"] if self.kind else [], [f"![{alt}]({name})" for name, alt in self.figures]
        table = [markdown(self.rows, padded=False)] if self.rows else []
        return "\n\n".join([f"## {self.title}", *kind, *self.text, *figures, *table])


def _code(text: str) -> Markup:
    """Escaped, with `code` as in Markdown."""
    return Markup(re.sub("`([^`]*)`", r"<code>\1</code>", str(escape(text))))


def html(title: str, intro: Sequence[str], sections: Sequence[Section]) -> str:
    """One file without scripts; pictures lie beside it."""
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined)
    environment.filters["code"] = _code
    return environment.get_template("page.html").render(title=title, intro=intro, sections=sections) + "\n"


def write(out: Path, name: str, title: str, intro: Sequence[str], sections: Sequence[Section]) -> list[Path]:
    """NAME.md and NAME.html in `out`."""
    out.mkdir(parents=True, exist_ok=True)
    text = "\n\n".join([f"# {title}", *intro, *(section.markdown() for section in sections)]) + "\n"
    files = {out / f"{name}.md": text, out / f"{name}.html": html(title, intro, sections)}
    for path, content in files.items():
        path.write_text(content, encoding="utf-8")
    return list(files)
