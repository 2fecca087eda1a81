"""python -m march.data prepare | info | verify"""

import argparse
import os
import sys
from pathlib import Path

from march.data.errors import DataError


def main(arguments: list[str] | None = None) -> int:
    """Runs a command; returns the exit code: 2, with one line on stderr, for what a user can mend."""
    options = _parser().parse_args(arguments)
    try:
        return options.run(options)
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: nothing was left behind that looks finished", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m march.data", description=__doc__, allow_abbrev=False)
    commands = parser.add_subparsers(required=True, metavar="prepare|info|verify")

    prepare = commands.add_parser("prepare", help="make a store from a corpus", allow_abbrev=False)
    prepare.set_defaults(run=_prepare)
    prepare.add_argument("--source", choices=["excerpt", "wikipedia", "files"], default="excerpt")
    prepare.add_argument("--directory", type=Path, default=Path("data"), help="folder of the stores (%(default)s)")
    prepare.add_argument("--vocab-size", type=int, help="tokens (excerpt 4096, wikipedia 30000, files up to 30000)")
    prepare.add_argument("--workers", type=int, help="threads of the tokenizer (all cores)")
    prepare.add_argument("--force", action="store_true", help="prepare again, replacing what is there")
    files = prepare.add_argument_group("--source files")
    files.add_argument("--files", nargs="+", metavar="GLOB", help=".txt .text .md, .jsonl .ndjson, .parquet")
    files.add_argument("--field", help="field of JSON lines that holds the text (text)")
    files.add_argument("--column", help="column of parquet that holds the text (text)")
    files.add_argument("--separator", type=_unescaped, help="between documents of a text file (a file is one)")
    files.add_argument("--encoding", help="of text files and JSON lines (utf-8)")
    wikipedia = prepare.add_argument_group("--source wikipedia")
    wikipedia.add_argument("--snapshot", help="configuration of the dataset (20231101.en)")
    wikipedia.add_argument("--dataset", help="name on the hub, or a folder (wikimedia/wikipedia)")
    wikipedia.add_argument("--limit", type=int, help="only so many articles, for a trial")

    for name, function, text in (
        ("info", _info, "what the stores in a folder hold"),
        ("verify", _verify, "read every file of the stores in a folder and compare the hashes"),
    ):
        command = commands.add_parser(name, help=text, allow_abbrev=False)
        command.set_defaults(run=function)
        command.add_argument("path", type=Path, nargs="?", help="one store (all in --directory)")
        command.add_argument("--directory", type=Path, default=Path("data"), help="folder of the stores (%(default)s)")
    return parser


def _unescaped(text: str) -> str:
    """A shell hands over backslash and n for a line break."""
    return text.replace("\\n", "\n").replace("\\t", "\t")


def _prepare(options: argparse.Namespace) -> int:
    if options.workers is not None:
        if options.workers < 1:
            raise DataError("at least one worker", str(options.workers), "leave --workers out for all cores")
        os.environ["RAYON_NUM_THREADS"] = str(options.workers)  # read once, when the tokenizer first works
    from march.data.prepare import ensure

    names = ("files", "field", "column", "separator", "encoding", "snapshot", "dataset", "limit")
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    store = ensure(options.source, options.directory, options.vocab_size, force=options.force, **given)
    print(_describe(store))
    return 0


def _info(options: argparse.Namespace) -> int:
    for path in _paths(options):
        print(_describe(_open(path)))
    return 0


def _verify(options: argparse.Namespace) -> int:
    for path in _paths(options):
        store = _open(path)
        store.verify()
        size = sum(file["bytes"] for file in store.manifest["files"].values())
        print(f"{path}: {len(store.manifest['files'])} files, {size:,} bytes, as they were written")
    return 0


def _open(path: Path):
    from march.data.store import Store

    return Store(path)


def _paths(options: argparse.Namespace) -> list[Path]:
    from march.data.store import stores_in

    paths = [options.path] if options.path else list(stores_in(options.directory))
    if not paths:
        raise DataError(f"a prepared store in {options.directory}", "none", "run python -m march.data prepare")
    return paths


def _describe(store) -> str:
    manifest = store.manifest
    tokens = manifest["tokens"]
    total = sum(tokens.values())
    lines = [
        f"{store.path}",
        f"  source      {manifest['source']['name']}: {manifest['note']}",
        f"  text        {manifest['documents']:,} documents, {manifest['characters']:,} characters",
        f"  vocabulary  {store.vocab_size:,} tokens, {manifest['characters'] / total:.2f} characters each",
        f"  entropy     {store.unigram_entropy:.3f} nats a token (unigrams of the training tokens)",
    ]
    for name, count in tokens.items():
        lines.append(f"  {name:<11} {count:,} tokens, {count // 1024:,} sequences of 1024")
    lines.append(f"  splits      {manifest['splits']}")
    lines.append(f"  prepared    {manifest['created']} in {manifest['seconds']} s")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
