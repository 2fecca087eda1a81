"""Datasets of the hub by name and column, splits of sources that grow, files larger than memory."""

import json
import tracemalloc

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from march.console import UsageError
from march.data import DataError, load_or_prepare, splits, vocabulary
from march.data.__main__ import main
from march.data.corpora import files, huggingface, open_corpus
from march.data.description import Description
from march.training.arguments import build_parser, check

TEXTS = [f"Document {i} tells of {'rivers and hills ' * (3 + i % 4)}in the year {1900 + i}." for i in range(40)]


def write(folder, name, rows):
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), folder / name)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A dataset of two configurations and two splits, its text in the column `content`."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "hf"))
    made = tmp_path / "set"
    write(made, "new/train-0.parquet", [{"id": i, "content": text} for i, text in enumerate(TEXTS)])
    write(made, "new/validation-0.parquet", [{"id": 0, "content": TEXTS[0][::-1]}])
    write(made, "old/train-0.parquet", [{"id": 0, "content": "old"}])
    configs = "".join(
        f"- config_name: {name}\n  data_files:\n"
        + "".join(f"  - split: {split}\n    path: {name}/{split}-*\n" for split in parts)
        for name, parts in (("new", ("train", "validation")), ("old", ("train",)))
    )
    (made / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    return made


def words(folder, **options):
    given = {"dataset": str(folder), "config": "new", "column": "content", **options}
    return [word for name, value in given.items() if value for word in (f"--{name.replace('_', '-')}", value)]


def corpus(folder, **options):
    return open_corpus("huggingface", **{"dataset": str(folder), "config": "new", "column": "content", **options})


# a dataset by name and column


def test_a_dataset_is_read_by_configuration_split_and_column(folder):
    assert list(corpus(folder).documents()) == list(corpus(folder).sample()) == TEXTS
    assert list(corpus(folder, split="validation").documents()) == [TEXTS[0][::-1]]
    assert list(corpus(folder, config="old").documents()) == ["old"]
    assert list(corpus(folder, limit=3).documents()) == TEXTS[:3]


def test_one_description_serves_preparing_and_training(folder, tmp_path, capsys):
    own = ["--source", "huggingface", *words(folder), "--vocab-size", "375", "--data-dir", str(tmp_path / "data")]
    assert main(["prepare", *own]) == 0
    described = check(build_parser().parse_args(own), cuda=False).data
    leaves = {"source": "huggingface", "dataset": folder, "config": "new", "column": "content", "vocab_size": 375}
    by_set = [word for n, v in leaves.items() for word in ("--set", f"data.{n}={v}")]
    assert (
        check(build_parser().parse_args([*by_set, "--data-dir", str(tmp_path / "data")]), cuda=False).data == described
    )
    Description.of(described).require_prepared()
    opened = Description.of(described).open()
    assert opened.manifest["documents"] == len(TEXTS)
    assert "column content of the split train" in (opened.path / "ATTRIBUTION.txt").read_text()
    assert "configuration new, revision main" in (opened.path / "ATTRIBUTION.txt").read_text()
    # the command of the manifest gives the same store
    first = {name: entry["sha256"] for name, entry in opened.manifest["files"].items()}
    again = opened.manifest["command"].removeprefix("python -m march.data ").split()
    assert main([*again, "--data-dir", str(tmp_path / "data"), "--force"]) == 0
    assert first == {n: e["sha256"] for n, e in Description.of(described).open().manifest["files"].items()}
    # a file more, and the store is not that of the source
    write(folder, "new/train-1.parquet", [{"id": 99, "content": "More text than before."}])
    with pytest.raises(DataError, match=r"fingerprint .* it is stale"):
        Description.of(described).open()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"column": "text"}, "expected a column 'text' in .*, got the columns id, content"),
        ({"column": "id"}, "text in row 1 of column 'id' of .*, got int"),
        ({"config": "newer"}, "configuration of .* among 'new', 'old', got 'newer', which it does not have"),
        ({"config": None}, "configuration of .* among 'new', 'old', got none of its several"),
        ({"split": "tests"}, "a split of .*, got .*tests"),
        ({"split": "train[:10%]"}, "the name of a split such as train, got 'train.:10%.'"),
        ({"dataset": ""}, "the name of a dataset on the hub"),
        ({"limit": 0}, "a limit of at least one document"),
        ({"held_out": 0.5}, "a share above 0 and below 0.5"),
    ],
)
def test_what_a_dataset_does_not_have_is_one_line(folder, options, expected):
    with pytest.raises(DataError, match=expected) as refused:
        list(corpus(folder, **options).documents())
    assert len(str(refused.value)) < 500
    assert "\n" not in str(refused.value)


