"""Text that cannot be used, text that is hard to use, and the advice that is given: one line each, and it helps."""

import copy
import io
import json
import multiprocessing
import os
import pickle
import shlex
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from march.console import escaped, unescaped
from march.data import DataError, Store, ensure, splits, vocabulary
from march.data.__main__ import main
from march.data.corpora import files, open_corpus
from march.data.prepare import _encoded

ROOT = Path(__file__).resolve().parents[2]
WORDS = [f"word{i} of {'rivers and hills ' * (3 + i % 4)}" for i in range(40)]


def documents(path, **options) -> list[str]:
    return list(open_corpus("files", files=[str(path)], **options).documents())


# records and files


GOOD = b'{"text": "good"}\n'
BAD_LINES = {
    "half a surrogate pair": rb'{"text": "\ud83d"}',
    "half a pair in the middle": rb'{"text": "a\udc80b"}',
    "depth": b'{"text": "x", "a": ' + b"[" * 200_000 + b"]" * 200_000 + b"}",
    "depth of objects": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "digits": b'{"text": "x", "n": ' + b"1" * 5000 + b"}",
    "NaN": b'{"text": "x", "n": NaN}',
    "infinity": b'{"text": "x", "n": -Infinity}',
    "a list": b'["text"]',
    "a string": b'"text"',
    "a number": b"3",
    "null": b"null",
    "no field": b'{"body": "x"}',
    "no fields": b"{}",
    "a wrong type": b'{"text": 3}',
    "null text": b'{"text": null}',
    "a list of texts": b'{"text": ["x"]}',
    "a byte order mark": b'\xef\xbb\xbf{"text": "x"}',
    "latin-1": b'{"text": "caf\xe9"}',
    "a cut character": b'{"text": "caf\xc3',
    "NUL": b'{"text": "a\0b"}',
    "half a line": b'{"text": "x',
    "two objects": b'{"text": "x"} {"text": "y"}',
    "a control character": b'{"text": "a\x01b"}',
    "many fields": json.dumps({f"field{i}": i for i in range(5000)}).encode(),
}


@pytest.mark.fault("a record after good ones", "refused by file and line")
@pytest.mark.parametrize("line", BAD_LINES.values(), ids=BAD_LINES)
@pytest.mark.parametrize("before", [0, 2])
def test_a_bad_record_is_named_by_file_and_line(tmp_path, line, before):
    path = tmp_path / "a.jsonl"
    path.write_bytes(GOOD * before + line + b"\n" + GOOD)
    if before == 0 and line.startswith(b"\xef\xbb\xbf"):
        return  # where a file begins it is no text
    with pytest.raises(DataError, match=rf"line {before + 1} of .*a\.jsonl") as caught:
        documents(path)
    assert len(str(caught.value).splitlines()) == 1
    assert len(str(caught.value)) < 600


@pytest.mark.fault("a bad record far into a file", "refused by file and line")
def test_faults_beyond_the_first_piece_have_their_line_too(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes((b'{"text": "' + b"x" * 1000 + b'"}\n') * 5000 + b'{"text": "\xff"}\n')
    with pytest.raises(DataError, match="line 5001 of"):
        documents(path)
    path = tmp_path / "a.txt"
    path.write_bytes(b"line\n" * 1_000_000 + b"a\0b")
    with pytest.raises(DataError, match=r"line 1000001 of .*NUL"):
        documents(path)


@pytest.mark.fault("a parquet file of which a part is left", "refused in one line")
@pytest.mark.parametrize("cut", [0.0, 0.3, 0.9, 0.999])
def test_a_cut_or_spoilt_parquet_file_is_one_line(tmp_path, cut):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": WORDS * 200}), path, compression="gzip")
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * cut)])
    with pytest.raises(DataError, match=r"a parquet file at .*a\.parquet"):
        documents(path)
    spoilt = bytearray(whole)
    spoilt[4:400] = bytes(396)
    path.write_bytes(spoilt)
    with pytest.raises(DataError, match=r"a parquet file at .*a\.parquet"):
        documents(path)


@pytest.mark.fault("a parquet column that is no text", "refused by file and row")
def test_parquet_with_bytes_that_are_no_text_names_the_row(tmp_path):
    path = tmp_path / "a.parquet"
    column = pa.Array.from_buffers(pa.string(), 2, pa.array([b"good", b"\xff\xfe"], pa.binary()).buffers())
    pq.write_table(pa.table({"text": column}), path)
    with pytest.raises(DataError, match=r"row 2 of .*a\.parquet"):
        documents(path)


