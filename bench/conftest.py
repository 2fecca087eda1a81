"""Tables that benchmarks fill are printed when the session ends, whatever was captured."""

import pytest

TABLES = pytest.StashKey[list[str]]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[TABLES] = []


@pytest.fixture(scope="session")
def report(pytestconfig: pytest.Config) -> list[str]:
    """Lines to print at the end of the session, in order."""
    return pytestconfig.stash[TABLES]


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    lines = config.stash[TABLES]
    if lines:
        terminalreporter.section("measured")
        for line in lines:
            terminalreporter.write_line(line)
