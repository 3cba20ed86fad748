"""Counting beyond memory: the windows of a text sorted by DuckDB, which spills to the disk."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from recurlm.errors import ConfigError, RunError
from recurlm.ngram.counts import ROWS, sorted_windows

TOKENS = 1 << 22  # of text at once


def externally_sorted_windows(
    ids: np.ndarray, vocab_size: int, boundary: int, order: int, memory_limit: str, folder: Path
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The distinct windows of a text in order, each with its number, as `build` takes them.

    Several words share one 63-bit key, so that sorting by the keys is sorting by the words. RunError where the database
    fails (a full disk, a limit too small), ConfigError where it is not installed.
    """
    try:
        import duckdb
    except ImportError:
        raise ConfigError(
            "Texts that do not fit into memory are counted with DuckDB, which is not installed: pip install 'recurlm[ngram]'."
        ) from None
    bits = vocab_size.bit_length()  # for 0 to V, where V stands for what is beyond a line's end
    per_key = 63 // bits
    spans = [range(k, min(k + per_key, order)) for k in range(0, order, per_key)]
    keys = ", ".join(f"k{n}" for n in range(len(spans)))
    try:
        with duckdb.connect(str(folder / "windows.duckdb")) as database:
            database.execute(f"SET memory_limit = '{memory_limit}'; SET preserve_insertion_order = false")
            database.execute(f"SET temp_directory = '{folder / 'spill'}'")
            columns = ", ".join(f"k{n} BIGINT" for n in range(len(spans)))
            database.execute(f"CREATE TABLE windows ({columns}, times BIGINT)")
            for part in _parts(ids, vocab_size, boundary, order, spans, bits):
                database.register("part", part)
                database.execute(f"INSERT INTO windows SELECT {keys}, times FROM part")
                database.unregister("part")
            database.execute("SET preserve_insertion_order = true")
            database.execute(
                f"CREATE TABLE sorted AS SELECT {keys}, sum(times)::BIGINT AS times FROM windows GROUP BY {keys} ORDER BY {keys}"
            )
            database.execute("DROP TABLE windows")
            (rows,) = database.execute("SELECT count(*) FROM sorted").fetchone() or (0,)
            for start in range(0, rows, ROWS):
                query = (
                    f"SELECT {keys}, times FROM sorted WHERE rowid >= {start} AND rowid < {start + ROWS} ORDER BY rowid"
                )
                found: dict[str, Any] = database.execute(query).fetchnumpy()
                rows_RN = np.empty((len(found["times"]), order), np.int32)
                for n, span in enumerate(spans):
                    for place, k in enumerate(reversed(span)):
                        rows_RN[:, k] = found[f"k{n}"] >> (place * bits) & ((1 << bits) - 1)
                yield rows_RN, found["times"]
    except duckdb.Error as error:
        reason = str(error).split("\n")[0].rstrip(".")
        raise RunError(f"{folder}: the n-grams could not be sorted on the disk ({reason}).") from error


def _parts(
    ids: np.ndarray, vocab_size: int, boundary: int, order: int, spans: list[range], bits: int
) -> Iterator[dict[str, np.ndarray]]:
    """The keys of the distinct windows of each part of the text, and their numbers."""
    for start in range(0, len(ids), TOKENS):
        for rows_RN, _ in sorted_windows(ids, vocab_size, boundary, order, start, start + TOKENS):
            keys = []
            for span in spans:
                key_R = np.zeros(len(rows_RN), np.int64)
                for k in span:
                    key_R = key_R << bits | rows_RN[:, k]
                keys.append(key_R)
            new_R = np.any([np.diff(key_R, prepend=-1) != 0 for key_R in keys], axis=0)
            at = np.flatnonzero(new_R)
            distinct = {f"k{n}": key_R[at] for n, key_R in enumerate(keys)}
            yield distinct | {"times": np.diff(at, append=len(rows_RN))}
