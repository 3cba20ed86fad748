"""N-gram runs: written, opened and used as any other, and refused when damaged."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from toys import FALLBACK

import recurlm
from recurlm import files, tensors
from recurlm.errors import CheckpointError, ConfigError, RunError, UserError
from recurlm.ngram import directory, run
from recurlm.ngram.smoothing import SMOOTHINGS, Settings
from recurlm.text.store import Store
from recurlm.text.tokenizers import TOKENIZERS
from support import counts, record, small_text, tiny_config

SETTINGS = Settings(fallback=FALLBACK)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, store: Store) -> Path:
    folder = tmp_path_factory.mktemp("ngram") / "run"
    run.train(store.path, folder, order=3, settings=SETTINGS)
    return folder


def test_every_use_of_a_run(trained):
    model = recurlm.load(trained)
    values = recurlm.evaluate(trained, split="test")
    assert 1 < values["ppl"] < 20 and values["top1"] > 0.1
    assert recurlm.evaluate(trained, split="test", batching="sentence")["ppl"] == pytest.approx(values["ppl"])
    assert recurlm.evaluate(trained, split="test", batch_size=4)["targets"] == values["targets"]
    facts = files.read_manifest(trained / "manifest.json", 1)["facts"]
    assert recurlm.evaluate(trained, split="valid", with_ranks=False)["ppl"] == pytest.approx(facts["ppl"])
    assert model.score("the king sees a bird").total > 0
    assert model.score_all(["the king", ""])[1].tokens == ("<eos>",)
    text = model.generate("the king", tokens=9, seed=1)
    assert text == model.generate("the king", tokens=9, seed=1) and text.startswith("the king ")
    assert len(model.beam("the king", tokens=4, beams=3, num_return=2)) == 2
    assert model.parameters == facts["parameters"] > 0
    with pytest.raises(UserError, match="no embeddings"):
        model.neighbours("king")


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_every_tokenizer(kind, tmp_path, text_file):
    config = tiny_config(f"tokenizer.kind={kind}").tokenizer
    facts = run.train(text_file, tmp_path / "run", order=4, settings=SETTINGS, tokenizer=config)
    model = recurlm.load(tmp_path / "run")
    assert recurlm.evaluate(tmp_path / "run", split="valid")["ppl"] == pytest.approx(facts["ppl"])
    assert model.generate("the ", tokens=5, seed=2).startswith("the ")


def test_models_of_two_domains_mix_by_their_share_of_the_held_out_text(trained, tmp_path, store):
    (tmp_path / "other.txt").write_text("the river of stone sees the zebra\n" * 200)
    run.train(tmp_path / "other.txt", tmp_path / "other", order=3, settings=SETTINGS, tokenizer_of=trained)
    mixed = recurlm.evaluate(trained, mixed_with=[tmp_path / "other"], with_ranks=False)
    own, other = mixed["weights"].values()
    assert own + other == pytest.approx(1) and own > 0.9
    (tmp_path / "both").mkdir()
    for split in ("train", "valid", "test"):
        (tmp_path / "both" / f"{split}.txt").write_text(
            small_text(100, seed=len(split)) + "the river of stone sees the zebra\n" * 100
        )
    runs = [trained, tmp_path / "other"]
    values = [recurlm.evaluate(r, data=tmp_path / "both", split="test", with_ranks=False)["ppl"] for r in runs]
    mixed = recurlm.evaluate(
        trained, data=tmp_path / "both", split="test", mixed_with=runs[1:], with_ranks=False, tune_on="valid"
    )
    assert mixed["ppl"] < min(values) and min(mixed["weights"].values()) > 0.1
    run.train(tmp_path / "other.txt", tmp_path / "apart", order=2, settings=SETTINGS)
    with pytest.raises(ConfigError, match="another tokenizer"):
        run.train(tmp_path / "other/store", tmp_path / "third", tokenizer_of=tmp_path / "apart")
    assert run.train(store.path, tmp_path / "third", order=2, settings=SETTINGS, tokenizer_of=trained)["order"] == 2


@pytest.mark.parametrize("smoothing", SMOOTHINGS)
def test_every_smoothing_is_told_in_the_files(smoothing, tmp_path, store):
    facts = run.train(store.path, tmp_path / "run", order=2, settings=Settings(smoothing=smoothing, fallback=FALLBACK))
    assert json.loads((tmp_path / "run/config.json").read_text())["model"]["smoothing"] == smoothing
    assert smoothing in (tmp_path / "run/README.md").read_text()
    assert facts["order"] == 2 and len(facts["ngrams"]) == 2


def test_a_run_is_not_overwritten_and_a_failure_leaves_nothing(trained, store, tmp_path, text_file):
    before = {path.name: path.stat().st_mtime_ns for path in trained.iterdir()}
    with pytest.raises(ConfigError, match="choose another -o"):
        run.train(store.path, trained)
    assert {path.name: path.stat().st_mtime_ns for path in trained.iterdir()} == before
    with pytest.raises(ConfigError, match="smoothing"):
        run.train(text_file, tmp_path / "new", settings=Settings(smoothing="none"))
    for name, error, words in (
        ("absent/x.arpa", UserError, "no such folder"),
        ("x" * 252, RunError, "could not be written: File name too long"),  # with .tmp
    ):
        with pytest.raises(error, match=words):
            run.train(text_file, tmp_path / "new", settings=SETTINGS, arpa_file=tmp_path / name)
    with pytest.raises(UserError, match="run of recurlm"):
        run.train(trained, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_what_a_killed_process_left_on_the_disk_is_removed(store, tmp_path):
    litter = tmp_path / "run" / "scratch.tmp-999999"
    litter.mkdir(parents=True)
    (litter / "windows.duckdb").write_bytes(b"x" * 1000)
    run.train(store.path, tmp_path / "run", order=2, settings=SETTINGS)
    assert not litter.exists() and recurlm.load(tmp_path / "run").parameters


def test_arpa_files_and_runs_are_the_same_models(trained, tmp_path):
    run.export_arpa(trained, tmp_path / "a.arpa.gz")
    facts = run.import_arpa(tmp_path / "a.arpa.gz", tmp_path / "run")
    ours, theirs = recurlm.load(trained), recurlm.load(tmp_path / "run")
    for line in ("the king sees a bird .", "a of unknown things", ""):
        assert theirs.score(line).total == pytest.approx(ours.score(line).total, abs=1e-4)
    assert facts["ngrams"] == files.read_manifest(trained / "manifest.json", 1)["facts"]["ngrams"]
    with pytest.raises(ConfigError, match="No text to measure"):
        recurlm.evaluate(tmp_path / "run")


def test_pruned_runs_go_on_with_the_same_text(trained, tmp_path):
    facts = run.prune(trained, tmp_path / "run", 1e-3, arpa_file=tmp_path / "small.arpa")
    assert sum(facts["ngrams"]) < sum(files.read_manifest(trained / "manifest.json", 1)["facts"]["ngrams"])
    assert recurlm.evaluate(tmp_path / "run", split="valid")["ppl"] == pytest.approx(facts["ppl"])
    assert (tmp_path / "small.arpa").read_text().startswith("\\data\\\nngram 1=")
    with pytest.raises(ConfigError, match="choose another"):
        run.prune(trained, trained, 1e-3)
    run.train(tmp_path / "run/../text.txt" if (tmp_path / "text.txt").write_text(small_text(50)) else "", tmp_path / "s",
              settings=Settings(smoothing="stupid-backoff"))  # fmt: skip
    with pytest.raises(ConfigError, match="no probabilities"):
        run.prune(tmp_path / "s", tmp_path / "t", 1e-3)


def test_large_texts_are_counted_on_the_disk(trained, store, tmp_path, monkeypatch):
    pytest.importorskip("duckdb", reason="duckdb is not installed")
    monkeypatch.setattr(run, "IN_MEMORY", 100)
    run.train(store.path, tmp_path / "run", order=3, settings=SETTINGS)
    assert (tmp_path / "run/model.safetensors").read_bytes() == (trained / "model.safetensors").read_bytes()
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == sorted(path.name for path in trained.iterdir())


@pytest.mark.parametrize("name", [directory.CONFIG, directory.TOKENIZER, directory.WEIGHTS, directory.MANIFEST])
@pytest.mark.parametrize("damage", ["changed", "short", "missing", "link"])
def test_damaged_files_are_named(name, damage, trained, tmp_path):
    folder = shutil.copytree(trained, tmp_path / "run")
    path = folder / name
    data = path.read_bytes()
    path.unlink()
    if damage == "changed":
        path.write_bytes(data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 1]) + data[len(data) // 2 + 1 :])
    elif damage == "short":
        path.write_bytes(data[:-3])
    elif damage == "link":
        path.symlink_to(trained / name)
    with pytest.raises(UserError, match=name):
        recurlm.load(folder)


def resealed(folder: Path, arrays: dict[str, np.ndarray]) -> None:
    """Writes the arrays as the folder's weights, under a manifest that agrees."""
    tensors.write_arrays(folder / directory.WEIGHTS, arrays)
    manifest = files.read_manifest(folder / directory.MANIFEST, 1)
    manifest["files"][directory.WEIGHTS] = files.describe(folder / directory.WEIGHTS)
    files.write_manifest(folder / directory.MANIFEST, manifest)


