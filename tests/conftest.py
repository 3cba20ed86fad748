"""Fixtures for every test."""

from pathlib import Path

import pytest
import torch

from recurlm.text.store import Store, prepare
from support import small_text, tiny_config


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "small.txt"
    path.write_text(small_text(400), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory, text_file: Path) -> Store:
    return prepare(text_file, tiny_config().tokenizer, tmp_path_factory.mktemp("store") / "words")


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(3)
