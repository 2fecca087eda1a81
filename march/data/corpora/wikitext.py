"""Wikitext to prose: what a reader sees of an article, without tables, references, files and boxes."""

import re

import mwparserfromhell
from mwparserfromhell.nodes import ExternalLink, Heading, HTMLEntity, Tag, Template, Text, Wikilink
from mwparserfromhell.wikicode import Wikicode

# sections that hold lists of books and links; of 3.4M stripped characters of the excerpt they are 0.25M
_DROPPED_SECTIONS = {
    "bibliography",
    "citations",
    "external links",
    "footnotes",
    "further reading",
    "gallery",
    "literature",
    "notes",
    "notes and references",
    "publications",
    "references",
    "references and notes",
    "see also",
    "sources",
    "works cited",
}
# LaTeX is dropped with the rest: 153 formulas in the excerpt, and a formula's source is not what a reader sees
_DROPPED_TAGS = {"ref", "references", "table", "gallery", "math", "timeline", "source", "syntaxhighlight", "hr"}
_DROPPED_TAGS |= {"imagemap", "score", "chem", "ce", "templatestyles", "section", "style"}
_DROPPED_NAMESPACES = {"file", "image", "category", "media", "template"}

# templates that stand inside sentences; what is not here (boxes, citations, hatnotes) leaves no text
_FIRST = {"nowrap", "smaller", "small", "sc", "vanchor", "nihongo", "quote", "larger", "big", "nobr", "em", "strong"}
_FIRST |= {"angle", "abbr", "ill", "unicode", "char", "math", "mvar", "var", "smallcaps", "blockquote", "cquote"}
_LAST = {"lang", "transl", "script", "color", "transliteration"}
_DASH = " \u2013 "
_FIXED = {"nbsp": " ", "thinsp": " ", "spaces": " ", "sep": ", ", "mdashb": _DASH, "mdash": _DASH, "ndash": _DASH}
_FIXED |= {"'s": "'s", "snd": _DASH, "dash": _DASH, "spaced ndash": _DASH, "=": "=", "!": "|", "'": "'"}


def clean(wikitext: str) -> str:
    """Plain text of an article: one paragraph, list item or heading a line, "" if there is no prose in it."""
    lines: list[str] = []
    pending: list[tuple[int, str]] = []  # headings that no text has followed yet
    dropped_level = 0
    for block in _blocks(mwparserfromhell.parse(wikitext)):
        if isinstance(block, Heading):
            if dropped_level and block.level > dropped_level:
                continue
            title = _tidy(_render(block.title))
            dropped_level = block.level if title.lower() in _DROPPED_SECTIONS else 0
            pending = [heading for heading in pending if heading[0] < block.level]
            if not dropped_level:
                pending.append((block.level, title))
        elif not dropped_level:
            text = [line for line in map(_tidy, _UNPARSED.sub("", block).split("\n")) if _is_text(line)]
            if text:
                lines.extend(title for _, title in pending)
                pending = []
                lines.extend(text)
    return "\n".join(lines)


def _blocks(code: Wikicode):
    """The article as headings and runs of rendered text between them."""
    run: list[str] = []
    for node in code.nodes:
        if isinstance(node, Heading):
            yield "".join(run)
            run = []
            yield node
        else:
            run.append(_render_node(node))
    yield "".join(run)


def _render(code: Wikicode | None) -> str:
    return "" if code is None else "".join(map(_render_node, code.nodes))


def _render_node(node) -> str:
    if isinstance(node, Text):
        return node.value
    if isinstance(node, HTMLEntity):
        return node.normalize()
    if isinstance(node, Wikilink):
        return _render_link(node)
    if isinstance(node, ExternalLink):
        return _render(node.title) if node.brackets else ""
    if isinstance(node, Tag):
        name = str(node.tag).strip().lower()
        if name in _DROPPED_TAGS:
            return ""
        return "\n" if name == "br" else _render(node.contents)
    if isinstance(node, Template):
        return _render_template(node)
    if isinstance(node, Heading):  # inside a box: never a section of the article
        return "\n"
    return ""  # comments and template arguments


def _render_link(node: Wikilink) -> str:
    target = str(node.title).strip()
    if target.split(":")[0].strip().lower() in _DROPPED_NAMESPACES:
        return ""
    return _render(node.text if node.text is not None else node.title).lstrip(":")


def _render_template(node: Template) -> str:
    name = str(node.name).strip().lower()
    values = [_render(parameter.value).strip() for parameter in node.params if not parameter.showkey]
    if name in _FIXED:
        return _FIXED[name]
    if not values:
        return ""
    if name in _FIRST:
        return values[0]
    if name in _LAST or name.startswith("lang-"):
        return values[-1] if name in _LAST else values[0]
    if name in ("convert", "cvt"):  # {{convert|12|km|mi}} shows a conversion too; the given quantity is enough
        if len(values) > 3 and values[1] in ("to", "-", "by", "x", "and", "or", _DASH.strip()):
            return f"{values[0]} {values[1]} {values[2]} {values[3]}"
        return " ".join(values[:2])
    if name == "as of":
        return "As of " + " ".join(values)
    if name in ("chem", "chem2", "val", "angbr"):
        return "".join(values) if name != "angbr" else f"⟨{values[0]}⟩"
    if name == "frac":
        return "/".join(values[-2:]) if len(values) < 3 else f"{values[0]} {values[1]}/{values[2]}"
    return ""


# unbalanced quotes or brackets around them (11 references, a quotation and a file in the excerpt) hide these
# from the parser
_UNPARSED = re.compile(
    r"<ref\b[^>]*/>|<ref\b.*?</ref>|\[\[(?:File|Image):.*?\]\]|</?(?:blockquote|div|span|small|center|p|i|b)\b[^<>]*>",
    re.DOTALL | re.IGNORECASE,
)
_RULES = [
    (re.compile(r"[\u00a0\u2009\u202f\t ]+"), " "),
    (re.compile(r"__[A-Z]+__"), ""),
    (re.compile(r"''+"), ""),  # italics and bold that the parser left because they were not balanced
    (re.compile(r"([(\[])\s*[;,:\s]+"), r"\1"),  # what a dropped pronunciation or date leaves behind
    (re.compile(r"[;,\s]+([)\]])"), r"\1"),
    (re.compile(r"\(\s*\)|\[\s*\]|⟨⟩"), ""),
    (re.compile(r" +([,.;)])(?=\s|$)"), r"\1"),
    (re.compile(r",([,.;])(?=\s|$)"), r"\1"),
    (re.compile(r"  +"), " "),
]


def _tidy(line: str) -> str:
    for pattern, replacement in _RULES:
        line = pattern.sub(replacement, line)
    return line.strip()


def _is_text(line: str) -> bool:
    """Leaves out rows that a table or a dropped template left half of: no letter, or wikitext in them."""
    return any(character.isalpha() for character in line) and not re.match(r"[|!{}]|.*(\{\||\|\}|\{\{|\}\})", line)
