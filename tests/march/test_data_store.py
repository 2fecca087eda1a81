"""Preparing, opening, refusing; killed and simultaneous preparations; the sources."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock

from march.data import DataError, Examples, SpanCorruption, Store, ensure, prepare, splits, store
from march.data.corpora import excerpt

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """Pieces of real text: 60 documents of 2000 characters, and control tokens spelled out in one."""
    text = "\n".join(list(excerpt.Excerpt().documents())[:3])
    pieces = [text[start : start + 2000] for start in range(0, 120_000, 2000)]
    assert len(pieces) == 60
    pieces[7] += " </s> <extra_id_3>"
    return pieces


@pytest.fixture(scope="session")
def lines(texts, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "texts.jsonl"
    path.write_text(
        "".join(json.dumps({"text": text, "n": i}) + "\n" for i, text in enumerate(texts)), encoding="utf-8"
    )
    return path


@pytest.fixture(scope="session")
def prepared(lines, tmp_path_factory) -> Path:
    return ensure("files", tmp_path_factory.mktemp("stores"), 500, files=[str(lines)]).path


@pytest.fixture
def copy(prepared, tmp_path) -> Path:
    return Path(shutil.copytree(prepared, tmp_path / prepared.name))


def documents_of(opened: Store) -> list[str]:
    found = []
    for name in store.SPLITS:
        tokens = opened.split(name)
        assert tokens[-1] == 0
        for piece in np.split(tokens, np.flatnonzero(tokens == 0) + 1):
            if piece.size:
                found.append(opened.tokenizer().decode(piece[:-1].tolist(), skip_special_tokens=False))
    return found


def test_a_store_holds_every_document_and_nothing_else(prepared, texts):
    opened = Store(prepared)
    assert sorted(documents_of(opened)) == sorted(texts)
    assert opened.vocab_size == 500 == opened.tokenizer().get_vocab_size()
    assert opened.manifest["documents"] == 60
    assert opened.manifest["characters"] == sum(map(len, texts))
    assert {name: opened.split(name).size for name in store.SPLITS} == opened.manifest["tokens"]
    tokens = np.concatenate([opened.split(name) for name in store.SPLITS])
    assert not ((tokens > 0) & (tokens <= 100)).any()
    assert (tokens == 0).sum() == 60


def test_tokens_are_mapped_read_only(prepared):
    tokens = Store(prepared).split("train")
    assert isinstance(tokens, np.memmap)
    assert tokens.dtype == np.uint16
    assert tokens.ndim == 1
    with pytest.raises(ValueError, match="read-only"):
        tokens[0] = 1
    with pytest.raises(DataError, match="train, validation, test"):
        Store(prepared).split("valid")


def test_unigram_entropy_is_that_of_the_training_tokens(prepared):
    opened = Store(prepared)
    _, counts = np.unique(opened.split("train"), return_counts=True)
    share = counts / counts.sum()
    assert opened.unigram_entropy == pytest.approx(-(share * np.log(share)).sum())
    assert 3 < opened.unigram_entropy < np.log(500)


def test_preparing_twice_gives_the_same_bytes(prepared, lines, tmp_path):
    again = ensure("files", tmp_path, 500, files=[str(lines)])
    assert again.manifest["files"] == Store(prepared).manifest["files"]


def test_a_prepared_store_is_opened_without_the_lock_or_a_change(prepared, lines):
    before = {path: path.stat().st_mtime_ns for path in prepared.iterdir()}
    with FileLock(prepared.parent / f".{prepared.name}.lock"):
        ensure("files", prepared.parent, 500, files=[str(lines)])
    assert before == {path: path.stat().st_mtime_ns for path in prepared.iterdir()}


def test_the_embedded_default(tmp_path):
    opened = ensure("excerpt", tmp_path)
    assert opened.path == tmp_path / "excerpt-v4096"
    assert opened.vocab_size == 4096
    assert "demonstration" in opened.manifest["note"]
    assert "Anarchism" in (opened.path / "ATTRIBUTION.txt").read_text(encoding="utf-8")
    assert len(Examples(opened.split("train"), SpanCorruption())) > 700
    # the size that is the default anyway, said aloud, is the same store
    assert ensure(directory=tmp_path, vocab_size=4096).manifest == opened.manifest


# damage


@pytest.mark.fault("a store's file flipped, cut, longer or gone", "refused by name, with the command that mends it")
@pytest.mark.parametrize("name", ["train.bin", "validation.bin", "test.bin", "tokenizer.json", "ATTRIBUTION.txt"])
def test_damage_is_refused(copy, name):
    file = copy / name
    content = file.read_bytes()
    flipped = bytearray(content)
    flipped[len(content) // 2] ^= 1
    for damaged, what in (
        (bytes(flipped), "sha256"),
        (content[:-2], rf"of {len(content):,} bytes"),
        (content + b"\0\0", rf"of {len(content):,} bytes"),
        (None, "none"),
    ):
        file.unlink() if damaged is None else file.write_bytes(damaged)
        with pytest.raises(
            DataError, match=rf"{name}.*{what}.*damaged; fix: copy it again from .*, or prepare .*--force"
        ) as caught:
            Store(copy)
        assert "\n" not in str(caught.value)
    file.write_bytes(content)
    Store(copy)


@pytest.mark.fault("a store's manifest changed", "refused in one line")
@pytest.mark.parametrize(
    "change", [lambda t: t.replace('"documents": 60', '"documents": 61'), lambda t: t[:-9], lambda t: "[]"]
)
def test_a_changed_manifest_is_refused(copy, change):
    file = copy / "manifest.json"
    text = file.read_text(encoding="utf-8")
    file.write_text(change(text), encoding="utf-8")
    assert file.read_text(encoding="utf-8") != text
    with pytest.raises(DataError, match=r"manifest\.json.*damaged; fix: delete"):
        Store(copy)


def test_no_store_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"no such folder; fix: run python -m march\.data prepare"):
        Store(tmp_path / "none")
    with pytest.raises(DataError, match="no manifest in it"):
        Store(tmp_path)


@pytest.mark.fault("a large store's file changed under an old time", "found by `verify`")
def test_large_files_are_hashed_once_for_a_size_and_time(copy, monkeypatch):
    monkeypatch.setattr(store, "ALWAYS_HASHED", 0)
    Store(copy)
    file = copy / "train.bin"
    times = file.stat().st_atime_ns, file.stat().st_mtime_ns
    content = bytearray(file.read_bytes())
    content[10] ^= 1
    hashed = []
    real = store.sha256
    monkeypatch.setattr(store, "sha256", lambda path: hashed.append(path.name) or real(path))
    Store(copy)
    assert hashed == []
    file.write_bytes(content)
    with pytest.raises(DataError, match="its bytes changed"):
        Store(copy)
    # damage under an unchanged time is what `verify` is for
    os.utime(file, ns=times)
    opened = Store(copy)
    with pytest.raises(DataError, match="its bytes changed"):
        opened.verify()


# staleness


@pytest.mark.fault("a store of another format", "refused as stale, with the command")
def test_another_format_is_stale(copy, monkeypatch):
    monkeypatch.setattr(store, "FORMAT", store.FORMAT + 1)
    with pytest.raises(DataError, match=r"format 3 in the store .*got format 2: it is stale; fix: .*--force"):
        Store(copy)


@pytest.mark.fault("the text of a store changed", "refused as stale; --force renews it")
def test_changed_files_make_a_store_stale_and_force_renews_it(texts, tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("\n\n\n".join(texts[:20]), encoding="utf-8")
    options = {"files": [str(path)], "separator": "\n\n\n", "directory": tmp_path, "vocab_size": 400}
    first = ensure("files", **options)
    path.write_text("\n\n\n".join(texts[20:50]), encoding="utf-8")
    with pytest.raises(DataError, match=r"fingerprint.*it is stale; fix: prepare it again with python -m march\.data"):
        ensure("files", **options)
    second = ensure("files", force=True, **options)
    assert second.path == first.path
    assert second.manifest["documents"] == 30
    assert sorted(documents_of(second)) == sorted(texts[20:50])
    assert not list(tmp_path.glob(".*.old"))


def test_other_options_are_another_store(lines, prepared):
    other = ensure("files", prepared.parent, 450, files=[str(lines)])
    assert other.path != prepared
    assert Store(prepared).vocab_size == 500


@pytest.mark.fault("a store under another one's name", "refused as stale")
def test_a_store_under_another_ones_name_is_stale(prepared, tmp_path, lines):
    shutil.copytree(prepared, tmp_path / prepared.name.replace("v500", "v501"))
    with pytest.raises(DataError, match=r'vocabulary "501" in the store .* got "500": it is stale'):
        ensure("files", tmp_path, 501, files=[str(lines)])


# killed, failed and simultaneous preparations


@pytest.mark.fault("SIGKILL in a preparation", "nothing that looks finished; the next one is whole")
@pytest.mark.parametrize(
    "moment",
    [
        "vocabulary.train",
        "SplitWriter",
        "SplitWriter.close",
        "stores.remember_checked",
        "stores.write_manifest",
        "_sync",
    ],
)
def test_a_killed_preparation_leaves_nothing_that_looks_finished(lines, tmp_path, moment):
    code = (
        "import os, sys\nfrom march.data import prepare\n"
        f"prepare.{moment} = lambda *a, **k: os.kill(os.getpid(), 9)\n"
        f"prepare.ensure('files', sys.argv[1], 500, files=[sys.argv[2]])"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path, lines], cwd=ROOT, timeout=600)
    assert done.returncode == -signal.SIGKILL
    assert list(tmp_path.glob(".*.partial")), "it was killed in the middle"
    assert list(store.stores_in(tmp_path)) == []
    opened = ensure("files", tmp_path, 500, files=[str(lines)])
    assert opened.manifest["documents"] == 60
    assert not list(tmp_path.glob(".*.partial"))


@pytest.mark.fault("an error in a renewal", "the old store stays")
def test_a_failed_renewal_keeps_the_old_store(copy, lines, monkeypatch):
    monkeypatch.setattr(prepare.vocabulary, "train", lambda *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        ensure("files", copy.parent, 500, force=True, files=[str(lines)])
    assert Store(copy).manifest["documents"] == 60


@pytest.mark.fault("two preparations at once", "one prepares, the other says that it waits")
def test_two_at_once_prepare_once_and_the_second_says_that_it_waits(lines, tmp_path, monkeypatch, capfd):
    built, started, go_on = [], threading.Event(), threading.Event()
    real = prepare._build

    def build(*arguments):
        built.append(1)
        started.set()
        assert go_on.wait(300)
        real(*arguments)

    monkeypatch.setattr(prepare, "_build", build)
    found = []
    threads = [
        threading.Thread(target=lambda: found.append(ensure("files", tmp_path, 500, files=[str(lines)])))
        for _ in range(2)
    ]
    threads[0].start()
    assert started.wait(300)
    threads[1].start()
    waited = ""
    for _ in range(600):
        waited += capfd.readouterr().err
        if "waiting" in waited:
            break
        threads[1].join(0.1)
    go_on.set()
    for thread in threads:
        thread.join(600)
    assert f"another process prepares {tmp_path}" in waited
    assert len(built) == 1
    assert len(found) == 2
    assert found[0].manifest == found[1].manifest


# splits


@pytest.mark.parametrize("pieces", [1, 7, 40])
def test_large_corpora_are_split_by_sequence(tmp_path, monkeypatch, pieces):
    monkeypatch.setattr(splits, "HELD_OUT", 100)
    monkeypatch.setattr(splits, "_BUFFER", 2000)
    stream = np.arange(5000, dtype=np.uint32) % 3000
    writer = splits.SplitWriter(tmp_path, np.dtype("<u2"), 3000)
    for piece in np.array_split(stream, pieces):
        writer.add(piece)
        assert sum(held.size for held in writer._held) <= 2000, "a bounded buffer"
    assert "1000 sequences" in writer.close()
    read = {name: np.fromfile(tmp_path / f"{name}.bin", dtype="<u2") for name in store.SPLITS}
    assert (np.concatenate([read["test"], read["validation"], read["train"]]) == stream).all()
    assert (read["test"].size, read["validation"].size) == (100, 100)
    assert (writer.counts == np.bincount(stream[200:], minlength=3000)).all()


def test_large_vocabularies_use_32_bits(tmp_path):
    words = (np.random.default_rng(0).integers(97, 123, size=(70_000, 6)).astype(np.uint8)).tobytes().decode()
    text = " ".join(words[i : i + 6] for i in range(0, len(words), 6))
    for number in range(4):
        (tmp_path / f"{number}.txt").write_text(text, encoding="utf-8")
    opened = ensure("files", tmp_path, 66_000, files=[str(tmp_path / "*.txt")])
    assert opened.split("train").dtype == np.uint32
    assert int(opened.split("train").max()) > 65_535
    decoded = opened.tokenizer().decode(opened.split("test").tolist())
    ends = decoded.split("</s>")[:-1]
    assert len(ends) == 4, "equal documents: each gives its end"
    assert all(text.endswith(end) and len(end) > 1000 for end in ends)


@pytest.mark.fault("a preparation's disk full after bytes", "one line, nothing left")
@pytest.mark.parametrize("limit", [100, 30_000, 70_000])
def test_a_full_disk_at_any_write_is_one_line_and_leaves_nothing(lines, tmp_path, limit):
    """Writing beyond `limit` bytes of a file fails as it does on a full disk, inside the real writes."""
    code = (
        "import resource, signal, sys\nfrom march.data.__main__ import main\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))\n"
        "sys.exit(main(['prepare', '--vocab-size', '500', '--files', sys.argv[2], '--data-dir', sys.argv[1]]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path, lines], cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: expected to be able to read the corpus and to write to ")
    assert done.stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir() if not path.name.endswith(".lock")] == []
