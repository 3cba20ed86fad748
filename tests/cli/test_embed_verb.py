"""`recurlm embed` from the command line: rows, JSON and the picture's file."""

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from typer.testing import CliRunner

from recurlm import api
from recurlm.cli.main import app
from support import tiny_config


@pytest.fixture(scope="module")
def trained(text_file, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("embed") / "run"
    api.train(tiny_config("train.max_steps=30", f'data.path="{text_file}"'), folder, quiet=True)
    return folder


def embed(*arguments: str) -> str:
    done = CliRunner().invoke(app, ["embed", *arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


def test_near_gives_rows_a_word(trained):
    rows = [line.split("\t") for line in embed(str(trained), "near", "king", "tea", "--k", "3").splitlines()]
    assert rows[0] == ["word", "neighbour", "cosine"]
    assert [row[0] for row in rows[1:]] == ["king"] * 3 + ["tea"] * 3
    found = json.loads(embed(str(trained), "near", "king", "--k", "3", "--json"))["king"]
    assert [row["token"] for row in found] == [row[1] for row in rows[1:4]]
    assert found == [vars(row) for row in api.load(trained).neighbours("king", k=3)]
    assert json.loads(embed(str(trained), "near", r"\n", "--k", "1", "--json"))["\\n"]  # the end of a line
    assert "king" not in embed(str(trained), "near", "tea", "--among", "3").splitlines()[1:]


def test_analogy_answers(trained):
    rows = embed(str(trained), "analogy", "king", "tea", "bird", "--k", "2").splitlines()
    assert rows[0] == "answer\tscore" and len(rows) == 3
    answer = json.loads(embed(str(trained), "analogy", "king", "tea", "bird", "--method", "mul", "--json"))
    assert answer["method"] == "mul" and len(answer["answers"]) == 10


def test_map_prints_or_draws(trained, tmp_path):
    rows = embed(str(trained), "map", "--top", "12").splitlines()
    assert rows[0] == "token\tx\ty" and len(rows) == 13
    out = tmp_path / "map.svg"
    assert embed(str(trained), "map", "-o", str(out), "--top", "12", "--method", "pca") == ""
    texts = {e.text for e in ElementTree.parse(out).iter() if e.tag.endswith("}text")}
    assert {row.split("\t")[0] for row in rows[1:]} <= texts
    points = json.loads(embed(str(trained), "map", "-o", str(out), "--top", "9", "--force", "--json"))["points"]
    assert len(points) == 9 and points[0].keys() == {"token", "x", "y"}
    assert [path.name for path in tmp_path.iterdir()] == ["map.svg"]
