"""The arrows between the packages, read from the imports themselves, and the rules of the layout."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# package -> first parts that it may import of this repository
ALLOWED = {
    "kernels": {"kernels"},
    "march/config.py": set(),
    "march/cli.py": {"march.config", "march.console"},  # the commands by name, when they are called
    "march/recipe_groups.py": set(),
    "march/recipe.py": {"march.config", "march.console", "march.data", "march.experiments", "march.recipe_groups"},
    "march/experiments": {"march.config", "march.experiments"},
    "march/model": {"kernels", "march.config", "march.experiments", "march.model"},
    "march/data": {"march.data", "march.console"},
    "march/cost": {"kernels", "march.config", "march.experiments", "march.model", "march.cost"},
    "march/check": {
        "kernels",
        "march.config",
        "march.console",
        "march.experiments",
        "march.model",
        "march.cost",
        "march.check",
    },
    "march/report": {
        "kernels",
        "march.config",
        "march.experiments",
        "march.cost",
        "march.data",
        "march.report",
        "march.recipe",
    },
    "march/compare": {
        "march.config",
        "march.console",
        "march.experiments",
        "march.data",
        "march.cost",
        "march.compare",
        "march.recipe",
        "march.training",
    },
    "march/predecessor": {"kernels", "march.config", "march.experiments", "march.model", "march.predecessor"},
    "march/training": {
        "kernels",
        "march.config",
        "march.console",
        "march.experiments",
        "march.model",
        "march.data",
        "march.cost",
        "march.report",
        "march.recipe",
        "march.training",
    },
}
# march itself: its lazy front door, build_model and the version
FRONT_DOOR = {"march"}
NO_TORCH = (
    "march/config.py",
    "march/experiments",
    "march/cost/devices.py",
    "march/console.py",
    "march/cli.py",
    "march/recipe.py",
    "march/recipe_groups.py",
)
MAX_LINES, MAX_KERNEL_LINES = 400, 600


def python_files(place: str) -> list[Path]:
    path = ROOT / place
    return [path] if path.is_file() else sorted(path.rglob("*.py"))


def imports(path: Path) -> set[str]:
    """Full names of the modules that a file imports, wherever in it."""
    found: set[str] = set()
    package = ".".join(path.relative_to(ROOT).parts[:-1])
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = f"{package}.{node.module or ''}".rstrip(".") if node.level else node.module or ""
            found |= {base} | {
                f"{base}.{alias.name}"
                for alias in node.names
                if (ROOT / base.replace(".", "/") / f"{alias.name}.py").exists()
                or (ROOT / base.replace(".", "/") / alias.name).is_dir()
            }
    return found


def ours(name: str) -> bool:
    return name.split(".")[0] in {"kernels", "march", "bench", "tests", "train"}


def permitted(name: str, allowed: set[str]) -> bool:
    return name in FRONT_DOOR or any(name == a or name.startswith(f"{a}.") for a in allowed)


@pytest.mark.parametrize("place", ALLOWED)
def test_imports_follow_the_arrows(place):
    wrong = {
        f"{path.relative_to(ROOT)} imports {name}"
        for path in python_files(place)
        for name in imports(path)
        if ours(name) and not permitted(name, ALLOWED[place])
    }
    assert not wrong


def test_the_front_door_is_lazy():
    code = "import sys, march; sys.exit(any(m.split('.')[0] in ('torch', 'kernels') for m in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_only_layers_and_the_model_call_operators():
    """march/model is the sole importer of kernels' operators; others use the seam's descriptions."""
    for path in python_files("march"):
        if path.is_relative_to(ROOT / "march/model"):
            continue
        source = path.read_text(encoding="utf-8")
        for operator in ("attention", "glu", "residual_norm", "linear_cross_entropy", "embedding"):
            assert f"kernels.{operator}(" not in source, path


def test_only_fused_imports_triton():
    for path in python_files("kernels"):
        inside = path.is_relative_to(ROOT / "kernels/fused") or path.name.startswith(("compile_only", "tune"))
        inside = inside or path.is_relative_to(ROOT / "kernels/compile_only")
        if not inside:
            assert not any(name.split(".")[0] == "triton" for name in imports(path)), path


@pytest.mark.parametrize("place", NO_TORCH)
def test_configuration_imports_no_torch(place):
    for path in python_files(place):
        assert not any(name.split(".")[0] in ("torch", "deepspeed", "triton") for name in imports(path)), path


def test_files_stay_readable():
    long = {
        str(path.relative_to(ROOT)): count
        for place, limit in (("march", MAX_LINES), ("kernels", MAX_KERNEL_LINES))
        for path in python_files(place)
        if (count := len(path.read_text(encoding="utf-8").splitlines())) > limit and path.name != "catalog.py"  # data
    }
    assert not long


def test_transformers_does_not_take_our_kernels_for_the_hub_package():
    """With `__version__` "1.0.0" it would; it compares with 0.0.x of this shape."""
    import kernels

    assert kernels.__version__.startswith("0.0.")
