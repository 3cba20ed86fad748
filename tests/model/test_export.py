"""Exported models: shards that load to the same weights, and whatever is wrong with them named in a sentence."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from recurlm import api, files
from recurlm.config import apply_assignments, from_toml
from recurlm.errors import CheckpointError, ConfigError, RunError, UserError
from recurlm.model import directory
from recurlm.training.monitor import read_metrics
from support import tiny_config

SMALL = 3000  # bytes: the largest weight of the model below just fits in bf16
TINY = 700  # a few rows of it


@pytest.fixture(scope="module")
def run(text_file, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("export") / "run"
    config = tiny_config("train.max_steps=12", "train.eval_every=4", "train.log_every=1", f'data.path="{text_file}"')
    api.train(config, run, quiet=True)
    return run


@pytest.fixture(scope="module")
def sharded(run, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("sharded") / "out"
    api.export(run, out, dtype="bf16", max_shard_size=SMALL)
    return out


def weights(model) -> dict[str, torch.Tensor]:
    return dict(model.model.named_parameters())


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("most", [0, TINY, SMALL, 2 * SMALL])
def test_an_exported_model_has_the_same_weights(run, dtype, most, tmp_path):
    most *= 2 if dtype == "fp32" else 1
    written = api.export(run, tmp_path / "out", dtype=dtype, max_shard_size=most)
    found, expected = weights(api.load(tmp_path / "out")), weights(api.load(run))
    stored = torch.bfloat16 if dtype == "bf16" else torch.float32
    assert found.keys() == expected.keys()
    for name, p in found.items():
        assert p.dtype == torch.float32 and torch.equal(p, expected[name].to(stored).float()), name
    shards = [name for name in written if name.endswith(".safetensors")]
    assert (shards == ["model.safetensors"]) == (most == 0) and len(shards) > (most > 0)
    assert most == 0 or all(written[name] <= most for name in shards)
    assert api.load(tmp_path / "out").score("the king").total > 0
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["facts"]["dtype"] == dtype
    assert set(manifest["files"]) == {*shards, "config.json", "tokenizer.json", *([directory.INDEX] if most else [])}


def test_the_index_is_as_hugging_face_lays_it_out(sharded):
    index = json.loads((sharded / "model.safetensors.index.json").read_text())
    count = len(list(sharded.glob("model-*.safetensors")))
    assert set(index["weight_map"].values()) == {f"model-{n:05}-of-{count:05}.safetensors" for n in range(1, count + 1)}
    loaded = {name: t for file in set(index["weight_map"].values()) for name, t in load_file(sharded / file).items()}
    assert loaded.keys() == index["weight_map"].keys()
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in loaded.values())


def test_the_figures_of_every_split_go_along(run, tmp_path):
    whole = shutil.copytree(run, tmp_path / "run")
    names = {"eval.json", "eval-valid.json", "eval-train.json"}
    for name in names:
        (whole / name).write_text(f'"{name}"')
    assert {n for n in api.export(whole, tmp_path / "card", card_only=True) if n.startswith("eval")} == names
    assert all((tmp_path / "card" / name).read_text() == f'"{name}"' for name in names)


def test_the_card_alone_says_what_the_run_was(run, tmp_path):
    written = api.export(run, tmp_path / "card", card_only=True)
    assert set(written) == {"README.md", "config.toml", "metrics.jsonl"}
    assert from_toml((tmp_path / "card/config.toml").read_text(), "x").data.path == "small.txt"
    events = [r["event"] for r in read_metrics(tmp_path / "card")]
    assert events == ["start", "valid", "valid", "valid"]
    (start, *_) = read_metrics(tmp_path / "card")
    assert start["command"] and start["torch"] == torch.__version__ and start["seed"] == 1111
    card = (tmp_path / "card/README.md").read_text()
    assert "perplexity" in card and start["command"].split()[0] in card
    assert sum(written.values()) < 20_000


def test_without_its_store_a_model_is_measured_on_the_same_split(run, text_file, tmp_path, monkeypatch):
    api.export(run, tmp_path / "out")
    monkeypatch.chdir(text_file.parent)  # the export knows its text by name only
    found, expected = api.evaluate(tmp_path / "out", with_ranks=False), api.evaluate(run, with_ranks=False)
    assert (found["split"], found["targets"]) == ("test", expected["targets"])
    assert found["loss_nats"] == pytest.approx(expected["loss_nats"], rel=1e-6)


def test_what_cannot_be_exported_is_a_sentence(run, tmp_path):
    with pytest.raises(ConfigError, match="exists already"):
        api.export(run, run)
    with pytest.raises(ConfigError, match="dtype = 'fp8' is not known"):
        api.export(run, tmp_path / "out", dtype="fp8")
    with pytest.raises(
        ConfigError, match=r"One row of the weight \S+ takes [\d,]+ bytes in float32, but a file may have 400"
    ):
        api.export(run, tmp_path / "out", max_shard_size=400)
    with pytest.raises(UserError, match="no such folder"):
        api.export(tmp_path / "nowhere", tmp_path / "out")
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="exists already"):
        api.export(run, tmp_path / "file")
    with pytest.raises(UserError, match="this folder cannot be made: Not a directory"):
        api.export(run, tmp_path / "file" / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]


def test_a_failure_leaves_nothing(run, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "check_space", full)
    with pytest.raises(RunError, match="No space left"):
        api.export(run, tmp_path / "a" / "b" / "out")
    assert not list(tmp_path.iterdir())


def seal(folder: Path) -> None:
    """Makes the manifest fit whatever the files are now, as whoever made them would."""
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"] = {name: files.describe(folder / name) for name in manifest["files"] if (folder / name).is_file()}
    files.write_manifest(folder / "manifest.json", {k: v for k, v in manifest.items() if k != "sha256"})


def first_of(index: dict) -> str:
    return sorted(index["weight_map"])[0]


HOSTILE = {
    "no map": lambda index: index.pop("weight_map"),
    "a map that is a list": lambda index: index.update(weight_map=[1]),
    "a weight left out": lambda index: index["weight_map"].pop(first_of(index)),
    "a weight too many": lambda index: index["weight_map"].update(evil="model-00001-of-00002.safetensors"),
    "a path that leaves": lambda index: index["weight_map"].update({first_of(index): "../model-00001-of-00002.safetensors"}),
    "an absolute path": lambda index: index["weight_map"].update({first_of(index): "/etc/passwd"}),
    "a path with an end": lambda index: index["weight_map"].update({first_of(index): "model-00001-of-00002.safetensors\n"}),
    "a number": lambda index: index["weight_map"].update({first_of(index): 3}),
    "a file that is not listed": lambda index: index["weight_map"].update({first_of(index): "model-00009-of-00009.safetensors"}),
    "another file of the model": lambda index: index["weight_map"].update({first_of(index): "config.json"}),
}  # fmt: skip


PARTS = {
    "a gap": ["w[0:2]", "w[3:4]"],
    "an overlap": ["w[0:3]", "w[2:4]"],
    "the end missing": ["w[0:3]"],
    "the start missing": ["w[1:4]"],
    "too long": ["w[0:5]"],
    "empty": ["w[0:0]", "w[0:4]"],
    "backwards": ["w[0:4]", "w[4:2]"],
    "twice": ["w", "w[0:4]"],
    "written otherwise": ["w[00:4]"],
    "a part of another": ["w", "v[0:1]"],
    "a part of a part": ["w[0:4][0:4]"],
    "nothing": [],
}


@pytest.mark.parametrize("what", PARTS)
def test_parts_that_do_not_make_the_weights_are_refused(what):
    assert directory._shapes_of_parts(["w[2:4]", "w[0:2]"], {"w": (4, 3)}) == {"w[0:2]": (2, 3), "w[2:4]": (2, 3)}
    with pytest.raises(ValueError, match="does not say where each"):
        directory._shapes_of_parts(PARTS[what], {"w": (4, 3)})


@pytest.mark.parametrize("what", [*HOSTILE, "a list", "deep", "not JSON", "long", "a key twice"])
def test_a_malformed_index_is_refused(what, sharded, tmp_path):
    folder = Path(shutil.copytree(sharded, tmp_path / "copy"))
    path = folder / directory.INDEX
    index = json.loads(path.read_text())
    if what in HOSTILE:
        HOSTILE[what](index)
    texts = {
        "a list": "[]",
        "deep": "[" * 200_000,
        "not JSON": "{",
        "long": " " * (2 << 20) + "{}",
        "a key twice": '{"a":1,"a":1}',
    }
    path.write_text(texts.get(what, json.dumps(index)))
    seal(folder)
    with pytest.raises(CheckpointError, match=r"index\.json: not an index of weights") as caught:
        api.load(folder)
    assert caught.value.exit_code == 3 and len(str(caught.value)) < 500


def test_a_weight_in_another_file_than_the_index_says_is_refused(sharded, tmp_path):
    folder = Path(shutil.copytree(sharded, tmp_path / "copy"))
    index = json.loads((folder / directory.INDEX).read_text())
    first, second, *_ = sorted(set(index["weight_map"].values()))
    (moved, *_) = [name for name, file in index["weight_map"].items() if file == first]
    index["weight_map"][moved] = second
    (folder / directory.INDEX).write_text(json.dumps(index))
    seal(folder)
    with pytest.raises(
        CheckpointError, match=r"model-0000\d-of-\d+\.safetensors: '.*' is .*, but config\.json asks for"
    ):
        api.load(folder)


@pytest.mark.parametrize("damage", ["flip", "cut", "missing", "pipe", "link", "half", "not finite"])
def test_a_damaged_shard_is_refused_by_name(damage, sharded, tmp_path):
    folder = Path(shutil.copytree(sharded, tmp_path / "copy"))
    shard = sorted(folder.glob("model-*.safetensors"))[-1]
    data = bytearray(shard.read_bytes())
    shard.unlink()
    if damage == "flip":
        data[-3] ^= 1
        shard.write_bytes(data)
    elif damage == "cut":
        shard.write_bytes(data[:-2])
    elif damage == "pipe":
        os.mkfifo(shard)
    elif damage == "link":
        shutil.copyfile(sharded / shard.name, tmp_path / "outside")
        shard.symlink_to(tmp_path / "outside")
    elif damage in ("half", "not finite"):
        kind = torch.float16 if damage == "half" else torch.bfloat16
        tensors = {name: t.to(kind) for name, t in load_file(sharded / shard.name).items()}
        if damage == "not finite":
            next(iter(tensors.values())).view(-1)[0] = float("inf")
        save_file(tensors, shard)
        seal(folder)
    with pytest.raises(CheckpointError, match=shard.name) as caught:
        api.load(folder)
    assert caught.value.exit_code == 3


def test_an_exported_folder_is_never_trained_over(sharded, text_file, tmp_path):
    folder = Path(shutil.copytree(sharded, tmp_path / "copy"))
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    for resume in (False, True):
        with pytest.raises(ConfigError):
            api.train(apply_assignments(tiny_config(), [f'data.path="{text_file}"']), folder, resume=resume, quiet=True)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


def test_the_folder_where_one_is(run, tmp_path, monkeypatch):
    monkeypatch.chdir(run)
    with pytest.raises(ConfigError, match="exists already"):
        api.export(run, ".")
    with pytest.raises(ConfigError, match="exists already"):
        api.export(run, "/")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    assert "manifest.json" in api.export(run, ".")
    assert weights(api.load(tmp_path / "empty")).keys() == weights(api.load(run)).keys()
