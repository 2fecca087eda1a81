"""The `march` command: a table of subcommands, each loaded when it is called."""

import sys
from importlib import import_module

from march.config import nearest
from march.console import quiet_pipe

# name: (module:function of an argument list, arguments before the user's, help)
COMMANDS: dict[str, tuple[str, tuple[str, ...], str]] = {
    "check": ("march.check:main", (), "FILE.py:NAME: what can be known of an idea before it is trained"),
    "list": ("march.training.main:main", ("--list",), "the experiments: what changes, parameters, control, claim"),
    "show": ("march.training.main:main", ("--show",), "NAME: one experiment, its configuration, parameters and cost"),
    "compare": ("march.compare.main:main", (), "EXPERIMENT ...: train several over seeds, say which is better"),
    "runs": ("march.compare.runs:main", (), "the runs that are there: filter, sort, CSV, JSON"),
    "infill": ("march.use:infill", (), "RUN TEXT: fill the gaps <extra_id_0> ... of a text by a trained model"),
    "export": ("march.use:export", (), "RUN FOLDER: a trained model as safetensors, tokenizer and recipe"),
    "data": ("march.data.__main__:main", (), "prepare, describe and verify the text to train on"),
}


def main(words: list[str] | None = None) -> int:
    """Run `march` with `words` (default: the process's arguments); returns the subcommand's exit code, 2 for none."""
    return quiet_pipe(_main, sys.argv[1:] if words is None else words)


def _main(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help"):
        rows = "\n".join(f"  {name:8} {text}" for name, (_, _, text) in COMMANDS.items())
        print(f"usage: march COMMAND ...\n\n{rows}\n\nmarch COMMAND --help says more; deepspeed train.py trains.")
        return 0
    command, *rest = words
    if command not in COMMANDS:
        close = nearest(command, list(COMMANDS), 2)
        hint = f"did you mean {' or '.join(close)}?" if close else "see march --help"
        print(f"march: expected one of {', '.join(COMMANDS)}, got {command[:60]!r}; {hint}", file=sys.stderr)
        return 2
    target, before, _ = COMMANDS[command]
    module, _, function = target.partition(":")
    return getattr(import_module(module), function)([*before, *rest])


if __name__ == "__main__":
    sys.exit(main())
