"""The table of injected faults: a test marked `fault` is a row of it, `--fault-table` prints it (`make faults`).

    @pytest.mark.fault("a flipped byte in model.pt")
    def test_something(fault):
        ...
        fault.happened("skipped by name, the older one taken")

happened and lost may be given to the marker too; by default a fault that its test survives lost nothing.
"""

from collections import Counter

import pytest


class Fault:
    """One row: what was injected, what happened, what was lost."""

    def __init__(self, name: str, happened: str = "held, as its test asserts", lost: str = "nothing"):
        self.row = [name, happened, lost]

    def happened(self, text: str, lost: str = "nothing") -> None:
        self.row[1:] = [" ".join(text.split())[:110], lost]


def pytest_addoption(parser):
    parser.addoption("--fault-table", action="store_true", help="print what each injected fault led to")


def pytest_configure(config):
    config.addinivalue_line("markers", "fault(name, happened=, lost=): injects a fault; a row of `make faults`")


@pytest.fixture
def fault(request) -> Fault:
    """The row of a test marked `fault`; a parametrised test is as many rows."""
    return request.node.fault


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    marker = item.get_closest_marker("fault")
    if marker is not None:
        parameters = getattr(item, "callspec", None)
        name = f"{marker.args[0]}: {parameters.id.rstrip('-')}" if parameters else marker.args[0]
        item.fault = Fault(name, *marker.args[1:], **marker.kwargs)
        item.user_properties.append(("fault", item.fault.row))


def pytest_terminal_summary(terminalreporter, config):
    if not config.getoption("--fault-table"):
        return
    rows = []
    for outcome in ("passed", "failed", "error", "skipped"):
        for report in terminalreporter.stats.get(outcome, []):
            row = dict(report.user_properties).get("fault")
            if row and (report.when == "call" or outcome in ("error", "skipped")):
                rows.append(row if outcome == "passed" else [row[0], outcome.upper(), "not known"])
    wide = max((len(row[0]) for row in rows), default=0)
    terminalreporter.section(f"{len(rows)} injected faults")
    for name, happened, lost in sorted(rows):
        terminalreporter.write_line(f"{name:{wide}} | {happened} | {lost}")
    counts = Counter(row[2] for row in rows)
    terminalreporter.write_line(
        f"{len(rows)} faults; lost: {', '.join(f'{what} {n}' for what, n in counts.most_common())}"
    )