@pytest.mark.fault("a parquet row without text", "refused by file and row")
@pytest.mark.parametrize("texts", [[None], ["good", None, "good"], ["good"] * 300 + [None]])
def test_a_parquet_row_that_is_null_is_named(tmp_path, texts):
    pq.write_table(pa.table({"text": pa.array(texts, pa.string())}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=rf"text in row {texts.index(None) + 1} of .*a\.parquet, got null; "):
        documents(tmp_path / "a.parquet")


@pytest.mark.fault("a pipe in place of a file of text", "refused in one line")
def test_a_pipe_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "a.txt")
    for name, got in (
        (str(tmp_path / "a.txt"), "a pipe or device"),
        ("/dev/null", "a pipe or device"),
        ("nowhere.txt", "no such file"),
    ):
        with pytest.raises(DataError, match=f"expected a file at .*, got {got}"):
            documents(name)


@pytest.mark.fault("links, loops and two spellings of one file", "read once; what is not there is refused")
def test_folders_links_and_two_spellings(tmp_path, monkeypatch):
    (tmp_path / "in").mkdir()
    path = tmp_path / "in" / "a.txt"
    path.write_text("one text")
    (tmp_path / "link.txt").symlink_to(path)
    os.link(path, tmp_path / "hard.txt")
    (tmp_path / "loop").symlink_to(tmp_path)
    monkeypatch.chdir(tmp_path)
    spelled = ["in/a.txt", str(path), "./in/../in/a.txt", "link.txt", "hard.txt", "**/*.txt"]
    assert list(open_corpus("files", files=spelled).documents()) == ["one text"]
    assert open_corpus("files", files=["in/a.txt"]) == open_corpus("files", files=[str(path)]), "one store"
    with pytest.raises(DataError, match=r"got a folder; fix: .*/in/\*\.txt"):
        documents("in")
    (tmp_path / "gone.txt").symlink_to("nowhere")
    with pytest.raises(DataError, match="no such file"):
        documents("gone.txt")
    assert list(open_corpus("files", files=["in/*"]).documents()) == ["one text"]


def test_file_names_may_be_any_bytes(tmp_path):
    path = tmp_path / os.fsdecode(b"caf\xe9.txt")
    path.write_text("few words " * 200)
    command = ["-m", "march.data", "prepare", "--files", path, "--data-dir", tmp_path / os.fsdecode(b"\xff")]
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, timeout=600)
    assert (done.returncode, done.stderr) == (0, b"")
    assert rb"caf\udce9.txt" in next(tmp_path.glob("*/*/ATTRIBUTION.txt")).read_bytes()


@pytest.mark.fault("an encoding that is none", "refused in one line")
@pytest.mark.parametrize("encoding", ["utf-9", "rot13", "undefined", "a\0b", "hex"])
def test_encodings_that_are_none(tmp_path, encoding):
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(DataError, match="an encoding that Python knows"):
        documents(tmp_path / "a.txt", encoding=encoding)


@pytest.mark.parametrize("encoding", ["utf-8", "utf8", "UTF-8-SIG", "utf-16", "utf-32", "latin-1", "cp1252"])
def test_encodings_with_and_without_a_mark(tmp_path, encoding):
    (tmp_path / "a.txt").write_text("caf\u00e9\n\nb", encoding=encoding)
    assert documents(tmp_path / "a.txt", encoding=encoding, separator="\n\n") == ["caf\u00e9", "b"]
    (tmp_path / "a.jsonl").write_text('{"text": "caf\u00e9"}\n{"text": 3}', encoding=encoding)
    with pytest.raises(DataError, match="line 2 of"):
        documents(tmp_path / "a.jsonl", encoding=encoding)


@pytest.mark.parametrize("separator", [r"\n\n", r"\r\n\r\n", r"\x0c", r"\t|\t", r"\\n", "---", r"\u2029", " "])
def test_separators_can_be_typed_recorded_and_found(tmp_path, separator):
    meant = unescaped(separator)
    assert unescaped(escaped(meant)) == meant
    path = tmp_path / "a.txt"
    path.write_bytes(f"one{meant}two{meant}three".encode())
    assert documents(path, separator=meant) == ["one", "two", "three"]


