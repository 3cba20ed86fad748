"""The training step on a GPU as one CUDA graph for each window length: no launches by the host, and nothing it waits for.

Forward and backward pass run on a twin of the model whose parameters are working copies: in the compute type, with weight
drop applied and sizes padded to what matrix units like. The update (`kernels.update_triton`) moves the model's own
fp32 parameters, the optimiser's moments and the mean of iterates in place and writes the next working copies, so that
checkpoints, validation and the plain step see what they always see.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from recurlm import kernels
from recurlm.config import Config, ModelConfig
from recurlm.model import dropout as drop
from recurlm.model.lanes import Lane
from recurlm.model.neural import LEAST_PART, PARTS, NeuralModel, layer_sizes
from recurlm.protocol import State, map_state, state_leaves
from recurlm.text.batches import Streams
from recurlm.training import objective
from recurlm.training.averaging import Averaging
from recurlm.training.cursor import seed_for_step
from recurlm.training.step import Order

MULTIPLE = 16  # of units, for layers computed in bf16 or TF32
FEATURES = 8  # of a word's vector, a multiple: 16 bytes in bf16, without which products take several times as long
MOST_GRAPHS = 64
MOMENTS = {"sgd": (), "adam": ("exp_avg", "exp_avg_sq"), "adamw": ("exp_avg", "exp_avg_sq")}


def obstacle(config: Config, device: torch.device) -> str:
    """Why the step cannot be captured, as part of a sentence; '' when it can."""
    if device.type != "cuda":
        return "no GPU"
    if not config.train.capture:
        return "train.capture = false"
    if not kernels.has_triton():
        return "triton is not installed"
    if torch.cuda.get_device_capability(device) < (7, 0):
        return "this GPU is older than Triton serves"
    if config.data.batching != "stream":
        return f"batches of {config.data.batching}s differ in shape"
    if config.optimizer.name not in MOMENTS:
        return f"optimizer {config.optimizer.name} has no fused update"
    if config.optimizer.clip_value:
        return "optimizer.clip_value is set"
    fault = _fault_of_triton(device)
    return fault and f"triton does not work here: {fault}"


@functools.cache
def _fault_of_triton(device: torch.device) -> str:
    """Why no kernel can be compiled or run (there may be no C compiler), in a line; '' when one did."""
    try:
        from recurlm.kernels import update_triton

        old, new = torch.zeros(1, device=device), torch.ones(2, device=device)
        update_triton.keep_if_ok(old, new[:1], new)
        return "" if old.item() == 1 else "a kernel gave a wrong result"
    except Exception as error:  # whatever it is, the plain step serves
        return " ".join(str(error).split())[:200]


def padded(model: NeuralModel, multiple: int, features: int) -> ModelConfig:
    """The model's settings with units of each layer as multiples of `multiple`, where every layer says how it is padded.

    The last layer and the words' vectors, these to multiples of `features`, where the head says so too.
    """
    config, head = model.config, model.head
    sizes, E = layer_sizes(config), config.embedding_size
    if all(layer.parts() for layer in model.layers):  # type: ignore[operator]
        *sizes, last = (-(-size // multiple) * multiple for size in sizes)
        if head.blocks() and not config.adaptive_inputs:  # type: ignore[operator]
            E = -(-E // features) * features
            last = E if head.tied else last
        else:
            last = layer_sizes(config)[-1]
        sizes = (*sizes, last)
    return dataclasses.replace(config, hidden_sizes=sizes, embedding_size=E)


class CapturedStep:
    """Orders run as replays of graphs; a window length seen for the first time, and odd windows, run as they are."""

    lag = 64

    def __init__(
        self, model: NeuralModel, optimizer: torch.optim.Optimizer, averaging: Averaging, config: Config,
        state: State, batches: Streams,
    ):  # fmt: skip
        from recurlm.kernels import update_triton

        self.kernels = update_triton
        self.model, self.optimizer, self.averaging, self.config = model, optimizer, averaging, config
        device = model.device
        ids = np.concatenate(([batches.boundary_id], batches.ids), dtype=np.int32)  # half of what int64 would take
        self.ids = torch.from_numpy(ids).to(device)
        self.starts = torch.from_numpy(batches.starts).to(device)
        self.places, self.turns_B = None, torch.zeros_like(self.starts)
        self.ring_lengths = (batches.length, len(batches.ids)) if batches.offset or batches.partial else None
        self.dropout = dataclasses.replace(config.dropout, weight=0.0)
        self._build_twin(model, device)
        # means over all elements of the last layer: those that are padded hold zeros
        wider = self.twin.layers[-1].hidden_size / model.layers[-1].hidden_size  # type: ignore[operator]
        penalties = config.objective
        self.objective = dataclasses.replace(penalties, ar=wider * penalties.ar, tar=wider * penalties.tar)
        self.state = state
        terms = 1 + bool(config.objective.ar) + bool(config.objective.tar)
        self.controls = torch.zeros(update_triton.CONTROLS, dtype=torch.float64, device=device)
        cuda = device.type == "cuda"  # elsewhere only in tests, in Triton's interpreter
        self.orders_host = torch.zeros(2 * self.lag, update_triton.CONTROLS, dtype=torch.float64, pin_memory=cuda)
        self.status = torch.ones(2, device=device)
        self.ring = torch.zeros(2 * self.lag, terms + 2, device=device)
        self.pending: list[Order] = []
        self.most_graphs = MOST_GRAPHS if cuda else 0
        self.slot = 0

    # ---- the twin -------------------------------------------------------------------------------------------

    def _build_twin(self, model: NeuralModel, device: torch.device) -> None:
        config = padded(model, *((1, 1) if model.precision.name == "fp32" else (MULTIPLE, FEATURES)))
        with torch.device("meta"):
            twin = NeuralModel(config, model.vocab_size, torch.Generator("cpu"), model.precision)
        shapes = {name: tuple(p.shape) for name, p in twin.named_parameters()}
        droppable = {id(layer.droppable) for layer in model.layers}  # type: ignore[attr-defined]
        parts = {
            f"layers.{n}.{name}": counts
            for n, layer in enumerate(model.layers)
            for name, counts in layer.parts().items()  # type: ignore[operator]
        }
        parts |= {f"head.{name}": counts for name, counts in model.head.blocks().items()}  # type: ignore[operator]
        own = {id(p) for layer in model.layers for p in layer.parameters()}  # packed, so never the model's own
        working = {}
        for name, p in model.named_parameters():
            same = tuple(p.shape) == shapes[name] and model.precision.dtype == p.dtype and id(p) not in own
            working[name] = p if same else torch.zeros(shapes[name], dtype=model.precision.dtype, device=device)
        twin.load_state_dict(working, assign=True)
        for layer in twin.layers:
            layer.pack()  # type: ignore[operator]
        self.weights, self.leaves = [], list(twin.parameters())
        for number, ((name, p), leaf) in enumerate(zip(model.named_parameters(), self.leaves, strict=True)):
            p_drop = self.config.dropout.weight if id(p) in droppable else 0.0
            shape = self.kernels.shape_of(tuple(p.shape), shapes[name], parts.get(name, (1,) * p.dim()))
            bits = self.kernels.empty_bits(shape, device) if p_drop else None
            copy = None if leaf is p else leaf.detach()
            self.weights.append(self.kernels.Weight(number, shape, p_drop, p.detach(), copy, bits, self._moments(p)))
        self.twin, self.ready = twin, False
        batch, recurrent = self.config.data.batch_size, self.config.dropout.recurrent
        overlaps = not recurrent and all(layer.overlaps(batch) for layer in twin.layers)  # type: ignore[operator]
        overlaps = overlaps and len(model.layers) > 1 and device.type == "cuda"
        self.lanes = [Lane(device) for _ in model.layers] if overlaps else []
        self.updates = int(max((float(s.get("step", 0)) for s in self.optimizer.state.values()), default=0))

    def _moments(self, p: nn.Parameter) -> tuple[Tensor, ...]:
        """The optimiser's own tensors of a parameter, made where it has none yet."""
        optimizer, state = self.config.optimizer, self.optimizer.state[p]
        names = ("momentum_buffer",) if optimizer.momentum and optimizer.name == "sgd" else MOMENTS[optimizer.name]
        if "exp_avg" in names and "step" not in state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
        for name in names:
            if state.get(name) is None:
                state[name] = torch.zeros_like(p)
        return tuple(state[name] for name in names)

    def _rule(self) -> Any:
        o = self.config.optimizer
        if o.name == "sgd":
            method = "sgd" if not o.momentum else "nesterov" if o.nesterov else "momentum"
            return self.kernels.Rule(method, o.clip, o.weight_decay, o.momentum, 0.0, o.eps)
        return self.kernels.Rule(o.name, o.clip, o.weight_decay, o.betas[0], o.betas[1], o.eps)

    # ---- the carried state ----------------------------------------------------------------------------------

    @property
    def state(self) -> State:
        """A copy of the carried state in the model's own sizes."""
        leaves = iter(state_leaves(self.carried))

        def cut(raw: Tensor) -> Tensor:
            return next(leaves)[tuple(slice(0, n) for n in raw.shape)].clone()

        return map_state(cut, self.model.initial_state(self.config.data.batch_size))

    @state.setter
    def state(self, state: State) -> None:
        self.carried = map_state(Tensor.clone, self.twin.initial_state(self.config.data.batch_size))
        for leaf, raw in zip(state_leaves(self.carried), state_leaves(state), strict=True):
            leaf[tuple(slice(0, n) for n in raw.shape)].copy_(raw)
        self._drop_graphs()

    def _drop_graphs(self) -> None:
        """Forgets every graph, and their memory pool: one that is in use no longer takes no new graph."""
        self.graphs: dict[tuple[int, bool], torch.cuda.CUDAGraph | None] = {}
        self.pool = torch.cuda.graph_pool_handle() if self.ids.is_cuda else None

    # ---- one step -------------------------------------------------------------------------------------------

    def take(self, order: Order) -> None:
        if order.newest and not self.averaging.mean:
            self.averaging.mean = [p.detach().clone() for p in self.model.parameters()]
            self._drop_graphs()
        self._control(order)
        self.pending.append(order)
        if order.window.fresh:
            self._reset_state()
        if not self.ready:
            self._refresh()
        length, counted = len(order.window.inputs_TB), order.window.counted_TB
        key = length, bool(self.averaging.mean)
        graph = None
        if counted is None and key in self.graphs and self.most_graphs:
            graph = self.graphs[key] = self.graphs[key] or self._captured(length)
        if graph:
            graph.replay()
        else:
            self._body(length, counted)
        if counted is None and len(self.graphs) < self.most_graphs:
            self.graphs.setdefault(key)
        self.updates += 1

    def _control(self, order: Order) -> None:
        """Sends the order's numbers to the device."""
        if order.window.places is not self.places and order.window.places is not None:  # a new epoch
            self.places = order.window.places
            self.starts.copy_(torch.from_numpy(self.places.starts_B))
            self.turns_B.copy_(torch.from_numpy(self.places.turns_B))
        o, seed, t = self.config.optimizer, self.config.train.seed, self.updates + 1
        corrections = (1 - o.betas[0] ** t, 1 - o.betas[1] ** t) if len(o.betas) == 2 else (1.0, 1.0)
        seeds = (seed_for_step(seed, step) >> 11 for step in (order.step, order.step + 1))  # float64 holds 53 bits
        row = (order.lr, order.newest, *corrections, *seeds, order.position, self.slot)
        host = self.orders_host[self.slot]
        host.copy_(torch.tensor(row, dtype=torch.float64))
        self.controls.copy_(host, non_blocking=True)
        self.slot = (self.slot + 1) % len(self.ring)

    def _reset_state(self) -> None:
        """The initial state in place, unless a step failed: that step's state is still needed."""
        initial = self.twin.initial_state(self.config.data.batch_size)
        self.kernels.keep_if_ok(state_leaves(self.carried), state_leaves(initial), self.status)

    def _refresh(self) -> None:
        """The working copies of the parameters as they are, with the masks of the step to come."""
        controls = self.controls.clone()
        controls[self.kernels.NEXT_SEED] = controls[self.kernels.SEED]
        self.kernels.update(self.weights, [], [], controls, self.status, self.kernels.Rule("none", 0, 0, 0, 0, 0))
        self.ready = True

    def _window(self, length: int) -> tuple[Tensor, Tensor]:
        """(inputs_TB, targets_TB) at the order's position: those of `Streams.window`, read on the device."""
        position = self.controls[self.kernels.POSITION].long()
        if self.ring_lengths is None:
            at_TB = self.starts + position + torch.arange(length + 1, device=self.ids.device)[:, None]
            block_TB = self.ids[at_TB].long()
            return block_TB[:-1], block_TB[1:]
        stream, text = self.ring_lengths
        at_TB = (position + torch.arange(length, device=self.ids.device)[:, None] + self.turns_B) % stream
        index_TB = (self.starts + at_TB) % text  # of targets; `ids` begins with the boundary, one place earlier
        return self.ids[index_TB].long(), self.ids[index_TB + 1].long()

    def _gradients(self, length: int, counted: Any) -> tuple[Tensor, list[str], tuple[Tensor, ...], State]:
        """(terms, their names, gradients of the twin's parameters, new state) for the window at the order's position."""
        inputs_TB, targets_TB = self._window(length)
        noise = drop.Noise(self.controls[self.kernels.SEED :])
        lanes = self.lanes if length >= PARTS * LEAST_PART else []
        out = self.twin(inputs_TB, self.carried, self.dropout, noise, lanes)
        mask = None if counted is None else torch.from_numpy(counted).to(self.ids.device)
        terms = objective.terms(self.twin, out, targets_TB, self.objective, mask)
        stacked = torch.stack([term.float() for term in terms.values()])
        gradients = torch.autograd.grad(stacked.sum(), self.leaves)
        for lane in lanes:
            torch.cuda.current_stream().wait_stream(lane.stream)
        stacked = pad(stacked.detach(), (0, self.ring.shape[1] - 2 - len(terms)))  # a window of one step has no tar
        return stacked, list(terms), gradients, out.state

    def _body(self, length: int, counted: Any) -> None:
        terms, _, gradients, state = self._gradients(length, counted)
        gradients, mean = [g.contiguous() for g in gradients], self.averaging.mean
        rule = self._rule()
        self.kernels.judge(self.weights, gradients, terms, self.controls, self.status, self.ring, rule.clip)
        self.kernels.update(self.weights, gradients, mean, self.controls, self.status, rule)
        self.kernels.keep_if_ok(state_leaves(self.carried), state_leaves(state), self.status)

    def _captured(self, length: int) -> torch.cuda.CUDAGraph | None:
        """The graph of a step of this length; None, and no other graph, where the memory is too small for it."""
        try:
            return self._capture(length)
        except torch.OutOfMemoryError:
            self.most_graphs = 0
            return None

    def _capture(self, length: int) -> torch.cuda.CUDAGraph:
        return kernels.graph_of(lambda: self._body(length, None), self.pool)

    # ---- what came of it ------------------------------------------------------------------------------------

    def read(self) -> tuple[list[list[float]], str]:
        orders, self.pending = self.pending, []
        if not orders:
            return [], ""
        first = (self.slot - len(orders)) % len(self.ring)
        places = [(first + i) % len(self.ring) for i in range(len(orders))]
        rows = self.ring.cpu()[places]
        failed = (rows[:, -1] == 0).nonzero()
        good = int(failed[0]) if len(failed) else len(orders)
        self.updates -= len(orders) - good
        for state in self.optimizer.state.values():
            if "step" in state:
                state["step"].fill_(self.updates)
        failure = self._explain(orders[good], rows[good, 1:-1].tolist()) if good < len(orders) else ""
        return rows[:good, :-1].tolist(), failure

    def _explain(self, order: Order, values: list[float]) -> str:
        """Computes the failed step's gradients once more, to name where it began; the next order may try again."""
        if kernels.lstm_waited_in_vain(self.ids.device):
            self.status.fill_(1.0)
            return "a block of the LSTM kernel waited in vain for another, as if something else held the GPU"
        self._control(order)
        _, names, gradients, _ = self._gradients(len(order.window.inputs_TB), order.window.counted_TB)
        named = dict(zip(dict(self.twin.named_parameters()), gradients, strict=True))
        self.status.fill_(1.0)
        return objective.explain_nonfinite(dict(zip(names, values, strict=False)), self.model, self.state, named)
