"""Peak memory and speed of `recurlm data prepare` on a large text, each tokenizer in a process of its own.

Usage: python bench/store_memory.py [MEGABYTES]; the text is made up, with a vocabulary that grows as real text's does.
"""

import subprocess
import sys
import tempfile
import time
from pathlib import Path

CHILD = """
import resource, sys
from recurlm.config import TokenizerConfig
from recurlm.text.store import prepare
store = prepare(sys.argv[1], TokenizerConfig(kind=sys.argv[3]), sys.argv[2])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, store.vocab_size, store.info['train'].tokens)
"""


def write_text(path: Path, megabytes: int) -> None:
    """Zipf-like words: the rank of each is a power law of a random number."""
    import numpy as np

    rng = np.random.default_rng(1)
    with path.open("w") as file:
        while file.tell() < megabytes << 20:
            ranks = (rng.random(200_000) ** -1.1).astype(np.int64) % 5_000_000
            words = [f"w{rank:x}" for rank in ranks]
            file.write("\n".join(" ".join(words[i : i + 20]) for i in range(0, len(words), 20)) + "\n")


def main() -> None:
    megabytes = int(sys.argv[1]) if len(sys.argv) > 1 else 200
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "text.txt"
        write_text(text, megabytes)
        size = text.stat().st_size
        print(f"{size / 1e6:,.0f} MB of text")
        print("tokenizer  peak RSS MB  MB/s   ids        train tokens")
        for kind in ("word", "char", "byte", "bpe", "unigram"):
            start = time.perf_counter()
            done = subprocess.run(
                [sys.executable, "-c", CHILD, str(text), f"{folder}/{kind}", kind],
                capture_output=True,
                text=True,
                check=True,
            )
            seconds = time.perf_counter() - start
            memory, vocabulary, tokens = map(int, done.stdout.split())
            print(f"{kind:<9}  {memory / 1e6:11,.0f}  {size / 1e6 / seconds:5.0f}  {vocabulary:9,}  {tokens:12,}")


if __name__ == "__main__":
    main()
