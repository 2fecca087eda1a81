"""A thread in every process that sees what the training loop cannot: signals while a collective waits, a launcher that
died, a rank that fell silent, an orderly end that takes too long. Whatever happens, a run ends within a bound, with one
line that names the cause and the command to continue, and leaves no process behind.
"""

from __future__ import annotations

import contextlib
import math
import os
import select
import signal
import socket
import threading
import time
from dataclasses import dataclass
from datetime import timedelta

import psutil
import torch.distributed as torch_distributed

from march.training.distributed import World
from march.training.errors import RunError, UsageError

# Seconds: how long a rank may be silent, and an orderly end go without progress.
TIMEOUT, TIMEOUT_VARIABLE = 60.0, "MARCH_TIMEOUT"
# SIGUSR1, SIGXCPU: what batch systems send before the time is over. All of them end a process that does not listen.
ENDING = (
    *(signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT),
    *(signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU),
)
# Parts of messages of gloo, NCCL and TCPStore when the other end is gone or does not answer.
LOST = ("gloo", "nccl", "connection closed", "connection reset", "socket", "timed out", "broken pipe")


@dataclass
class Peer:
    """Another rank: where it runs, and when it last said so."""

    rank: int
    host: str
    process: int
    created: float
    seen: float
    beat: str = ""

    @property
    def name(self) -> str:
        return f"rank {self.rank} (process {self.process} on {self.host})"

    def here(self) -> psutil.Process | None:
        """Its process, where that is on this machine; not another one of the same number."""
        if self.host == socket.gethostname():
            with contextlib.suppress(psutil.Error):
                process = psutil.Process(self.process)
                return process if process.create_time() == self.created else None
        return None

    def is_dead(self) -> bool:
        return self.host == socket.gethostname() and not _is_alive(self.here())


class Watch:
    """Enter it in the main thread. `reason` is set by the first ending signal, or by the launcher's death.

    Before `orderly` is set there is nothing to save and the process ends at once; after it, the loop reads `reason`,
    saves and leaves, and calls `progress` on its way. A second SIGINT ends the process at once; not a SIGTERM after a
    SIGINT, which is what DeepSpeed's launch process sends after Ctrl-C.
    """

    def __init__(self, world: World | None = None):
        """Collective where the world has several ranks."""
        self.reason: str | None = None
        self.exit_code = 0
        self.orderly = False
        self.advice = "start again"  # the command that continues the run
        self.timeout = timeout()
        self._world = world
        self._closed = threading.Event()
        self._steps = 0
        self._alive = self._tick = time.monotonic()
        self._launcher = launcher_processes()
        self._peers = _peers(world) if world and world.size > 1 else {}

    def __enter__(self) -> Watch:
        self._read, self._write = socket.socketpair()
        self._write.setblocking(False)
        self._previous_fd = signal.set_wakeup_fd(self._write.fileno(), warn_on_full_buffer=False)
        self._previous = {}
        for number in ENDING:
            # nohup: whoever set it wants the run to outlive its terminal
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                self._previous[number] = signal.signal(number, lambda *_: None)  # the thread reads it
        self._threads = [threading.Thread(target=self._watch, daemon=True)]
        if self._peers:
            self._threads.append(threading.Thread(target=self._beat, daemon=True))
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._previous_fd)
        self._write.close()
        self._threads[0].join()
        self._read.close()

    def progress(self) -> None:
        """The main thread is at work."""
        self._steps += 1
        self._alive = time.monotonic()

    def lost(self, error: BaseException) -> RunError | None:
        """What to say when a collective failed because another rank is gone; None for other errors."""
        if not self._peers or not isinstance(error, RuntimeError) or isinstance(error, RunError):
            return None
        if not any(part in str(error).lower() for part in LOST):
            return None
        dead: list[Peer] = []
        end = time.monotonic() + 3
        while not dead and time.monotonic() < end:
            dead = [peer for peer in self._peers.values() if peer.is_dead()]
            time.sleep(0.05)
        names = ", ".join(peer.name for peer in dead) or "another rank"
        found = RunError(f"{names} ended without a word: ended with it; continue with {self.advice}")
        found.report = self._reports({peer.rank for peer in dead})
        return found

    def _reports(self, gone: set[int]) -> bool:
        """One of the ranks that are left says it."""
        assert self._world is not None
        return self._world.rank == min({self._world.rank, *self._peers} - gone)

    def _watch(self) -> None:
        while not self._closed.is_set():
            if select.select([self._read], [], [], 0.5)[0]:
                for number in self._read.recv(64):
                    self._on_signal(signal.Signals(number))
            if self.reason is None and not all(_is_alive(process) for process in self._launcher):
                self._stop("end of the launcher", 128 + signal.SIGTERM)
            now = time.monotonic()
            if now - self._tick > self.timeout / 2:  # this process was stopped itself, or the machine asleep
                self._alive = now
                for peer in self._peers.values():
                    peer.seen = now
            self._tick = now
            self._check_peers(now)
            if self.reason is not None and now - self._alive > self.timeout:
                self._end(
                    self.exit_code,
                    f"no orderly end within {self.timeout:.0f} s of {self.reason}: ended without a further checkpoint; "
                    f"continue with {self.advice}",
                )

    def _on_signal(self, number: signal.Signals) -> None:
        if number not in self._previous:
            return
        if self.reason == "SIGINT" == number.name:
            self._end(128 + number, "second SIGINT: ended at once, without a checkpoint")
        if self.reason is None:
            self._stop(number.name, 128 + number)

    def _stop(self, reason: str, exit_code: int) -> None:
        self._alive = time.monotonic()
        self.exit_code = exit_code
        self.reason = reason
        if not self.orderly:
            self._end(exit_code, f"stopped by {reason} before the first step; {self.advice}")

    def _check_peers(self, now: float) -> None:
        silent = {rank: peer for rank, peer in self._peers.items() if now - peer.seen > self.timeout}
        if not silent:
            return
        if len(silent) == len(self._peers) and 0 in silent:
            # rank 0 holds the store: when it is stopped, nobody hears of anybody
            silent = {0: silent[0]}
        names = ", ".join(peer.name for peer in silent.values())
        text = f"{names} has not answered for {self.timeout:.0f} s: ended; continue with {self.advice}"
        self._end(1, text if self._reports(set(silent)) else "", silent)

    def _end(self, code: int, text: str, silent: dict[int, Peer] | None = None) -> None:
        if text and (silent or self._world is None or self._world.is_first):
            # not print: its lock may be held by the thread that hangs
            with contextlib.suppress(OSError):
                os.write(2, f"\ntrain.py: {text}\n".encode())
        for rank, peer in self._peers.items():
            process = peer.here()
            if process is not None and (rank in (silent or {}) or _is_stopped(process)):
                with contextlib.suppress(psutil.Error):
                    process.kill()  # a stopped process takes no other signal, and nobody else would end it
        os._exit(code)

    def _beat(self) -> None:
        """Says each second that this process lives, and hears the others; waits for nobody but rank 0's store."""
        assert self._world is not None
        count = 0
        try:
            # a connection of its own: the default one is locked while the main thread waits in it
            store = torch_distributed.TCPStore(
                os.environ["MASTER_ADDR"],
                int(os.environ["MASTER_PORT"]),
                is_master=False,
                wait_for_workers=False,
                timeout=timedelta(seconds=self.timeout),
            )
            while not self._closed.is_set():
                count += 1
                store.set(f"march-beat/{self._world.rank}", f"{count} {self._steps}")
                for rank, peer in self._peers.items():
                    key = f"march-beat/{rank}"
                    if store.check([key]) and (beat := store.get(key).decode()) != peer.beat:
                        peer.beat, peer.seen = beat, time.monotonic()
                self._closed.wait(1.0)
        except (RuntimeError, ValueError):
            return  # the store is gone with rank 0: its silence, and that of all others, is seen in `_watch`


