"""Pages as Markdown and as HTML: from a template (jinja2) whose tables are bench.tables', HTML from the Markdown."""

import itertools
import re
from pathlib import Path
from typing import Any

import jinja2
from markdown_it import MarkdownIt
from markupsafe import Markup

from bench.tables import markdown, table

FOLDER = Path(__file__).parent
# the templates' Markdown and no more: names with stars, underscores and brackets stand in cells as they are
RULES = ["heading", "table", "backticks", "image"]


def templates(folder: Path, padded: bool = False, autoescape: bool = False) -> jinja2.Environment:
    """Templates of a folder. In them table(columns, cells, items) of bench.tables, rows(list of {column: text})."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder),
        undefined=jinja2.StrictUndefined,
        autoescape=autoescape,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals["rows"] = lambda rows: markdown(rows, padded)
    environment.globals["table"] = lambda *of: markdown(table(*of), padded) if of[-1] else ""
    return environment


def render(template: Path, padded: bool = False, **values: Any) -> str:
    """Markdown from a template; tables padded for a terminal, or not."""
    text = templates(template.parent, padded).get_template(template.name).render(values)
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def html(text: str) -> str:
    """One file without scripts, from a template's Markdown; pictures lie beside it. A paragraph in ** is a kind."""
    sections, number = re.findall(r"^## (.+)$", text, re.M), itertools.count()
    body = MarkdownIt("zero").enable(RULES).render(text)
    for pattern, made in (
        (r"<h2>", lambda _: f'<h2 id="s{next(number)}">'),
        (r"<p>\*\*(.*?)\*\*</p>", r'<p class="kind">\1</p>'),
        (r"<table>|</table>", lambda x: '<div class="table"><table>' if x[0] == "<table>" else "</table></div>"),
    ):
        body = re.sub(pattern, made, body)
    title, (intro, rule, rest) = text.splitlines()[0].removeprefix("# "), body.partition("<h2 id")
    shell = templates(FOLDER, autoescape=True).get_template("page.html")
    return shell.render(title=title, sections=sections, intro=Markup(intro), body=Markup(rule + rest)) + "\n"


def write(out: Path, name: str, text: str) -> list[Path]:
    """NAME.md and NAME.html in `out`."""
    out.mkdir(parents=True, exist_ok=True)
    files = {out / f"{name}.md": text, out / f"{name}.html": html(text)}
    for path, content in files.items():
        path.write_text(content, encoding="utf-8")
    return list(files)
