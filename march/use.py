"""`march export` and `march infill`: what becomes of a trained model. The library is march.trained."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from march.config import ConfigError
from march.console import Parser, UsageError, whole

STEP = whole(1, 10**9, "leave it out for the newest checkpoint")


def export(words: list[str] | None = None) -> int:
    """`march export RUN FOLDER`; returns the exit code."""
    parser = Parser(prog="march export", description="Write a run's model as safetensors, its tokenizer and recipe.")
    parser.add_argument("run", metavar="RUN", type=Path, help="the run's folder")
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="a new one; march.load reads it")
    parser.add_argument("--step", type=STEP, metavar="N", help="a checkpoint; default the newest whole one")

    def run(given: Any) -> None:
        from march.trained import load

        trained = load(given.run, step=given.step)
        print(f"{trained.export(given.folder)}: {trained.recipe.entry.name} after {trained.step} steps")

    return _said(parser, words, run)


def infill(words: list[str] | None = None) -> int:
    """`march infill RUN TEXT`; returns the exit code."""
    parser = Parser(
        prog="march infill",
        description="Fill the gaps of a text: march infill runs/x 'The capital of <extra_id_0> is <extra_id_1>.'",
    )
    parser.add_argument("run", metavar="RUN", type=Path, help="the run's folder, or an exported one")
    parser.add_argument("text", metavar="TEXT", help="with <extra_id_0>, <extra_id_1>, ...; - reads stdin")
    number = whole(1, 10**6, "leave it out for the usual")
    parser.add_argument("--samples", type=number, metavar="N", help="draw so many; else the likeliest")
    parser.add_argument("--temperature", type=float, default=None, metavar="T", help="of draws; default 1")
    parser.add_argument("--top-k", type=number, metavar="K", help="draw of K tokens")
    parser.add_argument("--seed", type=whole(0, 2**31, "0 is usual"), default=0, metavar="N", help="of draws")
    parser.add_argument("--longest", type=number, default=32, metavar="N", help="tokens a gap")
    parser.add_argument("--step", type=STEP, metavar="N", help="a checkpoint; default the newest whole one")
    parser.add_argument("--json", action="store_true", help="a line for each: text, spans, score")

    def run(given: Any) -> None:
        drawn = {name for name in ("temperature", "top_k") if getattr(given, name) is not None}
        if given.temperature is not None and not 0 < given.temperature < 1e6:
            raise UsageError(f"expected --temperature above 0, got {given.temperature}; leave it out for the likeliest")
        text = sys.stdin.read() if given.text == "-" else given.text
        from march.trained import load

        trained = load(given.run, step=given.step)
        length = len(trained.encode(text))
        if length > trained.trained_length:
            print(
                f"march infill: WARNING: {length} tokens, {trained.trained_length} in training; positions behind those "
                "have hardly been learnt",
                file=sys.stderr,
            )
        draws = given.samples or (1 if drawn else 0)
        temperature = (given.temperature or 1.0) if draws else 0.0
        for number in range(max(1, draws)):
            filled = trained.infill(
                text, temperature=temperature, top_k=given.top_k, seed=given.seed + number, longest=given.longest
            )
            if given.json:
                print(json.dumps({"text": filled.text, "spans": filled.spans, "score": round(filled.score, 4)}))
            else:
                print(filled.text)

    return _said(parser, words, run)


def _said(parser: Parser, words: list[str] | None, run: Callable[[Any], None]) -> int:
    """0, or 2 for a mistake and 1 for a machine that fails, in one line."""
    try:
        run(parser.parse_args(words))
    except (ConfigError, ValueError, OSError) as error:
        print(f"{parser.prog}: {' '.join(str(error).split())}", file=sys.stderr)
        return 1 if isinstance(error, OSError) else 2
    return 0