def test_a_line_break_in_a_separator_is_the_files_own(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"one\r\n\r\ntwo\nmore\r\n\r\n\r\nthree")
    assert documents(path, separator="\n\n") == ["one", "two\nmore", "\r\nthree"]


@pytest.mark.fault("a document beyond all bounds", "refused with other advice than was followed")
def test_one_huge_line_is_refused_and_the_advice_is_not_the_option_just_given(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "LARGEST_DOCUMENT", 1000)
    path = tmp_path / "a.txt"
    path.write_text("x" * 2000)
    with pytest.raises(DataError, match="say what separates documents"):
        documents(path)
    with pytest.raises(DataError, match=r"it has no '\\n\\n' there: correct the separator"):
        documents(path, separator="\n\n")
    (tmp_path / "a.jsonl").write_text('{"text": "' + "x" * 2000 + '"}')
    with pytest.raises(DataError, match="documents of at most"):
        documents(tmp_path / "a.jsonl")


# the tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return vocabulary.train(WORDS, 500)


def _ids(tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text).ids


def test_the_guard_against_control_tokens_travels_with_the_tokenizer(tokenizer, tmp_path):
    text = "a" + " ".join(vocabulary.CONTROL_TOKENS) + "".join(vocabulary.CONTROL_TOKENS)
    expected = _ids(tokenizer, text)
    assert min(expected) > 100
    assert tokenizer.decode(expected) == text
    tokenizer.save(str(tmp_path / "t.json"))
    same = [copy.copy(tokenizer), copy.deepcopy(tokenizer), pickle.loads(pickle.dumps(tokenizer))]
    same += [type(tokenizer).from_file(str(tmp_path / "t.json")), type(tokenizer).from_str(tokenizer.to_str())]
    assert all(_ids(one, text) == expected for one in same)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(_ids, (tokenizer, text)) == expected
    found = []
    threads = [threading.Thread(target=lambda: found.append(_ids(tokenizer, text))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [expected] * 4


def test_a_corpus_full_of_control_tokens_merges_none_of_them():
    text = " ".join([*vocabulary.CONTROL_TOKENS, "0123456789 </s></s>"]) + "\n"
    trained = vocabulary.train([text] * 200, 700)
    ids = _ids(trained, text)
    assert min(ids) > 100
    assert trained.decode(ids) == text


@pytest.mark.parametrize(
    "unit", ["a", "abcdefghijklmnopqrstuvwxy", "=", "-+", "\u00e9", "\u4e2d", "7", " ", "\n", "a1", "a="]
)
def test_words_without_an_end_take_linear_time_and_come_back(unit):
    text = (unit * 150_000)[:150_000]
    begin = time.process_time()
    trained = vocabulary.train([*WORDS, text], 600)
    ids = trained.encode_batch_fast([text])[0].ids
    assert time.process_time() - begin < 10  # 65,536 letters took 2 s of the trainer, 131,072 took 14
    assert trained.decode(ids) == text


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.text(alphabet="ab1 \n.'\u00e9\u4e2d=", max_size=200), st.integers(5, 60))
def test_pieces_have_the_tokens_of_the_whole(tokenizer, text, size):
    with pytest.MonkeyPatch.context() as patch:
        whole = [*_ids(tokenizer, text), 0] if text.strip() else []
        patch.setattr(vocabulary, "PIECE", size)
        pieces = list(vocabulary.pieces(text))
        assert "".join(pieces) == text
        assert max(map(len, pieces)) <= size
        tokens = np.concatenate([np.zeros(0, "<u2"), *(t for t, _ in _encoded(tokenizer, [text], np.dtype("<u2")))])
        if all(piece.startswith((" ", "\n")) for piece in pieces[1:]):  # cut between words, not inside a long one
            assert tokens.tolist() == whole
        assert tokenizer.decode(tokens[:-1].tolist()) == (text if text.strip() else "")
        assert (tokens == 0).sum() == bool(text.strip())


# splits


def _split(lengths: list[int], groups: list[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[str]]:
    """Documents whose tokens are their group's number, so that it shows where each token went."""
    stream = np.concatenate([np.array([group + 1] * (n - 1) + [0]) for n, group in zip(lengths, groups, strict=True)])
    return splits.split_documents(stream, np.array(lengths), np.array(groups))


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.integers(2, 4000), st.integers(1, 4)), min_size=1, max_size=40))
def test_small_splits_are_near_5_percent_whatever_the_documents(kinds):
    kinds = [(n, copies) for n, copies in kinds if n * copies >= 1]
    lengths = [n for n, copies in kinds for _ in range(copies)]
    groups = [group for group, (_, copies) in enumerate(kinds) for _ in range(copies)]
    total = sum(lengths)
    if total < 160:
        return
    stream, after, chosen, cut = _split(lengths, groups)
    owner = np.repeat(chosen, after)
    assert after.sum() == len(stream) == len(owner)
    assert (stream[np.cumsum(after) - 1] == 0).all(), "every part ends its document"
    shares = np.array([(owner == split).sum() for split in (0, 1, 2)])
    copies = max(n for _, n in kinds)
    assert shares[2] >= 0.9 * total - 2 * copies
    for split in (0, 1):
        # a part of each copy: at most one token a copy is missing or too much
        assert 0.025 * total - copies - 1 <= shares[split] <= 0.05 * total + copies
    if not cut:
        members = np.array(groups)
        assert all(len(set(chosen[members == group])) == 1 for group in set(groups)), "copies stay together"
    else:
        assert len(after) <= len(lengths) + 2 * copies


