"""Text rules: natural text as the training text of a word model writes it. Other tokenizers take text as it is.

A word model knows only the spellings of its training text: Penn Treebank's is lower case without punctuation, WikiText's cuts
"role-playing" into "role @-@ playing". Measured without such a rule, a suite of natural sentences is mostly unknown words.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection

from recurlm.errors import lookup
from recurlm.text.tokenizers import Tokenizer

Words = Collection[str]
Rule = Callable[[str, Words], str]

_QUOTES = str.maketrans({"‘": "'", "’": "'", "“": '"', "”": '"'})
_CLITIC = re.compile(r"(?<=\w) ?'(?=(?:s|re|ve|ll|d|m)\b)", re.IGNORECASE)
_NOT = re.compile(r"(?<=\w) ?n't\b", re.IGNORECASE)
_MARK = re.compile(r"(?<!@)(?<!<unk)([^\w\s'.@-])(?!@|unk>)")
_OPENING = re.compile(r"(?<!\S)'(?=\S)(?!(?:s|t|re|ve|ll|d|m)\b)")
_DOTS = re.compile(r"\.{2,}")
_EDGES = "\"'`()[]{}<>;:!?,-–—/*_"


def as_is(text: str, words: Words) -> str:
    """The text itself."""
    return text


def ptb(text: str, words: Words) -> str:
    """Mikolov's Penn Treebank: lower case, no punctuation but in abbreviations that it knows, "do n't", numbers as N."""
    return _by_lines(_ptb_line, text, words)


def wikitext(text: str, words: Words) -> str:
    """WikiText: marks apart, "role @-@ playing", "1 @,@ 000", "3 @.@ 5", "don 't", "Ada 's"."""
    return _by_lines(_wikitext_line, text, words)


def tokens(text: str, words: Words) -> str:
    """Marks apart; "n't" and "'s" apart and lower case if the vocabulary has it so."""
    return _by_lines(_tokens_line, text, words)


RULES: dict[str, Rule] = {"as-is": as_is, "ptb": ptb, "wikitext": wikitext, "tokens": tokens}


def vocabulary(tokenizer: Tokenizer) -> frozenset[str]:
    """The words of a word tokenizer; nothing for others, which need no rule."""
    if tokenizer.kind != "word":
        return frozenset()
    return frozenset(piece.decode("utf-8", "replace") for piece in tokenizer.pieces)


def rule_name(tokenizer: Tokenizer, asked: str = "auto") -> str:
    """The name of the rule: the one `asked` for (ConfigError if there is none), or the one that the vocabulary shows."""
    if asked != "auto":
        lookup(RULES, asked, "text rule")
        return asked
    words = vocabulary(tokenizer)
    if "@-@" in words:
        return "wikitext"
    if not words or not words & {",", ".", "the", "The"}:
        return "as-is"
    return "tokens" if "," in words else "as-is" if _has_capitals(words) else "ptb"


def _has_capitals(words: Words) -> bool:
    return sum(word[:1].isupper() for word in words) > max(1, len(words) // 100)  # N and a few strays are no case


def _by_lines(rule: Rule, text: str, words: Words) -> str:
    return "\n".join(" ".join(rule(line.translate(_QUOTES), words).split()) for line in text.split("\n"))


def _ptb_line(line: str, words: Words) -> str:
    line = _CLITIC.sub(" '", _NOT.sub(" n't", line)).replace("%", " % ")
    parts, out = re.sub(r"\$(?=\d)", "$ ", line).split(), []
    for place, part in enumerate(parts, 1):
        part = part if part in ("N", "<unk>") else part.lower()
        if part not in ("'", "'s", "'re", "'ve", "'ll", "'d", "'m", "n't", "$", "&", "#", "<unk>"):
            part = part.strip(_EDGES)
            if part.endswith(".") and not _abbreviation(part, words, place == len(parts)):
                part = part.rstrip(".")
            part = part.strip(_EDGES)
        if re.fullmatch(r"%|\d[\d.,/]*", part) and "N" in words:
            part = "N"
        out.append(part)
    return " ".join(out)


def _wikitext_line(line: str, words: Words) -> str:
    line = re.sub(r" n't\b", "n 't", line.replace("``", '"').replace("''", '"'))
    line = re.sub(r"(?<=\w)-(?=\w)", " @-@ ", line)
    line = re.sub(r"(?<=\d)([.,])(?=\d)", r" @\1@ ", line)
    line = re.sub(r"(?<=\w)'(?=\w)", " '", line)
    return _marks_apart(line, words)


def _tokens_line(line: str, words: Words) -> str:
    if not _has_capitals(words):
        line = line.lower()
    if "n't" in words:
        line = _NOT.sub(" n't", line)
    if "'s" in words:
        line = _CLITIC.sub(" '", line)
    return _marks_apart(line, words)


def _abbreviation(word: str, words: Words, last: bool) -> bool:
    """Whether the word's full stop is its own; at the end of a line only if it is never written without."""
    return word in words and not (last and word.rstrip(".") in words)


def _marks_apart(line: str, words: Words) -> str:
    """The line with each punctuation mark a word of its own, the full stop too unless it belongs to a known abbreviation."""
    line = _OPENING.sub("' ", _DOTS.sub(" ... ", _MARK.sub(r" \1 ", line)))
    parts, out = line.split(), []
    last = max((n for n, part in enumerate(parts) if part[0].isalnum()), default=-1)
    for place, part in enumerate(parts):
        tail = []
        while len(part) > 1 and part[-1] in ".'" and part != "..." and not _abbreviation(part, words, place == last):
            tail.append(part[-1])
            part = part[:-1]
        out += [part, *tail[::-1]]
    return " ".join(out)
