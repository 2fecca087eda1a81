"""Tables that benchmarks fill: each line is shown when it is measured, whatever is captured."""

from collections.abc import Iterable

import pytest


class Report(list[str]):
    """Lines of a session's tables; written to the terminal as they come, since some take minutes."""

    def __init__(self, config: pytest.Config):
        super().__init__()
        self.plugins = config.pluginmanager

    def append(self, line: str) -> None:
        super().append(line)
        terminal, capture = (self.plugins.get_plugin(name) for name in ("terminalreporter", "capturemanager"))
        # written inside a test, so captured like the rest of its output unless that is suspended
        with capture.global_and_fixture_disabled():
            terminal.ensure_newline()
            terminal.write_line(line, flush=True)

    def __iadd__(self, lines: Iterable[str]):  # type: ignore[override, misc]
        for line in lines:
            self.append(line)
        return self


@pytest.fixture(scope="session")
def report(pytestconfig: pytest.Config) -> Report:
    """Lines to show, in order."""
    return Report(pytestconfig)