@pytest.mark.fault("too few documents to split by document", "the longest divided, shares as said")
@pytest.mark.parametrize(
    "texts",
    [
        ["The one and only document. " * 400],
        [f"Document {i}. " + "It goes on and on. " * 200 for i in range(2)],
        [f"Document {i}. " + "It goes on and on. " * 200 for i in range(3)],
        ["The same document. " * 200] * 3,
        ["Short. ", "Long. " * 2000, "Short too. "],
    ],
    ids=["one", "two", "three equal sizes", "three copies", "one among short ones"],
)
def test_few_documents_are_split_as_said(tmp_path, texts):
    for number, text in enumerate(texts):
        (tmp_path / f"{number}.txt").write_text(text)
    store = ensure("files", tmp_path / "data", files=[str(tmp_path / "*.txt")])
    tokens = store.manifest["tokens"]
    for name in ("test", "validation"):
        share = tokens[name] / sum(tokens.values())
        assert 0.02 < share < 0.06
        assert f"{share:.1%} {name}" in store.manifest["splits"]
    assert "the longest one divided for test and validation" in store.manifest["splits"]


@pytest.mark.fault("copies of documents", "in one split")
def test_copies_of_a_document_are_in_one_split(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in WORDS * 3))
    store = ensure("files", tmp_path / "data", files=[str(path)])
    assert "80 documents occur before, the copies of one are in one split" in store.manifest["splits"]
    parts = {}
    for name in ("train", "validation", "test"):
        tokens = np.asarray(store.split(name))
        parts[name] = {p.tobytes() for p in np.split(tokens, np.flatnonzero(tokens == 0) + 1) if p.size}
    assert not parts["train"] & (parts["test"] | parts["validation"])
    assert not parts["test"] & parts["validation"]


def test_copies_of_held_out_documents_of_a_large_corpus_are_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(splits, "HELD_OUT", 100)
    monkeypatch.setattr(splits, "_BUFFER", 2000)
    draw = np.random.default_rng(0)
    texts = [np.append(draw.integers(1, 50, draw.integers(5, 15)), 0) for _ in range(400)]
    stream = np.concatenate([*texts, texts[0], texts[3], texts[200]]).astype("<u2")
    for size in (37, 5000):
        writer = splits.SplitWriter(tmp_path, np.dtype("<u2"), 50)
        for begin in range(0, stream.size, size):
            writer.add(stream[begin : begin + size])
        assert "2 training documents are equal to one of these" in writer.close()


# advice that helps when it is followed


def follow(error: str) -> None:
    """Runs the command that a message prints."""
    command = error[error.index("python -m march.data ") :].split("python -m march.data ")[1]
    for end in (", and delete", " once (", ", or "):
        command = command.split(end)[0]
    assert main(shlex.split(command)) == 0


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("advice")
    path = folder / "a.txt"
    path.write_bytes("\r\n\r\n".join(WORDS).encode())
    return ensure("files", folder / "data", 370, files=[str(path)], separator="\n\n").path


def damage(path: Path) -> None:
    content = bytearray((path / "train.bin").read_bytes())
    content[10] ^= 1
    (path / "train.bin").write_bytes(content)


