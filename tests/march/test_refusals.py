"""What cannot be is refused in one line, exit code 2, before anything is written: every command, every recipe."""

import shlex
import tomllib
from pathlib import Path

import pytest

from march import cli
from march.compare import main as compare
from march.compare import runs
from march.data.__main__ import main as data
from march.training.main import main as train

# what the line begins with, and the command
COMMANDS = {
    "train": ("train.py: ", train),
    "data": ("error: ", data),
    "compare": ("march compare: ", compare.main),
    "runs": ("march runs: ", runs.main),
    "march": ("", cli.main),
    "recipe": ("train.py: ", lambda words: train(["--recipe", "mine.toml"])),
}
REFUSED = [
    (command, given, told)
    for command, entry in tomllib.loads(Path(__file__).with_name("refusals.toml").read_text()).items()
    for given, told in entry["refused"]
]


@pytest.mark.fault("words that cannot be", "refused in one line, nothing written")
@pytest.mark.parametrize(("command", "given", "told"), REFUSED, ids=lambda x: x.replace("\n", " ")[:60])
def test_what_cannot_be_is_one_line(command, given, told, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    begins, main = COMMANDS[command]
    words = []
    if command == "recipe":
        Path("mine.toml").write_text(given)
    else:
        words = [word.replace("{digits}", "9" * 5000) for word in shlex.split(given)]
    assert main(words) == 2
    shown = capsys.readouterr()
    assert "Traceback" not in shown.err
    (line,) = [line for line in shown.err.splitlines() if line.startswith(begins)]
    assert told in line
    assert len(line) < 600
    assert command == "compare" or shown.out == ""
    left = {path.relative_to(tmp_path) for path in tmp_path.rglob("*") if not path.name.endswith(".lock")}
    assert left <= {Path("mine.toml"), Path("data")}, "something was written"
