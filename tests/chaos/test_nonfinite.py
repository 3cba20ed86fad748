"""NaN and infinity put anywhere into training: no weight moves, the message says where, nothing of it is saved."""

import math
import random
import shutil
import time

import pytest
import torch

from recurlm import api
from recurlm.config import apply_assignments
from recurlm.errors import RunError
from recurlm.model import directory
from recurlm.model.layers import LAYERS
from recurlm.training import checkpoint, objective
from recurlm.training.averaging import AVERAGING
from recurlm.training.optimizers import OPTIMIZERS
from recurlm.training.publish import Best
from recurlm.training.trainer import Trainer
from support import counts, record, tiny_config

pytestmark = pytest.mark.chaos

BAD = (math.nan, math.inf, -math.inf)


def trainer_of(store, folder, layer: str, optimizer: str, *settings: str) -> Trainer:
    folder.mkdir()
    config = tiny_config(
        f"model.layer={layer}", f"optimizer.name={optimizer}", "dropout.embedding=0", "dropout.weight=0", *settings
    )
    return Trainer(config, store, folder, quiet=True)


def everything(trainer: Trainer) -> list[torch.Tensor]:
    """Copies of the weights and of all that the optimiser keeps."""
    kept = [t for state in trainer.optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor)]
    return [t.detach().clone() for t in (*trainer.parameters, *kept)]


def put(tensor: torch.Tensor, value: float, draw: random.Random) -> None:
    tensor.detach()[tuple(draw.randrange(size) for size in tensor.shape)] = value


def inject(where: str, trainer: Trainer, value: float, draw: random.Random, patch: pytest.MonkeyPatch) -> str:
    """Puts the value there for the next step; returns what the message must name."""
    named = dict(trainer.model.named_parameters())
    if where == "input":  # all rows, for a window does not read every one
        named["embedding"].data[:, draw.randrange(4)] = value
        return "weight embedding"
    if where == "weight":
        layer = trainer.model.layers[draw.randrange(len(trainer.model.layers))]
        name = next(n for n, p in named.items() if p is layer.droppable)
        put(named[name].data, value, draw)
        return f"weight {name}"
    if where == "state":
        leaves = objective.state_leaves(trainer.state)
        number = draw.randrange(len(leaves))
        put(leaves[number], value, draw)
        return f"carried state {number}"
    if where == "gradient":
        name = draw.choice(list(named))
        named[name].register_hook(lambda gradient: gradient * value if value != math.inf else gradient + value)
        return f"gradient of {name}"
    real = objective.terms
    term = draw.choice(["nll", "ar", "tar"])

    def terms(*arguments):
        return {name: loss * value if name == term else loss for name, loss in real(*arguments).items()}

    patch.setattr(objective, "terms", terms)
    return f"'{term}' is {value}"


PLACES = ("input", "weight", "state", "gradient", "term")


@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_no_weight_moves_and_the_message_says_where(where, layer, optimizer, store, tmp_path, monkeypatch):
    draw = random.Random(f"{where} {layer} {optimizer}")
    for number in range(counts(1, 6)):
        value = BAD[(number + len(layer + optimizer)) % 3]
        trainer = trainer_of(store, tmp_path / f"{number}", layer, optimizer)
        steps = draw.randrange(1, 6)
        for _ in range(steps):
            trainer.step()
        with monkeypatch.context() as patch:
            words = inject(where, trainer, value, draw, patch)
            before = everything(trainer)
            finite = [bool(torch.isfinite(t).all()) for t in before]
            try:
                trainer.step()
            except RunError as error:
                sentence = str(error)
            else:
                # An infinite weight or state may saturate a gate: then the step is sound, but it is never saved.
                assert where in ("weight", "state", "input") and math.isinf(value)
                if where != "state":
                    with pytest.raises(RunError, match="is not finite, so nothing was saved"):
                        trainer.save(time.monotonic())
                continue
        assert f"Step {steps + 1}: " in sentence and "No weight was changed" in sentence
        assert words in sentence, sentence
        assert "term" in sentence or "gradient norm" in sentence
        assert trainer.cursor.step == steps
        after = everything(trainer)
        assert all(torch.equal(a, b) for a, b, sound in zip(before, after, finite, strict=True) if sound)
    record("nonfinite_steps", where=where, layer=layer, optimizer=optimizer, injections=counts(1, 6))


@pytest.mark.parametrize("name", AVERAGING)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_nothing_that_is_not_finite_is_saved(name, optimizer, store, tmp_path):
    """Each tensor of a checkpoint in turn: weights, moments, means, carried state, and the best weights."""
    settings = (f"averaging.name={name}", "averaging.nonmono=1", "optimizer.momentum=0.5")
    folder = tmp_path / "run"
    trainer = trainer_of(store, folder, next(iter(LAYERS)), optimizer, *settings)
    trainer.averaging.observe([1.0, 2.0, 3.0])
    for _ in range(3):
        trainer.step()
    trainer.save(time.monotonic())
    good = checkpoint.load(folder / "checkpoints" / "step-3")
    model = (folder / "model.safetensors").read_bytes()
    trainer.step()
    averaged = trainer.averaging.weights() or []
    moments = [t for state in trainer.optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor)]
    places = [*trainer.parameters, *averaged, *moments, *objective.state_leaves(trainer.state)]
    for number, tensor in enumerate(places):
        flat = tensor.detach().view(-1)
        kept = flat[0].clone()
        flat[0] = BAD[number % 3]
        with pytest.raises(RunError, match=r"Step 4: the (weight|tensor) \S+ is not finite, so nothing was saved"):
            trainer.save(time.monotonic())
        flat[0] = kept
    trainer.best = Best(1.0, 4, trainer.weights(), 0)
    last = list(trainer.best.weights)[-1]
    trainer.best.weights[last].view(-1)[0] = math.nan
    with pytest.raises(RunError, match=f"the weight {last} is not finite, so no model was saved"):
        trainer.save(time.monotonic())
    assert [path.name for path in checkpoint.steps(folder / "checkpoints")] == ["step-3"]
    assert torch.equal(
        checkpoint.load(folder / "checkpoints" / "step-3").tensors["model.embedding"], good.tensors["model.embedding"]
    )
    assert (folder / "model.safetensors").read_bytes() == model
    trainer.best = None
    trainer.save(time.monotonic())  # sound again
    record("nonfinite_saves", averaging=name, optimizer=optimizer, tensors=len(places) + 1)


@pytest.mark.parametrize("layer", LAYERS)
def test_a_run_that_meets_a_bad_number_goes_on_from_before(layer, text_file, tmp_path, monkeypatch):
    config = apply_assignments(
        tiny_config(f"model.layer={layer}", "train.max_steps=30", "train.checkpoint_every=4", "train.eval_every=7"),
        [f'data.path="{text_file}"'],
    )
    whole = api.train(config, tmp_path / "whole", quiet=True)
    real, calls = objective.terms, []

    def terms(*arguments):
        calls.append(1)
        out = real(*arguments)
        return {name: loss * math.nan for name, loss in out.items()} if len(calls) == 18 else out

    with monkeypatch.context() as patch:
        patch.setattr(objective, "terms", terms)
        with pytest.raises(RunError, match="Step 18: the term 'nll' is nan"):
            api.train(config, tmp_path / "run", quiet=True)
    assert directory.exists(tmp_path / "run")
    api.load(tmp_path / "run")
    assert api.train(config, tmp_path / "run", resume=True, quiet=True).best_loss == whole.best_loss
    shutil.rmtree(tmp_path / "run")
