"""The report and the comparison, from files made here; no time in them is real."""

import copy
import json
import re
from html import unescape

import pytest
from matplotlib.figure import Figure

from bench import pages
from bench.report import __main__ as command
from bench.report.compare import threshold
from bench.report.load import ReportError, benchmark, projections

FACTS = {"kind": "CPU time", "device": "a processor", "threads": 2, "versions": {"torch": "2.13.0", "triton": "3.9.0"}}


def kernel(operator, name, direction="both", seconds=0.01, flops=2e9, **extra):
    row = {
        "suite": "kernels",
        "operator": operator,
        "shape": "2x8 16",
        "implementation": name,
        "direction": direction,
        "dtype": "float32",
        "flops": flops,
        "bytes": 1e7,
        "median": seconds,
        "p20": seconds,
        "p80": seconds,
        "tflops": flops / seconds / 1e12 if flops else None,
        "gbs": 1.0,
        "share_of_peak": None,
        "first_call": 0.1,
        "peak_bytes": None,
        "kept_bytes": 1000,
        "sizes": "reduced for a CPU",
        "experiments": {"Baseline": 3},
    }
    return row | extra


def step(experiment, name, seconds, ratio):
    return {
        "suite": "experiments",
        "experiment": experiment,
        "implementation": name,
        "median": seconds,
        "p20": seconds,
        "p80": seconds,
        "tokens_per_second": 100.0,
        "ratio": ratio,
        "ratio_low": 0.9 * ratio,
        "ratio_high": 1.1 * ratio,
        "kept_bytes": 1 << 20,
        "peak_bytes": None,
        "sizes": "batch 2, 231/52 positions",
    }


INFOS = [
    kernel("attention", "torch"),
    kernel("linear_cross_entropy", "torch"),
    kernel("residual_norm", "torch", flops=0),
    kernel("attention", "eager <b>"),
    step("Baseline", "torch", 0.5, 1.0),
    step("Database", "torch", 0.6, 1.2),
]
WITHOUT = [{"operator": "attention", "implementation": "triton", "reason": "no CUDA device here"}]


def data(scale=1.0, **facts):
    rows = [
        {"fullname": f"bench/x.py::t[{i}]", "stats": {"median": scale * info["median"]}, "extra_info": info}
        for i, info in enumerate(INFOS)
    ]
    return {
        "benchmarks": rows,
        "machine_info": {"march": FACTS | facts},
        "commit_info": {"id": "abc", "dirty": False},
        "datetime": "2026-01-01T00:00:00",
        "march": {"without": WITHOUT, "left_out": ["much"], "sizes": "small", "load": 1.0},
    }


