"""The captured step: its bookkeeping and arithmetic on the CPU in Triton's interpreter, and as CUDA graphs on a GPU."""

import re
from pathlib import Path

import pytest
import torch

from recurlm.config import ModelConfig, apply_assignments
from recurlm.model.heads import HEADS
from recurlm.model.layers import LAYERS
from recurlm.model.neural import NeuralModel
from recurlm.text.store import open_store
from recurlm.training import captured
from recurlm.training.step import Order, PlainStep
from recurlm.training.trainer import Trainer
from support import in_the_interpreter, tiny_config

CUDA = torch.cuda.is_available()


@pytest.mark.parametrize(
    ("layer", "head"), [(layer, "mixture") for layer in LAYERS] + [("lstm", head) for head in HEADS]
)
def test_units_padded_with_zeros_change_nothing(layer, head, generator):
    """What `parts` promises, for sizes of which none is padded alone; heads that promise nothing keep their sizes."""
    sizes = {"embedding_size": 6, "hidden_sizes": (5, 7, 9 if head == "mixture" else 6), "windows": (2, 3)}
    config = ModelConfig(layer=layer, head=head, experts=3, cutoffs=(4, 8), **sizes)
    model = NeuralModel(config, 11, generator).double()
    larger = captured.padded(model, 8, 8)
    promises = head in ("softmax", "tied", "mixture")
    assert bool(model.head.blocks()) == promises
    last = 16 if head == "mixture" else 8 if promises else 6
    assert larger.hidden_sizes == (8, 8, last) and larger.embedding_size == (8 if promises else 6)
    padded = NeuralModel(larger, 11, generator).double()
    assert captured.padded(padded, 8, 8) == larger
    counts = {"embedding": (1, 1)} | {f"head.{name}": parts for name, parts in model.head.blocks().items()}
    for n, small in enumerate(model.layers):
        assert small.parts().keys() == dict(small.named_parameters()).keys(), n
        counts |= {f"layers.{n}.{name}": parts for name, parts in small.parts().items()}
    raws = dict(model.named_parameters())
    for name, large in padded.named_parameters():
        raw, out = raws[name].data, torch.zeros_like(large)
        if name not in counts:
            counts[name] = (1,) * raw.dim()
            assert raw.shape == large.shape, name
        places = [
            torch.cat([torch.arange(r // c) + i * (p // c) for i in range(c)])
            for r, p, c in zip(raw.shape, out.shape, counts[name], strict=True)
        ]
        out[torch.meshgrid(*places, indexing="ij")] = raw
        large.data = out
    ids, targets = (torch.randint(11, (9, 3), generator=generator) for _ in range(2))
    state, wide = model.initial_state(3), padded.initial_state(3)
    for _ in range(2):
        out, same = model(ids, state), padded(ids, wide)
        state, wide = out.state, same.state
        units = out.raw_TBH.shape[2]
        torch.testing.assert_close(same.raw_TBH[..., :units], out.raw_TBH, rtol=0, atol=1e-14)
        assert (same.raw_TBH[..., units:] == 0).all()
        losses = (m.nll(x.raw_TBH, targets) for m, x in ((padded, same), (model, out)))
        torch.testing.assert_close(*losses, rtol=0, atol=1e-13)
    for layer_state, layer_wide in zip(state, wide, strict=True):
        assert (layer_wide[0][:, layer_state[0].shape[1] :] == 0).all()


def trainer_of(store, folder: Path, *settings: str, capture: bool = True) -> Trainer:
    """A Trainer whose step is captured, on the GPU, or in the interpreter on the CPU."""
    folder.mkdir(exist_ok=True)
    device = "cuda" if CUDA else "cpu"
    config = apply_assignments(
        tiny_config(*settings), [f"train.device={device}", f"train.capture={str(capture).lower()}"]
    )
    with pytest.MonkeyPatch.context() as patch:
        if capture:
            patch.setattr(captured, "obstacle", lambda *_: "")
        return Trainer(config, store, folder, quiet=True)


NO_DROPOUT = tuple(f"dropout.{name}=0" for name in ("embedding", "input", "hidden", "output", "weight", "latent"))
OPTIMIZERS = (
    ("optimizer.name=sgd", "optimizer.lr=2"),
    ("optimizer.name=sgd", "optimizer.lr=0.5", "optimizer.momentum=0.8", "optimizer.nesterov=true"),
    ("optimizer.name=adam", "optimizer.lr=0.01", "optimizer.weight_decay=0.001"),
    (
        "optimizer.name=adamw",
        "optimizer.lr=0.01",
        "optimizer.weight_decay=0.1",
        "averaging.name=ema",
        "averaging.start=0",
    ),
)


def check_against_the_plain_step(store, folder: Path) -> None:
    steps = 30 if CUDA else 3
    cases = [(layer, "tied", OPTIMIZERS[0]) for layer in LAYERS]
    cases += [("qrnn", "tied", optimizer) for optimizer in OPTIMIZERS[1:]]
    cases += [("qrnn", head, OPTIMIZERS[0]) for head in HEADS]
    for layer, head, optimizer in cases:
        settings = ("train.dtype=fp32", f"model.layer={layer}", "model.num_layers=1", "data.bptt_step=4", *optimizer,
                    f"model.head={head}", "model.cutoffs=[8,20]", "model.experts=2")  # fmt: skip
        plain = trainer_of(store, folder, *settings, *NO_DROPOUT, capture=False)
        step = trainer_of(store, folder, *settings, *NO_DROPOUT)
        assert isinstance(plain.stepper, PlainStep) and not isinstance(step.stepper, PlainStep)
        for _ in range(steps if CUDA or head == "tied" else 1):
            a, b = plain.step(), step.step()
            assert a.keys() == b.keys()
            for key in a:
                assert abs(a[key] - b[key]) <= 1e-3 * abs(a[key]), (layer, optimizer, key, a, b)
        for a, b in zip(plain.parameters, step.parameters, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def check_that_a_resumed_run_is_equal(store, folder: Path) -> None:
    from recurlm.training import checkpoint

    for layer in LAYERS if CUDA else ("lstm", "qrnn"):
        settings = (
            f"model.layer={layer}",
            "averaging.name=ema",
            "averaging.start=0.01",
            "optimizer.name=adam",
            "data.bptt_step=4",
        )
        one = trainer_of(store, folder / layer, *settings)
        for _ in range(2):
            one.advance()
        one.read()
        (folder / layer / "checkpoints").mkdir()
        one.save(0.0)
        saved, _ = checkpoint.newest(folder / layer / "checkpoints")
        two = trainer_of(store, folder / layer, *settings)
        two.resume(saved)
        assert [one.step() for _ in range(2)] == [two.step() for _ in range(2)]
        assert all(torch.equal(a, b) for a, b in zip(one.parameters, two.parameters, strict=True))
        assert all(torch.equal(a, b) for a, b in zip(one.averaging.mean, two.averaging.mean, strict=True))


def check_that_a_bad_step_moves_nothing(store, folder: Path) -> None:
    settings = ("optimizer.name=adam", "averaging.name=swa", "averaging.start=0", "model.num_layers=1")
    one = trainer_of(store, folder, *settings)
    for _ in range(2):
        one.advance()
    kept = [p.detach().clone() for p in (*one.parameters, *one.averaging.mean)]
    ids, sound = one.stepper.ids, one.parameters[0][3].detach().clone()
    words = ids.clone()
    ids.fill_(3)  # every input is the word whose vector goes bad
    one.stepper.ready = False
    one.parameters[0].data[3] = float("nan")
    for _ in range(3):  # all wait to be read: two good steps, a bad one, and two more that must not count
        one.advance()
    numbers, failure = one.read()
    assert [step for step, _ in numbers] == [1, 2]
    assert re.match(r"Step 3: .*first tensor that is not finite: weight embedding", failure)
    assert one.cursor.step == 2 and one.averaging.count == 2
    one.parameters[0].data[3] = sound
    assert all(torch.equal(a, b) for a, b in zip(kept, (*one.parameters, *one.averaging.mean), strict=True))
    assert all(s["step"] == 2 for s in one.optimizer.state.values())
    ids.copy_(words)
    one.stepper.ready = False
    other = trainer_of(store, folder, *settings)
    assert [*(n for _, n in numbers), one.step()] == [other.step() for _ in range(3)]


def check_that_lengths_are_captured_when_they_come_again(store, folder: Path) -> None:
    """With graphs that only call the step: which orders run as they are, which are captured, which replayed."""
    settings = ("data.bptt=9", "data.bptt_spread=0", "data.bptt_full_share=1", "model.num_layers=1", "averaging.name=swa",
                "averaging.start=0.5", "train.max_steps=8")  # fmt: skip

    class Graph:
        def __init__(self, step, length):
            self.step, self.length = step, length

        def replay(self):
            self.step._body(self.length, None)

    found = {}
    for name in ("graphs", "full memory"):
        one, log = trainer_of(store, folder, *settings), []
        step, real = one.stepper, one.stepper._body

        def body(length, counted, log=log, real=real):
            log.append((length, "masked" if counted is not None else "whole"))
            real(length, counted)

        def capture(length, step=step, log=log, name=name):
            log.append((length, "captured"))
            if name == "full memory":
                raise torch.OutOfMemoryError
            return Graph(step, length)

        step._body, step._capture, step.most_graphs = body, capture, 64
        for _ in range(7):
            one.advance()
        found[name] = one.read()[0]
        # as it is, captured and replayed, replayed twice; the mean begins with the fifth step, and the graphs anew
        again = ["whole"] if name == "full memory" else ["captured", "whole"]
        expected = ["whole", "captured", "whole", "whole", "whole", "whole", *again, "whole"]
        assert log == [(9, what) for what in expected]
    assert found["graphs"] == found["full memory"]


def check_that_a_stage_follows_and_the_mean_may_start_afresh(store, folder: Path) -> None:
    """Stopped between the stages, and after the mean started afresh, it equals the run that was not."""
    from recurlm.config import from_dict
    from recurlm.training import checkpoint

    second = {
        "optimizer": {"name": "sgd", "lr": 0.5},
        "averaging": {"name": "nt-asgd", "trigger": "share", "start": 0.0, "restart": 1},
    }
    settings = ("model.num_layers=1", "data.bptt_step=4", "optimizer.name=adam", "train.max_steps=2")
    (folder / "checkpoints").mkdir()

    def go(trainer: Trainer, stop: int) -> Trainer:
        while trainer.cursor.step < 5:
            if trainer.stage_done():
                trainer.kept = trainer.weights()
                trainer.next_stage()
                assert not isinstance(trainer.stepper, PlainStep)
            trainer.step()
            if trainer.cursor.step == 4:
                trainer.averaging.since = 0
                assert trainer.averaging.observe([2.0, 1.0, 3.0]) and trainer.averaging.count == 0
            if trainer.cursor.step == stop:
                trainer.save(0.0)
                saved, _ = checkpoint.newest(folder / "checkpoints")
                again = Trainer(trainer.recipe, store, folder, quiet=True)
                again.resume(saved)
                return go(again, 0)
        return trainer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(captured, "obstacle", lambda *_: "")
        config = tiny_config(*settings, f"train.device={'cuda' if CUDA else 'cpu'}")
        config = from_dict({"stages": [second | {"train": {"max_steps": 3}}]}, config)
        whole = go(Trainer(config, store, folder, quiet=True), 0)
        assert whole.averaging.count == 1 and whole.cursor.stage == 1
        assert all(torch.equal(m, p) for m, p in zip(whole.averaging.mean, whole.parameters, strict=True))
        for stop in (2, 4):
            other = go(Trainer(config, store, folder, quiet=True), stop)
            assert all(torch.equal(a, b) for a, b in zip(whole.parameters, other.parameters, strict=True))
            assert all(torch.equal(a, b) for a, b in zip(whole.averaging.mean, other.averaging.mean, strict=True))


def check_that_moved_streams_are_read_alike(store, folder: Path) -> None:
    """The windows that the device cuts are those of the host, over two epochs and a failed step's repetition."""
    for moved in (("random_offset",), ("partial_shuffle",), ("random_offset", "partial_shuffle")):
        settings = (
            "model.num_layers=1",
            "data.batch_size=5",
            "data.bptt=8",
            *(f"data.{name}=true" for name in moved),
        )
        one = trainer_of(store, folder, *settings)
        step, length = one.stepper, one.batches.length
        for at in range(0, 2 * length, 37):
            window = one.batches.window(at % length, 30, at // length)
            step._control(Order(at, window, at % length, 0.0, 0.0))
            inputs_TB, targets_TB = step._window(len(window.inputs_TB))
            assert (inputs_TB.cpu().numpy() == window.inputs_TB).all()
            assert (targets_TB.cpu().numpy() == window.targets_TB).all()
        one.step()


CHECKS = (check_that_lengths_are_captured_when_they_come_again, check_against_the_plain_step, check_that_a_resumed_run_is_equal,
          check_that_a_bad_step_moves_nothing, check_that_a_stage_follows_and_the_mean_may_start_afresh,
          check_that_moved_streams_are_read_alike)  # fmt: skip


def interpreted(name: str, store: str, folder: str) -> None:
    """What the test below runs without a GPU."""
    (check,) = [check for check in CHECKS if check.__name__ == name]
    check(open_store(store), Path(folder))


@pytest.mark.filterwarnings("ignore:RNN module weights")  # of the plain step with cuDNN, whose own filter pytest resets
@pytest.mark.parametrize("check", CHECKS)
def test_the_captured_step(check, store, tmp_path):
    if CUDA:
        check(store, tmp_path)
    else:
        in_the_interpreter("training/test_captured", f"interpreted{check.__name__, str(store.path), str(tmp_path)}")


@pytest.mark.skipif(not CUDA, reason="no GPU here")
@pytest.mark.parametrize("dtype", ["fp32", "tf32", "bf16"])
@pytest.mark.parametrize(("layer", "head"), [(layer, "tied") for layer in LAYERS] + [("qrnn", head) for head in HEADS])
def test_graphs_give_the_bits_of_the_same_step_uncaptured(layer, head, dtype, store, tmp_path):
    settings = (f"model.layer={layer}", f"train.dtype={dtype}", "data.bptt_step=4", "model.hidden_sizes=[20,16,12]",
                f"model.head={head}", "model.cutoffs=[8,20]", "model.experts=2")  # fmt: skip
    graphs, bare = (trainer_of(store, tmp_path, *settings) for _ in range(2))
    bare.stepper.most_graphs = 0
    for one in (graphs, bare):
        for _ in range(60):
            one.advance()
    (numbers, failure), (others, _) = graphs.read(), bare.read()
    assert numbers == others and len(numbers) == 60 and not failure
    assert sum(graph is not None for graph in graphs.stepper.graphs.values()) >= 3 and not bare.stepper.graphs
    assert all(torch.equal(a, b) for a, b in zip(graphs.parameters, bare.parameters, strict=True))


@pytest.mark.skipif(not CUDA, reason="no GPU here")
def test_averaging_may_start_after_graphs_were_captured_and_windows_may_be_short(store, tmp_path):
    settings = ("data.bptt=6", "data.bptt_spread=0", "data.bptt_full_share=1", "averaging.name=nt-asgd", "optimizer.lr=0.1",
                "train.epochs=30")  # fmt: skip
    graphs, bare = (trainer_of(store, tmp_path, *settings) for _ in range(2))
    bare.stepper.most_graphs = 0
    for one in (graphs, bare):
        for _ in range(20):
            one.advance()
        one.averaging.observe([1.0, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1])
        assert one.averaging.count == 0
        for _ in range(20):
            one.advance()
    assert graphs.read() == bare.read() and any(graphs.stepper.graphs.values())
    assert all(torch.equal(a, b) for a, b in zip(graphs.averaging.mean, bare.averaging.mean, strict=True))
