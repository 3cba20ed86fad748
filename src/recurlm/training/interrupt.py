"""SIGINT, SIGTERM and SIGHUP as a wish that training looks at after each step and during validation."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
GRACE = 1.0  # seconds from the first signal until a second one may end the process


class Stopped(Exception):
    """Raised by `Wish.heed`: what is going on can be given up and done again."""


class Wish:
    """`signal` is the number of the signal that asked to stop, 0 so far."""

    signal: int = 0

    def heed(self) -> None:
        """Raises Stopped when a signal asked to stop."""
        if self.signal:
            raise Stopped


@contextlib.contextmanager
def listening() -> Iterator[Wish]:
    """A Wish that a signal fulfils; a second signal ends the process at once (exit code 128 + number).

    "At once" is never within a second of the first: a Ctrl-C often arrives twice, from the terminal and from a parent
    that passes it on, and must not cost the checkpoint. A signal that the parent told us to ignore (nohup) stays ignored.
    """
    wish = Wish()
    if threading.current_thread() is not threading.main_thread():
        yield wish
        return
    first, timers = 0.0, list[threading.Timer]()

    def handle(number: int, frame: object) -> None:
        nonlocal first
        if not wish.signal:
            wish.signal, first = number, time.monotonic()
            return
        timer = threading.Timer(max(0.0, first + GRACE - time.monotonic()), os._exit, (128 + number,))
        timer.daemon = True
        timers.append(timer)
        timer.start()

    heard = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, handle) for number in heard}
    try:
        yield wish
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for timer in timers:
            timer.cancel()