def timeout() -> float:
    """Seconds from MARCH_TIMEOUT, or the default.

    Raises:
        UsageError: no positive number.
    """
    text = os.environ.get(TIMEOUT_VARIABLE, str(TIMEOUT))
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise UsageError(f"expected {TIMEOUT_VARIABLE} as a number of seconds, got {text!r}; unset it, or give 60")
    return seconds


def _peers(world: World) -> dict[int, Peer]:
    gathered: list = [None] * world.size
    torch_distributed.all_gather_object(gathered, (socket.gethostname(), os.getpid(), psutil.Process().create_time()))
    now = time.monotonic()
    return {
        rank: Peer(rank, host, process, created, now)
        for rank, (host, process, created) in enumerate(gathered)
        if rank != world.rank
    }


def launcher_processes() -> list[psutil.Process | None]:
    """DeepSpeed's launch process and its runner, where they are this process's parent and grandparent; [None] where
    the launch process has died already."""
    found: list[psutil.Process | None] = []
    with contextlib.suppress(psutil.Error):
        launch = psutil.Process().parent()
        if launch is not None and any("deepspeed.launcher.launch" in part for part in launch.cmdline()):
            found.append(launch)
            runner = launch.parent()
            names = {os.path.basename(part) for part in runner.cmdline()[:3]} if runner is not None else set()
            if names & {"deepspeed", "ds", "deepspeed.pt", "runner.py"}:
                found.append(runner)
    # CROSS_SIZE comes from DeepSpeed's launch process alone
    return found or ([None] if "CROSS_SIZE" in os.environ else [])


def _is_alive(process: psutil.Process | None) -> bool:
    if process is None:
        return False
    try:
        # is_running compares creation times, so a reused process id is not mistaken for the launcher
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def _is_stopped(process: psutil.Process | None) -> bool:
    with contextlib.suppress(psutil.Error):
        return process is not None and process.status() == psutil.STATUS_STOPPED
    return False
