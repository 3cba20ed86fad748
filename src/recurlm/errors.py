"""The errors a user can cause. The class says which exit code the command line returns; nothing else in
recurlm raises an error that a user is meant to read."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import TypeVar

T = TypeVar("T")


class UserError(Exception):
    """A mistake that one sentence can explain: what was found, where, what was expected, what to do."""

    exit_code = 2


class ConfigError(UserError):
    """A setting, recipe or option that cannot work."""


class RequestError(UserError):
    """A call with arguments out of range."""


class DataError(UserError):
    """Text, a token store or a tokenizer whose content is wrong."""

    exit_code = 3


class CheckpointError(UserError):
    """A run directory or checkpoint whose content is wrong."""

    exit_code = 3


class RunError(UserError):
    """A run that cannot go on: no space, no memory, or numbers that are no longer finite."""

    exit_code = 1


def shown(value: object, most: int = 60) -> str:
    """The value as Python writes it, cut to about `most` characters: what a message quotes of bad input."""
    try:
        text = repr(value)
    except ValueError:  # a whole number of thousands of digits
        text = f"a {type(value).__name__} of very many digits"
    except RecursionError:
        text = f"a {type(value).__name__} nested very deeply"
    return text if len(text) <= most else f"{text[: most // 2]} ... {text[-most // 4 :]}"


def nearest(name: object, known: Iterable[str]) -> str:
    """What to say after an unknown name: the nearest known one if any is close; all of them if few, or if none is."""
    name, known = str(name)[:100], sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    guess = f" Did you mean {close[0]!r}?" if close else ""
    return guess + (f" Known: {', '.join(known)}." if len(known) <= (12 if guess else 100) else "")


def lookup(registry: Mapping[str, T], name: str, setting: str) -> T:
    """The entry of a literal registry; ConfigError naming the setting and the nearest entry otherwise."""
    if name not in registry:
        raise ConfigError(f"{setting} = {shown(name)} is not known.{nearest(name, registry)}")
    return registry[name]
