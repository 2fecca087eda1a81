"""`pytest bench/` times by itself: see docs/bench.md.

pyproject.toml disables benchmarks for `pytest`, so that the tests stay quick; here they are enabled unless the command
line disables them. Without a file named, results are saved under .benchmarks/, on Ctrl-C what was measured until then.
"""

import os
from collections.abc import Iterable

# read when torch's OpenMP starts. On a machine with other work the default, spinning, turned steps of 0.8 s into 12 s
# (docs/portable.md). Both sides of every ratio have it.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
from pytest_benchmark.utils import get_tag

from bench import machine
from bench.kernel_calls import PAPER, REDUCED, SMOKE, Sizes
from bench.results import Results

# minutes each on two cores: see docs/portable.md. A few stay, so that a plain run sees every path, and `-k portable`
# asks for all.
FULL_ONLY = ("test_portable_libraries", "test_portable_memory", "test_portable_experiment")
KEPT = ("test_portable_experiment[MoreHeadsLessLayers]",)
RESULTS = pytest.StashKey[Results]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("march's benchmarks")
    group.addoption("--full", action="store_true", help="every experiment, shape and baseline: an hour on two cores")
    group.addoption("--smoke", action="store_true", help="tiny shapes, few rounds: does it run? Its times say nothing")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    config.stash[RESULTS] = Results()
    if "--benchmark-disable" in config.invocation_params.args:
        return
    config.option.benchmark_enable = True
    config.pluginmanager.register(Interrupts(config))
    config.option.benchmark_columns = config.option.benchmark_columns or ["min", "median", "iqr", "rounds"]
    if not (config.option.benchmark_json or config.option.benchmark_save):
        config.option.benchmark_autosave = get_tag()


class Interrupts:
    """On Ctrl-C an entry without a sample would keep the whole file from being written (pytest-benchmark 5.3)."""

    def __init__(self, config: pytest.Config):
        self.config = config

    def pytest_keyboard_interrupt(self) -> None:
        session = self.config._benchmarksession
        session.benchmarks[:] = [one for one in session.benchmarks if one.stats.data]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    smoke = config.getoption("--smoke")
    full = config.getoption("--full") or "portable" in config.option.keyword
    out = []
    for item in items:
        name = getattr(item, "originalname", item.name)
        slow = name in FULL_ONLY and item.name not in KEPT and not full
        if slow or (smoke and ("portable" in name or "collation" in name)):
            out.append(item)
    if out:
        config.hook.pytest_deselected(items=out)
        items[:] = [item for item in items if item not in out]
        names = sorted({item.name.split("[")[0] for item in out})
        config.stash[RESULTS].left_out.append(f"{len(out)} tests: {', '.join(names)}")


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict) -> None:
    machine_info["march"] = machine.facts()


def pytest_benchmark_update_json(config: pytest.Config, benchmarks: list, output_json: dict) -> None:
    # the load is no property of the machine: two runs of one machine would not compare
    output_json["march"] = {"load": machine.load(), "sizes": str(sizes_of(config)), **config.stash[RESULTS].to_dict()}


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    results, write = config.stash[RESULTS], terminalreporter.write_line
    terminalreporter.section(f"{machine.kind()}, {machine.device_name()}, {sizes_of(config).label}")
    write("rates, ratios and memory: `python -m bench.report`")
    if results.without:
        terminalreporter.section("without a time")
        for row in results.without:
            what = " ".join(str(value) for key, value in row.items() if key != "reason")
            write(f"{what}: {row['reason']}")
    if results.left_out:
        terminalreporter.section("left out; `pytest bench/ --full` runs it")
        for line in results.left_out:
            write(line)


def sizes_of(config: pytest.Config) -> Sizes:
    """The paper's shapes on a GPU, reduced ones on a CPU."""
    if config.getoption("--smoke"):
        return SMOKE
    return PAPER if machine.kind() == machine.GPU_TIME else REDUCED


@pytest.fixture(scope="session")
def sizes(pytestconfig: pytest.Config) -> Sizes:
    return sizes_of(pytestconfig)


@pytest.fixture(scope="session")
def results(pytestconfig: pytest.Config) -> Results:
    return pytestconfig.stash[RESULTS]


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
