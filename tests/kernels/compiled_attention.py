"""Compiles attention launches for a GPU that is not there; a program of its own, since kernels tested beside it are
interpreted. Input: cases as a JSON list in the only argument; output: rows of the report as a JSON list.

A case: {"arch", "operator", "width", "value_width", "dropout", "causal", "padding", "bank", "dtype", "offset",
"sizes"}, where sizes is a list of (batch, queries, keys), one call each.
"""

import json
import sys

import torch

import kernels
from kernels.compile_only import recording
from kernels.compile_only.report import reports
from kernels.dropout import Dropout

HEADS = 8


def _call(case, batch, queries, keys, site):
    dtype = getattr(torch, case.get("dtype", "bfloat16"))
    width = case["width"]
    value_width = case.get("value_width", width)

    def heads(length, n, k, of=batch):
        # an offset: rows that start at odd elements, as part of something wider
        offset = case.get("offset", 0)
        x = torch.empty(of, length, n, k + offset, dtype=dtype, device="meta", requires_grad=True)
        return x[..., offset:]

    dropout = None
    if case.get("dropout"):
        dropout = Dropout(0.1 + 0.01 * site, torch.empty(3, dtype=torch.int64, device="meta"), site)
    kwargs = {"dropout": dropout, "impl": "triton"}
    if case.get("padding") == "lengths":
        kwargs["key_lengths"] = torch.empty(batch, dtype=torch.int32, device="meta")
    elif case.get("padding") == "mask":
        kwargs["key_mask"] = torch.empty(batch, keys, dtype=torch.bool, device="meta")
    q = heads(queries, HEADS, width)
    if case.get("bank"):
        k, v = heads(keys, 1, width, 1), heads(keys, 1, value_width, 1)
    else:
        k, v = heads(keys, HEADS, width), heads(keys, HEADS, value_width)
    if case.get("segments") == 2:
        own = heads(queries, HEADS, width), heads(queries, HEADS, value_width)
        out = kernels.attention(q, *own, k, v, causal=True, **kwargs)
    else:
        out = kernels.attention(q, k, v, causal=bool(case.get("causal")), **kwargs)
    out.backward(torch.empty_like(out))


def main() -> None:
    rows = []
    for case in json.loads(sys.argv[1]):
        with recording(case.get("arch", "sm_86")) as launches:
            for site, sizes in enumerate(case["sizes"]):
                _call(case, *sizes, site)
        rows += [report.row() | {"case": case} for report in reports(launches)]
    json.dump(rows, sys.stdout)


if __name__ == "__main__":
    main()
