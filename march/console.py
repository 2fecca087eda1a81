"""What every command line here shares: mistakes in one line, no traceback for a reader that has gone."""

import argparse
import difflib
import io
import os
import re
import signal
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NoReturn


class UsageError(ValueError):
    """The request cannot be carried out as asked: expected, got, fix. Exit code 2.

    report: whether this process prints it; None: rank 0 does, because every rank raised the same.
    """

    report: bool | None = None


class Parser(argparse.ArgumentParser):
    """Mistakes are UsageErrors of one line, with the nearest option; an empty value or a repeated option is one.

    An empty value is what an unset variable of a shell leaves, and would mean something else: the newest run, the
    default experiment.
    """

    def __init__(self, *arguments: Any, **keywords: Any):
        super().__init__(*arguments, **{"allow_abbrev": False, **keywords})

    def error(self, message: str) -> NoReturn:
        message = message if len(message) <= 400 else f"{message[:400]}..."
        raise UsageError(f"{message}; see {self.prog} --help")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        words = sys.argv[1:] if args is None else list(args)
        option, seen = None, set()
        for word in words:
            name, equals, value = word.partition("=")
            action = self._option_string_actions.get(name)
            if action is not None:
                if id(action) in seen and not isinstance(action, argparse._AppendAction):
                    raise UsageError(f"expected {name} once, got it twice; leave one out")
                seen.add(id(action))
                option = name
            if self._subparsers is None and (word == "" or (action is not None and equals and value == "")):
                raise UsageError(
                    f"expected a value{f' for {option}' if option else ''}, got an empty one; give one or leave the "
                    "option out (is a variable of the shell unset?)"
                )
        found, unknown = super().parse_known_args(words, namespace)
        if unknown and unknown[0].startswith("-"):
            close = difflib.get_close_matches(unknown[0].split("=")[0], list(self._option_string_actions), n=2)
            hint = f"did you mean {' or '.join(close)}?" if close else f"see {self.prog} --help"
            raise UsageError(f"expected an option of {self.prog}, got {unknown[0]!r}; {hint}")
        if unknown:
            raise UsageError(f"expected options only, got {unknown[0]!r}; quote what belongs together")
        return found, unknown


def unescaped(text: str) -> str:
    r"""What a shell cannot hand over easily: \n, \r, \t, \\, \xNN, \uNNNN and the other escapes of Python."""

    def character(found: re.Match[str]) -> str:
        try:
            return found[0].encode("ascii").decode("unicode_escape")
        except UnicodeError:
            raise argparse.ArgumentTypeError(
                f"expected an escape such as \\n, got {found[0]!r}; write \\\\ for \\"
            ) from None

    return re.sub(r"\\(?:x..|u....|U........|N\{[^}]*\}|[0-7]{1,3}|.|$)", character, text, flags=re.DOTALL)


def escaped(text: str) -> str:
    """`unescaped` gives the text back."""
    return text.encode("unicode_escape").decode("ascii")


def whole(smallest: int, largest: int, fix: str) -> Callable[[str], int]:
    """A type for add_argument: a whole number between the two, `fix` in the message otherwise."""

    def parse(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = None
        if number is None or not smallest <= number <= largest:
            raise argparse.ArgumentTypeError(
                f"expected a whole number from {smallest} to {largest}, got {text[:40]!r}; {fix}"
            )
        return number

    return parse


def print_table(headings: Mapping[str, bool], rows: Iterable[Sequence[str]], *, width: int, fold: str = "") -> None:
    """A table on stdout, `width` wide where that is no terminal. headings: numeric ones to the right; fold: the
    heading whose texts may break."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for name, numeric in headings.items():
        table.add_column(
            name, justify="right" if numeric else "left", no_wrap=bool(fold) and name != fold, overflow="fold"
        )
    for row in rows:
        table.add_row(*row)
    console = Console(highlight=False)
    (console if console.is_terminal else Console(width=width, highlight=False)).print(table)


def quiet_pipe(run: Callable[..., int], *arguments: Any) -> int:
    """The exit code of `run`; 141, as a shell has it for SIGPIPE, and nothing on stderr where stdout was closed."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files may be any bytes, a terminal of any encoding
    try:
        code = run(*arguments)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # the interpreter flushes at its end too
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
