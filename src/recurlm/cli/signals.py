"""What Ctrl-C and SIGTERM do to the command line. Imports nothing slow: it comes first."""

from __future__ import annotations

import os
import signal
import sys
import threading


def _unraisable(what: sys.UnraisableHookArgs) -> None:
    """Says nothing of an interruption that came where Python cannot raise it, as in a callback of a weak reference."""
    if what.exc_type is not SystemExit:
        sys.__unraisablehook__(what)


def listen() -> list[int]:
    """A list that gets the number of the first SIGINT or SIGTERM, which ends the process; training listens itself.

    What is half made is cleared away on the way out. Code that swallows the interruption gets five seconds more.
    """
    stopped: list[int] = []

    def handle(number: int, frame: object) -> None:
        if stopped:
            os._exit(128 + stopped[0])
        stopped.append(number)
        sys.unraisablehook = _unraisable
        print(f"recurlm: interrupted ({signal.Signals(number).name}).", file=sys.stderr, flush=True)
        last = threading.Timer(5.0, os._exit, (128 + number,))
        last.daemon = True
        last.start()
        raise SystemExit(128 + number)

    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, handle)
    return stopped
