"""Child processes started together, watched, and stopped in the opposite order.

    start all, wait until each is healthy     one that dies or takes too long ends the run
    all healthy: wait                         for a signal, or for the death of one; a spare one
                                              is started anew, since others do its work
    stop, last one first                      SIGTERM, its grace, then SIGKILL to its whole group

Each service leads a process group of its own: a Ctrl-C at the terminal reaches only us, and a
service that is several processes can be killed as one. If we are killed ourselves, `tether` takes
the services along.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx

from sglang_stream.cli import tether
from sglang_stream.errors import WorkerUnavailable

PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h
LOG_LINES = 20
PROBE_INTERVAL_S = 0.5
PROBE_TIMEOUT_S = 30.0
KILL_CHECK_S = 0.02  # what is killed is gone within milliseconds, unless the kernel holds it
KILL_CHECKS = 250
RESTART_INTERVAL_S = 30.0


@dataclass(frozen=True)
class Service:
    """What to run and how to tell that it works.

    `health_url` answers 200 once the service can be used. `log`: where its output goes, None to
    share ours. `grace_s`: how long it may take to end by itself after SIGTERM. `spare`: once all
    are healthy the others go on when it ends.
    """

    name: str
    argv: Sequence[str]
    health_url: str
    env: Mapping[str, str] | None = None
    log: Path | None = None
    grace_s: float = 30.0
    spare: bool = False


class Child:
    """A running service and its process group."""

    def __init__(self, service: Service, process: asyncio.subprocess.Process) -> None:
        self.service = service
        self.process = process
        self.started_s = time.monotonic()

    @classmethod
    async def start(cls, service: Service) -> Child:
        """Runs the service's command. Raises OSError if its log cannot be written."""
        with contextlib.ExitStack() as files:
            out = files.enter_context(service.log.open("ab")) if service.log else None
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-I", tether.__file__, str(os.getpid()), *service.argv),
                env=dict(service.env) if service.env is not None else None,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=out,
                stderr=asyncio.subprocess.STDOUT if out else None,
                start_new_session=True,
            )
        return cls(service, process)

    async def stop(self, insist: asyncio.Event) -> None:
        """Ends the service and all its processes: politely at first, unless `insist` is set."""
        if self.process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self.process.terminate()
            await _first(self.process.wait(), insist.wait(), timeout_s=self.service.grace_s)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        await self.process.wait()
        for _ in range(KILL_CHECKS):
            if not _group_is_left(self.process.pid):
                break
            await asyncio.sleep(KILL_CHECK_S)

    def obituary(self) -> str:
        """How the service ended, with the last lines of its log."""
        code = self.process.returncode
        if code is not None and code < 0:
            how = f"was killed by {signal.Signals(-code).name}"
        else:
            how = f"ended with status {code}"
        return f"the {self.service.name} {how}{self.last_words()}"

    def last_words(self) -> str:
        """The last lines of the service's log, as the end of a message."""
        log = self.service.log
        if log is None or not log.is_file():
            return ""
        with log.open(encoding="utf-8", errors="replace") as lines:
            tail = "".join(deque(lines, maxlen=LOG_LINES)).rstrip()
        return f"; the end of its log {log}:\n{tail}" if tail else f"; its log {log} is empty"


class StopSignals:
    """The first signal asks us to stop (`asked`), a second one to do it at once (`insisted`)."""

    def __init__(self) -> None:
        self.asked = asyncio.Event()
        self.insisted = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            loop.add_signal_handler(number, self._receive)

    def _receive(self) -> None:
        (self.insisted if self.asked.is_set() else self.asked).set()


async def supervise(
    services: Sequence[Service],
    *,
    start_timeout_s: float,
    say: Callable[[str], None],
    on_ready: Callable[[], None],
) -> None:
    """Runs `services` until SIGINT, SIGTERM or SIGHUP, then returns with nothing left running.

    They start together, since each has much to load; `say` hears of each step and `on_ready` is
    called once when all are healthy. Raises WorkerUnavailable, also with nothing left running, if
    one of them ends by itself, except a spare one later on, or is not healthy after
    `start_timeout_s` seconds.
    """
    _adopt_orphans()
    signals = StopSignals()
    children: list[Child] = []
    try:
        for service in services:
            say(f"starting the {service.name}")
            children.append(await Child.start(service))
        deadline = time.monotonic() + start_timeout_s
        for service in services:
            say(f"waiting for the {service.name}")
            if await _watch(children, signals, service, deadline - time.monotonic()):
                return
        on_ready()
        while not await _watch(children, signals, spares_may_end=True):
            await _start_anew(children, signals, say)
    finally:
        for child in reversed(children):
            say(f"stopping the {child.service.name}")
            await child.stop(signals.insisted)


async def _watch(
    children: Sequence[Child],
    signals: StopSignals,
    starting: Service | None = None,
    timeout_s: float | None = None,
    *,
    spares_may_end: bool = False,
) -> bool:
    """Waits until `starting` is healthy, for the end of a spare child where it may end, or for a
    signal; whether it was a signal.

    Raises WorkerUnavailable on the death of any other child, or after `timeout_s` seconds.
    """
    ends: list[Awaitable[object]] = [child.process.wait() for child in children]
    if starting is not None:
        ends.append(_becomes_healthy(starting.health_url))
    happened = await _first(*ends, signals.asked.wait(), timeout_s=timeout_s)
    if signals.asked.is_set():
        return True
    for child in children:
        if child.process.returncode is not None and not (spares_may_end and child.service.spare):
            raise WorkerUnavailable(child.obituary())
    if not happened:
        late = next(child for child in children if child.service is starting)
        raise WorkerUnavailable(
            f"the {late.service.name} was not healthy in time: "
            f"raise --start-timeout-s if it only needs longer{late.last_words()}"
        )
    return False


async def _start_anew(
    children: list[Child], signals: StopSignals, say: Callable[[str], None]
) -> None:
    """Replaces the children that have ended; one that ends again at once waits a little."""
    for i, child in enumerate(children):
        if child.process.returncode is None:
            continue
        say(f"{child.obituary()}\nstarting it anew")
        await child.stop(signals.insisted)
        pause_s = child.started_s + RESTART_INTERVAL_S - time.monotonic()
        if pause_s > 0:
            await _first(signals.asked.wait(), timeout_s=pause_s)
        if signals.asked.is_set():
            return
        children[i] = await Child.start(child.service)


async def _first(*awaitables: Awaitable[object], timeout_s: float | None = None) -> bool:
    """Waits until one of `awaitables` is done and cancels the others; False if `timeout_s` passed.

    Raises what the one that is done raised.
    """
    tasks = [asyncio.ensure_future(a) for a in awaitables]
    try:
        done, _ = await asyncio.wait(tasks, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
        return bool(done)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _becomes_healthy(url: str) -> None:
    async with httpx.AsyncClient(timeout=PROBE_TIMEOUT_S, trust_env=False) as client:
        while True:
            with contextlib.suppress(httpx.TransportError):
                if (await client.get(url)).status_code == 200:
                    return
            await asyncio.sleep(PROBE_INTERVAL_S)


def _adopt_orphans() -> None:
    """Makes grandchildren whose parent died ours, so that `_group_is_left` can collect them.

    Without it their remains would wait for a process 1 that many containers do not have.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)


def _group_is_left(group: int) -> bool:
    """Collects what has died in a process group whose leader is gone; whether anything is left."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-group, os.WNOHANG)[0]:
            pass
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True
