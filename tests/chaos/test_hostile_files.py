"""Files made to harm: refused, without running, importing, fetching or allocating what they ask for."""

import hashlib
import io
import json
import os
import pickle
import random
import shutil
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from recurlm import api, files, tensors
from recurlm.config import apply_assignments, from_dict
from recurlm.errors import CheckpointError, UserError
from recurlm.training import checkpoint
from support import counts, record, small_text, tiny_config

pytestmark = pytest.mark.chaos

LAST = Path("checkpoints", "step-6")
MODEL = {"config": "config.json", "weights": "model.safetensors", "tokenizer": "tokenizer.json"}


class Bomb:
    """What a pickle would run."""

    def __reduce__(self) -> tuple:
        return os.system, ("touch /tmp/recurlm-was-run",)


def archive(*entries: tuple[str, bytes]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as file:
        for name, data in entries:
            file.writestr(name, data)
    return out.getvalue()


def torch_zip(value: object) -> bytes:
    out = io.BytesIO()
    torch.save(value, out)
    return out.getvalue()


def numpy_file(save: Callable, value: np.ndarray) -> bytes:
    out = io.BytesIO()
    save(out, value)
    return out.getvalue()


def safetensors(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(shape: list, start: int, end: int, dtype: str = "F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def tokenizer_json(model: dict, **parts: Any) -> bytes:
    head = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None,
            "pre_tokenizer": None, "post_processor": None, "decoder": None}  # fmt: skip
    return json.dumps({**head, **parts, "model": model}).encode()


PICKLE = pickle.dumps(Bomb())
DEEP = b"[" * 200_000
LONG = b"9" * 5000
BYTES = [f"<0x{i:02X}>" for i in range(256)]
CHARS = {token: i for i, token in enumerate(["\n", *BYTES])}
CHAR_MODEL = {"type": "BPE", "unk_token": None, "fuse_unk": False, "byte_fallback": True, "merges": []}
REGEX_BOMB = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}

HOSTILE: dict[str, tuple[str, bytes]] = {
    "a pickle": ("weights", PICKLE),
    "a torch file": ("weights", torch_zip({"a": torch.zeros(2), "b": Bomb()})),
    "a pickle after a header": ("weights", safetensors({"a": entry([2], 0, 8)}, bytes(8)) + PICKLE),
    "a pickled npy": ("weights", numpy_file(np.save, np.array([Bomb()], dtype=object))),
    "a pickled npz": ("weights", numpy_file(np.savez, np.array([Bomb()], dtype=object))),
    "a zip": ("weights", archive(("model/data.pkl", PICKLE))),
    "a zip with a path": ("weights", archive(("../../evil.py", b"import os"))),
    "a zip behind tensors": ("weights", safetensors({"a": entry([2], 0, 8)}, bytes(8)) + archive(("data.pkl", PICKLE))),
    "a header of 2^63 bytes": ("weights", safetensors(b"{}", length=2**63)),
    "a header of 2^64 - 1 bytes": ("weights", safetensors(b"{}", length=2**64 - 1)),
    "a header of 3 MB": ("weights", safetensors(b"{" + b" " * (3 << 20) + b"}")),
    "a header longer than the file": ("weights", safetensors(b"{}", length=200)),
    "a header of 0 bytes": ("weights", safetensors(b"")),
    "less than a length": ("weights", b"\x02\0\0"),
    "a header that is a list": ("weights", safetensors(b"[]")),
    "a nested header": ("weights", safetensors(DEEP)),
    "a tensor of 2^62 numbers": ("weights", safetensors({"embedding": entry([2**31, 2**31], 0, 2**64)})),
    "a shape that overflows": ("weights", safetensors({"embedding": entry([2**32, 2**32, 4], 0, 0)})),
    "a shape of 10^12 ones": ("weights", safetensors({"embedding": entry([1] * 9, 0, 4)}, bytes(4))),
    "a negative shape": ("weights", safetensors({"embedding": entry([-1, -2], 0, 8)}, bytes(8))),
    "a negative offset": ("weights", safetensors({"embedding": entry([2], -8, 0)}, bytes(8))),
    "an offset past the end": ("weights", safetensors({"embedding": entry([2], 0, 8)}, bytes(4))),
    "offsets the wrong way": ("weights", safetensors({"embedding": entry([2], 8, 0)}, bytes(8))),
    "tensors that overlap": ("weights", safetensors({"a": entry([2], 0, 8), "b": entry([2], 4, 12)}, bytes(12))),
    "a hole between tensors": ("weights", safetensors({"a": entry([1], 0, 4), "b": entry([1], 8, 12)}, bytes(12))),
    "a number that is true": ("weights", safetensors({"a": entry([True], 0, 4)}, bytes(4))),
    "an unknown dtype": ("weights", safetensors({"a": entry([1], 0, 8, "OBJECT")}, bytes(8))),
    "100,000 tensors": ("weights", safetensors({f"{i}": entry([0], 0, 0) for i in range(100_000)})),
    "5,000 tensors": ("weights", safetensors({f"{i}": entry([0], 0, 0) for i in range(5_000)})),
    "a tensor twice": ("weights", safetensors(b'{"a":%s,"a":%s}' % ((json.dumps(entry([1], 0, 4)).encode(),) * 2), bytes(4))),
    "tensors of another model": ("weights", safetensors({"a": entry([1], 0, 4)}, bytes(4))),
    "a nested configuration": ("config", DEEP),
    "a number of 5,000 digits": ("config", b'{"vocab_size": %s}' % LONG),
    "a vocabulary of NaN": ("config", b'{"model": {}, "vocab_size": NaN}'),
    "a dropout of Infinity": ("config", b'{"model": {"zoneout": Infinity}, "vocab_size": 9}'),
    "a size of 1e400": ("config", b'{"model": {"init_range": 1e400}, "vocab_size": 9}'),
    "a size twice": ("config", b'{"model": {}, "vocab_size": 9, "vocab_size": 10}'),
    "10^9 rows": ("config", b'{"model": {}, "vocab_size": 1000000000}'),
    "10^12 units": ("config", b'{"model": {"hidden_size": 1000000000000}, "vocab_size": 9}'),
    "65,536 units in 256 layers": ("config", b'{"model": {"hidden_size": 65536, "num_layers": 256}, "vocab_size": 9}'),
    "a million layers": ("config", json.dumps({"model": {"hidden_sizes": [9] * 10**5}, "vocab_size": 9}).encode()),
    "a class to import": ("config", b'{"model": {"layer": "os.system"}, "vocab_size": 9}'),
    "code to import": ("config", b'{"model": {}, "vocab_size": 9, "auto_map": {"AutoModel": "evil.Model"}}'),
    "a YAML tag": ("config", b"!!python/object/apply:os.system ['touch /tmp/recurlm-was-run']"),
    "a lone surrogate": ("config", b'{"model": {"layer": "\\ud800"}, "vocab_size": 9}'),
    "a byte that is not UTF-8": ("config", b'{"model": {"layer": "\xff"}, "vocab_size": 9}'),
    "a pickled configuration": ("config", PICKLE),
    "a vocabulary with the id 10^9": ("tokenizer", tokenizer_json({**CHAR_MODEL, "vocab": {**CHARS, "z": 10**9}})),
    "an id that is a list": ("tokenizer", tokenizer_json({**CHAR_MODEL, "vocab": {**CHARS, "z": []}})),
    "a negative id": ("tokenizer", tokenizer_json({**CHAR_MODEL, "vocab": {**CHARS, "z": -1}})),
    "a vocabulary that is a list": ("tokenizer", tokenizer_json({**CHAR_MODEL, "vocab": list(CHARS)})),
    "merges of nothing": ("tokenizer", tokenizer_json({**CHAR_MODEL, "vocab": CHARS, "merges": [["a", "b"]] * 10_000})),
    "merges that are numbers": ("tokenizer", tokenizer_json({"type": "BPE", "vocab": CHARS, "merges": list(range(1000))})),
    "a unigram model": ("tokenizer", tokenizer_json({"type": "Unigram", "unk_id": 10**9, "vocab": [["a", -1e308]] * 9})),
    "a regular expression that never ends": (
        "tokenizer", tokenizer_json({**CHAR_MODEL, "vocab": CHARS}, pre_tokenizer=REGEX_BOMB)),
    "a normalizer that never ends": (
        "tokenizer", tokenizer_json({"type": "WordLevel", "vocab": {"<eos>": 0, "<unk>": 1, "a": 2}, "unk_token": "<unk>"},
                                    normalizer={"type": "Replace", "pattern": {"Regex": "(.*)*x"}, "content": "a" * 10**5})),
    "a token of a megabyte of white space": ("tokenizer", tokenizer_json(
        {"type": "WordLevel", "vocab": {"<eos>": 0, "<unk>": 1, " " * (1 << 20): 2}, "unk_token": "<unk>"})),
    "a token that is a surrogate": ("tokenizer", tokenizer_json({**CHAR_MODEL, "vocab": {"\n": 0, "\ud800": 1}})),
    "a nested tokenizer": ("tokenizer", b'{"model": ' + DEEP),
    "a pickled tokenizer": ("tokenizer", PICKLE),
}  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hostile")
    (folder / "text.txt").write_text(small_text(100))
    config = apply_assignments(
        tiny_config("train.max_steps=6", "train.checkpoint_every=3"), [f'data.path="{folder / "text.txt"}"']
    )
    api.train(config, folder / "run", quiet=True)
    return folder / "run"


def seal(folder: Path) -> None:
    """Makes the manifest fit whatever the files are now, as whoever made them would."""
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"] = {name: files.describe(folder / name) for name in manifest["files"]}
    files.write_manifest(folder / "manifest.json", {k: v for k, v in manifest.items() if k != "sha256"})


def hostile_run(run: Path, folder: Path, name: str) -> Path:
    part, data = HOSTILE[name]
    shutil.copytree(run, folder)
    (folder / MODEL[part]).write_bytes(data)
    seal(folder)
    return folder


WATCHED = """
import resource, sys
from recurlm import api
from recurlm.errors import UserError
"a".encode("utf-32-le")
good, *paths = sys.argv[1:]
api.load(good, device="cpu")  # what is imported and compiled for a good file is no file's doing
known, seen = {name.split(".")[0] for name in sys.modules} | sys.stdlib_module_names, []
FORBIDDEN = ("exec", "compile", "os.system", "os.exec", "os.posix_spawn", "os.fork", "os.remove", "os.rename", "subprocess.",
             "socket.", "pickle.", "marshal.", "ctypes.", "import")

def watch(event, arguments):
    if event.startswith(FORBIDDEN) and not (event == "import" and arguments[0].split(".")[0] in known):
        seen.append((event, repr(arguments)[:200]))

before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
sys.addaudithook(watch)
for path in paths:
    try:
        api.load(path, device="cpu")
        print("LOADED", path)
    except UserError as error:
        print("refused", str(error).replace(chr(10), "NEWLINE"))
grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
print("RESULT", len(seen), grown, seen)
"""


def test_hostile_models_are_refused_and_run_nothing(run, tmp_path):
    """All of them under an audit hook, in one process, whose memory hardly grows."""
    marker = Path("/tmp/recurlm-was-run")
    marker.unlink(missing_ok=True)
    folders = [hostile_run(run, tmp_path / f"{i}", name) for i, name in enumerate(HOSTILE)]
    done = subprocess.run(
        [sys.executable, "-c", WATCHED, str(run), *map(str, folders)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    *lines, result = done.stdout.splitlines()
    for (name, (part, _)), line in zip(HOSTILE.items(), lines, strict=True):
        assert line.startswith("refused ") and MODEL[part] in line and len(line) < 500, (name, line[:600])
    _, events, grown, rest = result.split(" ", 3)
    assert events == "0", rest
    assert float(grown) < 256, f"{grown} MB"
    assert not marker.exists()
    record("hostile_files", files=len(HOSTILE), refused=len(lines), events=int(events), memory_mb=float(grown))


def test_the_same_files_as_checkpoints(run, tmp_path):
    """Weights as a checkpoint's tensors: refused, and the checkpoint before is taken."""
    for name, (part, data) in HOSTILE.items():
        if part != "weights" or name in ("5,000 tensors", "tensors of another model"):
            continue  # these two are in order as a file; the model refuses them when it goes on
        folder = Path(shutil.copytree(run, tmp_path / "copy"))
        (folder / LAST / "tensors.safetensors").write_bytes(data)
        seal(folder / LAST)
        with pytest.raises(CheckpointError, match=r"tensors\.safetensors"):
            checkpoint.load(folder / LAST)
        saved, skipped = checkpoint.newest(folder / "checkpoints")
        assert saved is not None and saved.step == 3 and len(skipped) == 1
        shutil.rmtree(folder)


CHANGES: dict[str, Callable[[dict, dict], Any]] = {
    "a moment of another shape": lambda t, v: t.update({"optimizer.0.exp_avg": torch.zeros(3)}),
    "a moment that is one number": lambda t, v: t.update({"optimizer.0.exp_avg": torch.zeros(())}),
    "a moment of another type": lambda t, v: t.update({"optimizer.0.exp_avg": t["optimizer.0.exp_avg"].double()}),
    "a step that is a table": lambda t, v: t.update({"optimizer.0.step": torch.zeros(4, 4)}),
    "a moment left out": lambda t, v: t.pop("optimizer.0.exp_avg"),
    "moments of a parameter that is not there": lambda t, v: t.update({"optimizer.999.exp_avg": torch.zeros(1)}),
    "moments of a parameter without number": lambda t, v: t.update({"optimizer.x": torch.zeros(1)}),
    "a state of another shape": lambda t, v: t.update({"state.0": torch.zeros(4, 5)}),
    "a state for one row": lambda t, v: t.update({"state.0": t["state.0"][:1].clone()}),
    "a state left out": lambda t, v: t.pop("state.1"),
    "a weight of another shape": lambda t, v: t.update({"model.embedding": torch.zeros(3, 3)}),
    "a weight left out": lambda t, v: t.pop("model.embedding"),
    "a weight too many": lambda t, v: t.update({"model.evil": torch.zeros(3)}),
    "a negative position": lambda t, v: v["cursor"].update(position=-5),
    "a position that is a text": lambda t, v: v["cursor"].update(position="0"),
    "a position of 10^30": lambda t, v: v["cursor"].update(position=10**30),
    "another step": lambda t, v: v["cursor"].update(step=7),
    "losses that are texts": lambda t, v: v["cursor"].update(losses=["a"]),
    "losses that are a number": lambda t, v: v["cursor"].update(losses=3),
    "an unknown piece of the cursor": lambda t, v: v["cursor"].update(evil=1),
    "no cursor": lambda t, v: v.pop("cursor"),
    "a cursor that is a list": lambda t, v: v.update(cursor=[]),
    "no settings": lambda t, v: v.pop("config"),
    "settings that are a text": lambda t, v: v.update(config="x"),
    "settings without a section": lambda t, v: v["config"].update(optimizer=7),
    "no store": lambda t, v: v.pop("store"),
    "no averaging": lambda t, v: v.pop("averaging"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_checkpoints_that_do_not_fit_are_refused(name, run, tmp_path):
    """Sealed, so that every checksum is right: what is inside would be read past its end, or fail later."""
    folder = Path(shutil.copytree(run, tmp_path / "run"))
    path = folder / LAST
    saved = checkpoint.load(path)
    config = from_dict(saved.values["config"])
    CHANGES[name](saved.tensors, saved.values)
    shutil.rmtree(path)
    checkpoint.save(folder / "checkpoints", saved.step, saved.tensors, saved.values, 3)
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    with pytest.raises(UserError):
        api.train(apply_assignments(config, ["train.max_steps=8"]), folder, resume=True, quiet=True)
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before


COUNTS = {"tokens": 1, "words": 0, "lines": 0, "characters": 0, "bytes": 0, "sha256": ""}
STORES: dict[str, dict] = {
    "an empty split": {"splits": {"train": COUNTS | {"tokens": 0}}},
    "a negative count": {"splits": {"train": COUNTS | {"tokens": -3}}},
    "a count with a point": {"splits": {"train": COUNTS | {"tokens": 1.5}}},
    "a split elsewhere": {"splits": {"../train": COUNTS | {"tokens": 1}}},
    "an object dtype": {"dtype": "|O"},
    "a format that is true": {"format": True},
    "a vocabulary of 10^9": {"vocab_size": 10**9},
    "a vocabulary of 3": {"vocab_size": 3},
    "a vocabulary of text": {"vocab_size": "9"},
    "another kind": {"kind": "sentences"},
}  # fmt: skip


@pytest.mark.parametrize("name", STORES)
def test_hostile_stores_are_refused(name, run, tmp_path):
    from recurlm.text.store import _hash, open_store

    folder = Path(shutil.copytree(run / "store", tmp_path / "store"))
    content = json.loads((folder / "store.json").read_text())
    del content["hash"]
    for key, value in STORES[name].items():
        (content["tokenizer"] if key in ("vocab_size", "kind") else content)[key] = value
    (folder / "store.json").write_text(json.dumps(content | {"hash": _hash(content)}))
    with pytest.raises(UserError, match=r"store\.json|train\.bin|tokenizer\.json"):
        open_store(folder).verify()


def test_ids_outside_the_vocabulary_are_refused(run, tmp_path):
    from recurlm.text.store import _hash, open_store

    folder = Path(shutil.copytree(run / "store", tmp_path / "store"))
    ids = np.fromfile(folder / "train.bin", "<u2")
    ids[-1] = 60_000
    ids.tofile(folder / "train.bin")
    content = json.loads((folder / "store.json").read_text())
    del content["hash"]
    content["splits"]["train"]["sha256"] = hashlib.sha256(ids.tobytes()).hexdigest()
    (folder / "store.json").write_text(json.dumps(content | {"hash": _hash(content)}))
    with pytest.raises(UserError, match="holds the id 60000"):
        open_store(folder).verify()


def test_the_tensor_reader_never_reads_more_than_is_there(tmp_path):
    """Random headers: the tensors that safetensors itself reads, or a refusal; never another exception."""
    number, accepted, draw = counts(1000, 10_000), 0, random.Random(11)
    path = tmp_path / "x.safetensors"
    shapes = [[], [0], [3], [2, 2], [1, 4]]
    for _ in range(number):
        header, place = {}, 0
        for i in range(draw.randrange(4)):
            dtype, shape = draw.choice(list(tensors.DTYPES)), draw.choice(shapes)
            size = int(np.prod(shape)) * tensors.DTYPES[dtype].itemsize
            header[f"t{i}"] = entry(shape, place, place + size, dtype)
            place += size
        data = bytearray(safetensors(header, draw.randbytes(place)))
        for _ in range(draw.choice([0, 0, 1, 1, 3])):
            at = draw.randrange(len(data))
            choice = draw.randrange(4)
            if choice == 0:
                data[at] ^= 1 << draw.randrange(8)
            elif choice == 1:
                del data[at:]
                data += b"\0" * (not data)
            elif choice == 2:
                data[at:at] = draw.choice([b"0", b"9" * 30, b"[", b'"', b"-", b"e999", b"\xff", b"NaN"])
            else:
                data[at] = draw.randrange(256)
        path.write_bytes(data)
        try:
            found = tensors.read(path, files.describe(path))
        except CheckpointError as error:
            assert "x.safetensors" in str(error)
            continue
        accepted += 1
        good = load_file(path)
        assert found.keys() == good.keys()
        for name, tensor in found.items():
            assert tensor.dtype == good[name].dtype and tensor.shape == good[name].shape
            assert tensor.reshape(-1).view(torch.uint8).tolist() == good[name].reshape(-1).view(torch.uint8).tolist()
    assert number // 10 < accepted < number
    record("safetensors_inputs", inputs=number, accepted_equal_to_safetensors=accepted)


def test_weights_that_are_not_finite_are_refused(run, tmp_path):
    from safetensors.torch import save_file

    folder = Path(shutil.copytree(run, tmp_path / "run"))
    weights = load_file(folder / "model.safetensors")
    name = sorted(weights)[-1]
    weights[name].view(-1)[0] = float("inf")
    save_file(weights, folder / "model.safetensors")
    seal(folder)
    with pytest.raises(CheckpointError, match=f"model.safetensors: {name} holds a number that is not finite"):
        api.load(folder)
