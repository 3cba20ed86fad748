"""Text as strangers send it: any bytes, any shape, any size; and files that are not what they seem."""

from __future__ import annotations

import gzip
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from recurlm.config import TokenizerConfig
from recurlm.errors import DataError, UserError
from recurlm.text import corpora, plays
from recurlm.text.store import is_store, open_store, prepare, texts
from recurlm.text.tokenizers import TOKENIZERS, Tokenizer, train_tokenizer
from support import FULL, counts, record

pytestmark = pytest.mark.chaos

SAMPLE = Path(__file__).read_text(encoding="utf-8")
CONFIGS = {kind: TokenizerConfig(kind=kind) for kind in TOKENIZERS}
TRAINED = {kind: train_tokenizer([SAMPLE], config) for kind, config in CONFIGS.items()}
CONTROL = ["<eos>", "<unk>", "<0x0A>", "<0x41>", "<|endoftext|>", "[UNK]", "</s>", "<pad>", "Ċ", "Ġ", "<bos>", "▁"]

every = pytest.mark.parametrize("kind", TOKENIZERS)


def comes_back(tokenizer: Tokenizer, text: str, ids: list[int]) -> bool:
    """Whether ids spell the text: exactly, or as the word tokenizer says."""
    if tokenizer.exact:
        return tokenizer.decode(ids) == text
    lines = [line.split() for line in text.removesuffix("\n").split("\n")] if text else []
    known = set(tokenizer.pieces)
    expected = [
        w if w != "<eos>" and w.encode() in known else "<unk>" for line in lines for w in [*line, "\n"] if w != "\n"
    ]
    return tokenizer.decode(ids).split() == expected


def hostile_bytes(draw: random.Random) -> bytes:
    """Random bytes, text, or text with a few bytes changed."""
    pieces = ["the ", "\n", "\x00", "\ufeff", "\u2028", "\r\n", "é", "戦", "🎈", "e\u0301", "'s", " ", "12", *CONTROL]
    text = "".join(draw.choice([*pieces, chr(draw.randrange(0xD800))]) for _ in range(draw.randrange(30))).encode()
    kind = draw.randrange(3)
    if kind == 0:
        return draw.randbytes(draw.randrange(60))
    if kind == 1 or not text:
        return text
    broken = bytearray(text)
    for _ in range(draw.randint(1, 3)):
        broken[draw.randrange(len(broken))] = draw.randrange(256)
    return bytes(broken)


def test_any_bytes():
    draw, refused, cases = random.Random(1), 0, counts(5_000, 100_000)
    for _ in range(cases):
        data = hostile_bytes(draw)
        cuts = sorted(draw.randrange(len(data) + 1) for _ in range(draw.randrange(3)))
        try:
            text = data.decode()
        except UnicodeDecodeError as error:
            text, bad = None, error.start
            refused += 1
        for tokenizer in TRAINED.values():
            if tokenizer.reads_bytes:
                ids = tokenizer.encode_prefix(data).tolist()  # type: ignore[arg-type]
                assert b"".join(tokenizer.pieces[i] for i in ids) == data
            elif text is None:
                with pytest.raises(DataError, match=rf"here: not UTF-8 text at byte {bad}; convert"):
                    list(texts([data], type(tokenizer), "here"))
            else:
                blocks = [text[i:j].encode() for i, j in zip([0, *cuts], [*cuts, len(text)], strict=True) if text[i:j]]
                parts = [tokenizer.encode_prefix(part) for part in texts(blocks, type(tokenizer), "here")]
                ids = [i for part in parts for i in part.tolist()]
                assert ids == tokenizer.encode(text).tolist()
                assert comes_back(tokenizer, text, ids), (tokenizer.kind, text)
    record("any bytes", cases=cases, not_utf8=refused, tokenizers=len(TRAINED))


