"""Neighbours, analogies and the map: the mathematics on plain tensors, then the picture."""

import xml.etree.ElementTree as ElementTree

import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from recurlm.inference.embed import analogy, neighbour_map, neighbours, principal_plane, unit_rows
from recurlm.inference.picture import draw
from recurlm.language_model import LanguageModel
from recurlm.model.neural import NeuralModel
from recurlm.text.tokenizers import train_tokenizer
from support import tiny_config


@pytest.fixture
def rows(generator) -> torch.Tensor:
    return torch.randn(40, 9, generator=generator)


def first(n, of=40) -> torch.Tensor:
    return torch.arange(of) < n


def cosine(x, y) -> float:
    return float(torch.nn.functional.cosine_similarity(x, y, dim=0))


def test_neighbours_are_the_largest_cosines(rows):
    unit = unit_rows(rows)
    for among in (40, 25, 3):
        expected = sorted(((cosine(rows[i], rows[11]), i) for i in range(among) if i != 11), reverse=True)
        values, ids = neighbours(unit, 11, 7, first(among))
        assert ids == [i for _, i in expected[:7]]
        assert values == pytest.approx([value for value, _ in expected[:7]], abs=1e-6)
    assert len(neighbours(unit, 11, 1000, first(40))[1]) == 39
    assert unit_rows(torch.zeros(2, 3)).tolist() == [[0, 0, 0]] * 2


def test_analogies_follow_their_formulas(rows):
    unit, (a, b, c) = unit_rows(rows), (4, 20, 9)
    target = unit[b] - unit[a] + unit[c]
    add = sorted(((cosine(unit[i], target), i) for i in range(40) if i not in (a, b, c)), reverse=True)
    values, ids = analogy(unit, a, b, c, 37, first(40))
    assert ids == [i for _, i in add]
    assert values == pytest.approx([value for value, _ in add], abs=1e-6)

    def near(i, j):
        return (cosine(unit[i], unit[j]) + 1) / 2

    mul = sorted(
        ((near(i, b) * near(i, c) / (near(i, a) + 0.001), i) for i in range(30) if i not in (a, b, c)), reverse=True
    )
    assert analogy(unit, a, b, c, 5, first(30), multiply=True)[1] == [i for _, i in mul[:5]]
    assert len(analogy(unit, 4, 4, 9, 99, first(40))[1]) == 38


def test_an_analogy_that_is_there_is_found(generator):
    base, sex, crown = torch.randn(3, 60, generator=generator)
    noise = 0.1 * torch.randn(4, 60, generator=generator)
    words = torch.stack([base, base + sex, base + crown, base + sex + crown]) + noise  # man, woman, king, queen
    unit = unit_rows(torch.cat([words, torch.randn(200, 60, generator=generator)]))
    for multiply in (False, True):
        assert analogy(unit, 0, 2, 1, 1, first(204, 204), multiply)[1] == [3]


@pytest.mark.parametrize("kind", ["bpe", "unigram", "char"])
def test_bytes_and_pieces_from_inside_words_are_no_neighbours_of_words(kind, generator):
    text = "".join(f"kinging king {word} sing é\n" for word in ("tea", "bread", "river") * 20)
    tokenizer = train_tokenizer([text], tiny_config(f"tokenizer.kind={kind}").tokenizer)
    model = LanguageModel(NeuralModel(tiny_config().model, tokenizer.vocab_size, generator), tokenizer, {})
    bytes_ = {tokenizer.token(i) for i in range(tokenizer.vocab_size) if tokenizer.is_byte(i)}
    assert len(bytes_) == (256 if kind == "char" else 128) and "<0xC3>" in bytes_
    everything = {row.token for row in model.neighbours("g", k=9999)}
    assert not everything & bytes_ and "\\n" in everything
    assert len(model.embedding_map(999).tokens) == tokenizer.vocab_size - len(bytes_)
    if kind != "char":
        near, answers = model.neighbours("king", k=9999), model.analogy("king", "tea", "sing", k=9999)
        assert " king" not in {row.token for row in near}  # it is the word that was asked for
        assert {" tea", " bread"} < {row.token for row in near} and " river" in {row.token for row in answers}
        assert all(row.token.startswith(" ") for row in [*near, *answers])


def test_the_principal_plane_holds_most_variance(rows):
    plane = principal_plane(rows)
    centred = rows.double() - rows.double().mean(0)
    values = torch.linalg.eigvalsh(centred.T @ centred).flip(0)
    assert plane.square().sum(0).tolist() == pytest.approx(values[:2].tolist())
    assert plane.mean(0).abs().max() < 1e-9
    assert torch.equal(principal_plane(rows[:1]), torch.zeros(1, 2))
    assert principal_plane(torch.ones(5, 3)).abs().max() < 1e-6


def test_the_neighbour_map_keeps_groups_together(generator):
    centres = 5 * torch.randn(6, 20, generator=generator)
    rows = centres.repeat_interleave(15, 0) + torch.randn(90, 20, generator=generator)
    plane = neighbour_map(rows)
    assert torch.equal(plane, neighbour_map(rows))
    distance = torch.cdist(plane, plane).fill_diagonal_(torch.inf)
    assert (distance.argmin(1) // 15 == torch.arange(90) // 15).all()


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 9, 120])
def test_a_map_of_any_size_is_finite(n, generator):
    for rows in (torch.randn(n, 5, generator=generator), torch.ones(n, 5), torch.randn(n, 1, generator=generator)):
        plane = neighbour_map(rows)
        assert plane.shape == (n, 2) and plane.isfinite().all()


STRANGE = ["tea", "$x_1$", "<eos>", "a&b", "\\n", "日本", "␣the", "<0xE2>", "\u0301", "'", '"']


def test_the_picture_keeps_its_text(recwarn):
    points = [(i % 3, i // 3) for i in range(len(STRANGE))]
    picture = draw(STRANGE, points, "A <map>")
    assert picture == draw(STRANGE, points, "A <map>")
    texts = [e.text for e in ElementTree.fromstring(picture).iter() if e.tag.endswith("}text")]
    assert sorted(texts) == sorted([*STRANGE, "A <map>"])
    assert not recwarn.list


def test_labels_do_not_cover_each_other(generator, monkeypatch):
    """Even when all points are nearly one."""
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
    draw([f"word{i}" for i in range(80)], (0.01 * torch.randn(80, 2, generator=generator)).tolist(), "")
    renderer = FigureCanvasAgg(figures[0]).get_renderer()
    boxes = [text.get_window_extent(renderer) for text in figures[0].axes[0].texts]
    assert len(boxes) == 80
    assert not [(a, b) for i, a in enumerate(boxes) for b in boxes[:i] if a.shrunk(0.98, 0.98).overlaps(b)]


def test_a_picture_of_one_point_or_of_equal_points():
    assert b"<svg" in draw(["tea"], [(0.0, 0.0)], "")
    assert b"<svg" in draw(["tea", "bread"], [(1.0, 1.0)] * 2, "")
