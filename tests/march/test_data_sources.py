"""Users' files and Wikipedia, the errors they give, and the command line."""

import io
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from march.data import DataError, ensure
from march.data.__main__ import main
from march.data.corpora import files, open_corpus, wikipedia
from march.data.description import Description
from march.data.prepare import location
from march.data.progress import bar
from march.training.arguments import build_parser, check

ROOT = Path(__file__).resolve().parents[2]
TEXTS = [f"Document {i} tells of {'rivers and hills ' * (3 + i % 4)}in the year {1900 + i}." for i in range(30)]


def documents(*patterns, **options) -> list[str]:
    return list(open_corpus("files", files=[str(pattern) for pattern in patterns], **options).documents())


@pytest.fixture
def wiki(tmp_path) -> Path:
    """A folder laid out like the dataset's repository: two parquet files of one configuration."""
    folder = tmp_path / "copy"
    (folder / "20990101.en").mkdir(parents=True)
    for shard in range(2):
        rows = [
            {"id": str(i), "url": "u", "title": "t", "text": text} for i, text in enumerate(TEXTS) if i // 15 == shard
        ]
        pq.write_table(pa.Table.from_pylist(rows), folder / "20990101.en" / f"train-0000{shard}-of-00002.parquet")
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: 20990101.en\n  data_files:\n"
        "  - split: train\n    path: 20990101.en/train-*\n---\n"
    )
    return folder


@pytest.fixture
def hf_cache(monkeypatch, tmp_path):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "hf"))


# files


def test_text_files_are_documents_in_order_of_their_names(tmp_path):
    (tmp_path / "b.txt").write_text("second\r\nline", encoding="utf-8", newline="")
    (tmp_path / "a.md").write_bytes(b"\xef\xbb\xbffirst \xc3\xa9")
    assert documents(tmp_path / "*") == ["first é", "second\r\nline"]


def test_a_separator_splits_also_where_pieces_meet(tmp_path, monkeypatch):
    real = files.Files._pieces
    monkeypatch.setattr(files.Files, "_pieces", lambda self, path: (c for piece in real(self, path) for c in piece))
    (tmp_path / "a.txt").write_text("one<|end|>two<|end|>three")
    assert documents(tmp_path / "a.txt", separator="<|end|>") == ["one", "two", "three"]


def test_json_lines_and_parquet(tmp_path):
    rows = [{"body": text, "n": i} for i, text in enumerate(TEXTS)]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n\n", encoding="utf-8")
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "b.parquet")
    assert documents(tmp_path / "a.jsonl", field="body") == TEXTS
    assert documents(tmp_path / "b.parquet", column="body") == TEXTS