@every
def test_every_scalar_and_awkward_ones(kind: str):
    tokenizer = TRAINED[kind]
    scalars = "".join(chr(p) for p in range(0x110000) if not 0xD800 <= p < 0xE000)
    assert len(scalars) == 1_112_064
    for text in (scalars, "\x00" * 9, "\ufeff\ufeffa", "a\u2028b\u2029c\x85d\n", "e" + "\u0301" * 10_000, "\r\r\n\n"):
        assert comes_back(tokenizer, text, tokenizer.encode(text).tolist())


UNITS = [
    "a",
    "ab",
    "\u0301",
    " ",
    "é",
    "戦",
    "🎈",
    "\x00",
    "'",
    "\n",
    "1",
    "\u2028",
    "a\u0301",
    " a",
    "<eos>",
    "_",
    "\r",
]


@every
def test_a_megabyte_of_the_same(kind: str):
    units = UNITS if FULL else UNITS[:3]
    for unit in units:
        text = unit * (1_000_000 // len(unit.encode()))
        took = [measured(lambda t=t: TRAINED[kind].encode(t)) for t in (text, text + text)]
        train = [measured(lambda t=t: train_tokenizer([t], CONFIGS[kind])) for t in (text, text + text)]
        assert max(took[0], train[0]) < 10
        record("a megabyte of the same", tokenizer=kind, unit=ascii(unit), encode_s=took[0], train_s=train[0],
               encode_ratio=round(took[1] / took[0], 2), train_ratio=round(train[1] / train[0], 2))  # fmt: skip


def measured(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return max(0.0001, round(time.process_time() - start, 4))


ATTACKS = [
    "_",
    "*",
    "_a",
    "*a_",
    "**a",
    "#",
    "\\",
    " ",
    " x",
    "\t ",
    "a\n",
    "_\n",
    "\n",
    "& ",
    "[",
    "<eos>",
    "<eos",
    "'",
    "é ",
    "\u3000",
    "\x1c",
]


def test_patterns_are_linear():
    """All that is matched in Python; the library's patterns see the same strings in the tests of shapes."""
    slowest = 0.0
    for unit in ATTACKS:
        for text in (
            unit * (50_000 // len(unit)),
            "_" + unit * (50_000 // len(unit)),
            unit * (50_000 // len(unit)) + "x",
        ):
            works = {
                "plays": lambda t=text: plays.plain(t),
                **{kind: lambda t=text, made=made: made.encode(t) for kind, made in TRAINED.items()},
                **{
                    f"{k} store": lambda t=text, c=c: list(texts([t.encode()], c, "here"))
                    for k, c in TOKENIZERS.items()
                },
            }
            for name, work in works.items():
                took = measured(work)
                slowest = max(slowest, took)
                assert took < 2, (name, unit)
    record("patterns on 50,000 characters", slowest_s=slowest)


def test_typed_control_tokens_are_text():
    draw, cases = random.Random(2), counts(1_000, 10_000)
    for _ in range(cases):
        text = "".join(draw.choice([*CONTROL, " ", "a", "\t", "\u2028"]) for _ in range(draw.randint(1, 12)))
        for tokenizer in TRAINED.values():
            ids = tokenizer.encode_prefix(text).tolist()
            assert tokenizer.boundary_id not in ids
            assert comes_back(tokenizer, text, ids if tokenizer.exact else [*ids, tokenizer.boundary_id])


def child(code: str, *arguments: object) -> tuple[list[str], float]:
    """(lines printed by the code, peak MB) in a process of its own."""
    code += "\nprint(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))"
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, check=False, timeout=3600
    )
    assert done.returncode == 0, done.stderr[-2000:]
    *lines, peak = done.stdout.splitlines()
    return lines, float(peak) / 1024


PREPARE = """
import sys, time
from recurlm.config import TokenizerConfig
from recurlm.text.store import prepare
start = time.process_time()
store = prepare(sys.argv[1], TokenizerConfig(kind=sys.argv[2]), sys.argv[3])
print(time.process_time() - start, store.vocab_size, store.info["train"].tokens, sep="\\n")
"""


@every
def test_one_line(kind: str, tmp_path: Path):
    """A line of 1 GB, 4 MB in CI: memory does not grow with it."""
    megabytes = counts(4, 1000)
    source = tmp_path / "source"
    source.mkdir()
    with (source / "train.txt").open("w", encoding="utf-8") as file:
        for _ in range(megabytes):
            file.write("the cat's naïve 123 戦場 " * 38_500)
    (seconds, *_), peak = child(PREPARE, source, kind, tmp_path / "store")
    record("one line", tokenizer=kind, megabytes=megabytes, seconds=float(seconds), peak_mb=peak)
    assert peak < 512


@every
def test_distinct_words(kind: str, tmp_path: Path):
    """3 million words that come once, 20,000 in CI. Each costs bpe's trainer 1.1 kB, so 10 million would need 11 GB."""
    words = counts(20_000, 3_000_000)
    rng = np.random.default_rng(1)
    source = tmp_path / "source"
    source.mkdir()
    with (source / "train.txt").open("wb") as file:
        for start in range(0, words, 10_000):
            letters = rng.integers(ord("a"), ord("z") + 1, (min(10_000, words - start), 10)).astype(np.uint8)
            letters[:, -1] = ord(" ")
            letters[::20, -1] = ord("\n")
            file.write(letters.tobytes())
    (seconds, vocabulary, _), peak = child(PREPARE, source, kind, tmp_path / "store")
    record(
        "distinct words", tokenizer=kind, words=words, vocabulary=int(vocabulary), seconds=float(seconds), peak_mb=peak
    )
    assert peak < 512 + words * 1.2e-3


@every
@pytest.mark.parametrize("text", ["\n" * 100_000, "x", "\n", " ", "\r", "\x00"], ids=ascii)
def test_small_and_empty_shapes(kind: str, text: str, tmp_path: Path):
    source = tmp_path / "source"
    source.mkdir()
    (source / "train.txt").write_bytes(text.encode())
    store = prepare(source, CONFIGS[kind], tmp_path / "store")
    assert comes_back(store.tokenizer(), text, store.ids("train").tolist())


READ = """
import sys
from recurlm.errors import DataError
from recurlm.text.corpora import open_corpus
try:
    for _ in open_corpus(sys.argv[1]).blocks("train"):
        pass
except DataError as error:
    print(error)
"""


@pytest.mark.parametrize("name", ["text.txt.gz", "text.jsonl.gz", "folder/train.txt.gz", "folder/train.jsonl.gz"])
@pytest.mark.parametrize("unit", [b"\x00", b"a\n"], ids=ascii)
def test_gzip_bombs(name: str, unit: bytes, tmp_path: Path):
    """10 MB that unpack to 10 GB (1 GB in CI)."""
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    member = gzip.compress(unit * (100_000_000 // len(unit)), 9)
    with path.open("wb") as file:
        for _ in range(counts(10, 100)):
            file.write(member)
    (message,), peak = child(READ, path.parent if "/" in name else path)
    assert any(part in message for part in ("unpacks to more than", "is longer than 64 MB", "is not a JSON object"))
    record("gzip bomb", file=name, unit=ascii(unit), packed_mb=path.stat().st_size / 1e6, peak_mb=peak)
    assert peak < 300


AUDIT = """
import json, sys, os
from pathlib import Path
import tokenizers, ctypes
from recurlm.errors import UserError
from recurlm.text import corpora, store
root = sys.argv[1]
opened = []
def hook(event, arguments):
    files = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.symlink")
    if event in files and isinstance(arguments[0], (str, bytes, Path)):
        opened.append(os.path.abspath(os.fsdecode(arguments[0])))
    if event.startswith(("socket.", "subprocess.", "os.exec", "os.system")):
        opened.append(event)
names = json.loads(Path(root, "names.json").read_text())
good = json.loads(Path(root, "store", "store.json").read_text())
del good["hash"]
sys.addaudithook(hook)
refused = 0
for name in names:
    for act in (
        lambda: corpora.get(name, Path(root, "source")),
        lambda: store.open_store(write(good | {"splits": {name: good["splits"]["train"]}})).ids(name),
        lambda: store.open_store(write(good)).ids(name),
    ):
        def write(content):
            content = content | {"hash": store._hash(content)}
            Path(root, "store", "store.json").write_text(json.dumps(content))
            return Path(root, "store")
        try:
            act()
        except UserError:
            refused += 1
outside = sorted({path for path in opened if not path.startswith(root) and "/python" not in path and not path.endswith(".py")})
print(refused, outside)
"""


def test_path_tricks(tmp_path: Path):
    """Names of data sets and of splits lead to no file outside."""
    draw = random.Random(4)
    outside = tmp_path / "secret.bin"
    outside.write_bytes(b"secret")
    root = tmp_path / "root"
    (root / "source").mkdir(parents=True)
    (root / "source" / "train.txt").write_text("a\n")
    prepare(root / "source", CONFIGS["byte"], root / "store")
    parts = [
        "..",
        "../",
        "..\\",
        "%2e%2e",
        "/",
        "//",
        "\x00",
        "~",
        "secret",
        ".bin",
        "train",
        "C:",
        "a" * 4096,
        "\u2215",
        ".",
        "file://",
    ]
    names = ["../../secret", str(outside.with_suffix("")), "/etc/passwd", "..", "", "a" * 4096]
    names += ["".join(draw.choice(parts) for _ in range(draw.randint(1, 6))) for _ in range(counts(100, 500))]
    names = [name for name in names if name != "train"]
    (root / "names.json").write_text(json.dumps(names))
    (line,), _ = child(AUDIT, root)
    assert line == f"{3 * len(names)} []"


def test_a_store_is_there_while_it_is_replaced(tmp_path: Path):
    """A reader finds a whole store at any moment of `--force`."""
    source = tmp_path / "text.txt"
    source.write_text("a\nb\nc\n" * 100)
    store = prepare(source, CONFIGS["byte"], tmp_path / "store")
    times = counts(20, 300)
    code = (
        "import sys; from recurlm.config import TokenizerConfig; from recurlm.text.store import prepare\n"
        "for _ in range(int(sys.argv[3])): prepare(sys.argv[1], TokenizerConfig(kind='byte'), sys.argv[2], overwrite=True)"
    )
    writer = subprocess.Popen([sys.executable, "-c", code, str(source), str(store.path), str(times)])
    looks = 0
    while writer.poll() is None:
        assert is_store(store.path)
        looks += 1
    assert writer.returncode == 0 and open_store(store.path) == store
    assert sorted(p.name for p in tmp_path.iterdir()) == ["store", "text.txt"]
    record("store replaced", times=times, looks=looks)


def test_odd_files_in_any_place(tmp_path: Path):
    """A folder, a pipe, a device, a loop, a broken link or nothing in the place of each file."""
    makers: dict[str, Callable[[Path], object]] = {
        "folder": Path.mkdir,
        "pipe": os.mkfifo,
        "device": lambda p: p.symlink_to("/dev/zero"),
        "loop": lambda p: p.symlink_to(p),
        "broken link": lambda p: p.symlink_to(p.with_name("nothing")),
        "process": lambda p: p.symlink_to("/proc/self/mem"),
    }
    for kind, make in makers.items():
        for name in ("train.txt", "valid.jsonl", "test.txt.gz", "store.json", "train.bin", "tokenizer.json", "ptb.txt"):
            folder = tmp_path / f"{kind} {name}"
            folder.mkdir()
            if name in ("store.json", "train.bin", "tokenizer.json"):
                (tmp_path / "text.txt").write_text("a\nb\nc\n")
                path = prepare(tmp_path / "text.txt", CONFIGS["byte"], folder / "store").path
                (path / name).unlink()
                make(path / name)
                with pytest.raises(UserError) as raised:
                    open_store(path)
            else:
                if name != "train.txt":
                    (folder / "train.txt").write_text("a\n")
                make(folder / name)
                with pytest.raises(UserError) as raised:
                    source = folder / name if name == "ptb.txt" else folder
                    corpus = corpora.open_corpus(source)
                    for split in ("train", "valid", "test"):
                        list(corpus.blocks(split))
            assert "\n" not in str(raised.value)
