"""The self-test of every fused operator, in every dtype, one line each: `python -m bench.self_test`.

On a CUDA device, or under TRITON_INTERPRET=1, in float32 only (the interpreter is silently wrong in bfloat16). Unlike a
run's own check it goes on after a disagreement and remembers nothing. Exit status 1 where one disagrees.
"""

import sys
import time

import torch

from kernels import selftest
from kernels.calls import fused_function, generic_calls
from kernels.dispatch import OPERATORS, triton_interpreted

MARK = "check: "


def check(operator: str, device: torch.device, dtype: torch.dtype) -> str:
    """ "" where the fused kernel agrees with the formula, else what is wrong."""
    try:
        calls, function = generic_calls(operator, dtype), fused_function(operator)
        return "; ".join(problem for call in calls for problem in selftest.disagreements(call, function, device))
    except Exception as error:  # a kernel that does not compile here is what this is for
        return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def main() -> int:
    quick = "--quick" in sys.argv[1:]
    cuda = torch.cuda.is_available()
    if not cuda and not triton_interpreted():
        print("bench.self_test: expected a CUDA device or TRITON_INTERPRET=1, found neither", file=sys.stderr)
        return 2
    device = torch.device("cuda") if cuda else torch.device("cpu")
    failed = False
    for dtype in (torch.bfloat16, torch.float32) if cuda else (torch.float32,):
        for operator in ("residual_norm",) if quick else OPERATORS:
            start = time.perf_counter()
            problem = check(operator, device, dtype)
            failed |= bool(problem)
            seconds = time.perf_counter() - start
            name = str(dtype).removeprefix("torch.")
            print(f"{MARK}{operator} {name}: {problem or 'agrees with the formula'} ({seconds:.1f} s)", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