def test_a_row_without_text_is_named(folder):
    write(folder, "new/train-1.parquet", [{"id": 1, "content": None}, {"id": 2, "content": "x"}])
    with pytest.raises(DataError, match=r"text in row 41 of column 'content' .*, got null"):
        list(corpus(folder).documents())


def test_the_hub_is_asked_for_what_was_named(monkeypatch, tmp_path):
    """A hub of this test's: the name, configuration, split and revision arrive."""
    calls = []

    def load(path, **options):
        calls.append({"path": path, **options})
        return datasets.Dataset.from_dict({"body": TEXTS}).to_iterable_dataset(num_shards=2)

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(huggingface, "_resolve", lambda dataset: None)
    options = {"dataset": "some/one", "config": "c", "split": "dev", "revision": "abc123", "column": "body"}
    opened = load_or_prepare("huggingface", tmp_path, 375, **options)
    assert opened.manifest["documents"] == len(TEXTS)
    asked = {"path": "some/one", "name": "c", "split": "dev", "revision": "abc123", "streaming": True}
    assert all(call == asked for call in calls)
    assert opened.path.name.startswith("huggingface-one-")
    assert open_corpus("huggingface", **{**options, "revision": "abc124"}).name not in opened.path.name


def test_training_does_not_load_a_dataset_of_the_hub_by_itself(tmp_path):
    given = ["--source", "huggingface", "--dataset", "some/one", "--column", "body", "--data-dir", str(tmp_path)]
    described = Description.of(check(build_parser().parse_args(given), cuda=False).data)
    with pytest.raises(
        DataError, match=r"prepared some/one at .*; fix: run python -m march.data prepare --source"
    ) as said:
        described.require_prepared()
    assert all(part in str(said.value) for part in ("--source huggingface", "--dataset some/one", "--column body"))


# splits of sources that grow


def documents_of(store):
    """{split: its documents} of a store."""
    found = {}
    for name in ("train", "validation", "test"):
        tokens = np.asarray(store.split(name))
        parts = np.split(tokens, np.flatnonzero(tokens == 0) + 1)
        found[name] = {store.tokenizer().decode(part[:-1].tolist()) for part in parts if part.size}
    return found


def grown(count):
    return [f"{i} {'ab cd ef '[: 3 + i % 6] * (1 + i % 9)}" for i in range(count)]


@pytest.mark.parametrize("order", ["behind", "before"])
@pytest.mark.parametrize("piece", [vocabulary.PIECE, 50])
def test_a_document_keeps_its_split_when_the_source_grows(tmp_path, monkeypatch, piece, order):
    """Whatever comes, wherever, and though the vocabulary is another; its copies are where it is."""
    monkeypatch.setattr(vocabulary, "PIECE", piece)
    few, many = grown(300), grown(900) if order == "behind" else grown(900)[::-1]
    found = []
    for number, texts in enumerate((few, [*many, *few[:5]])):
        path = tmp_path / "text.jsonl"
        path.write_text("\n".join(json.dumps({"text": text}) for text in texts))
        size = 357 + 5 * number
        found.append(load_or_prepare("files", tmp_path / str(number), size, files=[str(path)], held_out=0.1))
    before, after = map(documents_of, found)
    assert set.union(*before.values()) == set(few)
    assert set.union(*after.values()) == set(many)
    for name, documents in before.items():
        assert documents < after[name], name
        assert 0.05 < len(after[name]) / 900 < 0.15 or name == "train"
    assert not after["test"] & after["train"]
    assert found[1].manifest["tokens"]["test"] == found[1].split("test").size
    assert "0.1 of the documents each are test and validation, by a hash of their text" in found[1].manifest["splits"]
    assert found[0].path.name.endswith("-held-out-0.1-v357")


