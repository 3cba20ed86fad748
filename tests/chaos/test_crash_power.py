"""Power loss: what was not synced is dropped, cut or garbled; the loader finds the old checkpoint or the new, never a mix."""

import base64
import hashlib
import random
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from crashes import lives

from recurlm import api
from recurlm.errors import CheckpointError
from recurlm.model import directory
from recurlm.training import checkpoint
from support import counts, record


@dataclass
class File:
    """Content as written, and as the disk has it for certain."""

    data: bytearray = field(default_factory=bytearray)
    synced: bytes | None = None

    def after_power_loss(self, draw: random.Random) -> bytes:
        """What may be read afterwards: the synced content if nothing came later, else one of several half-truths."""
        now = bytes(self.data)
        if now == self.synced:
            return now
        cut = now[: draw.randrange(len(now) + 1)]
        start = draw.randrange(len(now) + 1)
        garbled = now[:start] + draw.randbytes(min(512, len(now) - start)) + now[start + 512 :]
        return draw.choice([self.synced or b"", now, cut, cut + bytes(len(now) - len(cut)), garbled])


class Folder:
    """Entries as they are, the ones that are certain, and the changes between, each a set of entries put or taken."""

    def __init__(self):
        self.now: dict[str, File | Folder] = {}
        self.synced: dict[str, File | Folder] = {}
        self.pending: list[dict[str, File | Folder | None]] = []

    def change(self, entries: dict) -> None:
        self.pending.append(entries)
        apply(self.now, entries)

    def sync(self) -> None:
        self.synced, self.pending = dict(self.now), []

    def after_power_loss(self, draw: random.Random) -> dict:
        """The entries that may be found afterwards: any of the unsynced changes may be missing."""
        kept, share = dict(self.synced), draw.choice([0.0, 0.5, 0.5, 1.0])
        for entries in self.pending:
            if draw.random() < share:
                apply(kept, entries)
        return kept


def apply(entries: dict, changes: dict) -> None:
    for name, thing in changes.items():
        if thing is None:
            entries.pop(name, None)
        else:
            entries[name] = thing


class Replay:
    """A disk on which the recorded changes of a life happen again, one by one."""

    def __init__(self, root: Path, start: Path):
        self.root = root
        self.top = self._read(start)

    def _read(self, path: Path) -> Folder:
        folder = Folder()
        for entry in path.iterdir():
            data = entry.read_bytes() if entry.is_file() else b""
            folder.now[entry.name] = File(bytearray(data), data) if entry.is_file() else self._read(entry)
        folder.sync()
        return folder

    def find(self, place: str) -> tuple[Folder, str]:
        """(parent, name) of a place."""
        parts = Path(place).relative_to(self.root).parts
        folder = self.top
        for part in parts[:-1]:
            inner = folder.now[part]
            assert isinstance(inner, Folder)
            folder = inner
        return folder, parts[-1] if parts else ""

    def happen(self, name: str, *arguments) -> None:
        if not str(arguments[0]).startswith(str(self.root)):
            return
        folder, entry = self.find(arguments[0])
        thing = folder.now.get(entry) if entry else self.top
        if name == "create":
            if isinstance(thing, File):
                thing.data = bytearray()
            else:
                folder.change({entry: File()})
        elif name == "write":
            assert isinstance(thing, File)
            at, data = arguments[1], base64.b64decode(arguments[2])
            thing.data[at : at + len(data)] = data
        elif name == "mkdir":
            folder.change({entry: Folder()})
        elif name in ("unlink", "rmdir"):
            folder.change({entry: None})
        elif name in ("rename", "replace"):
            other, new = self.find(arguments[1])
            assert thing is not None
            if other is folder:
                folder.change({entry: None, new: thing})
            else:
                other.change({new: thing})
                folder.change({entry: None})
        elif name == "fsync":
            if isinstance(thing, File):
                thing.synced = bytes(thing.data)
            elif isinstance(thing, Folder):
                thing.sync()

    def write(self, target: Path, draw: random.Random) -> None:
        """A folder as it may be found after a power loss now."""

        def put(folder: Folder, path: Path) -> None:
            path.mkdir()
            for name, thing in folder.after_power_loss(draw).items():
                if isinstance(thing, File):
                    (path / name).write_bytes(thing.after_power_loss(draw))
                else:
                    put(thing, path / name)

        put(self.top, target)


def content(path: Path) -> str:
    saved = checkpoint.load(path)
    digest = hashlib.sha256(repr(saved.values["cursor"]).encode())
    for name in sorted(saved.tensors):
        digest.update(name.encode() + saved.tensors[name].numpy().tobytes())
    return digest.hexdigest()


CHANGES = ("create", "write", "mkdir", "unlink", "rmdir", "rename", "replace", "fsync")


