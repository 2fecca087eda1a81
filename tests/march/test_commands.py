"""The `march` command: its table, its start, its exit codes."""

import json
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from march import cli

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_command_is_there_and_described(command, capsys):
    target, _, text = cli.COMMANDS[command]
    module, _, function = target.partition(":")
    assert callable(getattr(import_module(module), function))
    assert cli.main([]) == cli.main(["--help"]) == 0
    printed = capsys.readouterr().out
    assert f"  {command}" in printed
    assert text in printed
    assert max(map(len, printed.splitlines())) <= 80


def test_list_and_show_are_train_py_s(capsys):
    assert cli.main(["list", "--json"]) == 0
    names = [row["name"] for row in json.loads(capsys.readouterr().out)]
    assert names[:2] == ["Baseline", "BaselineFP32"]


def test_help_loads_nothing_heavy():
    code = "import sys; from march import cli; cli.main(['--help']); print('loaded', *sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = done.stdout.split("loaded ")[1].split()
    assert not {"torch", "numpy", "kernels", "deepspeed", "rich", "pydantic"} & set(loaded)
