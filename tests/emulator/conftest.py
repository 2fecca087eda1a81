"""The emulator runs compiled kernels, and tests/kernels sets TRITON_INTERPRET=1 for its whole process.

So where other tests share the process, each module here is one item that runs `pytest` on itself in a process of its
own; `pytest tests/emulator` alone runs them in place.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def _alone(config: pytest.Config) -> bool:
    """Only these tests were asked for, and nothing set the interpreter."""
    paths = [(config.invocation_params.dir / argument.split("::")[0]).resolve() for argument in config.args]
    return os.environ.get("TRITON_INTERPRET") != "1" and all(HERE in (path, *path.parents) for path in paths)


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector):
    return None if _alone(parent.config) else _Apart.from_parent(parent, path=module_path)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of a module with a `SPREAD`, names of tests, CI runs those; the others are slow."""
    for item in items:
        spread = getattr(getattr(item, "module", None), "SPREAD", None)
        if spread is not None and item.name not in spread:
            item.add_marker(pytest.mark.slow)


class _Apart(pytest.File):
    def collect(self):
        module = _Module.from_parent(self, name="in_its_own_process")
        module.add_marker(pytest.mark.timeout(0))  # its tests have their own
        yield module


class _Module(pytest.Item):
    def runtest(self) -> None:
        environment = {
            name: value for name, value in os.environ.items() if not name.startswith(("TRITON_INT", "PYTEST_"))
        }
        options = ["-q", "-n", "0", "-m", self.config.option.markexpr, "-k", self.config.option.keyword]
        command = [sys.executable, "-m", "pytest", str(self.path), *options]
        done = subprocess.run(
            command, cwd=HERE.parents[1], env=environment, capture_output=True, text=True, check=False
        )
        if done.returncode not in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
            pytest.fail(f"{done.stdout[-6000:]}\n{done.stderr[-2000:]}", pytrace=False)
