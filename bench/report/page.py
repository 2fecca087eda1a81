"""A page of sections, as Markdown and as HTML: what stands in one stands in the other."""

import html
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.55 system-ui, "Segoe UI", "DejaVu Sans", sans-serif; color: #202124; background: #fff;
       margin: 0 auto; padding: 1.5rem clamp(1rem, 4vw, 3rem) 4rem; max-width: 78rem; }
h1 { font-size: 1.9rem; margin: .4rem 0; } h2 { font-size: 1.3rem; margin: 2.6rem 0 .4rem; }
p { max-width: 48rem; margin: .5rem 0; } code { background: #f1f3f4; padding: .1em .3em; border-radius: 3px; }
nav { display: flex; flex-wrap: wrap; gap: .3rem 1.1rem; margin: 1rem 0; font-size: .95rem; }
a { color: #1a56b0; }
.kind { display: inline-block; font-size: .82rem; font-weight: 600; padding: .12rem .6rem; border-radius: 1rem;
        background: #eef3fc; color: #174ea6; border: 1px solid #c9d9f5; }
.kind.projection { background: #fef3e2; color: #8a4b00; border-color: #f5d9ab; }
.kind.counted { background: #f1f3f4; color: #3c4043; border-color: #dadce0; }
figure { margin: 1rem 0; overflow-x: auto; } img { max-width: 100%; height: auto; display: block; }
.table { overflow: auto; max-height: 34rem; border: 1px solid #dadce0; border-radius: 6px; margin: .8rem 0; }
table { border-collapse: separate; border-spacing: 0; font-size: .85rem; width: 100%;
        font-variant-numeric: tabular-nums; }
th, td { padding: .32rem .7rem; border-bottom: 1px solid #eceff1; white-space: nowrap; text-align: right; }
th { position: sticky; top: 0; background: #f8f9fa; font-weight: 600; z-index: 1; border-bottom: 1px solid #dadce0; }
th.text, td.text { text-align: left; } td.wide { white-space: normal; min-width: 22rem; }
td:first-child { position: sticky; left: 0; background: #fff; } th:first-child { left: 0; z-index: 2; }
tr:hover td { background: #f6f9fe; }
@media (max-width: 40rem) { body { font-size: 15px; } td:first-child, th:first-child { position: static; }
  th { position: sticky; } td.wide { min-width: 14rem; }
  img { max-width: none; width: 44rem; } }
"""


@dataclass(frozen=True)
class Section:
    """kind: what its numbers are ("CPU time", "GPU time", "projection", "counted, not run"), "" where it has none.
    Columns whose every cell is a number stand to the right."""

    title: str
    kind: str
    text: Sequence[str] = ()
    header: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    figure: str = ""
    alt: str = ""
    figures: Sequence[tuple[str, str]] = field(default_factory=tuple)

    def pictures(self) -> list[tuple[str, str]]:
        return [*([(self.figure, self.alt)] if self.figure else []), *self.figures]


def _numeric(rows: Sequence[Sequence[str]], column: int) -> bool:
    cells = [row[column] for row in rows if row[column] not in ("", "-")]
    return column > 0 and all(cell[0].isdigit() or cell[0] in "+-" for cell in cells)


def markdown(title: str, intro: Sequence[str], sections: Sequence[Section]) -> str:
    lines = [f"# {title}", ""]
    for text in intro:
        lines += [text, ""]
    for section in sections:
        lines += [f"## {section.title}", ""]
        if section.kind:
            lines += [f"**{section.kind}**", ""]
        for text in section.text:
            lines += [text, ""]
        for name, alt in section.pictures():
            lines += [f"![{alt}]({name})", ""]
        if section.rows:
            right = [_numeric(section.rows, i) for i in range(len(section.header))]
            lines.append("| " + " | ".join(section.header) + " |")
            lines.append("|" + "|".join(" --: " if r else " :-- " for r in right) + "|")
            lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in section.rows]
            lines.append("")
    return "\n".join(lines)


def _text(text: str) -> str:
    """Escaped, with `code` as in Markdown."""
    parts = html.escape(text).split("`")
    return "".join(f"<code>{part}</code>" if i % 2 else part for i, part in enumerate(parts))


def _table(section: Section) -> str:
    right = [_numeric(section.rows, i) for i in range(len(section.header))]
    wide = [max((len(row[i]) for row in section.rows), default=0) > 60 for i in range(len(section.header))]

    def attributes(i: int) -> str:
        names = ("" if right[i] else "text ") + ("wide" if wide[i] else "")
        return f' class="{names.strip()}"' if names.strip() else ""

    head = "".join(f"<th{attributes(i)}>{_text(cell)}</th>" for i, cell in enumerate(section.header))
    body = "\n".join(
        "<tr>" + "".join(f"<td{attributes(i)}>{_text(cell)}</td>" for i, cell in enumerate(row)) + "</tr>"
        for row in section.rows
    )
    return (
        f'<div class="table" tabindex="0"><table><thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table></div>'
    )


def page(title: str, intro: Sequence[str], sections: Sequence[Section]) -> str:
    """One HTML file without scripts; pictures lie beside it."""
    anchors = [f"s{i}" for i in range(len(sections))]
    links = "".join(f'<a href="#{a}">{_text(s.title)}</a>' for a, s in zip(anchors, sections, strict=True))
    parts = [f"<h1>{_text(title)}</h1>", *(f"<p>{_text(text)}</p>" for text in intro), f"<nav>{links}</nav>"]
    for anchor, section in zip(anchors, sections, strict=True):
        parts.append(f'<h2 id="{anchor}">{_text(section.title)}</h2>')
        if section.kind:
            colour = "projection" if "projection" in section.kind else "counted" if "counted" in section.kind else ""
            parts.append(f'<span class="kind {colour}">{_text(section.kind)}</span>')
        parts += [f"<p>{_text(text)}</p>" for text in section.text]
        parts += [
            f'<figure><img src="{html.escape(name)}" alt="{html.escape(alt)}" loading="lazy"></figure>'
            for name, alt in section.pictures()
        ]
        if section.rows:
            parts.append(_table(section))
    body = "\n".join(parts)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{STYLE}</style></head>\n<body>\n{body}\n</body></html>\n"
    )


def write(out: Path, name: str, title: str, intro: Sequence[str], sections: Sequence[Section]) -> list[Path]:
    """NAME.md and NAME.html in `out`."""
    out.mkdir(parents=True, exist_ok=True)
    files = [
        (out / f"{name}.md", markdown(title, intro, sections)),
        (out / f"{name}.html", page(title, intro, sections)),
    ]
    for path, text in files:
        path.write_text(text, encoding="utf-8")
    return [path for path, _ in files]
