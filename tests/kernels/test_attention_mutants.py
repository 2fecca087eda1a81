"""Mistakes inside the attention kernels: each is put into a copy of their source, and the checks must then fail."""

import importlib.util
from pathlib import Path

import pytest
import torch
from harness import check
from test_attention import case, dropout, small_tiles  # noqa: F401  a fixture

from kernels.fused import attention, attention_core, attention_kernels

COMMON = {"dropout": dropout(), "scale": 0.5}
CASES = {
    "causal": (case(1, 20, 50), COMMON | {"causal": True}, torch.float32),
    "lengths": (case(2, 20, 50), COMMON | {"key_lengths": torch.tensor([50, 18])}, torch.float32),
    "mask": (case(1, 20, 50), COMMON | {"key_mask": torch.arange(50)[None] % 3 != 1}, torch.float32),
    "shared": (case(2, 20, 40, heads=2, groups=1, shared=True), COMMON, torch.float32),
    "float16": (case(1, 40, 40, heads=2, groups=1, width=64), {}, torch.float16),
}

# name: (module, case, what stands there, what is put in its place)
CORE, PROGRAMS = attention_core, attention_kernels
MUTANTS = {
    "causal mask dropped": (CORE, "causal", "offs_n[None, :] <= last[:, None]", "offs_n[None, :] >= 0"),
    "future key seen": (CORE, "causal", "last = tl.minimum(offs_m,", "last = tl.minimum(offs_m + 1,"),
    "causal mask of dK, dV dropped": (PROGRAMS, "causal", "        if EDGE:", "        if False:"),
    "end of keys ignored": (CORE, "lengths", "(offs_n < key_end - start)[None, :]", "(offs_n >= 0)[None, :]"),
    "padding keys kept in dK, dV": (PROGRAMS, "lengths", "tl.where(real[:, None], x0, 0.0)", "x0"),
    "key mask dropped": (CORE, "mask", "s += tl.load(mask_ptr + start + offs_n)[None, :]", "pass"),
    "dropout of O shifted": (CORE, "lengths", "+ offs_n)\n                p =", "+ offs_n + 1)\n                p ="),
    "dropout of dQ shifted": (
        CORE,
        "lengths",
        "+ offs_n)\n                dp =",
        "+ offs_n + 1)\n                dp =",
    ),
    "dropout of dK, dV shifted": (PROGRAMS, "lengths", "(ckeys_ptr + offs_n)", "(ckeys_ptr + offs_n + 1)"),
    "dropout's row keys exchanged": (CORE, "lengths", "    return row_a, row_b", "    return row_b, row_a"),
    "old maximum kept": (CORE, "lengths", "acc0 *= alpha[:, None]", "pass"),
    "dQ scaled": (CORE, "lengths", "ds = (p * (dp", "ds = (1.01 * p * (dp"),
    "dK scaled": (PROGRAMS, "lengths", "ds = (p * (dp", "ds = (1.01 * p * (dp"),
    "dV scaled": (PROGRAMS, "lengths", "pd = tl.where(kept, p, 0.0)", "pd = tl.where(kept, p * 1.01, 0.0)"),
    "D scaled": (CORE, "lengths", "delta *= inverse_keep_scale", "pass"),
    "columns reversed": (CORE, "lengths", "x = x.to(ptr.dtype", "x = tl.flip(x, 1).to(ptr.dtype"),
    "a pair of shared keys left out": (
        PROGRAMS,
        "shared",
        "    for pair in range(lo_pair, hi_pair):\n        b =",
        "    for pair in range(lo_pair + 1, hi_pair):\n        b =",
    ),
    "a partial sum left out": (PROGRAMS, "shared", "in range(splits)", "in range(splits - 1)"),
    "further bits of O exchanged": (CORE, "float16", "even | (odd << 4)", "odd | (even << 4)"),
    "further bits of O negated": (CORE, "float16", "(steps << SHIFT)", "(-steps << SHIFT)"),
}


def _copy(module, tmp_path, old="", new=""):
    """`module` from a copy of its source in which `old` is `new`."""
    source = Path(module.__file__).read_text()
    if old:
        assert source.count(old) == 1, f"{source.count(old)} places in {module.__name__} read {old!r}, expected one"
    path = tmp_path / f"{module.__name__.rsplit('.', 1)[1]}.py"
    path.write_text(source.replace(old, new) if old else source)
    spec = importlib.util.spec_from_file_location(f"mutant_{path.stem}", path)
    copy = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(copy)
    return copy


def _install(monkeypatch, tmp_path, module, old="", new=""):
    copy = _copy(module, tmp_path, old, new)
    if module is attention_core:
        programs, core = _copy(attention_kernels, tmp_path), copy
        for name in vars(core):
            if name in vars(programs) and not name.startswith("__"):
                monkeypatch.setattr(programs, name, getattr(core, name))
        copy = programs
    monkeypatch.setattr(attention, "programs", copy)


@pytest.mark.parametrize("name", MUTANTS)
def test_mistakes_in_the_kernels_are_caught(small_tiles, monkeypatch, tmp_path, name):  # noqa: F811
    module, of, old, new = MUTANTS[name]
    _install(monkeypatch, tmp_path, module, old, new)
    inputs, kwargs, dtype = CASES[of]
    with pytest.raises(AssertionError, match="attention"):
        check("attention", inputs, kwargs, dtype, cancelling=("q", "k") if of == "causal" else ())


@pytest.mark.parametrize("module", [attention_core, attention_kernels], ids=lambda m: m.__name__.rsplit(".", 1)[1])
@pytest.mark.parametrize("of", CASES)
def test_a_copy_without_a_mistake_passes(small_tiles, monkeypatch, tmp_path, module, of):  # noqa: F811
    _install(monkeypatch, tmp_path, module)
    inputs, kwargs, dtype = CASES[of]
    check("attention", inputs, kwargs, dtype, cancelling=("q", "k") if of == "causal" else ())