def test_a_share_that_holds_nothing_is_said(tmp_path):
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in TEXTS[:3]))
    with pytest.raises(DataError, match=r"documents in each split, got none in .*test.* of a share of 0\.01"):
        load_or_prepare("files", tmp_path / "data", 357, files=[str(tmp_path / "a.jsonl")], held_out=0.01)


def test_a_share_is_the_same_by_option_set_and_file(tmp_path):
    (tmp_path / "mine.toml").write_text('from = "demo"\n[data]\nheld_out = 0.25\n')
    ways = [["--held-out", "0.25"], ["--set", "data.held_out=0.25"], ["--recipe", str(tmp_path / "mine.toml")]]
    found = [check(build_parser().parse_args(way), cuda=False).data for way in ways]
    assert {data.held_out for data in found} == {0.25}
    assert len({Description.of(data).corpus() for data in found}) == 1
    for wrong in ("0", "0.5", "nan", "x"):
        with pytest.raises(UsageError, match=r"held[-_]out"):
            check(build_parser().parse_args(["--held-out", wrong]), cuda=False)
        assert main(["prepare", "--held-out", wrong, "--data-dir", str(tmp_path)]) == 2


def test_a_document_without_an_end_is_not_held_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(splits, "_BUFFER", 1000)
    writer = splits.SplitWriter(tmp_path, np.dtype("<u2"), 50, 0.1)
    for _ in range(10):
        writer.add(np.ones(100, dtype=np.uint16))
    with pytest.raises(DataError, match="documents of at most 1,000 tokens with --held-out"):
        writer.add(np.ones(100, dtype=np.uint16))


# files larger than memory


@pytest.mark.parametrize("separator", [None, "\n\n"])
def test_a_large_text_file_is_read_in_bounded_memory(tmp_path, separator):
    paragraph = "Some words of a text that goes on, é, and on.\n" * 20
    path, repeats = tmp_path / "large.txt", 48 * 2**20 // len(paragraph.encode())
    with path.open("w") as file:
        for _ in range(repeats):
            file.write(f"{paragraph}\n")
    source = open_corpus("files", files=[str(path)], separator=separator)
    tracemalloc.start()
    read = sum(len(piece) for text in source.documents() for piece in vocabulary.pieces(text))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert read == repeats * (len(paragraph) + (1 if separator is None else -1))
    assert peak < 40 * 2**20


def test_a_file_in_parts_has_the_tokens_of_the_whole(tmp_path, monkeypatch):
    path = tmp_path / "text.txt"
    path.write_text(" \n" * 20 + " ".join(TEXTS), encoding="utf-8")
    whole = load_or_prepare("files", tmp_path / "whole", 375, files=[str(path)])
    monkeypatch.setattr(files, "LARGEST_TEXT", 10)
    monkeypatch.setattr(vocabulary, "PIECE", 99)
    read = files.Files._pieces
    monkeypatch.setattr(files.Files, "_pieces", lambda self, path: (c for piece in read(self, path) for c in piece))
    parts = load_or_prepare("files", tmp_path / "parts", 375, files=[str(path)])
    assert parts.manifest["documents"] == 1
    for name in ("train", "validation", "test"):
        assert (parts.split(name) == whole.split(name)).all()
