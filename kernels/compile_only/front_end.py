"""Triton's front end alone: a kernel's Python as TTIR, specialised as a launch would be. 0.1 s a program; no code is
generated for a target, and ptxas is not called."""

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from kernels.compile_only.record import Launch, recording


def make_ttir(
    function: Any, signature: Mapping[str, str], constants: Mapping[Any, Any], attributes: Mapping, arch: str
) -> Any:
    """TTIR of a kernel with these types, constants and attributes (alignment) of its arguments, as Triton's module.

    Raises what Triton's front end raises on Python that it cannot compile.
    """
    from triton._C.libtriton import ir
    from triton.backends.compiler import GPUTarget
    from triton.compiler.compiler import ASTSource, make_backend

    target = GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)
    backend = make_backend(target)
    options = backend.parse_options({})
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    source = ASTSource(function, dict(signature), dict(constants), dict(attributes))
    codegen = backend.get_codegen_implementation(options)
    ttir = source.make_ir(target, options, codegen, backend.get_module_map(), context)
    ttir.context = context  # which it does not keep alive
    return ttir


def problems(launches: Iterable[Launch]) -> list[str]:
    """One line a distinct program that the front end refuses: its kernel, arguments, and why."""
    found = []
    for launch in {launch.program: launch for launch in launches}.values():
        try:
            function, signature, constants, attributes = launch.source()
            make_ttir(function, signature, constants, attributes, launch.arch)
        except Exception as error:  # whatever Triton makes of it is the finding
            last = (str(error).strip().splitlines() or [""])[-1]
            found.append(f"{launch.program}: {type(error).__name__}: {error.__cause__ or last}")
    return found


@contextlib.contextmanager
def front_end_only(arch: str = "sm_86") -> Iterator[list[Launch]]:
    """`recording` that takes each distinct program through Triton's front end at its end, and compiles no further.

    Raises RuntimeError with a line for each program that the front end refuses.
    """
    with recording(arch, compile=False) as launches:
        yield launches
    found = problems(launches)
    if found:
        raise RuntimeError("front_end_only: expected programs that compile, got " + "\n".join(found))