def save(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def counted():
    rows = [
        {"operator": name, "phase": phase, "flops": flops, "bytes": 10**9}
        for name, flops in (("attention", 10**12), ("adamw", 0))
        for phase in ("forward", "backward")
    ]
    base = {"micro_batch": 64, "precision": "bf16", "rows": rows, "kept": 1, "states": 2**30, "fixed": 0}
    return base | {"per_sequence": 2**20, "fits": 400}


@pytest.fixture
def no_counting(monkeypatch):
    monkeypatch.setattr(command, "counted", lambda name: counted())


PROJECTION = {
    "experiment": "Baseline",
    "impl": "triton",
    "device": "a5000",
    "gpus": 8,
    "seconds": 0.2,
    "low": 0.18,
    "high": 0.22,
    "by_operator": {"attention": 0.1, "exchange": 0.1},
    "published_seconds": 0.9262,
    "status": "projection, not measured",
}


# ---------------------------------------------------------------- the page


@pytest.mark.parametrize("projected", [False, True])
def test_the_page_says_what_each_number_is(tmp_path, no_counting, projected, capsys):
    source = save(tmp_path / "b.json", data())
    arguments = [str(source), "--out", str(tmp_path / "out")]
    if projected:
        arguments += ["--projection", str(save(tmp_path / "projection.json", [PROJECTION]))]
    assert command.main(arguments) == 0
    text, html = (tmp_path / "out/report.md").read_text(), (tmp_path / "out/report.html").read_text()
    for wanted in ("CPU time", "counted, not run", "a processor", "no CUDA device here", "load average 1.0", "much"):
        assert wanted in text
        assert wanted in html
    assert ("rates are a projection" in text) == projected
    assert ("No projection was given" in text) != projected
    # every section with numbers has its kind
    for part in text.split("\n## ")[1:]:
        assert part.startswith("Without") or re.search(r"\*\*(.*(CPU time|counted|projection).*)\*\*", part), part[:80]
    pictures = set(re.findall(r"\]\((\w+\.png)\)", text))
    assert pictures == set(re.findall(r'src="(\w+\.png)"', html))
    assert {"experiments.png", "memory.png", "roofline_measured.png", "roofline_counted.png"} <= pictures
    for name in pictures:
        assert (tmp_path / "out" / name).read_bytes().startswith(b"\x89PNG")
        assert (tmp_path / "out" / name).stat().st_size < 200_000
    assert "eager &lt;b&gt;" in html
    assert "<b>" not in html


PLAIN = {"machine_info": {"node": "host"}, "datetime": "2026"}
ELSEWHERE = {**PROJECTION, "device": "h100"}


@pytest.mark.parametrize(
    ("kept", "found", "extra"),
    [
        (range(6), [PROJECTION], {}),
        (range(4), None, {}),  # operators alone
        ([0], [ELSEWHERE], {}),
        ([2], None, PLAIN),  # an operator without products
        ([0, 1, 2, 3, 4], None, {}),  # Baseline's step alone has no ratio
        ([1, 4, 5], [], PLAIN),
        ([4, 5], None, {}),
        ([6], [PROJECTION], PLAIN),  # the machine alone
    ],
)
def test_titles_and_subtitles_say_what_is_drawn_and_nothing_else(
    tmp_path, no_counting, monkeypatch, kept, found, extra
):
    """Files of a part of the suites, as `-k` and `--smoke` write them: no empty fields, no kind without its numbers."""
    made, content = {}, copy.deepcopy(data() | extra)
    machine = {"suite": "machine", "what": "copy", "bytes_per_second": 1e9, "median": 1.0, "p20": 1.0, "p80": 1.0}
    content["benchmarks"].append({"fullname": "m", "stats": {"median": 1.0}, "extra_info": machine})
    content["benchmarks"] = [content["benchmarks"][i] for i in kept]
    for row in content["benchmarks"] if extra else ():
        row["extra_info"].pop("sizes", None)

    def save_figure(figure, path):
        *_, subtitle = (text.get_text() for text in figure.texts)
        made[path.name] = (figure.get_suptitle().strip(), subtitle, figure.axes[0])

    monkeypatch.setattr(Figure, "savefig", save_figure)
    projection = [] if found is None else ["--projection", str(save(tmp_path / "projection.json", found))]
    assert command.main([str(save(tmp_path / "b.json", content)), "--out", str(tmp_path), *projection]) == 0
    text = (tmp_path / "report.md").read_text()
    assert {"experiments.png", "memory.png", "operators_counted.png", "roofline_counted.png"} <= set(made)
    for title, subtitle, _ in made.values():
        for one in (title, subtitle):
            assert not re.search(r"^\s*[,;:]|[,;:]\s*[,;:]|[,;:]\s*$|\(\)", one), one
    title, subtitle, axes = made["experiments.png"]
    drawn_kinds = [entry.get_text().split(",")[0] for entry in axes.get_legend().get_texts()]
    assert title.split(": ")[1].split(", ") == list(dict.fromkeys(drawn_kinds))
    assert f"**{title.split(': ')[1]}**" in text
    assert ("measured on" in subtitle) == (5 in kept)
    assert ("CPU time" in title) == (5 in kept and not extra)
    assert ("none is shown" in text) == (found != [PROJECTION])
    for sentence in re.findall(r"^Forward, backward and AdamW.*", text, re.M):
        assert not sentence.startswith("Forward, backward and AdamW, .")


def test_published_ratios_are_the_repositorys(tmp_path, no_counting):
    save(tmp_path / "b.json", data())
    command.main([str(tmp_path / "b.json"), "--out", str(tmp_path)])
    row = next(x for x in (tmp_path / "report.md").read_text().splitlines() if x.startswith("| BaselineFP32 |"))
    assert f"{1.7620 / 0.9262:.2f}" in row


def test_markdown_and_html_have_the_same_cells(tmp_path):
    """Whatever a name or an error's text is made of stands there as it is."""
    cells = ["p|q", "__init__", "a*b*c", "<b>&amp;</b>", "[x](y)", "a\\b\\*", "`code`", "1. x", "x" * 70, "1_000 {z}"]
    template = tmp_path / "t.md"
    template.write_text('# T\n\n## One\n\n**CPU time**\n\na `b`\n\n{{ table("x | y", "{a} | {b:.1f}", items) }}\n')
    text = pages.render(
        template,
        items=[{"a": cell, "b": 1.5} for cell in cells] + [{"a": "none", "b": None}, {"a": "nan", "b": float("nan")}],
    )
    assert "| p\\|q | 1.5 |" in text
    html = pages.html(text)
    found = re.findall(r"<td[^>]*>(.*?)</td>\s*<td[^>]*>(.*?)</td>", html)
    assert [unescape(re.sub("</?code>", "`", cell)) for cell, _ in found] == [*cells, "none", "nan"]
    assert [value for _, value in found] == ["1.5"] * len(cells) + ["-", "-"]
    assert "<code>b</code>" in html
    assert '<p class="kind">CPU time</p>' in html
    assert '<a href="#s0">One</a>' in html


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "no such file"),
        ("", "empty file"),
        ("{", "not JSON"),
        ([1], "other JSON"),
        ({"benchmarks": [], "machine_info": {}}, "got none"),
    ],
)
def test_bad_files_are_named(tmp_path, capsys, content, said):
    path = tmp_path / "b.json"
    if content is not None:
        save(path, content)
    assert command.main([str(path)]) == 2
    error = capsys.readouterr().err
    assert str(path) in error
    assert said in error
    assert len(error.splitlines()) == 1


