"""python -m march.data prepare | info | verify"""

import argparse
import os
import shlex
import sys
from pathlib import Path

from march.console import Parser, UsageError, quiet_pipe, whole
from march.data.errors import DataError


def main(arguments: list[str] | None = None) -> int:
    """Runs a command; returns the exit code: 2, with one line on stderr, for what a user can mend."""
    return quiet_pipe(_main, arguments)


def _main(arguments: list[str] | None) -> int:
    try:
        options = _parser().parse_args(arguments)
        return options.run(options)
    except (DataError, UsageError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: nothing was left behind that looks finished", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    from march.data import description

    parser = Parser(prog="python -m march.data", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="prepare|info|verify")

    prepare = commands.add_parser("prepare", help="make a store from a corpus")
    prepare.set_defaults(run=_prepare)
    prepare.add_argument("--force", action="store_true", help="prepare again, replacing what is there")
    threads = whole(1, 1024, "leave it out for all cores")
    prepare.add_argument("--workers", type=threads, metavar="N", help="threads of the tokenizer (all cores)")
    description.add_arguments(prepare, "excerpt")

    for name, function, text in (
        ("info", _info, "what the stores in a folder hold"),
        ("verify", _verify, "read every file of the stores in a folder and compare the hashes"),
    ):
        command = commands.add_parser(name, help=text)
        command.set_defaults(run=function)
        command.add_argument("path", type=Path, nargs="?", help="one store (all in --data-dir)")
        command.add_argument("--data-dir", "--directory", type=Path, default=description.DIRECTORY, metavar="DIR")
    return parser


def _prepare(options: argparse.Namespace) -> int:
    from march.data.description import Description

    if options.workers is not None:
        os.environ["RAYON_NUM_THREADS"] = str(options.workers)  # read once, when the tokenizer first works
    store = Description.of(options, "excerpt").open(force=options.force)
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
    from march.data.store import TokenDataset

    return TokenDataset(path)


def _paths(options: argparse.Namespace) -> list[Path]:
    from march.data.store import stores_in

    paths = [options.path] if options.path else list(stores_in(options.data_dir))
    if not paths:
        raise DataError(f"a prepared store in {options.data_dir}", "none", "run python -m march.data prepare")
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
    lines.append(f"  train       python train.py --data {shlex.quote(str(store.path))}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
