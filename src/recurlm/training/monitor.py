"""What a training run shows and records: a progress bar, metrics.jsonl, TensorBoard events."""

from __future__ import annotations

import contextlib
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from recurlm import files

METRICS = "metrics.jsonl"


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The run's records, oldest first; lines that are no records are left out."""
    path, records = run / METRICS, []
    if path.is_file():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            with contextlib.suppress(ValueError):
                record = files.parse_json(line.encode())
                known = isinstance(record, dict) and isinstance(record.get("event"), str)
                if known and type(record.get("step")) is int:
                    records.append(record)
    return records


class _Console(Console):
    """A console that goes silent when nobody reads it any more; rich's own would end the process."""

    def on_broken_pipe(self) -> None:
        self.quiet = True


SECONDS_A_LINE = 60  # between two lines of progress where there is no terminal


class Monitor:
    """Progress on stderr; records under the run directory. Records after `step` are dropped: they will come again.

    With `due` the validation of `step` will come again too. What cannot be written or shown never stops the training:
    records wait in memory and are tried again with the next one.
    """

    def __init__(self, run: Path, step: int, tensorboard: bool, quiet: bool, due: bool = False):
        kept = [record for record in read_metrics(run) if record["step"] <= step] if step else []
        if due:
            kept = [record for record in kept if (record["step"], record.get("event")) != (step, "valid")]
        files.write_atomic(run / METRICS, "".join(json.dumps(record) + "\n" for record in kept))
        self.file = (run / METRICS).open("ab", buffering=0)
        self.size, self.waiting, self.broken = self.file.tell(), b"", False  # bytes of whole lines; lines to come
        self.console = _Console(stderr=True, quiet=quiet)
        self.bar = Progress(
            TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"),
            TextColumn("{task.fields[numbers]}"), TimeElapsedColumn(), TimeRemainingColumn(),
            console=self.console, transient=True, disable=quiet or not self.console.is_terminal, refresh_per_second=4,
        )  # fmt: skip
        self.task = self.bar.add_task("training", total=1.0, numbers="")
        self.lines, self.told = not quiet and not self.console.is_terminal, time.perf_counter()  # in place of the bar
        self.writer = None
        if tensorboard:
            from torch.utils.tensorboard.writer import SummaryWriter

            self.writer = SummaryWriter(str(run / "tensorboard"), purge_step=step + 1)
        self.smooth, self.last, self.rate, self.tokens = math.nan, time.perf_counter(), 0.0, 0
        with contextlib.suppress(OSError):
            self.bar.start()

    def say(self, text: str) -> None:
        """One line for the person who watches."""
        with contextlib.suppress(OSError):
            self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def step(self, place: str, share: float, nll: float, tokens: int) -> None:
        """Moves the bar; the shown loss is a running mean over about 50 steps."""
        self.smooth = nll if math.isnan(self.smooth) else self.smooth + 0.04 * (nll - self.smooth)
        self.tokens += tokens
        now = time.perf_counter()
        if now - self.last >= 0.5:
            self.rate, self.tokens, self.last = self.tokens / (now - self.last), 0, now
            numbers = f"loss {self.smooth:.3f}  ppl {math.exp(min(self.smooth, 50)):,.1f}  {self.rate:,.0f} tokens/s"
            with contextlib.suppress(OSError):
                self.bar.update(self.task, completed=share, description=place, numbers=numbers)
            if self.lines and now - self.told >= SECONDS_A_LINE:
                self.told = now
                self.say(f"{place}  {share:.0%}  {numbers}")

    def record(self, event: str, step: int, values: dict[str, Any]) -> None:
        """One line of metrics.jsonl, and the numbers among `values` as TensorBoard scalars."""
        self.waiting += json.dumps({"event": event, "step": step, **values}).encode() + b"\n"
        self.write()
        if self.writer is not None:
            try:
                for name, value in values.items():
                    if isinstance(value, int | float) and not isinstance(value, bool):
                        self.writer.add_scalar(f"{event}/{name}", value, step)
                    elif name == "text":
                        self.writer.add_text(event, str(value), step)
            except OSError as error:
                self.writer = None
                self.say(f"TensorBoard's events cannot be written ({error}); training goes on without them.")

    def write(self) -> None:
        """Writes the waiting records; what fails waits for the next call, and the first failure of a row is told."""
        try:
            if self.broken:
                self.file.truncate(self.size)  # a part of a line may be there
            done = 0
            while done < len(self.waiting):
                done += self.file.write(self.waiting[done:])
            self.size, self.waiting, self.broken = self.size + done, b"", False
        except OSError as error:
            if not self.broken:
                self.say(f"{self.file.name}: {error.strerror}; training goes on, and the records wait in memory.")
            self.broken = True

    def close(self) -> None:
        """Closes bar and files."""
        if self.waiting:
            self.write()
        with contextlib.suppress(OSError):
            self.bar.stop()
        with contextlib.suppress(OSError):
            self.file.close()
        with contextlib.suppress(OSError):
            if self.writer is not None:
                self.writer.close()
        with contextlib.suppress(OSError):
            sys.stderr.flush()