def test_a_line_separator_inside_json_is_no_end_of_line(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a\u2028b"}\n{"text": "c"}', encoding="utf-8")
    assert documents(tmp_path / "a.jsonl") == ["a\u2028b", "c"]


@pytest.mark.parametrize(
    ("name", "content", "options", "message"),
    [
        ("a.txt", b"caf\xe9", {}, r"utf-8 text in line 1 of .*a\.txt, got byte 0xe9 .*--encoding latin-1"),
        ("a.jsonl", b'{"body": "y"}\n', {}, r"field 'text' in line 1 .* got the fields body; fix: .*--field"),
        ("a.csv", b"a,b", {}, r"a file ending in \.txt .*got .*a\.csv"),
        ("a.txt", b"x", {"separator": ""}, r"separator of at least one character"),
    ],
)
def test_errors_of_files_say_expected_got_fix(tmp_path, name, content, options, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        documents(tmp_path / name, **options)
    assert "\n" not in str(caught.value)


def test_parquet_columns_are_checked(tmp_path):
    pq.write_table(pa.table({"body": ["x"], "n": [1]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"column 'text' .*got the columns body, n; fix: .*--column"):
        documents(tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"text in the column 'n' .* got int64"):
        documents(tmp_path / "a.parquet", column="n")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"a file at .*none\.txt"):
        documents(tmp_path / "none.txt")
    with pytest.raises(DataError, match="at least one file or pattern"):
        documents()


@pytest.mark.parametrize(
    ("texts", "size", "message"),
    [
        ([], 400, "a corpus with text in it, got none"),
        (["", "  \n", "\t"], 400, "a corpus with text in it, got none"),
        (["one text", "and another"], 357, "at least 160 tokens.*got 21 in 2 document"),
        (TEXTS, 5000, r"fills a vocabulary of 5,000, got text for \d+ tokens"),
        (TEXTS, 100, "a vocabulary of at least 357"),
    ],
)
def test_corpora_that_are_too_small_are_refused(tmp_path, texts, size, message):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    with pytest.raises(DataError, match=message):
        ensure("files", tmp_path / "data", size, files=[str(path)])


def test_the_vocabulary_of_files_follows_from_their_size(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    opened = ensure("files", tmp_path / "data", files=[str(path)])
    assert 357 < opened.vocab_size < 420
    assert opened.path.name.endswith("-vauto")
    assert ensure("files", tmp_path / "data", files=[str(path)]).manifest == opened.manifest


# Wikipedia


def test_wikipedia_from_a_copy(wiki, tmp_path, hf_cache):
    opened = ensure("wikipedia", tmp_path / "data", 380, dataset=str(wiki), snapshot="20990101.en")
    assert opened.manifest["documents"] == 30
    assert re.fullmatch(r"wikipedia-20990101\.en-[0-9a-f]{8}-v380", opened.path.name), (
        "a copy may differ from the hub's"
    )
    assert "CC BY-SA" in (opened.path / "ATTRIBUTION.txt").read_text()


def test_wikipedia_with_options_is_prepared_by_the_command_that_training_advises(wiki, tmp_path, hf_cache, capsys):
    data = ["--vocab-size", "375", "--data-dir", str(tmp_path / "data"), "--limit", "20"]
    arguments = ["--source", "wikipedia", "--dataset", str(wiki), "--snapshot", "20990101.en", *data]
    described = check(build_parser().parse_args(["--recipe", "paper", *arguments]), cuda=False)
    assert not described.comparable
    with pytest.raises(DataError, match=r"prepared Wikipedia at .*-first20-v375, got none") as caught:
        Description.of(described.data).require_prepared()
    command = str(caught.value).split("python -m march.data ")[1].split(" once")[0]
    assert main(shlex.split(command)) == 0
    Description.of(described.data).require_prepared()
    prepared = Description.of(described.data).open()
    assert prepared.manifest["documents"] == 20
    # two datasets of one snapshot are two stores, and the folder alone will do
    other = check(build_parser().parse_args([*arguments[:2], *arguments[4:]]), cuda=False)
    assert "-first20-v375" in str(location(Description.of(other.data).corpus(), tmp_path, 375))
    with pytest.raises(DataError, match="prepared Wikipedia at"):
        Description.of(other.data).require_prepared()
    by_folder = check(build_parser().parse_args(["--data", str(prepared.path)]), cuda=False)
    assert Description.of(by_folder.data).open().manifest == prepared.manifest


def test_wikipedia_streams_in_order_and_samples_every_file(wiki, monkeypatch, hf_cache):
    corpus = open_corpus("wikipedia", dataset=str(wiki), snapshot="20990101.en")
    assert list(corpus.documents()) == TEXTS
    monkeypatch.setattr(wikipedia, "SAMPLE_DOCUMENTS", 4)
    assert list(corpus.sample()) == [TEXTS[0], TEXTS[1], TEXTS[15], TEXTS[16]]
    limited = open_corpus("wikipedia", dataset=str(wiki), snapshot="20990101.en", limit=3)
    assert list(limited.documents()) == list(limited.sample()) == TEXTS[:3]


def test_a_wrong_snapshot_is_named(wiki, hf_cache):
    with pytest.raises(DataError, match=r"got '20220301\.en', which it does not have"):
        list(open_corpus("wikipedia", dataset=str(wiki), snapshot="20220301.en").documents())


def test_a_hub_that_does_not_resolve_is_said_at_once(monkeypatch):
    def refuse(*_):
        raise OSError("Name or service not known")

    monkeypatch.setattr(wikipedia.socket, "getaddrinfo", refuse)
    monkeypatch.setattr(wikipedia.urllib.request, "getproxies", dict)
    with pytest.raises(DataError, match="access to the dataset wikimedia/wikipedia, got OSError: Name or service"):
        wikipedia._resolve("wikimedia/wikipedia")
    wikipedia._resolve(str(ROOT))  # a folder needs no network


# the command line


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_bars_are_for_terminals(terminal, monkeypatch):
    stream = io.StringIO()
    stream.isatty = lambda: terminal
    monkeypatch.setattr(sys, "stderr", stream)
    with bar("counting", 10, unit="doc") as progress:
        progress.update(10)
    assert ("counting: 100%" in stream.getvalue()) == terminal
    # fewer units than `least` are over too soon to show
    with bar("hidden", 10, unit="doc", least=11) as progress:
        progress.update(10)
    assert "hidden" not in stream.getvalue()


def test_prepare_info_and_verify(tmp_path, capsys):
    path = tmp_path / "a.txt"
    path.write_text("\n".join(TEXTS))
    data = str(tmp_path / "data")
    assert main(["prepare", "--source", "files", "--files", str(path), "--separator", "\\n", "--directory", data]) == 0
    shown = capsys.readouterr()
    assert "30 documents" in shown.out
    assert shown.err == "", "no progress bar without a terminal"
    assert main(["info", "--directory", data]) == 0
    assert capsys.readouterr().out == shown.out
    assert main(["verify", "--directory", data]) == 0
    assert "as they were written" in capsys.readouterr().out
    (train,) = (tmp_path / "data").glob("*/train.bin")
    train.write_bytes(train.read_bytes()[::-1])
    for command in ("info", "verify"):
        assert main([command, "--directory", data]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: expected train.bin with sha256")
        assert error.count("\n") == 1
    # the message's own command mends it
    assert "; fix: prepare it again with python -m march.data prepare" in error
    assert main(shlex.split(error.split("python -m march.data ")[1])) == 0
    assert main(["verify", "--directory", data]) == 0


def test_without_a_network_wikipedia_is_one_line_at_once(tmp_path):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "march.data", "prepare", "--source", "wikipedia", "--directory", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: expected access to the dataset wikimedia/wikipedia")
