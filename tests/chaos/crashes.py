"""Lives of a training process that end badly: `lives().start(...)` runs the command line in a fork of a warm process.

A fork costs milliseconds where a new interpreter costs seconds. In a life every file operation of Python below a
folder passes through `Disk`, which can count, fail, cut short, record it, or end the process there. Tensors are
written by safetensors' own code: there the call as a whole can fail, or leave the part of a file that a kill leaves.
"""

from __future__ import annotations

import base64
import builtins
import contextlib
import errno
import functools
import hashlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from recurlm.training.monitor import read_metrics
from support import TINY

ERRORS = {"ENOSPC": errno.ENOSPC, "EIO": errno.EIO, "EACCES": errno.EACCES}
LITTER = re.compile(r".*\.(tmp|trash|old)-.*|\.tmp.*|unusable-.*")


# ---- the disk of a life ---------------------------------------------------------------------------------------------


class Disk:
    """Passes on every I/O call below `root`; the `at`-th does `what`: an error, 'short', 'hang', or a signal's name.

    With `persistent` all later calls fail too. With `record` what changes the disk is kept for `write_record`.
    """

    def __init__(self, root: str, at: int = 0, what: str = "", persistent: bool = False, record: str = ""):
        self.root, self.at, self.what, self.persistent, self.path = root, at, what, persistent, record
        self.count, self.events, self.numbers = 0, list[list](), list[int]()  # numbers: `count` at each event

    def place(self, path: Any, dir_fd: int | None = None) -> str:
        """The absolute path of a path or descriptor."""
        path = path.fileno() if hasattr(path, "fileno") else path
        if isinstance(path, int):
            return str(Path(f"/proc/self/fd/{path}").readlink())
        base = Path(f"/proc/self/fd/{dir_fd}").readlink() if dir_fd is not None else Path.cwd()
        return os.path.normpath(os.path.join(base, os.fspath(path)))  # noqa: PTH118

    def due(self, call: str, place: str) -> bool:
        """Counts the call, and says whether it is one that goes wrong. Ends the process here if that is the plan."""
        if not place.startswith(self.root) or (self.what == "short" and call != "write"):
            return False
        self.count += 1
        wrong = self.count == self.at or (self.persistent and 0 < self.at < self.count)
        if wrong and self.what == "hang":
            end = time.monotonic() + 60
            while time.monotonic() < end:
                time.sleep(0.01)
        if wrong and self.what.startswith("SIG") and call != "write":
            os.kill(os.getpid(), getattr(signal, self.what))
            return False
        return wrong

    def gate(self, call: str, place: str) -> None:
        if self.due(call, place) and self.what in ERRORS:
            number = ERRORS[self.what]
            raise OSError(number, os.strerror(number), place)

    def event(self, *event: Any) -> None:
        if self.path and any(isinstance(part, str) and part.startswith(self.root) for part in event):
            self.events.append(list(event))
            self.numbers.append(self.count)

    def install(self) -> None:
        """Puts this disk before every call that writing, reading and clearing of files makes."""
        disk = self
        import fcntl

        def wrap(module: Any, name: str, places: int = 1) -> None:
            real = getattr(module, name)

            @functools.wraps(real)
            def call(*arguments, **keys):
                where = [disk.place(a, keys.get("dir_fd")) for a in arguments[:places]] or [str(Path.cwd())]
                disk.gate(name, where[0])
                out = real(*arguments, **keys)
                disk.event(name, *where)
                return out

            setattr(module, name, call)

        for name in ("open", "fsync", "mkdir", "unlink", "rmdir", "scandir", "listdir", "chmod", "stat", "lstat"):
            wrap(os, name)
        wrap(os, "statvfs")
        wrap(os, "rename", 2)
        wrap(os, "replace", 2)
        wrap(fcntl, "flock")

        class Raw(io.FileIO):
            def write(self, data):
                view = memoryview(data).cast("B")
                half = view[: (len(view) + 1) // 2]
                if disk.due("write", str(self.name)):
                    if disk.what in ERRORS:
                        raise OSError(ERRORS[disk.what], os.strerror(ERRORS[disk.what]))
                    if disk.what == "short" and disk.count > disk.at:
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                    view = half
                at = self.tell() if "a" not in self.mode else os.fstat(self.fileno()).st_size
                written = super().write(view)
                disk.event("write", str(self.name), at, base64.b64encode(view[:written]).decode())
                if disk.what.startswith("SIG") and view is half:
                    os.kill(os.getpid(), getattr(signal, disk.what))
                return written

            def readinto(self, buffer):
                disk.gate("read", str(self.name))
                return super().readinto(buffer)

            def truncate(self, size=None):
                disk.gate("truncate", str(self.name))
                return super().truncate(size)

        real_open = io.open

        def fake_open(
            file, mode="r", buffering=-1, encoding=None, errors=None, newline=None, closefd=True, opener=None
        ):
            if isinstance(file, int) or not disk.place(file).startswith(disk.root):
                return real_open(file, mode, buffering, encoding, errors, newline, closefd, opener)
            place = disk.place(file)
            disk.gate("open", place)
            fresh = not os.path.lexists(place)
            raw = Raw(place, mode.replace("b", "").replace("t", ""))
            if fresh or "w" in mode:
                disk.event("create", place)
            if buffering == 0:
                return raw
            buffered = (io.BufferedRandom if "+" in mode else io.BufferedReader if "r" in mode else io.BufferedWriter)(
                raw
            )
            return buffered if "b" in mode else io.TextIOWrapper(buffered, encoding, errors, newline)

        io.open = builtins.open = fake_open  # type: ignore[assignment]
        self._tensors()

    def _tensors(self) -> None:
        from safetensors import SafetensorError

        from recurlm.model import directory
        from recurlm.training import checkpoint

        real = checkpoint.save_file

        def save_file(tensors, path, metadata=None):
            try:
                self.gate("create", str(path))
                real(tensors, path, metadata)
                data = Path(path).read_bytes()
                self.event("create", str(path))
                self.event("write", str(path), 0, base64.b64encode(data).decode())
                if self.count + 1 == self.at and self.what == "SIGKILL":  # what safetensors leaves when it is killed
                    Path(path).rename(Path(path).with_name(".tmpAbCdEf"))
                self.gate("written", str(path))
            except OSError as error:
                Path(path).unlink(missing_ok=True)
                raise SafetensorError(f"Error while serializing: I/O error: {error.strerror} ({error.errno})") from None

        checkpoint.save_file = directory.save_file = save_file

    def report(self, path: str) -> None:
        """Writes the number of calls, and the recorded changes."""
        Path(path).write_text(json.dumps({"count": self.count, "events": self.events, "numbers": self.numbers}))


# ---- the warm process -----------------------------------------------------------------------------------------------


def _life(job: dict[str, Any]) -> None:
    """In the fork: the command line with the job's arguments, errors into its file."""
    handle = os.open(job["err"], os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    os.dup2(handle, 1), os.dup2(handle, 2), os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.argv = ["recurlm", *job["argv"]]
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    code: Any = 0
    disk = Disk(**job["disk"]) if job["disk"] else None
    try:
        from recurlm.cli import main

        if disk:
            disk.install()
        main.run()
    except SystemExit as error:
        code = error.code
    except BaseException:
        traceback.print_exc()
        code = 99
    with contextlib.suppress(Exception):
        sys.stdout.flush(), sys.stderr.flush()
    if disk:
        disk.root = "/nowhere"
        disk.report(job["err"] + ".disk")
    os._exit(code or 0)


def _serve() -> None:
    import tempfile

    import torch

    torch.set_num_threads(1)
    from recurlm import api
    from support import small_text, tiny_config

    with tempfile.TemporaryDirectory() as scratch:  # whatever training imports late is imported here, once
        text = Path(scratch) / "text.txt"
        text.write_text(small_text(40))
        settings = (f'data.path="{text}"', "train.max_steps=3", "averaging.name=nt-asgd", "train.sample_every=2")
        api.train(tiny_config(*settings), Path(scratch) / "run", quiet=True)
        api.load(Path(scratch) / "run")
    out = os.fdopen(os.dup(1), "w")
    print("ready", file=out, flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        if "wait" in job:
            answer = os.waitstatus_to_exitcode(os.waitpid(job["wait"], 0)[1])
        else:
            answer = os.fork()
            if answer == 0:
                _life(job)
        print(answer, file=out, flush=True)


class Life:
    """One process; `wait` returns its exit code, minus the signal's number when a signal ended it."""

    def __init__(self, lives: Lives, pid: int, err: Path):
        self.lives, self.pid, self.err = lives, pid, err

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)  # not reaped before `wait`, so the pid is still its own

    def wait(self) -> int:
        return self.lives.ask({"wait": self.pid})

    @property
    def said(self) -> str:
        return self.err.read_text(errors="replace")

    @property
    def calls(self) -> dict[str, Any]:
        return json.loads(Path(f"{self.err}.disk").read_text())


class Lives:
    """The warm process."""

    def __init__(self):
        tests = Path(__file__).parents[1]
        path = os.pathsep.join([str(tests), str(tests.parent / "src"), os.environ.get("PYTHONPATH", "")])
        self.process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert self.process.stdout is not None and self.process.stdout.readline() == "ready\n"

    def ask(self, job: dict[str, Any]) -> int:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def start(self, argv: list[str], err: Path, **disk: Any) -> Life:
        """A life with these arguments of `recurlm`; `disk` are Disk's."""
        err.write_text("")
        return Life(self, self.ask({"argv": argv, "err": str(err), "disk": disk}), err)

    def run(self, argv: list[str], err: Path, **disk: Any) -> tuple[int, Life]:
        life = self.start(argv, err, **disk)
        return life.wait(), life


@functools.cache
def lives() -> Lives:
    """The warm process of this test session."""
    return Lives()


# ---- what a run left ------------------------------------------------------------------------------------------------

EXACT = ("step", "loss_nats", "objective", "grad_norm", "lr", "length")


def train(run: Path, data: Path, *settings: str) -> list[str]:
    """The arguments that start the run or go on with it."""
    out = ["train", "--data", str(data), "-o", str(run), "--threads", "1", "--resume", "auto"]
    for setting in [*TINY, *settings]:
        out += ["--set", setting]
    return out


def outcome(run: Path) -> dict[str, Any]:
    """Every recorded number of the run, exactly, and its model's hash."""
    records = read_metrics(run)
    return {
        "trace": [tuple(float(r[k]).hex() for k in EXACT) for r in records if r["event"] == "step"],
        "valid": [
            (
                r["step"],
                r["loss_nats"].hex(),
                r["train_loss_nats"].hex(),
                r["best"],
                r["averaged"],
                r["averaging_starts"],
            )
            for r in records
            if r["event"] == "valid"
        ],
        "samples": [(r["step"], r["text"]) for r in records if r["event"] == "sample"],
        "weights": hashlib.sha256((run / "model.safetensors").read_bytes()).hexdigest(),
        "facts": json.loads((run / "manifest.json").read_text())["facts"],
    }


def litter(run: Path) -> list[str]:
    """Names below the run that only a dead writer leaves."""
    return [str(path.relative_to(run)) for path in run.rglob("*") if LITTER.fullmatch(path.name)]


if __name__ == "__main__":
    _serve()
