"""Runs code in an interpreter without TRITON_INTERPRET, where kernels compile; its last line is JSON.

One process that has imported torch and Triton forks for each piece of code: 2 s of imports are spared every time.
"""

import atexit
import json
import os
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SERVER = """
import contextlib, json, os, sys, traceback
import torch, kernels, kernels.calls, kernels.compile_only

for line in sys.stdin:
    code, arguments, folder = json.loads(line)
    child = os.fork()
    if child == 0:
        with open(f"{folder}/out", "w") as out, open(f"{folder}/errors", "w") as errors:
            os.dup2(out.fileno(), 1)
            os.dup2(errors.fileno(), 2)
            sys.argv, status = ["-c", *arguments], 0
            try:
                exec(compile(code, "code", "exec"), {"__name__": "__main__"})
            except SystemExit as end:
                status = end.code or 0
            except BaseException:
                traceback.print_exc()
                status = 1
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
_servers: list[subprocess.Popen] = []


def environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return kept | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests" / "kernels")])}


def _server() -> subprocess.Popen:
    if not _servers:
        command, pipe = [sys.executable, "-c", SERVER], subprocess.PIPE
        _servers.append(subprocess.Popen(command, cwd=ROOT, env=environment(), stdin=pipe, stdout=pipe, text=True))
        atexit.register(_servers[0].stdin.close)
    return _servers[0]


def compiled(code: str, *arguments: str) -> Any:
    """What `code` prints last, parsed; it sees `arguments` in sys.argv[1:]."""
    server = _server()
    with tempfile.TemporaryDirectory() as folder:
        server.stdin.write(json.dumps([textwrap.dedent(code), arguments, folder]) + "\n")
        server.stdin.flush()
        status = server.stdout.readline().strip()
        out, errors = ((Path(folder) / name).read_text() for name in ("out", "errors"))
    assert status == "0", f"status {status or 'none: the server ended'}: {errors[-4000:]}"
    return json.loads(out.splitlines()[-1])
