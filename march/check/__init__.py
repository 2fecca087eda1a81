"""`march check my_idea.py:MyIdea`: what can be known of an idea before it is trained, on a page, in a minute."""

import os
import subprocess
import sys
import textwrap
import time
import traceback
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from march import experiments
from march.config import ConfigError
from march.console import Parser, UsageError, quiet_pipe

if TYPE_CHECKING:
    from march.check.subject import Subject

WIDTH = 80
T = TypeVar("T")


def main(words: list[str] | None = None) -> int:
    """Prints the page; 0: nothing found, 1: faults, 2: no such experiment."""
    return quiet_pipe(_main, words)


def _main(words: list[str] | None) -> int:
    parser = Parser(prog="march check", description=__doc__)
    parser.add_argument("experiment", metavar="FILE.py:NAME", help="an experiment of a file of yours, or of the list")
    parser.add_argument("--fused", action="store_true", help="only the fused kernels, in Triton's interpreter")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        given = parser.parse_args(words)
        return _fused(given.experiment) if given.fused else check(given.experiment)
    except (ConfigError, UsageError) as error:
        print(f"march check: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def check(name: str) -> int:
    """Prints the page of experiment `name`, faults with what to do; returns 1 where there are some, else 0."""
    from march.check import effects

    before, start = effects.snapshot(), time.perf_counter()
    experiment = experiments.get(name)  # runs the file
    from march.check import costs, training
    from march.check.probes import PROBES, Fault
    from march.check.subject import Subject

    source = (
        f"{os.path.relpath(experiment.file or name)}, sha256 {experiment.sha256[:16]}"
        if experiment.sha256
        else "the catalogue"
    )
    print(f"{experiment.name} of {source}")
    print(textwrap.fill(experiment.hypothesis, WIDTH))
    path = os.pathsep.join([os.getcwd(), *sys.path])
    kernels = subprocess.Popen(  # beside the rest: Triton's interpreter is for whole processes
        [sys.executable, "-m", "march.cli", "check", "--fused", experiment.spec],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        page = _Page()
        subject = page.row("build", lambda: Subject.of(experiment), _built)
        if subject is not None:
            for what, much, more in page.row("cost", lambda: costs.compared(experiment), lambda _: "") or ():
                print(f"  {what:18} {much:>22}   {more}")
        if subject is not None:
            for title, probe in {**PROBES, "20 steps": training.twenty_steps}.items():
                page.row(title, partial(probe, subject))

            def fused() -> str:
                said, error = kernels.communicate()
                if kernels.returncode:
                    text, _, fix = (said or error).strip().rpartition("\n")
                    raise Fault(text or "the process died", fix)
                return said.strip()

            page.row("fused kernels", fused)

        def alone() -> str:
            if names := effects.changed(before):
                raise Fault(
                    f"the file changes {', '.join(names[:3])}", "subclass, and name the class in parts; nothing else"
                )
            return "the file changes nothing of other experiments"

        page.row("side effects", alone)
    finally:
        kernels.kill()
        kernels.wait()
    print(f"\n{page.rows - page.faults} of {page.rows} ok, {page.faults} FAIL, {time.perf_counter() - start:.0f} s")
    return min(page.faults, 1)


def _built(subject: "Subject") -> str:
    return f"only at its own widths, so this takes minutes ({subject.wide})" if subject.wide else "builds and runs"


def _fused(name: str) -> int:
    """The answer of the fused kernels on stdout; on failure 1, the last line what to do."""
    from march.check.probes import Fault
    from march.check.training import fused

    try:
        print(fused(name))
    except Fault as fault:
        print(f"{fault}\n{fault.fix}")
        return 1
    return 0


class _Page:
    """Rows of 80 columns: ok or FAIL, what was asked, the answer; behind FAIL what to do."""

    def __init__(self) -> None:
        self.rows = self.faults = 0

    def row(self, title: str, ask: Callable[[], T], say: Callable[[T], str] = str) -> T | None:
        """Asks, prints the answer, and returns it; None where it is a fault."""
        from march.check.probes import Fault

        answer, text, fix = None, "", ""
        try:
            answer = ask()
            text = say(answer)
        except Fault as fault:
            text, fix = str(fault), fault.fix
        except Exception as error:  # an idea's own, whatever it is
            at = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(sys.prefix)]
            where = f" at {os.path.basename(at[-1].filename)}:{at[-1].lineno}" if at else ""
            text, fix = f"{type(error).__name__}{where}: {' '.join(str(error).split())[:400]}", "mend it there"
        if text:
            self.rows += 1
            self.faults += bool(fix)
            lead = f"{'FAIL' if fix else 'ok':4} {title:15} "
            print(textwrap.fill(text, WIDTH, initial_indent=lead, subsequent_indent=" " * len(lead)), flush=True)
        if fix:
            indent = " " * 21
            print(
                textwrap.fill(f"-> {fix}", WIDTH, initial_indent=indent, subsequent_indent=indent + "   "), flush=True
            )
        return answer
