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
LONG = 60


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
    parser = MarkdownIt("zero").enable(RULES)
    parser.add_render_rule("table_open", lambda *_: '<div class="table" tabindex="0"><table>\n')
    parser.add_render_rule("table_close", lambda *_: "</table></div>\n")
    tokens, sections = parser.parse(text), []
    for opening, inside in itertools.pairwise(tokens):
        if inside.type != "inline":
            continue
        if opening.tag == "h2":
            opening.attrSet("id", f"s{len(sections)}")
            sections.append(inside.content)
        elif opening.type == "td_open" and len(inside.content) > LONG:
            opening.attrSet("class", "wide")
        elif kind := re.fullmatch(r"\*\*(.*)\*\*", inside.content):
            colour = next((name for name in ("projection", "counted") if name in inside.content), "")
            opening.attrSet("class", f"kind {colour}")
            inside.children = parser.parseInline(kind[1])[0].children
        elif inside.children and inside.children[0].type == "image":
            opening.attrSet("class", "figure")
            inside.children[0].attrSet("loading", "lazy")
    first = next((i for i, token in enumerate(tokens) if token.tag == "h2"), len(tokens))
    intro, body = (Markup(parser.renderer.render(t, parser.options, {})) for t in (tokens[:first], tokens[first:]))
    title = text.splitlines()[0].removeprefix("# ")
    shell = templates(FOLDER, autoescape=True).get_template("page.html")
    return shell.render(title=title, sections=sections, intro=intro, body=body) + "\n"


def write(out: Path, name: str, text: str) -> list[Path]:
    """NAME.md and NAME.html in `out`."""
    out.mkdir(parents=True, exist_ok=True)
    files = {out / f"{name}.md": text, out / f"{name}.html": html(text)}
    for path, content in files.items():
        path.write_text(content, encoding="utf-8")
    return list(files)
