"""Metrics against oracles of a few lines, and against cases that can be done by hand."""

import numpy as np
import pytest

from recurlm.evaluation.metrics import (
    SUGGESTIONS,
    Keyboard,
    calibration,
    distinct,
    last_occurrence,
    repeats_within,
    repetition,
)  # fmt: skip
from recurlm.evaluation.reading import exact_match


def test_calibration_by_hand():
    found = calibration(np.array([0.1, 0.1, 0.9, 0.9, 1.0]), np.array([0, 1, 1, 1, 0]), bins=2)
    assert found.share == pytest.approx((0.4, 0.6))
    assert found.accuracy == pytest.approx((0.5, 2 / 3))
    assert found.ece == pytest.approx(0.4 * 0.4 + 0.6 * abs(2 / 3 - 2.8 / 3))


def test_a_calibrated_model_has_no_error():
    draw = np.random.default_rng(1)
    confidence = draw.random(200_000)
    assert calibration(confidence, draw.random(200_000) < confidence).ece < 0.006
    assert calibration(confidence, draw.random(200_000) < confidence**2).ece > 0.1


def test_repetition_by_hand():
    assert repetition([list("abab")], 2) == pytest.approx(1 - 2 / 3)
    assert repetition([list("aaaa"), list("abcd")], 1) == pytest.approx((0.75 + 0) / 2)
    assert repetition([list("ab")], 3) == 0
    assert distinct([list("aab"), list("ab")], 1) == pytest.approx(2 / 5)
    assert distinct([list("aab"), list("ab")], 2) == pytest.approx(2 / 3)
    assert repeats_within([list("abca")], 3) == pytest.approx(1 / 4)
    assert repeats_within([list("abca")], 2) == 0
    assert last_occurrence(list("abcabb")).tolist() == [0, 0, 0, 3, 3, 1]


def test_exact_match_is_greedy_prediction():
    """k words are foreseen where greedy prediction writes them: simulated with a model that looks one word back."""
    draw = np.random.default_rng(2)
    best, text = draw.integers(4, size=4), draw.integers(4, size=400)
    foreseen = best[np.concatenate(([0], text[:-1]))] == text
    for k in (1, 2, 3):
        right = 0
        for at in range(len(text) - k + 1):
            before, written = (0 if at == 0 else text[at - 1]), []
            for _ in range(k):
                written.append(before := best[before])
            right += written == text[at : at + k].tolist()
        assert exact_match(foreseen, np.ones(400, bool), k) == pytest.approx(right / (400 - k + 1))
    assert exact_match(foreseen, np.zeros(400, bool), 1) == 0
    assert exact_match(foreseen[:2], np.ones(2, bool), 3) == 0


def keys_by_hand(words: list[str], log_probs: np.ndarray, hidden: set, target: int, k: int) -> int:
    """Types letter by letter and looks at the list each time."""
    for typed in range(len(words[target])):
        offered = [i for i in range(len(words)) if i not in hidden and words[i].startswith(words[target][:typed])]
        if target in sorted(offered, key=lambda i: -log_probs[i])[:k]:
            return typed + 1
    return len(words[target]) + 1


def test_keystrokes_equal_typing_by_hand():
    draw = np.random.default_rng(3)
    words = sorted({"".join(draw.choice(list("abc"), size=draw.integers(1, 6))) for _ in range(120)})
    draw.shuffle(words)
    hidden = {0, 5}
    keyboard = Keyboard(words, (0, 5, None))
    for _ in range(300):
        log_probs = draw.normal(size=len(words))
        target = int(draw.integers(len(words)))
        if target in hidden:
            assert keyboard.characters(target) == 0
            continue
        expected = tuple(keys_by_hand(words, log_probs, hidden, target, k) for k in SUGGESTIONS)
        assert keyboard.keys(log_probs[keyboard.order], target) == expected
        assert keyboard.characters(target) == len(words[target]) + 1
