"""File operations that fail, disks that are full: one sentence, nothing lost, and the resumed run equals the unbroken one."""

import random
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from crashes import ERRORS, litter, lives, outcome

from recurlm import api
from recurlm.training import checkpoint
from support import counts, record


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def one_sentence(said: str) -> bool:
    """Whether a life that failed said why in one line, and nothing of Python's."""
    lines = [line for line in said.splitlines() if line.startswith("recurlm: ")]
    return len(lines) == 1 and "Traceback" not in said


@pytest.mark.chaos
@pytest.mark.parametrize("persistent", [False, True], ids=["once", "from_then_on"])
@pytest.mark.parametrize("what", [*ERRORS, "short"])
def test_failing_io_at_every_call(what, persistent, whole, tmp_path):
    """Fails the n-th call of a life for n = 1, 2, ... until the life ends without meeting it (in CI: at a few n)."""
    run = tmp_path / "run"
    argv, before = whole.argv(run, "train.checkpoint_every=1"), files_of(whole.at_64 / "checkpoints" / "step-64")
    whole.fresh(run)
    code, life = lives().run(argv, tmp_path / "err", root=str(run), what=what)
    assert code == 0, life.said
    last = life.calls["count"]  # with "short" only writes count
    points = sorted(random.Random(f"{what} {persistent}").sample(range(1, last + 1), counts(3, last)))
    stopped = went_on = met = 0
    for at in points:
        whole.fresh(run)
        code, life = lives().run(argv, tmp_path / "err", root=str(run), at=at, what=what, persistent=persistent)
        place, met = (at, code, life.said), met + (life.calls["count"] >= at)
        assert code in (0, 1, 2, 3), place
        if code:
            assert one_sentence(life.said) and str(run) in life.said, place
            stopped += 1
        else:
            went_on += 1
        saved, skipped = checkpoint.newest(run / "checkpoints")
        assert saved is not None and saved.step >= 64 and not skipped, place
        if (old := run / "checkpoints" / "step-64").exists():
            assert files_of(old) == before, place
        api.load(run)
        code, life = lives().run(argv, tmp_path / "err")
        assert code == 0, (place, life.said)
        assert outcome(run) == whole.outcome and litter(run) == [], place
    assert met
    record("failing_io", what=what, persistent=persistent, points=len(points), met=met, stopped=stopped, went_on=went_on,
           equal=len(points))  # fmt: skip


@pytest.mark.chaos
def test_failing_io_at_the_very_start(whole, tmp_path):
    """A run that was never saved starts again; a start that made nothing leaves nothing."""
    run, nothing = tmp_path / "run", 0
    argv = whole.argv(run, "train.max_steps=2")
    points = random.Random("start").sample(range(1, 161), counts(8, 160))
    for at in points:
        shutil.rmtree(run, ignore_errors=True)
        code, life = lives().run(argv, tmp_path / "err", root=str(run), at=at, what="ENOSPC", persistent=True)
        if code:
            assert one_sentence(life.said), (at, life.said)
        nothing += not run.exists()
        code, life = lives().run(argv, tmp_path / "err")
        assert code == 0 and litter(run) == [], (at, life.said)
        assert outcome(run)["trace"] == whole.outcome["trace"][:2]
    record("failing_start", points=len(points), nothing_left=nothing)


@pytest.mark.chaos
def test_a_limit_on_file_sizes_meets_the_writer_of_tensors_itself(whole, tmp_path):
    """The limit is the kernel's, so the write fails inside safetensors' own code too, at any byte of a file."""
    resource = pytest.importorskip("resource")
    run, draw, stopped, number = tmp_path / "run", random.Random("limit"), 0, counts(6, 60)
    largest = max(path.stat().st_size for path in whole.at_64.rglob("*.safetensors"))
    for _ in range(number):
        whole.fresh(run)
        argv, limit = whole.argv(run, "train.checkpoint_every=1"), draw.randrange(largest + 2000)
        life = lives().start(argv, tmp_path / "err")
        resource.prlimit(life.pid, resource.RLIMIT_FSIZE, (limit, limit))
        code = life.wait()
        place = (limit, life.said)
        if code:
            stopped += 1
            assert code == 1 and (one_sentence(life.said) or not life.said), place  # the log has the limit too
        saved, skipped = checkpoint.newest(run / "checkpoints")
        assert saved is not None and saved.step >= 64 and not skipped, place
        api.load(run)
        code, life = lives().run(argv, tmp_path / "err")
        assert code == 0 and outcome(run) == whole.outcome and litter(run) == [], (place, life.said)
    record("file_size_limit", limits=number, stopped=stopped, equal=number)


@pytest.fixture(scope="module")
def mounted(tmp_path_factory):
    """A function that gives a fresh tmpfs of so many kB."""
    places = []

    def mount(kilobytes: int) -> Path:
        place = tmp_path_factory.mktemp("disk")
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "none", str(place)], capture_output=True, text=True
        )
        if done.returncode:
            pytest.skip(f"a tmpfs cannot be mounted here: {done.stderr.strip()}")
        places.append(place)
        return place

    if shutil.which("mount") is None:
        pytest.skip("there is no mount command")
    yield mount
    for place in places:
        subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.mark.chaos
def test_a_full_disk(mounted, whole, tmp_path):
    """Disks from one that holds hardly more than the run so far to one that holds all of it."""
    used = sum(path.stat().st_size + 4096 for path in whole.at_64.rglob("*")) // 1024
    sizes, stopped = counts(5, 20), 0
    for number in range(sizes):
        disk = mounted(used + 8 + number * 160 // (sizes - 1))
        run = disk / "run"
        shutil.copytree(whole.at_64, run)
        before = files_of(run / "checkpoints" / "step-64")
        code, life = lives().run(whole.argv(run, "train.checkpoint_every=1"), tmp_path / "err")
        if code:
            stopped += 1
            assert code == 1 and one_sentence(life.said), life.said
            assert re.search(rf"{run}\S*: .*[\d.]+ \w+ are needed, [\d.]+ \w+ are free", life.said), life.said
        saved, skipped = checkpoint.newest(run / "checkpoints")
        assert saved is not None and not skipped
        if (run / "checkpoints" / "step-64").exists():
            assert files_of(run / "checkpoints" / "step-64") == before
        api.load(run)
        subprocess.run(["mount", "-o", "remount,size=10m", str(disk)], check=True)  # space is made
        code, life = lives().run(whole.argv(run, "train.checkpoint_every=1"), tmp_path / "err")
        assert code == 0 and litter(run) == [], life.said
        assert outcome(run) == whole.outcome
    assert 0 < stopped < sizes
    record("full_disk", sizes=sizes, stopped=stopped, went_on=sizes - stopped, equal=sizes)
