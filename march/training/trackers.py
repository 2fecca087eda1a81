"""Where a run's metrics go beside metrics.jsonl: TensorBoard, and the trackers that `logging.trackers` names.

A tracker is imported when a run asks for it. Projects, servers and offline modes are its own environment variables'
(WANDB_PROJECT, WANDB_MODE=offline, TRACKIO_PROJECT, TRACKIO_DIR).
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import json
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from march.console import UsageError
from march.recipe import leaves

FINAL = {"mean_last_losses": "loss", "eval_loss": "eval_loss", "test_loss": "test_loss"}  # of summary.json


@dataclass(frozen=True)
class About:
    """A run as trackers know it. name: the same after every resume, unlike the folder's. settings: bool, str, numbers
    by dotted name."""

    name: str
    experiment: str
    settings: Mapping[str, Any]

    @classmethod
    def of(cls, run: Mapping[str, Any]) -> About:
        """Of what config.json says."""
        identity = json.dumps([run["experiment"], run["seed"], run["started"]])
        digest = hashlib.sha256(identity.encode()).hexdigest()[:8]
        told = leaves({**run["recipe"], "config": run["config"]})
        settings = {name: v if isinstance(v, bool | str | int | float) else str(v) for name, v in told}
        return cls(f"{run['experiment']}-seed{run['seed']}-{digest}", run["experiment"], settings)


def scalars(row: Mapping[str, Any]) -> dict[str, float]:
    """A line of metrics.jsonl by the names of the field: train/loss, eval/loss."""
    return {
        "eval/loss" if name == "eval_loss" else f"train/{name}": value
        for name, value in row.items()
        if isinstance(value, float)
    }


class Tracker(Protocol):
    """Any of its methods may raise: it is left out then, and training goes on. has: the last step that it has from an
    earlier start; a killed one may not have sent all that metrics.jsonl has."""

    has: int

    def add(self, step: int, values: Mapping[str, float]) -> None: ...

    def end(self, step: int, final: Mapping[str, float], finished: bool) -> None:
        """The last call. final: losses of a finished run."""


class TensorBoard:
    """A file of events, each step on the disk when `add` returns.

    Not torch's SummaryWriter: it writes in a thread, which ends with a traceback when the disk is full.
    """

    def __init__(self, folder: Path, step: int, about: About | None = None):
        """What other files there say of steps after `step` does not count. about: becomes hparams."""
        folder.mkdir(exist_ok=True)
        before = len(list(folder.iterdir()))
        self.has = step if before else 0
        # read in the order of their names
        name = f"{int(time.time())}.{platform.node()}.{os.getpid()}.{before:05}"
        self._path = folder / f"events.out.tfevents.{name}"
        self._write(file_version="brain.Event:2")
        from tensorboard.compat.proto.event_pb2 import SessionLog

        self._write(step=self.has + 1, session_log=SessionLog(status=SessionLog.START))
        if about:
            from tensorboard.plugins.hparams import api_pb2, metadata, plugin_data_pb2, summary_v2

            metrics = [
                api_pb2.MetricInfo(name=api_pb2.MetricName(tag=f"final/{name}"), display_name=name)
                for name in FINAL.values()
            ]
            types = {bool: api_pb2.DATA_TYPE_BOOL, str: api_pb2.DATA_TYPE_STRING}
            columns = [
                api_pb2.HParamInfo(name=name, type=types.get(type(value), api_pb2.DATA_TYPE_FLOAT64))
                for name, value in about.settings.items()
            ]
            experiment = api_pb2.Experiment(hparam_infos=columns, metric_infos=metrics)
            data = plugin_data_pb2.HParamsPluginData(experiment=experiment)
            self._write(summary=_plugin(metadata.EXPERIMENT_TAG, data))
            self._write(summary=summary_v2.hparams_pb(dict(about.settings), trial_id=about.name))

    def add(self, step: int, values: Mapping[str, float]) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        self._write(step=step, summary=Summary(value=[Summary.Value(tag=t, simple_value=v) for t, v in values.items()]))

    def end(self, step: int, final: Mapping[str, float], finished: bool) -> None:
        if not finished:  # the page keeps the first end that it reads, and this run may be continued
            return
        from tensorboard.plugins.hparams import api_pb2, metadata, plugin_data_pb2

        self.add(step, final)
        end = plugin_data_pb2.SessionEndInfo(status=api_pb2.STATUS_SUCCESS, end_time_secs=time.time())
        data = plugin_data_pb2.HParamsPluginData(session_end_info=end)
        self._write(summary=_plugin(metadata.SESSION_END_INFO_TAG, data))

    def _write(self, **what: Any) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.summary.writer.record_writer import RecordWriter

        with open(self._path, "ab") as file:
            RecordWriter(file).write(Event(wall_time=time.time(), **what).SerializeToString())


def _plugin(tag: str, data: Any) -> Any:
    """A summary that carries `data` to TensorBoard's page of hparams."""
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.plugins.hparams import metadata

    told = metadata.create_summary_metadata(data)
    return Summary(value=[Summary.Value(tag=tag, metadata=told, tensor=metadata.NULL_TENSOR)])


class WandB:
    """Weights & Biases; its files in the run's folder."""

    def __init__(self, about: About, folder: Path):
        project = {} if os.environ.get("WANDB_PROJECT") else {"project": "march"}
        self._run = importlib.import_module("wandb").init(
            id=about.name,
            name=about.name,
            group=about.experiment,
            config=dict(about.settings),
            resume="allow",
            dir=str(folder),
            **project,
        )
        self.has = self._run.step - 1

    def add(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def end(self, step: int, final: Mapping[str, float], finished: bool) -> None:
        self._run.summary.update(dict(final))
        self._run.finish(exit_code=0 if finished else 1)


class Trackio:
    def __init__(self, about: About, folder: Path):
        self._run = importlib.import_module("trackio").init(
            project=os.environ.get("TRACKIO_PROJECT") or "march",
            name=about.name,
            group=about.experiment,
            config=dict(about.settings),
            resume="allow",
        )
        self.has = getattr(self._run, "_next_step", 0) - 1  # it tells nobody; without, steps come twice

    def add(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def end(self, step: int, final: Mapping[str, float], finished: bool) -> None:
        if final:
            self._run.log(dict(final), step=step)
        self._run.finish()


TRACKERS: dict[str, Callable[[About, Path], Tracker]] = {"wandb": WandB, "trackio": Trackio}


def require(names: Sequence[str]) -> None:
    """UsageError where a tracker's package is missing, before a run takes time; imports nothing."""
    for name in names:
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:  # wandb leaves a folder of its name: an empty package to Python
            raise UsageError(
                f"expected the package {name} for logging.trackers, got none; pip install {name}, or leave it out"
            )
