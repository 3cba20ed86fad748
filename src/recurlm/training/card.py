"""The README.md of a run directory."""

from __future__ import annotations

import math

from recurlm.config import Config
from recurlm.model.neural import NeuralModel, layer_sizes
from recurlm.text.store import Store


def model_card(config: Config, store: Store, model: NeuralModel, best: float, step: int) -> str:
    """Markdown that says what the model is, what it was trained on and how it measured."""
    m, counts = config.model, store.info["train"]
    sizes = ", ".join(map(str, layer_sizes(m)))
    measured = (
        f"{best:.4f} nats per token, perplexity {math.exp(min(best, 700)):.2f}, on the valid split"
        if math.isfinite(best)
        else "not validated yet"
    )
    return f"""---
library_name: recurlm
tags: [language-model, {m.layer}, recurrent]
---
# A recurrent language model

| | |
|---|---|
| layers | {m.layer}, units {sizes}, embedding {m.embedding_size}, head {m.head} |
| parameters | {sum(p.numel() for p in model.parameters()):,} |
| tokenizer | {store.tokenizer_kind}, {store.vocab_size:,} ids |
| trained on | {counts.tokens:,} tokens ({counts.words:,} words, {counts.characters:,} characters), {step:,} steps |
| measured | {measured} |

```python
import recurlm

model = recurlm.load("this folder")
model.score("some text")
model.generate("some text", tokens=50, seed=1)
```

The settings of the run are in `config.toml`, its numbers over time in `metrics.jsonl`.
"""
