"""recurlm: train, measure and use recurrent neural language models.

>>> import recurlm
>>> model = recurlm.load("runs/my-run")
>>> model.score("strong tea").total      # bits
>>> model.generate("strong", tokens=20, seed=1)
>>> model.perplexity("a whole text")
>>> recurlm.evaluate("runs/my-run", split="test")["ppl"]
>>> recurlm.train(recurlm.configure("awd-lstm-ptb", "data.path=ptb"), "runs/new")

Nothing heavy is imported before it is used: `import recurlm` touches no torch, GPU, network or disk.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["Config", "LanguageModel", "__version__", "configure", "evaluate", "load", "train"]

if TYPE_CHECKING:
    from recurlm.api import LanguageModel, evaluate, load, train
    from recurlm.config import Config, configure


def __getattr__(name: str) -> Any:
    if name in ("Config", "configure"):
        from recurlm import config

        return getattr(config, name)
    if name in ("LanguageModel", "evaluate", "load", "train"):
        from recurlm import api

        return getattr(api, name)
    raise AttributeError(f"module 'recurlm' has no attribute {name!r}")
