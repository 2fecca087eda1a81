"""The operators' records, one file each; a new file is a new operator."""

import importlib
import pkgutil

from kernels.operators.record import Operator
from kernels.validation import Contract

_FOUND = [importlib.import_module(f"{__name__}.{m.name}") for m in pkgutil.iter_modules(__path__) if m.name != "record"]
OPERATORS: dict[str, Operator] = {module.RECORD.name: module.RECORD for module in _FOUND}
CONTRACTS: dict[str, Contract] = {
    name: contract
    for record in OPERATORS.values()
    for name, contract in ({record.name: record.contract} | dict(record.forms)).items()
}


def saved(name: str) -> tuple[str, ...]:
    """What backward of an operator or a packed form must see again."""
    return OPERATORS[name].saved if name in OPERATORS else (*CONTRACTS[name].tensors, "out", "lse")