@pytest.mark.chaos
def test_no_number_in_a_sealed_file_leads_out_of_the_arrays(trained, tmp_path):
    folder, rng = shutil.copytree(trained, tmp_path / "run"), np.random.default_rng(5)
    table = directory.read(trained)[0].table
    names = ("words", "first", "links", "log10", "backoff")
    whole = dict(zip(names, table.walk, strict=True)) | {"known": table.known_V.astype(np.uint8)}
    refused = sound = 0
    for _ in range(counts(150, 3000)):
        arrays = {name: values.copy() for name, values in whole.items()}
        name = names[rng.integers(len(names))]
        bits = arrays[name].view(f"u{arrays[name].itemsize}")
        for _ in range(int(rng.integers(1, 4))):
            bits[rng.integers(bits.size)] ^= 1 << rng.integers(8 * bits.itemsize - (bits.itemsize == 8))
        resealed(folder, arrays)
        try:
            model = recurlm.load(folder)
        except CheckpointError as error:
            assert directory.WEIGHTS in str(error)
            refused += 1
        else:
            model.score_all(["the king sees a bird and the river finds it .", "a b c"])
            model.generate("the", tokens=5, seed=1)
            sound += 1
    record("bits of sealed n-gram files", refused=refused, harmless=sound)
    assert refused and sound


