"""SIGINT and SIGTERM as a wish that training looks at after each step."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator


class Wish:
    """`signal` is the number of the signal that asked to stop, 0 so far."""

    signal: int = 0


@contextlib.contextmanager
def listening() -> Iterator[Wish]:
    """A Wish that SIGINT or SIGTERM fulfils; a second signal ends the process at once (exit code 128 + number)."""
    wish = Wish()
    if threading.current_thread() is not threading.main_thread():
        yield wish
        return

    def handle(number: int, frame: object) -> None:
        if wish.signal:
            os._exit(128 + number)
        wish.signal = number

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield wish
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