def test_bad_projections_are_named(tmp_path):
    with pytest.raises(ReportError, match="list of projections"):
        projections([save(tmp_path / "p.json", {})])
    entry = {name: value for name, value in PROJECTION.items() if name != "low"}
    with pytest.raises(ReportError, match="'low'"):
        projections([save(tmp_path / "p.json", [entry])])


def test_without_a_file_it_says_what_to_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert command.main([]) == 2
    assert "run `pytest bench/` first" in capsys.readouterr().err


def test_a_plain_file_of_pytest_benchmark_is_read(tmp_path):
    """One without march's own facts."""
    plain = {"benchmarks": data()["benchmarks"], "machine_info": {"node": "host"}, "datetime": "2026"}
    found = benchmark(save(tmp_path / "b.json", plain))
    assert found.device == "host"
    assert "unknown" in found.kind


# ---------------------------------------------------------------- the comparison


def compare(tmp_path, before, after, *arguments):
    files = [str(save(tmp_path / name, content)) for name, content in (("a.json", before), ("b.json", after))]
    return command.main(["--compare", *files, *arguments])


@pytest.mark.parametrize(("scale", "status"), [(1.0, 0), (1.04, 0), (1.06, 1), (0.5, 0)])
def test_the_threshold_fails(tmp_path, capsys, scale, status):
    assert compare(tmp_path, data(), data(scale)) == status
    assert f"{6 * status} of 6 slower by more than 5.0%" in capsys.readouterr().out


def test_another_threshold(tmp_path):
    assert compare(tmp_path, data(), data(1.06), "--threshold", "10%") == 0
    assert compare(tmp_path, data(), data(1.06), "--threshold", "0.01") == 1


@pytest.mark.parametrize("change", [{"device": "another"}, {"threads": 8}, {"versions": {"torch": "2.14"}}])
def test_other_conditions_are_refused_unless_asked(tmp_path, capsys, change):
    assert compare(tmp_path, data(), data(**change)) == 2
    assert "not measured under the same conditions" in capsys.readouterr().err
    assert compare(tmp_path, data(), data(**change), "--other-machine") == 0
    assert "conditions differ" in capsys.readouterr().out


def test_what_only_one_file_has_is_said(tmp_path, capsys):
    less = copy.deepcopy(data())
    del less["benchmarks"][2:]
    assert compare(tmp_path, data(), less) == 0
    out = capsys.readouterr().out
    assert "only before: 4, only after: 0" in out
    assert "0 of 2 slower" in out
    for row in less["benchmarks"]:
        row["fullname"] += "x"
    assert compare(tmp_path, data(), less) == 2


def test_thresholds():
    assert threshold("5%") == threshold("0.05") == 0.05
    for text in ("", "x", "-1%"):
        with pytest.raises(ValueError, match=r".*"):
            threshold(text)