def test_arrays_must_be_those_of_the_configuration(trained, tmp_path):
    folder = shutil.copytree(trained, tmp_path / "run")
    table = directory.read(trained)[0].table
    arrays = dict(zip(("words", "first", "links", "log10", "backoff"), table.walk, strict=True))
    arrays["known"] = table.known_V.astype(np.uint8)
    for name, other in (
        ("log10", arrays["log10"][:-1]),
        ("first", arrays["first"].astype(np.int64)),
        ("more", arrays["first"]),
    ):
        resealed(folder, arrays | {name: other})
        with pytest.raises(CheckpointError, match=name):
            recurlm.load(folder)
    resealed(folder, {name: values for name, values in arrays.items() if name != "links"})
    with pytest.raises(CheckpointError, match="links"):
        recurlm.load(folder)
    resealed(folder, arrays)
    recurlm.load(folder)
    config = json.loads((folder / "config.json").read_text())
    for levels in ([0], [0, 5], [0, -1, 3], "much", [0, 1.5], [1, 2, 3], [0, *range(10**6, 10**6 + 40)]):
        (folder / "config.json").write_text(json.dumps(config | {"model": {"levels": levels, "unk_log10": -1}}))
        manifest = files.read_manifest(folder / "manifest.json", 1)
        manifest["files"]["config.json"] = files.describe(folder / "config.json")
        files.write_manifest(folder / "manifest.json", manifest)
        with pytest.raises(CheckpointError, match=r"config\.json"):
            recurlm.load(folder)
