"""A stand-in for train.py that the tests of comparisons start: the run folder and behaviour of a run, in milliseconds.

Options that it knows: --exp, --seed, --run-dir, --resume, --steps N, --pause SECONDS (a step), --set dropout=D (adds to
the loss), and in --exp a name: Fails and Diverges end so, Refused leaves no folder. Each start is a line of starts.txt
beside the cells' folders.
"""

import argparse
import fcntl
import json
import math
import os
import random
import signal
import sys
import time
from pathlib import Path

OFFSETS = {"SquaredReLU": -0.1, "NoPositions": 0.1}


def write(path: Path, content) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(content))
    temporary.replace(path)


def main() -> int:
    parser = argparse.ArgumentParser()
    for name, default in (("exp", "Baseline"), ("run-dir", None), ("resume", None)):
        parser.add_argument(f"--{name}", default=default)
    for name, default in (("seed", 42), ("steps", 6)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--pause", type=float, default=0.0)
    parser.add_argument("--set", action="append", default=[])
    given, _ = parser.parse_known_args()
    folder = Path(given.resume or given.run_dir)
    if given.resume:
        given = argparse.Namespace(**json.loads((folder / "config.json").read_text())["given"])
    if given.exp == "Refused":
        print("train.py: expected another option, got this one; fix it", file=sys.stderr)
        return 2
    folder.mkdir(parents=True, exist_ok=True)
    held = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)  # two at once are an error, as in train.py
    with open(folder.parents[1] / "starts.txt", "a") as file:
        file.write(f"{folder.parent.name}\n")
    write(folder / "config.json", {"experiment": given.exp, "seed": given.seed, "given": vars(given)})
    write(folder / "summary.json", {"finished": False, "stopped_by": "no end yet: running, or killed"})
    stopped = []
    signal.signal(signal.SIGTERM, lambda *_: stopped.append(1))
    saved = sorted(folder.glob("checkpoints/*/manifest.json"))
    done = json.loads(saved[-1].read_text()) if saved else []
    draw = random.Random(given.seed)
    shift = sum(float(value.partition("=")[2]) for value in given.set if value.startswith("dropout="))
    noise = [draw.gauss(0, 0.02) for _ in range(given.steps)]
    for step in range(len(done) + 1, given.steps + 1):
        if stopped:
            write(folder / "summary.json", {"finished": False, "stopped_by": "SIGTERM", "steps": step - 1})
            return 128 + signal.SIGTERM
        time.sleep(given.pause)
        own = random.Random(f"{given.exp} {given.seed} {step}").gauss(0, 0.002)
        loss = 4 + 8 / step + OFFSETS.get(given.exp, 0.0) + shift + noise[step - 1] + own
        done.append({"step": step, "loss": loss, "eval_loss": loss, "seconds": 0.1, "elapsed": 0.1 * step})
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in done))
        (folder / f"checkpoints/step-{step:03}").mkdir(parents=True, exist_ok=True)
        write(folder / f"checkpoints/step-{step:03}/manifest.json", done)
        if given.exp == "Fails" and step == 3:
            write(folder / "summary.json", {"finished": False, "failed": "the disk is full", "steps": step})
            return 1
        if given.exp == "Diverges" and step == 3:
            facts = {"failed": "loss is nan in step 3", "failed_step": 3, "steps": 2}
            write(folder / "summary.json", {"finished": False, **facts})
            return 1
    mean = math.fsum(row["loss"] for row in done) / len(done)
    end = {"finished": True, "steps": given.steps, "test_loss": mean, "eval_loss": done[-1]["loss"]}
    write(folder / "summary.json", {**end, "final_loss": done[-1]["loss"], "process_seconds": 1.0})
    return 0


if __name__ == "__main__":
    sys.exit(main())
