"""What the documents, comments and messages point at is in this repository."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TRACKED = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
# templates under bench/ link to pictures that are drawn beside the page made of them
NOT_DOCUMENTS = ("CHANGELOG.md", "docs/example_report/", "bench/")
DOCUMENTS = [name for name in TRACKED if name.endswith(".md") and not name.startswith(NOT_DOCUMENTS)]
SOURCES = [name for name in TRACKED if name.endswith((".py", ".md")) and name not in ("CHANGELOG.md", __file__)]
PATHS = re.compile(r"(?<![\w/.*-])((?:kernels|march|bench|tests|docs|examples|\.ci)(?:/[\w.*-]+)+)")
# a section, a specification or a number that only somebody who was there can look up
ELSEWHERE = re.compile(r"\b[Ss]ections? \d|\bspec/|the specification|# spec:|§|\b[Ii]ssue #?\d")
PUBLISHED = ("Raffel", "Programming Guide", "PTX ISA")


@pytest.mark.parametrize("name", DOCUMENTS)
def test_paths_modules_and_links_of_a_document_exist(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    paths = {path.rstrip(".").split("::")[0] for path in PATHS.findall(text) if "XX" not in path}
    assert not {path for path in paths if not list(ROOT.glob(path))}
    modules = {
        module.rstrip(".").replace(".", "/")
        for module in re.findall(r"python -m ((?:bench|march|kernels)[\w.]*)", text)
    }
    assert not {m for m in modules if not (ROOT / f"{m}.py").exists() and not (ROOT / m / "__main__.py").exists()}
    links = {link for link in re.findall(r"\]\(([^)#:\s]+)\)", text) if link != "..."}
    assert not {link for link in links if not (ROOT / name).parent.joinpath(link).exists()}


def test_nothing_refers_to_what_is_not_here():
    found = [
        f"{name}:{number}: {line.strip()}"
        for name in SOURCES
        if (ROOT / name) != Path(__file__)
        for number, line in enumerate((ROOT / name).read_text(encoding="utf-8").splitlines(), 1)
        if ELSEWHERE.search(line) and not any(source in line for source in PUBLISHED)
    ]
    assert not found, "\n".join(found)
