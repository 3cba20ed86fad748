"""The README.md of a run directory."""

from __future__ import annotations

import math
from typing import Any

from recurlm.config import Config
from recurlm.model.neural import layer_sizes
from recurlm.text.store import Store


def model_card(config: Config, store: Store, facts: dict[str, Any], made: dict[str, Any]) -> str:
    """Markdown that says what the model is, what it was trained on, how it measured, and what made it."""
    m, counts = config.model, store.info["train"]
    sizes = ", ".join(map(str, layer_sizes(m)))
    loss, split = facts["loss_nats"], facts["loss_split"]
    commit, *changes = made["commit"].partition("+")
    commit = f"commit {commit[:12]}{''.join(changes)}, " if commit else ""
    command = made["command"].replace("`", "'").replace("|", "\\|").replace("\n", " ")
    stage = f", stage {facts['stage']} of {facts['stages']}" if "stage" in facts else ""
    measured = "not measured yet"
    if loss is not None:
        measured = f"{loss:.4f} nats per token, perplexity {math.exp(min(loss, 700)):.2f}, on the {split} split"
    return f"""---
library_name: recurlm
tags: [language-model, {m.layer}, recurrent]
---
# A recurrent language model

| | |
|---|---|
| layers | {m.layer}, units {sizes}, embedding {m.embedding_size}, head {m.head} |
| parameters | {facts["parameters"]:,} |
| tokenizer | {store.tokenizer_kind}, {store.vocab_size:,} ids |
| trained on | {counts.tokens:,} tokens ({counts.words:,} words, {counts.characters:,} characters), {facts["step"]:,} steps{stage} |
| measured | {measured} |
| made by | `{command}` |
| with | recurlm {made["recurlm"]}, {commit}torch {made["torch"]}, {made["device"]}, {made["dtype"]}, seed {made["seed"]} |

```python
import recurlm

model = recurlm.load("this folder")
model.score("some text")
model.generate("some text", tokens=50, seed=1)
```

The settings of the run are in `config.toml`, its numbers over time in `metrics.jsonl`.
"""
