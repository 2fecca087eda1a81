"""Experiments of a file of your own: `my_idea.py:MyIdea`.

The file holds an `Experiment`; its `parts` say what of the file's code stands where in the model:

    block                   a subclass of march.model.Block
    norm                    of march.model.Norm
    activation              a kernels.activations.Activation
    self_attention, cross_attention, unified_attention, database_attention, feedforward
                            subclasses of march.model.Sublayer

The parts belong to that experiment alone: its configuration names them by the file's hash and place, no other does. A
file is one module, loaded from the bytes that were hashed; march.experiments.own.<...> imports it anew in another
process, so a model can be pickled.
"""

import contextlib
import hashlib
import importlib
import importlib.machinery
import importlib.util
import re
import sys
import traceback
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

from march.config import PARTS, ConfigError, nearest
from march.experiments.experiment import Experiment

__path__: list[str] = []  # a package for the import system: its modules are the files, which _Files finds
SPECS: dict[str, str] = {}  # FILE.py:NAME by ModelConfig.idea
_SPEC = re.compile(r"(?P<path>.*\.py)(?::(?P<name>.*))?|(?P<module>[^:]*):(?P<other>.*)", re.DOTALL)
ONE_FILE = "an idea is one file, which its runs keep: move the code into it"


def is_spec(text: str) -> bool:
    """Whether `text` means a file and not a name of the catalogue."""
    return _SPEC.fullmatch(text.strip()) is not None


def load(text: str) -> Experiment:
    """The experiment FILE.py:NAME, or FILE.py's only one; its own base and control may be names of that file.

    Raises:
        ConfigError: no such file or name, a file that cannot be imported, parts that are none; one line.
    """
    found = _SPEC.fullmatch(text.strip())
    assert found is not None
    if found["path"] is None:
        raise ConfigError(
            f"experiment: expected FILE.py:NAME, got {text!r}; write {found['module']}.py:{found['other']}"
        )
    path, module = _module(Path(found["path"]).expanduser())
    there = {x.name: x for x in vars(module).values() if isinstance(x, Experiment) and x.file is None}
    there |= {name: x for name, x in vars(module).items() if isinstance(x, Experiment) and x.file is None}
    name = found["name"]
    if name is None and len({id(x) for x in there.values()}) == 1:
        name = next(iter(there))
    if name not in there:
        close = nearest(name or "", list(there)) or list(there)
        hint = f"did you mean {', '.join(close)}?" if close else f"write {name or 'MyIdea'} = Experiment(...) in it"
        other = getattr(module, name or "", None)
        got = f"a {type(other).__name__} of that name" if other is not None else repr(name) if name else "no name"
        raise ConfigError(f"experiment: expected an Experiment of {path.name}, got {got}; {hint}")
    experiment = there[name]
    if not re.fullmatch(r"[\w.+-]{1,80}", experiment.name):
        raise ConfigError(
            f"{path.name}: expected a name that a folder can have, got {experiment.name!r}; use letters, digits, _"
        )
    linked: dict[str, Any] = {
        x: f"{path}:{n}" if n in there else n for x in ("base", "control") if (n := getattr(experiment, x))
    }
    if linked.get("base") == f"{path}:{name}":
        raise ConfigError(f"{path.name}: expected another experiment as the base of {name}, got itself; name Baseline")
    return replace(experiment, **linked, file=path, sha256=module.SHA256)


def source(experiment: Experiment) -> bytes:
    """The bytes of the experiment's file, as it was loaded."""
    return vars(sys.modules[_name(experiment.file, experiment.sha256)])["SOURCE"]


def fields(experiment: Experiment) -> dict[str, str]:
    """The fields of ModelConfig that stand for the code of an experiment."""
    if experiment.file is None and not experiment.parts:
        return {}
    base = {} if experiment.base is None or not is_spec(experiment.base) else load(experiment.base).parts
    # of the place too: the same bytes in another folder are other classes, and each process has to find the same name
    key = hashlib.sha256(f"{experiment.sha256}{experiment.file}".encode()).hexdigest()[:16]
    found = register(f"{experiment.name}@{key}", {**base, **experiment.parts})
    if experiment.file is not None:
        SPECS[found["idea"]] = experiment.spec
    return found


def register(name: str, parts: Mapping[str, Any]) -> dict[str, str]:
    """Makes `parts` known; the fields of ModelConfig that stand for them. The model checks them (march.model.parts)."""
    while name in PARTS and PARTS[name] != parts:  # of a notebook's cells, run again
        name += "'"
    PARTS[name] = dict(parts)
    return {"idea": name} | ({"activation": name} if "activation" in parts else {})


def _module(path: Path) -> tuple[Path, ModuleType]:
    """The module of a file as it is now; ConfigError, in one line, where it cannot be read or run."""
    try:
        source = path.read_bytes()
    except OSError as error:
        folder = path.parent if path.parent.is_dir() else Path()
        close = nearest(path.name, sorted(x.name for x in folder.glob("*.py")))
        hint = f"did you mean {', '.join(close)}?" if close else f"looked in {folder.absolute()}"
        raise ConfigError(f"experiment: expected a file of yours, got {path} ({error.strerror}); {hint}") from None
    path = path.absolute()
    name = _name(path, hashlib.sha256(source).hexdigest())
    try:
        with contextlib.redirect_stdout(sys.stderr):  # stdout is for what was asked
            return path, importlib.import_module(name)
    except (Exception, SystemExit) as error:
        raise ConfigError(f"experiment: {_said(error, path)}") from error


def _name(path: Path | None, sha256: str | None) -> str:
    assert path is not None
    stem = re.sub(r"\W", "_", path.stem)
    return f"{__name__}.{stem}-{sha256}-{str(path).encode().hex()}"


def _said(error: BaseException, path: Path) -> str:
    lines = [(f.lineno, f.line) for f in traceback.extract_tb(error.__traceback__) if f.filename == str(path)]
    if isinstance(error, SyntaxError) and error.filename == str(path):
        lines, error = [(error.lineno, (error.text or "").strip())], SyntaxError(error.msg)
    where = f" line {lines[-1][0]} ({lines[-1][1]})" if lines else ""
    missing = getattr(error, "name", None) if isinstance(error, ModuleNotFoundError) else None
    fix = ONE_FILE if missing and path.with_name(f"{missing.partition('.')[0]}.py").exists() else "mend that line"
    return f"expected {path.name} to load, got {type(error).__name__}: {' '.join(str(error).split())}{where}; {fix}"


class _Files:
    """Finds and runs the files: march.experiments.own.<name>-<sha256>-<path in hex>."""

    @classmethod
    def find_spec(cls, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if not name.startswith(f"{__name__}."):
            return None
        origin = bytes.fromhex(name.rpartition("-")[2]).decode()
        return importlib.util.spec_from_file_location(name, origin, loader=cls())  # type: ignore[arg-type]

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        assert module.__file__ is not None
        source = Path(module.__file__).read_bytes()
        wanted, got = module.__name__.split("-")[-2], hashlib.sha256(source).hexdigest()
        if got != wanted:
            raise ImportError(f"expected {module.__file__} with sha256 {wanted[:16]}, got {got[:16]}; it was changed")
        vars(module).update(SHA256=wanted, SOURCE=source)
        exec(compile(source, module.__file__, "exec", dont_inherit=True), vars(module))


if _Files not in sys.meta_path:
    sys.meta_path.append(_Files)  # type: ignore[arg-type]
