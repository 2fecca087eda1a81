"""What a run leaves: `march.load` gives its model, tokenizer and recipe; spans are filled, weights exported.

An exported folder:

    model.safetensors   every parameter, float32
    tokenizer.json      of the tokenizers library
    recipe.toml         trains the same run again
    config.json         format, experiment, step, the model's configuration, sha256 of each other file
    <name>.py           the experiment's own file, where it has one
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

import kernels
from march import config as configuration
from march import recipe as recipes
from march.console import UsageError
from march.data import vocabulary
from march.data.corruption import END_OF_TEXT, FIRST_SENTINEL, NUM_SENTINELS, SpanCorruption
from march.data.store import TOKENIZER, digest
from march.experiments import own
from march.model import Transformer, build_model
from march.recipe import Recipe
from march.training.checkpoint import Checkpoints, tag_of
from march.training.files import first_line, read_json, sha256, write_json, write_text
from march.training.runfolder import RunFolder

FORMAT = 1
WEIGHTS = "model.safetensors"
_GAP = re.compile(r"<extra_id_(\d+)>")


@dataclass(frozen=True)
class Infilled:
    """text: with its gaps filled; spans: what they were filled with, in order; score: the mean of ln p of each chosen
    token, in nats."""

    text: str
    spans: tuple[str, ...]
    score: float


@dataclass(frozen=True)
class Trained:
    """model: in evaluation mode, float32, on the CPU. tokenizer: of the text that it was trained on. step: finished."""

    model: Transformer
    tokenizer: Tokenizer
    recipe: Recipe
    step: int

    def infill(
        self, text: str, *, temperature: float = 0.0, top_k: int | None = None, seed: int = 0, longest: int = 32
    ) -> Infilled:
        """Fill the gaps <extra_id_0>, <extra_id_1>, ... of `text`, in this order in it, by 1 to `longest` tokens each.

        temperature 0 takes the likeliest token each time; else they are drawn, by `seed`, from softmax(logits /
        temperature), of the `top_k` likeliest where that is given. Each token is a pass of the whole model.

        ValueError where the gaps are others, a value cannot be, or the text has more tokens than the model positions.
        """
        if temperature < 0 or longest < 1 or (top_k is not None and top_k < 1):
            raise ValueError(
                f"infill: expected temperature from 0, longest and top_k from 1, got {temperature}, {longest} and "
                f"{top_k}; leave out what need not differ"
            )
        source = self.encode(text)
        gaps = len(_GAP.findall(text))
        generator = torch.Generator().manual_seed(seed)
        # the decoder is given where the first gap's filling begins; the labels begin with that sentinel
        out, scores, spans = [END_OF_TEXT, FIRST_SENTINEL], [], []
        ids = torch.tensor([source])
        known = self.tokenizer.get_vocab_size()
        for gap in range(gaps):
            span: list[int] = []
            closing = FIRST_SENTINEL - gap - 1
            while len(span) < longest and len(out) < self.model.config.max_length:
                with torch.no_grad():
                    logits = self.model(ids, torch.tensor([out]), return_logits=True).logits
                assert logits is not None
                logits = logits[0, -1].float()
                allowed = torch.full_like(logits, -torch.inf)
                allowed[FIRST_SENTINEL + 1 : known] = 0.0
                if span:
                    allowed[closing] = 0.0
                token, score = _choose(logits + allowed, temperature, top_k, generator)
                scores.append(score)
                if token == closing:
                    break
                span.append(token)
                out.append(token)
            out.append(closing)
            spans.append(self.tokenizer.decode(span, skip_special_tokens=False))
        filled = iter(spans)
        whole = _GAP.sub(lambda _: next(filled), text)
        return Infilled(whole, tuple(spans), sum(scores) / len(scores))

    def encode(self, text: str) -> list[int]:
        """Token ids of a text with gaps; ValueError as `infill` says."""
        numbers = [int(number) for number in _GAP.findall(text)]
        if not numbers or numbers != list(range(len(numbers))) or len(numbers) >= NUM_SENTINELS:
            got = " ".join(f"<extra_id_{n}>" for n in numbers[:6]) or "none"
            raise ValueError(
                f"expected the gaps <extra_id_0>, <extra_id_1>, ... in this order, at most {NUM_SENTINELS - 1}, got "
                f"{got}; number them from 0"
            )
        ids: list[int] = []
        for place, piece in enumerate(_GAP.split(text)):
            # every second piece is a gap's number
            ids += [FIRST_SENTINEL - int(piece)] if place % 2 else self.tokenizer.encode(piece).ids
        if len(ids) > self.model.config.max_length:
            raise ValueError(
                f"expected at most {self.model.config.max_length} tokens, the model's positions, got {len(ids)}; "
                "shorten the text"
            )
        return ids

    @property
    def trained_length(self) -> int:
        """Tokens of the encoder in training: positions behind them have hardly been learnt."""
        return SpanCorruption(sequence_length=self.recipe.batch.sequence_length).input_length

    def export(self, folder: Path | str) -> Path:
        """Write the model, its tokenizer and its recipe to a new folder, which `load` reads; returns it.

        Raises:
            UsageError: the folder is there and holds something.
            OSError: it cannot be written.
        """
        from safetensors.torch import save_file

        folder = Path(folder)
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UsageError(f"expected a new or empty folder, got {folder}, which holds something; give another")
        folder.mkdir(parents=True, exist_ok=True)
        weights = {name: x.detach().float().contiguous().clone() for name, x in self.model.named_parameters()}
        save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
        write_text(folder / TOKENIZER, self.tokenizer.to_str())
        recipe = self.recipe
        if recipe.entry.file is not None:
            (folder / recipe.entry.file.name).write_bytes(own.source(recipe.entry))
            # beside the recipe, wherever the folder goes
            recipe = recipe.model_copy(update={"experiment": f"{recipe.entry.file.name}:{recipe.entry.name}"})
        write_text(folder / "recipe.toml", recipe.toml())
        files = {path.name: sha256(path) for path in sorted(folder.iterdir())}
        told = {
            "format": FORMAT,
            "experiment": self.recipe.entry.name,
            "step": self.step,
            "parameters": sum(x.numel() for x in weights.values()),
            "config": configuration.to_dict(self.model.config),
            "files": files,
        }
        write_json(folder / "config.json", {**told, "digest": digest(told)})
        return folder


def load(path: Path | str, *, step: int | None = None, impl: kernels.Impl = "auto") -> Trained:
    """The model of a run's folder, at its newest whole checkpoint or after `step` steps, or of an exported folder.

    Nothing is unpickled but tensors; files are compared with their hashes. An experiment's own file is executed, the
    copy beside the weights.

    Raises:
        UsageError: no run and no export, another step, a damaged file; one line.
        march.config.ConfigError: the experiment is not known here.
    """
    path = Path(path)
    if (path / WEIGHTS).is_file():
        if step is not None:
            raise UsageError(f"expected a run's folder with a step, got {path}, one exported model; leave step out")
        return _exported(path, impl)
    folder = RunFolder(path)
    if not folder.holds_run():
        raise UsageError(f"expected a run's folder or an exported one, got {path}; see march runs")
    checkpoints = Checkpoints(folder.checkpoints, 1)
    if step is not None and tag_of(step) not in checkpoints.tags():
        there = ", ".join(str(int(tag[-8:])) for tag in checkpoints.tags()) or "no checkpoint"
        raise UsageError(f"expected a step that {path} has, {there}, got {step}; leave step out for the newest")
    checkpoint = checkpoints.load(None if step is None else tag_of(step))
    run: Any = checkpoint.state.get("run")
    if not isinstance(run, dict) or not isinstance(run.get("recipe"), dict) or not isinstance(run.get("config"), dict):
        raise UsageError(f"{checkpoint.path}: expected a run's recipe and configuration, got others; it is damaged")
    return _built(
        path, run["recipe"], (run.get("file") or {}).get("sha256"), run["config"], checkpoint.tensors["model"],
        checkpoint.step, impl,
    )  # fmt: skip


def _exported(path: Path, impl: kernels.Impl) -> Trained:
    from safetensors.torch import load_file

    told = read_json(path / "config.json")
    if told.pop("digest", None) != digest(told):
        raise UsageError(f"expected config.json in {path} as it was written, got another; export again")
    if told["format"] != FORMAT:
        raise UsageError(f"expected an exported model of format {FORMAT}, got {told['format']} in {path}; export again")
    files, step, config = told["files"], told["step"], told["config"]
    for name, wanted in files.items():
        file = path / Path(name).name
        if not file.is_file() or sha256(file) != wanted:
            got = "other bytes" if file.is_file() else "none"
            raise UsageError(f"expected {name} in {path} as config.json says, got {got}; copy or export it again")
    try:
        tensors = load_file(path / WEIGHTS)
    except Exception as error:  # whatever the reader makes of foreign bytes
        raise UsageError(f"expected tensors in {path / WEIGHTS}, got {first_line(error)[:80]}; export again") from error
    source = next((digest for name, digest in files.items() if name.endswith(".py")), None)
    tree = recipes.tree_of(str(path / "recipe.toml"))
    return _built(path, tree, source, config, tensors, step, impl)


def _built(
    path: Path,
    tree: dict[str, Any],
    source: str | None,
    config: dict[str, Any],
    tensors: dict[str, torch.Tensor],
    step: int,
    impl: kernels.Impl,
) -> Trained:
    """source: SHA-256 of the experiment's own file; tensors: by the names of the model's parameters."""
    if source is not None:
        file, _, name = tree["experiment"].rpartition(":")
        copy = path / Path(file).name
        if not copy.is_file() or sha256(copy) != source:
            got = "another" if copy.is_file() else "none"
            raise UsageError(f"expected {copy}, the experiment's own file with sha256 {source[:16]}, got {got}")
        tree = {**tree, "experiment": f"{copy}:{name}"}
    found = recipes.build(tree, str(path))
    if not (path / TOKENIZER).is_file():
        raise UsageError(f"expected {TOKENIZER} in {path}, got none; copy it from the prepared text")
    tokenizer = vocabulary.load(path / TOKENIZER)
    decided = {"vocab_size": config.get("vocab_size"), "precision": config.get("precision")}
    model = build_model(found.entry, impl=impl, seed=0, **{**found.model, **decided})
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        got = " ".join(str(error).split())[:200]
        raise UsageError(f"{path}: expected the model's parameters, got others ({got}); it is damaged") from error
    return Trained(model.eval(), tokenizer, found, step)


def _choose(
    logits: torch.Tensor, temperature: float, top_k: int | None, generator: torch.Generator
) -> tuple[int, float]:
    """A token of `logits` [V], and its ln p among those that may be chosen."""
    score = torch.log_softmax(logits, 0)
    if temperature == 0:
        token = int(score.argmax())
    else:
        if top_k is not None:
            least = logits.topk(min(top_k, int(torch.isfinite(logits).sum()))).values[-1]
            logits = logits.masked_fill(logits < least, -torch.inf)
        token = int(torch.multinomial(torch.softmax(logits / temperature, 0), 1, generator=generator))
    return token, float(score[token])
