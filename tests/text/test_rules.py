"""Text rules: natural text as word models read it."""

import pytest

from recurlm.config import Config, apply_assignments
from recurlm.errors import ConfigError
from recurlm.text.rules import RULES, rule_name, vocabulary
from recurlm.text.tokenizers import TOKENIZERS, train_tokenizer
from support import SHARED, small_text

PTB = {"<unk>", "N", "$", "&", "the", "mr.", "u.s.", "'s", "n't", "no", "no.", "company"}
WIKI = {"@-@", ",", ".", "The", "the", "St.", "U.S.", "U.S", "'s", "Ada"}
LOWER = {",", ".", "the", "n't", "'s", "dr."}

CASES = [
    ("ptb", PTB, "Don't they like Mr. Smith's \"rules\"?", "do n't they like mr. smith 's rules"),
    ("ptb", PTB, "It cost $5.30, or 1,000 (30%).", "it cost $ N or N N N"),
    ("ptb", PTB, "He said: no.", "he said no"),
    ("ptb", PTB, "the <unk> is N in the U.S.", "the <unk> is N in the u.s."),
    (
        "wikitext",
        WIKI,
        "A role-playing game for 1,000 people, 3.5%.",
        "A role @-@ playing game for 1 @,@ 000 people , 3 @.@ 5 % .",
    ),
    ("wikitext", WIKI, "He didn't see Ada’s “cat”.", "He didn 't see Ada 's \" cat \" ."),
    ("wikitext", WIKI, "the cat did n't ``move''", 'the cat didn \'t " move "'),
    ("wikitext", WIKI, "St. Louis... is it?\nYes", "St. Louis ... is it ?\nYes"),
    ("wikitext", WIKI, "a role @-@ playing <unk> , 1 @,@ 000 .", "a role @-@ playing <unk> , 1 @,@ 000 ."),
    ("tokens", LOWER, "Dr. No didn't (really) say: Stop!", "dr. no did n't ( really ) say : stop !"),
    ("as-is", LOWER, "  As  it is. ", "  As  it is. "),
]


@pytest.mark.parametrize(("rule", "words", "text", "expected"), CASES)
def test_cases(rule, words, text, expected):
    assert RULES[rule](text, words) == expected


def tokenizer_of(text: str, kind: str = "word"):
    return train_tokenizer([text], apply_assignments(Config(), [f"tokenizer.kind={kind}"]).tokenizer)


def test_the_vocabulary_shows_the_rule():
    assert rule_name(tokenizer_of("the <unk> said N years mr. smith\n")) == "ptb"
    assert rule_name(tokenizer_of("The role @-@ playing game , they said .\n")) == "wikitext"
    assert rule_name(tokenizer_of("the game , they said .\n")) == "tokens"
    assert rule_name(tokenizer_of("q1 q2 q3\n")) == "as-is"
    assert rule_name(tokenizer_of("the game , they said .\n"), "ptb") == "ptb"
    with pytest.raises(ConfigError, match="text rule"):
        rule_name(tokenizer_of("a\n"), "pbt")


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_only_words_need_a_rule(kind):
    tokenizer = tokenizer_of(small_text(50), kind)
    assert bool(vocabulary(tokenizer)) == (kind == "word")
    assert kind == "word" or rule_name(tokenizer) == "as-is"


@pytest.mark.parametrize("rule", RULES)
def test_long_attacks_take_no_time(rule):
    for text in (
        "'" * 50_000,
        "a-" * 25_000,
        "1,." * 17_000,
        "n't" * 17_000,
        " ." * 25_000,
        "@" * 50_000,
        "a" * 50_000 + "." * 999,
    ):
        RULES[rule](text, WIKI)


@pytest.mark.parametrize(("name", "rule", "least"), [("ptb", "ptb", 0.99), ("wikitext-2", "wikitext", 0.97)])
def test_training_text_stays_as_it_is(name, rule, least):
    path = SHARED / name / "valid.txt"
    if not path.exists():
        pytest.skip(f"{name} is not here")
    text = path.read_text(encoding="utf-8")
    tokenizer = tokenizer_of(text)
    assert rule_name(tokenizer) == rule
    words, lines = vocabulary(tokenizer), text.splitlines()[:2000]
    assert sum(RULES[rule](line, words).split() == line.split() for line in lines) > least * len(lines)