@pytest.mark.chaos
def test_power_loss(whole, tmp_path):
    run, image = tmp_path / "run", tmp_path / "image"
    whole.fresh(run)
    argv = whole.argv(run, "train.checkpoint_every=1", "train.keep_checkpoints=9")
    code, life = lives().run(argv, tmp_path / "err", root=str(run), record="yes")
    assert code == 0, life.said
    events = [event for event in life.calls["events"] if event[0] in CHANGES]
    saves = [n for n, e in enumerate(events) if e[0] == "replace" and Path(e[2]).name.startswith("step-")]
    assert len(saves) == 4
    known = {path.name: content(path) for path in checkpoint.steps(run / "checkpoints")}
    replay = Replay(run, whole.at_64)
    replay_hashes = {
        hashlib.sha256((folder / directory.WEIGHTS).read_bytes()).hexdigest() for folder in (run, whole.at_64)
    }
    for event in events:  # the replayed disk is the real one, when nothing is lost
        replay.happen(*event)
        if event[0] == "write" and Path(event[1]).name == directory.WEIGHTS:
            replay_hashes.add(hashlib.sha256(base64.b64decode(event[3])).hexdigest())
    replay.write(image, Whole())
    assert {p.name: content(p) for p in checkpoint.steps(image / "checkpoints")} == known
    assert (image / directory.MANIFEST).read_bytes() == (run / directory.MANIFEST).read_bytes()

    draw, found = random.Random("power"), {"old": 0, "new": 0}
    images = counts(50, 500)
    moments = sorted(draw.randrange(len(events) + 1) for _ in range(images))
    replay, done = Replay(run, whole.at_64), 0
    for moment in moments:
        for event in events[done:moment]:
            replay.happen(*event)
        done = moment
        shutil.rmtree(image)
        replay.write(image, draw)
        certain = 64 + sum(1 for n in saves if n < moment - 1)  # saved and synced: cannot be lost again
        checkpoint.clean(image / "checkpoints")
        saved, _ = checkpoint.newest(image / "checkpoints")
        assert saved is not None and saved.step >= certain, (moment, events[moment - 1 : moment + 1])
        assert content(image / "checkpoints" / f"step-{saved.step}") == known[f"step-{saved.step}"]
        found["new" if saved.step > certain else "old"] += 1
        model = api.load(image)
        assert hashlib.sha256((image / directory.WEIGHTS).read_bytes()).hexdigest() in replay_hashes
        loss = whole.outcome["valid"][[row[0] for row in whole.outcome["valid"]].index(model.facts["step"])][1]
        assert float(model.facts["loss_nats"]).hex() == loss
    record("power_loss", images=images, **found)


class Whole(random.Random):
    """Draws that lose nothing."""

    def choice(self, seq):
        return seq[-1] if isinstance(seq[-1], float) else seq[1]

    def random(self):
        return 0.0


IMPROVING = ("train.eval_every=2", "train.checkpoint_every=2", "averaging.name=none", "optimizer.lr=0.01",
             "schedule.name=constant", "train.epochs=9", "train.max_steps=130")  # fmt: skip


@pytest.mark.chaos
def test_power_loss_while_a_model_is_exchanged(whole, tmp_path):
    """The model's facts and weights belong together in every image of one `directory.write`, and of two in a row."""
    import torch

    from recurlm.model.precision import FP32

    run, image, cpu = tmp_path / "run", tmp_path / "image", torch.device("cpu")
    whole.fresh(run)
    recorder = lives().start(["generate", str(run), "--tokens", "1"], tmp_path / "err")  # the loader's own path works
    assert recorder.wait() == 0
    model, _ = directory.read(run, cpu, FP32)
    code, life = lives().run(
        whole.argv(run, *IMPROVING), tmp_path / "err", root=str(run), record="yes"
    )  # a better model is published again and again
    assert code == 0, life.said
    events = [event for event in life.calls["events"] if event[0] in CHANGES]
    replay, draw, done = Replay(run, whole.at_64), random.Random("model"), 0
    seen: dict[int, str] = {}
    for moment in sorted(draw.randrange(len(events) + 1) for _ in range(counts(50, 500))):
        for event in events[done:moment]:
            replay.happen(*event)
        done = moment
        shutil.rmtree(image, ignore_errors=True)
        replay.write(image, draw)
        try:
            model, manifest = directory.read(image, cpu, FP32)
        except CheckpointError as error:
            pytest.fail(f"{moment}: {error}")
        weights = hashlib.sha256(b"".join(p.numpy().tobytes() for p in model.parameters())).hexdigest()
        assert seen.setdefault(manifest["facts"]["step"], weights) == weights
    assert len(seen) > 3
    record("power_loss_model", images=counts(50, 500), models=len(seen))
