"""What this machine does at best: a large product and a large copy. The roof that the report draws where no data sheet
lists the device."""

import pytest
import torch

from bench import machine, timing

# 2048^3 in float32: 17 GFLOP, 0.1 to 0.5 s of two cores; the copy is far beyond any cache
SIDE, COPIED = 2048, 1 << 28


@pytest.mark.parametrize("what", ["product float32", "product bfloat16", "copy"])
def test_machine(what, benchmark, pytestconfig):
    device, smoke = machine.device(), pytestconfig.getoption("--smoke")
    dtype = torch.bfloat16 if what.endswith("bfloat16") else torch.float32
    if what == "copy":
        source = torch.ones((1 << 16 if smoke else COPIED) // 4, device=device)
        target, amount = torch.empty_like(source), {"bytes": 2 * source.nbytes}

        def run():
            target.copy_(source)
    else:
        side = 64 if smoke else SIDE
        a, b = (torch.ones(side, side, dtype=dtype, device=device) for _ in range(2))
        amount = {"flops": 2 * side**3}

        def run():
            torch.mm(a, b)

    benchmark.group = f"machine, {machine.kind()}"
    if benchmark.disabled:
        benchmark.pedantic(run)
        return
    samples = timing.measure(run, 0.0 if smoke else 0.5)
    timing.record(benchmark, samples.seconds)
    rates = {f"{name}_per_second": value / samples.median for name, value in amount.items()}
    benchmark.extra_info.update(
        suite="machine", what=what, kind=machine.kind(), dtype=str(dtype), **amount, **samples.quantiles(), **rates
    )
