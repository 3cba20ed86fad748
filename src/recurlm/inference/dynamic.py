"""Dynamic evaluation: a model that learns from the text which it has just predicted (Krause et al. 2018)."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Sequence
from typing import final

import numpy as np
import torch
from torch import Tensor

from recurlm import kernels
from recurlm.config import DynamicConfig
from recurlm.errors import DataError, RequestError, RunError
from recurlm.model.neural import NeuralModel
from recurlm.model.precision import applied
from recurlm.protocol import State, StatefulModel, detach, map_state, state_leaves
from recurlm.text.batches import Streams


class Segments:
    """Reads segments in turn, each with its gradients, which `learn` gets; on a GPU as one CUDA graph from the second on.

    Every dropout is off, weight drop too. It works on a copy of the model, `twin`, and carries the state.
    """

    def __init__(self, model: NeuralModel, rows: int, learn: Callable[[tuple[Tensor, ...]], None], capture: bool):
        with torch.inference_mode(False):  # weights made in that mode could not be moved outside of it
            self.twin = copy.deepcopy(model).requires_grad_(True)
            for layer in self.twin.layers:
                layer.pack()  # type: ignore[operator]
            self.state = map_state(lambda leaf: leaf.detach().clone(), self.twin.initial_state(rows))
        self.weights, self.learn = list(self.twin.parameters()), learn
        self.capture = capture and model.device.type == "cuda"
        self.graphs: dict[tuple[bool, tuple[int, ...]], torch.cuda.CUDAGraph | None] = {}
        self.fixed: dict[tuple[bool, tuple[int, ...]], list[Tensor]] = {}

    def __call__(self, x_TB: Tensor, y_TB: Tensor, scores: bool = True) -> tuple[Tensor, Tensor]:
        """(hidden_TBH, nll_TB or, without `scores`, log_probs_TBV) by the weights before `learn`; good until the next call."""
        key = scores, tuple(x_TB.shape)
        if not self.capture or key not in self.graphs:
            self.graphs[key] = None  # the first time compiles what must not compile during a capture
            return self._read(x_TB, y_TB, scores)
        if self.graphs[key] is None and not self._captured(key, x_TB, y_TB):
            return self._read(x_TB, y_TB, scores)
        x, y, hidden, out = self.fixed[key]
        x.copy_(x_TB)
        y.copy_(y_TB)
        self.graphs[key].replay()  # type: ignore[union-attr]
        return hidden, out

    def _captured(self, key: tuple[bool, tuple[int, ...]], x_TB: Tensor, y_TB: Tensor) -> bool:
        x, y = x_TB.clone(), y_TB.clone()

        def work() -> None:
            self.fixed[key] = [x, y, *self._read(x, y, key[0])]

        try:
            self.graphs[key] = kernels.graph_of(work)
        except RuntimeError as error:
            self.capture = False
            why = " ".join(str(error).split())[:200]
            warnings.warn(
                f"Segments run without a CUDA graph, several times slower: {why}", RuntimeWarning, stacklevel=5
            )
        return self.capture

    def _read(self, x_TB: Tensor, y_TB: Tensor, scores: bool) -> tuple[Tensor, Tensor]:
        out = self.twin(x_TB, self.state)
        nll_TB, hidden_TBH = self.twin.nll(out.raw_TBH, y_TB), out.raw_TBH.detach()
        gradients = torch.autograd.grad(nll_TB.mean(), self.weights, materialize_grads=True)
        with torch.no_grad():
            answer = nll_TB.detach() if scores else self.log_probs(hidden_TBH)
            for old, new in zip(state_leaves(self.state), state_leaves(out.state), strict=True):
                old.copy_(new)
            self.learn(gradients)
        return hidden_TBH, answer

    def log_probs(self, hidden_TBH: Tensor) -> Tensor:
        """log_probs_TBV by the weights as they are."""
        log_probs_NV = self.twin.head.log_probs(hidden_TBH.flatten(0, 1), self.twin.embedding)  # type: ignore[operator]
        return log_probs_NV.view(*hidden_TBH.shape[:2], -1)


def gradient_rms(
    model: NeuralModel, ids: np.ndarray, boundary_id: int, config: DynamicConfig, capture: bool = True
) -> list[Tensor]:
    """sqrt(mean over minibatches of g^2), g each parameter's gradient of the mean loss of a minibatch of the training ids.

    Minibatches are segments of `config.batch` streams, the state carried, as in the published code. DataError when the
    text is too short for one.
    """
    batches = Streams(ids, config.batch, boundary_id, "published")
    length, most = batches.epoch_length(0), config.batches or math.inf
    if length < 1:
        raise DataError(
            f"A training text of {len(ids):,} tokens is too short for the statistics of dynamic evaluation in "
            f"{config.batch} streams; give a smaller batch."
        )
    with torch.inference_mode(False), torch.enable_grad(), applied(model.precision):
        squares = [torch.zeros_like(p) for p in model.parameters()]
        segments = Segments(
            model, config.batch, lambda gradients: torch._foreach_addcmul_(squares, gradients, gradients), capture
        )
        position = count = 0
        while position < length and count < most:
            window = batches.window(position, config.segment)
            x_TB, y_TB = (torch.from_numpy(a).to(model.device) for a in (window.inputs_TB, window.targets_TB))
            segments(x_TB, y_TB)
            position, count = window.next, count + 1
        torch._foreach_div_(squares, count)
        torch._foreach_sqrt_(squares)
    return squares


@final
class DynamicEvaluation(StatefulModel):
    """The model, moved after each segment of text that it has predicted; one row. The model itself stays as it is.

    rule 'rms': w <- w + min(decay R, 1) (w0 - w) - lr g / (RMS + eps) with g the gradient of the segment's mean loss, w0 the
    trained weights, RMS of `gradient_rms` and R = RMS / mean of RMS (Krause et al. 2018, section 4). The mean is that of
    their code: over the means of the parameters' tensors. rule 'sgd': w <- w + decay (w0 - w) - lr g.
    A segment is learned from when the id after it is read, so what is predicted never depends on what was not yet read.
    Its state: the weights, the recurrent state before the newest segment, and that segment's ids.
    """

    def __init__(
        self, model: StatefulModel, config: DynamicConfig, rms: Sequence[Tensor] | None = None, capture: bool = True
    ):
        if not isinstance(model, NeuralModel):
            raise RequestError("Dynamic evaluation needs the gradients of a neural model; an n-gram model has none.")
        if (rms is None) != (config.rule == "sgd"):
            raise RequestError("Dynamic evaluation by rule rms, and no other, needs the RMS of gradients.")
        self.model, self.config = model, config
        self.vocab_size, self.backward = model.vocab_size, model.backward
        trained = [p.detach() for p in model.parameters()]
        mean = 1.0 if rms is None else sum(float(r.mean()) for r in rms) / len(rms)
        if not mean > 0:
            raise RequestError("The gradients on the training text are all 0: there is nothing to learn from.")
        how = config.lr, config.decay / mean, config.eps
        self.segments = Segments(
            model,
            1,
            lambda gradients: kernels.dynamic_update(self.segments.weights, gradients, trained, rms, *how),
            capture,
        )

    @property
    def device(self) -> torch.device:
        return self.model.device

    def initial_state(self, batch: int) -> State:
        if batch != 1:
            raise RequestError(
                f"Dynamic evaluation reads one stream, for its weights follow it; found a batch of {batch}."
            )
        weights = tuple(p.detach()[None] for p in self.model.parameters())
        return weights, self.model.initial_state(1), torch.zeros(1, 0, dtype=torch.long, device=self.device)

    def advance(self, ids_TB: Tensor, state: State) -> tuple[Tensor, State]:
        return self.read(ids_TB, state)[1:]

    def score(self, ids_TB: Tensor, targets_TB: Tensor, state: State) -> tuple[Tensor, State]:
        return self.read(ids_TB, state, targets_TB)[1:]

    def read(self, ids_TB: Tensor, state: State, targets_TB: Tensor | None = None) -> tuple[Tensor, Tensor, State]:
        """(hidden_TBH, nll_TB of the targets or, without them, log_probs_TBV, state); RunError when the loss is not finite."""
        if targets_TB is not None and not torch.equal(targets_TB[:-1], ids_TB[1:]):  # of another text than is read
            hidden_TBH, log_probs_TBV, state = self.read(ids_TB, state)
            return hidden_TBH, -log_probs_TBV.gather(-1, targets_TB[..., None]).squeeze(-1), state
        with torch.inference_mode(False), torch.enable_grad(), applied(self.model.precision):
            hidden_TBH, out, state = self._read(ids_TB.clone(), state, targets_TB)
        if not math.isfinite(float(out.max())):
            raise RunError(
                f"Dynamic evaluation with lr = {self.config.lr:g} came to a loss that is not finite; take a smaller lr."
            )
        return hidden_TBH, out, state

    def _read(self, ids_TB: Tensor, state: State, targets_TB: Tensor | None) -> tuple[Tensor, Tensor, State]:
        weights, start, before_1S = state
        segments, steps, scores = self.segments, self.config.segment, targets_TB is not None
        ids_TB = torch.cat((before_1S.T, ids_TB))
        next_TB = torch.cat((ids_TB[1:], ids_TB[-1:] if targets_TB is None else targets_TB[-1:].clone()))
        with torch.no_grad():
            for p, w in zip(
                (*segments.weights, *state_leaves(segments.state)), (*weights, *state_leaves(start)), strict=True
            ):
                p.copy_(w.view(p.shape))
        whole = (len(ids_TB) - 1) // steps * steps
        parts = [
            tuple(map(Tensor.clone, segments(ids_TB[t : t + steps], next_TB[t : t + steps], scores)))
            for t in range(0, whole, steps)
        ]
        rest_TB = ids_TB[whole:]
        with torch.no_grad():
            hidden_TBH = segments.twin(rest_TB, segments.state).raw_TBH
            last = segments.twin.nll(hidden_TBH, next_TB[whole:]) if scores else segments.log_probs(hidden_TBH)
            moved = tuple(p.detach().clone()[None] for p in segments.weights) if parts else weights
        hiddens, outs = zip(*parts, (hidden_TBH, last), strict=True)
        state = moved, map_state(Tensor.clone, detach(segments.state)), rest_TB.T
        new = before_1S.shape[1]
        return torch.cat(hiddens)[new:], torch.cat(outs)[new:], state
