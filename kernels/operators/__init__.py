"""The operators' records, one file each; a new file is a new operator."""

import importlib
import pkgutil

from kernels.operators.record import Operator

_FOUND = [importlib.import_module(f"{__name__}.{m.name}") for m in pkgutil.iter_modules(__path__) if m.name != "record"]
OPERATORS: dict[str, Operator] = {module.RECORD.name: module.RECORD for module in _FOUND}
