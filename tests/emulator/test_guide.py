"""The worked example of docs/kernels/emulator.md prints what the page says."""

import re
import runpy
from pathlib import Path

PAGE = (Path(__file__).parents[2] / "docs" / "kernels" / "emulator.md").read_text(encoding="utf-8")


def test_the_dropped_barrier_is_found_at_its_line(tmp_path, capsys):
    code, printed = re.search(r"```python\n(.*?)```.*?```\n(.*?)```", PAGE, re.S).groups()
    example = tmp_path / "example.py"
    example.write_text(code, encoding="utf-8")
    session = runpy.run_path(str(example))["session"]
    assert capsys.readouterr().out == printed
    assert "tl.trans" in code.splitlines()[session.findings[0].source.line - 1]
