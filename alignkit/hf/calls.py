"""Functions of users called side by side, each with a limit of its time.

A sync function runs in threads of its own, an async one in the one event loop of the process, where clients and
semaphores of earlier calls stay valid. Both are daemons, so that nothing that hangs keeps the process alive.
"""

import asyncio
import inspect
import signal
import threading
import traceback
from collections.abc import Awaitable, Callable, Sequence
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from time import monotonic
from typing import Any

THREADS = 32


class Timeout(ValueError, TimeoutError):
    """A function took longer than it may."""


class Call:
    """`fn()`: after `run`, `wait` says whether it is over, and then there is a `value` or an `error`."""

    def __init__(self, fn: Callable[[], Any]):
        self.value: Any = None
        self.error: BaseException | None = None
        self._fn = fn
        self._began: float | None = None
        self._over = threading.Event()

    def run(self) -> None:
        """Call it here; what it returns to be awaited goes to the event loop."""
        self._began = monotonic()
        try:
            value = self._fn()
        except BaseException as error:
            self._end(error=error)
        else:
            if inspect.isawaitable(value):
                asyncio.run_coroutine_threadsafe(self._finish(value), _loop())
            else:
                self._end(value)

    async def _finish(self, value: Awaitable[Any]) -> None:
        try:
            self._end(await value)
        except BaseException as error:
            self._end(error=error)

    def _end(self, value: Any = None, error: BaseException | None = None) -> None:
        self.value, self.error = value, error
        self._over.set()

    def wait(self, timeout: float) -> bool:
        """Whether it is over, at the latest `timeout` seconds after it began."""
        began = monotonic() if self._began is None else self._began
        return self._over.wait(max(began + timeout - monotonic(), 0))


def start(calls: Sequence[Call], stack: ExitStack) -> None:
    """Run the calls, in their order, in up to `THREADS` threads; those not begun when the stack closes never do."""
    order, closed = iter(calls), threading.Event()
    stack.callback(closed.set)

    def work() -> None:
        for call in order:  # which the threads share
            if closed.is_set():
                return
            call.run()

    for _ in range(min(THREADS, len(calls))):
        threading.Thread(target=work, daemon=True).start()


def alarms_work() -> bool:
    """Whether this thread can be woken by a signal."""
    return hasattr(signal, "SIGALRM") and threading.current_thread() is threading.main_thread()


@cache
def _loop() -> asyncio.AbstractEventLoop:
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, daemon=True).start()
    return loop


def place(error: Exception) -> str:
    """Where in the function it was raised."""
    frames = traceback.walk_tb(error.__traceback__)
    theirs = ((frame.f_code.co_filename, line) for frame, line in frames if frame.f_code.co_filename != __file__)
    return next((f" ({Path(file).name}, line {line})" for file, line in theirs), "")