@pytest.mark.fault("a damaged copy of a store", "its advice mends it and leaves the original alone")
@pytest.mark.parametrize("name", [None, "renamed"])
def test_a_damaged_copy_is_mended_and_the_original_left_alone(prepared, tmp_path, monkeypatch, name):
    copied = Path(shutil.copytree(prepared, tmp_path / "elsewhere" / (name or prepared.name)))
    damage(copied)
    before = {path.name: path.stat().st_mtime_ns for path in prepared.iterdir()}
    with pytest.raises(DataError, match=f"copy it again from {prepared}") as caught:
        Store(copied)
    monkeypatch.chdir(tmp_path)  # the command works from any folder
    follow(str(caught.value))
    Store(copied.parent / prepared.name).verify()
    assert before == {path.name: path.stat().st_mtime_ns for path in prepared.iterdir()}


@pytest.mark.fault("a damaged store", "its advice mends it")
def test_a_damaged_original_is_mended(prepared, tmp_path):
    moved = Path(shutil.copytree(prepared.parent.parent, tmp_path / "own"))
    options = {"files": [str(moved / "a.txt")], "separator": "\n\n", "vocab_size": 370}
    path = ensure("files", moved / "fresh", **options).path
    damage(path)
    with pytest.raises(DataError, match="--force") as caught:
        Store(path)
    follow(str(caught.value))
    assert ensure("files", moved / "fresh", **options).path == path
    (moved / "a.txt").write_text("\n\n".join(WORDS[::-1]))
    with pytest.raises(DataError, match="stale") as caught:
        ensure("files", moved / "fresh", **options)
    follow(str(caught.value))
    ensure("files", moved / "fresh", **options)


# the command lines


@pytest.mark.fault("a reader that has gone", "quiet, exit code 141")
@pytest.mark.parametrize("command", [["-m", "march.data", "info"], ["train.py", "--list"]])
def test_a_reader_that_has_gone_is_no_error(command, prepared):
    more = ["--data-dir", str(prepared.parent)] if "info" in command else []
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, *command, *more], cwd=ROOT, stdout=write, stderr=subprocess.PIPE, text=True, timeout=600
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")


def test_progress_without_a_terminal_is_a_line_now_and_then(monkeypatch):
    from march.data import progress

    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.05)
    with progress.bar("reading", None, "doc") as shown:
        shown.update(3)
        shown.set_postfix_str("7M characters")
        time.sleep(0.3)
    assert "reading: 3 doc, 7M characters, " in stream.getvalue()
    assert "\r" not in stream.getvalue()


# any file


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.one_of(
        st.binary(max_size=400),
        st.text(max_size=400).map(lambda text: text.encode("utf-8", "surrogatepass")),
        st.lists(st.text("ab \n\u00e9", min_size=1, max_size=60), max_size=12).map(lambda t: "\n\n".join(t).encode()),
        st.lists(
            st.dictionaries(st.sampled_from(["text", "n"]), st.one_of(st.text(max_size=99), st.floats())), max_size=9
        ).map(lambda rows: "\n".join(map(json.dumps, rows)).encode()),
    ),
    st.sampled_from([".txt", ".jsonl", ".parquet", ".md"]),
    st.sampled_from([None, "\n", "\n\n"]),
    st.sampled_from(["utf-8", "latin-1", "utf-16"]),
)
def test_any_file_is_a_store_that_holds_it_or_one_line(tmp_path, content, ending, separator, encoding):
    folder = tmp_path / str(time.monotonic_ns())
    folder.mkdir()
    path = folder / f"a{ending}"
    path.write_bytes(content)
    options = {"files": [str(path)], "separator": separator, "encoding": encoding}
    try:
        store = ensure("files", folder / "data", **options)
    except DataError as error:
        said = str(error)
    else:
        said = ""
    if said:
        assert len(said.splitlines()) == 1
        assert not list(folder.glob("data/*/manifest.json"))
        assert not list(folder.glob("data/.*.partial"))
        return
    texts = [text for text in open_corpus("files", **options).documents() if text.strip()]
    tokens = np.concatenate([np.asarray(store.split(name)) for name in ("train", "validation", "test")])
    found = store.tokenizer().decode([int(t) for t in tokens if t])
    assert sorted(found) == sorted("".join(texts))
