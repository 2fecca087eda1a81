"""residual_norm with NVIDIA apex's fused RMSNorm; the sum and the dropout stay plain torch operations.

`pip install apex` installs another project, a toolkit for web applications. NVIDIA's is recognised by the modules that
only it has: apex.normalization.fused_layer_norm and the compiled fused_layer_norm_cuda.
"""

import importlib
import importlib.util
from types import ModuleType

from torch import Tensor

from kernels import reference
from kernels.dispatch import ImplementationError
from kernels.dropout import Dropout

INSTALL = (
    "build NVIDIA's from source: `git clone https://github.com/NVIDIA/apex && cd apex && "
    "APEX_CPP_EXT=1 APEX_CUDA_EXT=1 pip install -v --no-build-isolation .`, or use impl='triton'"
)


def _found(name: str) -> bool:
    """Whether module `name` can be found; a package that is something else has no such submodule."""
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError, AttributeError):
        return False


def library() -> ModuleType:
    """apex.normalization.fused_layer_norm of NVIDIA's apex; ImplementationError where it is missing or another apex."""
    if not _found("apex"):
        raise ImplementationError(f"residual_norm: impl='apex' is not installed; {INSTALL}")
    if not _found("apex.normalization.fused_layer_norm"):
        raise ImplementationError(
            "residual_norm: the installed `apex` is not NVIDIA's (PyPI has a web toolkit of that name): remove it with "
            f"`pip uninstall apex` and {INSTALL}"
        )
    if not _found("fused_layer_norm_cuda"):
        raise ImplementationError(
            f"residual_norm: NVIDIA's apex is installed without its CUDA extension fused_layer_norm_cuda; {INSTALL}"
        )
    module = importlib.import_module("apex.normalization.fused_layer_norm")
    if not hasattr(module, "fused_rms_norm_affine"):
        raise ImplementationError(
            f"residual_norm: the installed apex is too old, it has no fused_rms_norm_affine; {INSTALL}"
        )
    return module


def residual_norm(
    x: Tensor | None, s: Tensor | None, gain: Tensor, *, dropout: Dropout | None, eps: float,
    features: int | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Contract in kernels.api.residual_norm, of whole rows: it knows no `features`."""
    norm = library().fused_rms_norm_affine
    if features not in (None, gain.shape[0]):
        raise ImplementationError(
            f"residual_norm: impl='apex' normalises all of a row, expected features {gain.shape[0]}, got {features}; "
            "use impl='triton' or give rows that are not filled up"
        )
    if s is None:
        assert x is not None
        y = x
    else:
        dropped = reference.drop(s, dropout)
        y = dropped if x is None else x + dropped
    return y, norm(y, gain, gain.shape, eps=eps).to(y.dtype)
