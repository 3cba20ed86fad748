"""The recurrence of an LSTM layer on the GPU, its weights resident on the chip for the whole sequence (see lstm.cu)."""

from __future__ import annotations

import contextlib
import functools
import itertools
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad

from recurlm.kernels import nvrtc, reference

MULTIPLE = 16  # of units, as the kernels compute them
PATIENCE = 4_000_000_000  # nanoseconds that a block waits for another
LEAST_CAPABILITY = (8, 0)
RING = 4  # uses of the ring of partial sums before a place is used again
CLUSTERS = (2, 3, 4, 8, 9, 16)  # blocks that add their sums through shared memory
CLUSTER_CAPABILITY = (9, 0)  # the one that has products of four warps, wgmma
LEAST_CLUSTERED = 48  # clusters pay for larger batches than this (docs/log.md)
TEAMS = (1, 2)  # of the warps of such a block
CLUSTER_RING = 2  # the same within clusters
SLOTS = 4  # steps whose vectors have places of their own
WIDE_TILES = (3, 4, 5, 8, 10)  # of 8 batch rows that lstm_common.cu writes such products for
STOPS = 2  # steps of the backward kernel at which products beside it may begin
LEAST_STEPS = 16  # of a sequence, for products to run beside it
PARTS = (1, 2, 3, 4)  # of a GPU, with the weights in each and a share of the batch of PART_ROWS rows or more
PART_ROWS = 16
MOST_ROWS = 16  # blocks that share a strip of columns in the backward kernel
MOST_BATCH = (
    48  # for more, several layers of cuDNN's, which overlap, are as fast unless FASTEST says more (docs/log.md)
)


class Card(NamedTuple):
    """What a GPU offers: multiprocessors, bytes of shared memory a block, compute capability; and how many clusters of so many
    blocks, each with a multiprocessor of its own, run at once."""

    processors: int
    shared: int
    capability: tuple[int, int]
    clusters: tuple[tuple[int, int], ...] = ()

    def share(self, parts: int) -> Card:
        """One of so many equal parts of its multiprocessors."""
        clusters = tuple((size, most // parts) for size, most in self.clusters)
        return self._replace(processors=self.processors // parts, clusters=clusters)


class Layout(NamedTuple):
    """A kernel's name and macros, its blocks, warps a block and bytes of shared memory, and microseconds a step by estimate.

    `beside`: shares of the steps at which products begin that run on the multiprocessors that the kernel leaves idle: forward
    those of the steps behind, backward the weights' gradients of the steps that are done.
    """

    name: str
    macros: tuple[tuple[str, int], ...]
    blocks: int
    warps: int
    shared: int
    cost: float
    beside: tuple[float, ...] = ()

    def get(self, macro: str) -> int:
        return dict(self.macros)[macro]

    @property
    def cluster(self) -> int:
        """Blocks of a cluster; 1 for the kernels that have none."""
        return dict(self.macros).get("CLUSTER", 1)


@functools.cache
def card(index: int) -> Card:
    """The Card of torch's GPU of this number."""
    known = torch.cuda.get_device_properties(index)
    shared, capability = known.shared_memory_per_block_optin, (known.major, known.minor)
    clusters = []
    if capability == CLUSTER_CAPABILITY:
        code = nvrtc.compiled('extern "C" __global__ void nothing() {}', {}, capability)
        for size in CLUSTERS:
            with contextlib.suppress(RuntimeError):  # a size that this GPU does not take
                kernel = nvrtc.Kernel(code, "nothing", shared, size)
                clusters.append((size, kernel.resident_blocks(32) // size))
    return Card(known.multi_processor_count, shared, capability, tuple(clusters))


def _up(a: int, b: int) -> int:
    return -(-a // b)


def _groupings(batch: int, parts: int, tiles: Sequence[int] = (1, 2, 3, 4)) -> dict[tuple[int, int, int], None]:
    """(groups of a part, batch rows of each, tiles of 8 rows) of ways to take a batch in groups, with such numbers of tiles."""
    found = {}
    for most, more in itertools.product(tiles, (0, 1)):  # a second group, for one's exchange to hide behind
        groups = _up(_up(batch, parts), 8 * most) + more
        rows = _up(batch, parts * groups)
        if _up(rows, 8) <= most and _up(batch, rows) == parts * groups:
            found[groups, rows, min(n for n in tiles if 8 * n >= rows)] = None
    return found


def _of_parts(make: Callable[[int, int, int, Card], Iterator[Layout]], H: int, batch: int, here: Card) -> list[Layout]:
    """What `make` finds for every number of parts and one part's share of the GPU, the one estimated best first."""
    counts = [parts for parts in PARTS if parts == 1 or batch >= parts * PART_ROWS]
    found = (layout for parts in counts for layout in make(H, batch, parts, here.share(parts)))
    return sorted(found, key=lambda layout: layout.cost)


def _fitted(
    tiles_m: int, tiles_n: int, blocks_k: int, warps: int, other: int, here: Card, biases: int = 0
) -> tuple[int, int] | None:
    """(blocks of 32 k whose weights are kept in registers, bytes of shared memory); None where neither has room.

    `other` is an estimate of the registers that the rest of the kernel needs, `biases` the bytes of those in shared memory.
    """
    registers = min(
        255, 16384 // (32 * _up(warps, 4)) // 8 * 8
    )  # a quarter of the processor's for a quarter of the warps
    free = registers - 4 * tiles_m * tiles_n - 4 * blocks_k * tiles_n - other
    kept = max(0, min(blocks_k, free // (8 * tiles_m)))
    if kept < blocks_k:  # fragments from shared memory pass through registers
        kept = max(0, min(blocks_k, (free - 4) // (8 * tiles_m)))
    shared = warps * (blocks_k - kept) * 2 * tiles_m * 512 + 2 * warps * tiles_n * 8 * (16 * tiles_m + 4) * 4 + biases
    return (kept, shared) if free >= 0 and shared <= here.shared - 2048 else None


def _warps(blocks_k: int) -> Iterator[tuple[int, int]]:
    """(warps, blocks of 32 k for each) of ways to share blocks of k among warps: no warp that could be spared."""
    for warps in range(1, 17):
        each = _up(blocks_k, warps)
        if warps == 1 or _up(blocks_k, warps - 1) > each:
            yield warps, each


def _work(groups: int, warps: int, blocks_k: int, kept: int, tiles_m: int, tiles_n: int) -> tuple[float, float]:
    """Microseconds a step on an H200 of products on the matrix units, and of reading weights from shared memory."""
    products = groups * _up(warps, 4) * blocks_k * 2 * tiles_m * tiles_n * 0.0033
    return products, groups * warps * (blocks_k - kept) * 2 * tiles_m * 0.002


# The estimates' factors are fitted to some 900 layouts measured on an H200 (bench/results/h200/lstm-layouts.txt).


def forward_layouts(H: int, batch: int, here: Card) -> list[Layout]:
    """Ways to lay out the forward kernel for H units (a multiple of 16), the one estimated best first."""
    return _of_parts(_forward, H, batch, here)


def _forward(H: int, batch: int, parts: int, here: Card) -> Iterator[Layout]:
    if not here.processors:
        return
    least = _up(_up(H, 4), here.processors)
    for tiles_m in (least, least + 1):
        units, blocks = 4 * tiles_m, _up(H, 4 * tiles_m)
        for warps, blocks_k in _warps(_up(H, 32)):
            for groups, rows, tiles_n in _groupings(batch, parts):
                rounds = _up(units * rows, 32 * warps)
                fit = _fitted(tiles_m, tiles_n, blocks_k, warps, 20 + 5 * rounds + blocks_k, here, 16 * units)
                if fit is None:
                    continue
                products, reads = _work(groups, warps, blocks_k, fit[0], tiles_m, tiles_n)
                moved = batch * H * 2 * blocks / 5.5e6
                cost = (
                    0.6 * groups
                    + 0.6 * (groups == 1)
                    + 0.68 * products
                    + 0.7 * reads
                    + 1.66 * moved
                    + 0.18 * groups * rounds
                )
                macros = _batch_macros(H, batch, parts, groups, rows, tiles_n, warps)
                macros |= {"UNITS": units, "BLOCKS_K": blocks_k, "REGISTERS_K": fit[0]}
                yield Layout("forward", tuple(macros.items()), parts * blocks, warps, fit[1], cost)


def backward_layouts(H: int, batch: int, here: Card) -> list[Layout]:
    """Ways to lay out the backward kernel for H units (a multiple of 16), the one estimated best first."""
    return _of_parts(_backward, H, batch, here)


def _backward(H: int, batch: int, parts: int, here: Card) -> Iterator[Layout]:
    for columns in range(16, min(H, 128) + 1, 16):
        strips, tiles_m = _up(H, columns), columns // 16
        if strips > here.processors:
            continue
        row_units = _up(_up(H, here.processors // strips), 16) * 16
        rows = _up(H, row_units)
        if rows > MOST_ROWS:
            continue
        for warps, blocks_k in _warps(row_units // 8):
            for groups, batch_rows, tiles_n in _groupings(batch, parts):
                rounds = _up(_up(columns // 2 * batch_rows, rows), 32 * warps)
                fit = _fitted(tiles_m, tiles_n, blocks_k, warps, 18 + 20 * rounds + 2 * rows + blocks_k, here)
                if fit is None:
                    continue
                products, reads = _work(groups, warps, blocks_k, fit[0], tiles_m, tiles_n)
                moved = batch * strips * rows * (0.9 * 8 * row_units + 1.05 * 8 * columns) / 5.5e6
                cost = 1.1 + groups + 0.5 * (groups == 1) + 1.8 * products + 1.2 * reads + moved
                macros = _batch_macros(H, batch, parts, groups, batch_rows, tiles_n, warps)
                macros |= {"ROW_UNITS": row_units, "COLUMNS": columns, "BLOCKS_K": blocks_k, "REGISTERS_K": fit[0]}
                yield Layout("backward", tuple(macros.items()), parts * strips * rows, warps, fit[1], cost)


def _batch_macros(H: int, batch: int, parts: int, groups: int, rows: int, tiles_n: int, warps: int) -> dict[str, int]:
    of_batch = {"PARTS": parts, "GROUPS": groups, "GROUP_BATCH": rows, "TILES_N": tiles_n}
    return {"H": H, "BATCH": batch, **of_batch, "WARPS": warps, "SLOTS": SLOTS}


LAYOUTS = {"forward": forward_layouts, "backward": backward_layouts}


def cluster_layouts(name: str, H: int, batch: int, here: Card) -> list[Layout]:
    """Ways to lay out a kernel of lstm_cluster.cu for H units (a multiple of 16), the one estimated best first."""
    return _of_parts(functools.partial(_clusters, name), H, batch, here)


def _clusters(name: str, H: int, batch: int, parts: int, here: Card) -> Iterator[Layout]:
    if here.capability != CLUSTER_CAPABILITY:
        return
    for (cluster, most), teams in itertools.product(here.clusters, TEAMS):
        batch_rows = _up(batch, parts * teams)
        tiles_n = next((n for n in WIDE_TILES if 8 * n >= batch_rows), None)
        if not most or tiles_n is None or _up(batch, batch_rows) != parts * teams:
            continue
        least = _up(_up(H, most), 4 if name == "forward" else 16)  # tiles of rows of a cluster
        for warps_m, team_warps in itertools.product((4, 8), (4, 8)):
            shares = warps_m, _up(least, warps_m), team_warps, batch_rows, tiles_n
            layout = _clustered(name, H, batch, here, cluster, parts, teams, *shares)
            if layout is not None:
                yield layout


def _clustered(
    name: str, H: int, batch: int, here: Card, cluster: int, parts: int, teams: int,
    warps_m: int, tiles_m: int, team_warps: int, batch_rows: int, tiles_n: int,
) -> Layout | None:  # fmt: skip
    """The layout with these shares of a warp; None where it does not fit."""
    forward, rows = name == "forward", 16 * warps_m * tiles_m
    warps = warps_m + teams * team_warps
    blocks_k = _up(_up(H, cluster), 32 if forward else 8)  # of 32 k: gates of 8 units
    if (cluster - 1) * blocks_k * (32 if forward else 8) >= H:
        return None  # the last block would have nothing to wait for and run ahead
    if warps > 24 or _up(blocks_k * tiles_n, team_warps) > 32:  # a lane's loads have a bit each in a word
        return None
    strips, width, of_item = _up(H, rows // 4 if forward else rows), 8 if forward else 2, 16 if forward else 4
    if strips > dict(here.clusters)[cluster]:
        return None
    share = rows // width * _up(batch_rows, cluster)
    if 32 * team_warps % (rows // width):
        return None  # a thread's items would be of several units
    rounds = _up(share, 32 * team_warps)
    # registers of a thread: those that a team needs, and what that leaves for who multiplies
    of_team = _up(56 + 22 * rounds if forward else 80, 8) * 8
    equal = min(65536 // (32 * warps) // 8 * 8, 248)
    of_multiplier = min(232, (equal * warps - of_team * teams * team_warps) // warps_m // 8 * 8)
    free = of_multiplier - 4 * tiles_m * tiles_n - 28
    vectors = blocks_k * tiles_n * 512
    shared = teams * (vectors + CLUSTER_RING * cluster * share * of_item + 16) + 2 * tiles_n * 8 * (rows // 2 + 4) * 4
    shared += 4 * rows if forward else teams * (16 * _up(batch_rows, cluster) * (rows // 2 + 4) + 96 * share)
    room = (here.shared - shared) // (warps_m * tiles_m * 1024)  # for blocks of 32 k of the weights
    kept = min(blocks_k, free // (8 * tiles_m))
    if not of_team <= equal <= of_multiplier or kept < 0 or blocks_k - kept > room:
        return None
    shared += warps_m * (blocks_k - kept) * tiles_m * 1024
    # microseconds on an H200: of the exchange, and of one team's products and sums, while another team does something else
    moved = batch * H * (2 if forward else 8) * strips / 5.5e6
    product = warps_m // 4 * tiles_m * blocks_k * 2 * 4 * tiles_n / 1830
    sums = rows * batch_rows * 2 * (cluster - 1) / cluster / 14 / 1830
    cost = max(1.6 + moved / teams + product + sums + 0.4 * rounds, moved, 1.3 * teams * product)
    macros = _batch_macros(H, batch, parts, 1, batch_rows, tiles_n, warps) | {"TEAMS": teams, "TEAM_WARPS": team_warps}
    macros |= {"CLUSTER": cluster, "WARPS_M": warps_m, "WARP_TILES": tiles_m, "BLOCKS_K": blocks_k, "REGISTERS_K": kept}
    macros |= {"MULTIPLY_REGISTERS": of_multiplier, "TEAM_REGISTERS": of_team}
    macros |= {"UNITS": rows // 4} if forward else {"COLUMNS": rows, "ROW_UNITS": 8 * blocks_k}
    return Layout(name, tuple(macros.items()), parts * strips * cluster, warps, shared, cost)


# What was fastest of many layouts on an H200, by kernel, units and batch (bench/results/h200/lstm-pace.txt, lstm-parts.txt,
# lstm-teams.txt). PACE is free: no layout has it otherwise. Batches over MOST_BATCH are computed here for these sizes only.
FASTEST = {
    ("forward", 1152, 20): {"UNITS": 12, "WARPS": 8, "GROUPS": 1},
    ("backward", 1152, 20): {"ROW_UNITS": 240, "COLUMNS": 48, "WARPS": 8, "GROUPS": 1},
    ("forward", 400, 20): {"UNITS": 8, "WARPS": 7, "GROUPS": 1, "PACE": 700},
    ("backward", 400, 20): {"ROW_UNITS": 48, "COLUMNS": 32, "WARPS": 6, "GROUPS": 1},
    ("forward", 1152, 64): {"PARTS": 1, "TEAMS": 2, "CLUSTER": 3, "WARPS_M": 8, "TEAM_WARPS": 4, "PACE": 800},
    ("backward", 1152, 64): {"PARTS": 1, "TEAMS": 2, "CLUSTER": 9, "WARPS_M": 8, "TEAM_WARPS": 4},
    ("forward", 1152, 80): {"PARTS": 1, "TEAMS": 2, "CLUSTER": 3, "WARPS_M": 8, "TEAM_WARPS": 4, "PACE": 1000},
    ("backward", 1152, 80): {"PARTS": 1, "TEAMS": 2, "CLUSTER": 9, "WARPS_M": 8, "TEAM_WARPS": 4},
    ("forward", 400, 80): {"PARTS": 4, "UNITS": 16, "WARPS": 13, "GROUPS": 1},
    ("backward", 400, 80): {"PARTS": 4, "ROW_UNITS": 208, "COLUMNS": 32, "WARPS": 13},
    ("forward", 1024, 32): {"UNITS": 12, "WARPS": 8, "GROUPS": 1},
    ("backward", 1024, 32): {"ROW_UNITS": 128, "COLUMNS": 64, "WARPS": 8, "GROUPS": 1, "PACE": 2500},
    ("forward", 1024, 128): {"PARTS": 2, "TEAMS": 1, "CLUSTER": 2, "WARPS_M": 8, "TEAM_WARPS": 8},
    ("backward", 1024, 128): {"PARTS": 2, "ROW_UNITS": 256, "COLUMNS": 64, "WARPS": 8, "TILES_N": 4},
}


# The same of Layout.beside (bench/results/h200/lstm-beside.txt).
BESIDE = {
    ("forward", 1152, 64): (0.75,),
    ("backward", 1152, 64): (0.21, 0.55),
    ("forward", 1152, 80): (0.75,),
    ("backward", 1152, 80): (0.26, 0.6),
}


def measured(name: str, H: int, batch: int, here: Card, choice: dict[str, int]) -> Layout | None:
    """The layout with these macros that is estimated best; None where there is none."""
    wanted = {key: value for key, value in choice.items() if key != "PACE"}
    make = functools.partial(cluster_layouts, name) if "CLUSTER" in choice else LAYOUTS[name]
    free = tuple((key, value) for key, value in choice.items() if key == "PACE")
    for layout in make(H, batch, here):
        if wanted.items() <= dict(layout.macros).items():
            return layout._replace(macros=layout.macros + free, beside=BESIDE.get((name, H, batch), ()))
    return None


def source(layout: Layout) -> str:
    """The CUDA C++ of a layout's kernel."""
    return nvrtc.source("lstm_common.cu") + nvrtc.source("lstm_cluster.cu" if layout.cluster > 1 else "lstm.cu")


@functools.cache
def _kernel(layout: Layout, half: bool, index: int) -> nvrtc.Kernel:
    return nvrtc.Kernel(_code(layout, half, index), layout.name, layout.shared, layout.cluster)


@functools.cache
def _wait_for_steps(layout: Layout, half: bool, index: int) -> nvrtc.Kernel:
    return nvrtc.Kernel(_code(layout, half, index), "wait_for_steps", 0, together=False)


@functools.cache
def _bias_gradient(layout: Layout, half: bool, index: int) -> nvrtc.Kernel:
    return nvrtc.Kernel(_code(layout, half, index), "bias_gradient", layout.warps * 1024, together=False)


def _code(layout: Layout, half: bool, index: int) -> bytes:
    return nvrtc.compiled(source(layout), {**dict(layout.macros), "HALF": int(half)}, card(index).capability)


def _is_measured(H: int, batch: int, here: Card) -> bool:
    return ("forward", H, batch) in FASTEST and here.capability == CLUSTER_CAPABILITY


def _left_to_cudnn(units: int, batch: int, index: int) -> bool:
    return batch > MOST_BATCH and not _is_measured(_up(units, MULTIPLE) * MULTIPLE, batch, card(index))


def _whole(layouts: list[Layout]) -> list[Layout]:
    """The first that has one part, which the estimates are fitted to; others are taken where they were measured."""
    return [layout for layout in layouts if layout.get("PARTS") == 1][:1]


@functools.cache
def best(units: int, batch: int, index: int) -> tuple[Layout, Layout] | None:
    """The forward and the backward layout for a GPU of torch's; None where one of the kernels does not fit."""
    here, H = card(index), _up(units, MULTIPLE) * MULTIPLE
    if here.capability < LEAST_CAPABILITY:
        return None
    pair, is_measured = [], _is_measured(H, batch, here)
    for name, layouts in LAYOUTS.items():
        choice = FASTEST[name, H, batch] if is_measured else None
        known = measured(name, H, batch, here, choice) if choice else None
        found = [known] if known else _whole(layouts(H, batch, here))
        if not known and batch > LEAST_CLUSTERED:
            found += _whole(cluster_layouts(name, H, batch, here))
        if not found:
            return None
        pair.append(min(found, key=lambda layout: layout.cost))
    return pair[0], pair[1]


def obstacle(units: int, batch: int, device: torch.device) -> str:
    """Why a layer in bf16 or fp16 is not computed here, as part of a sentence; '' when it can be."""
    index = torch.cuda.current_device() if device.index is None else device.index
    if card(index).capability < LEAST_CAPABILITY:
        return "this GPU is older than compute capability {}.{}".format(*LEAST_CAPABILITY)
    if _left_to_cudnn(units, batch, index):
        return f"cuDNN is as fast for batches of more than {MOST_BATCH}, or this is not measured"
    return "" if best(units, batch, index) else f"{units} units with batches of {batch} do not fit on this GPU at once"


@functools.cache
def _trouble(index: int) -> Tensor:
    return torch.zeros(1, dtype=torch.int32, device=torch.device("cuda", index))


def waited_too_long(device: torch.device) -> bool:
    """Whether a block gave up waiting for another since the last call; its outputs are NaN. Waits for the GPU."""
    place = _trouble(torch.cuda.current_device() if device.index is None else device.index)
    found = bool(place.item())
    place.zero_()
    return found


def _stops(layout: Layout, T: int) -> list[int]:
    """The steps of a sequence of T at which products begin beside the kernel."""
    if T < LEAST_STEPS or (layout.name == "backward" and layout.cluster == 1):  # lstm.cu's does not count its steps
        return []
    return [round(T * share) for share in layout.beside]


@functools.cache
def _side(index: int) -> tuple[torch.cuda.Stream, nvrtc.Running]:
    return torch.cuda.Stream(index), nvrtc.Running()


class _Beside:
    """Torch's current stream and, if `wanted`, a second one beside it, which is joined in the end; if not, what is meant for that
    runs on the current one. All layers of a GPU share the second one."""

    def __init__(self, index: int, wanted: bool):
        self.main = torch.cuda.current_stream() if wanted else None
        self.side, self.running = _side(index) if wanted else (None, None)

    def fork(self) -> None:
        """What comes next on the second stream waits for what the current one has been given."""
        if self.main and self.side:
            self.side.wait_stream(self.main)

    def join(self) -> None:
        """The same the other way."""
        if self.main and self.side:
            self.main.wait_stream(self.side)

    def __enter__(self) -> _Beside:
        return self

    def __exit__(self, *error: object) -> None:
        self.join()  # also behind an error: the second stream may be writing what is then free


def exchange_of(
    layout: Layout, batch: int, device: torch.device, launches: int = 1, beside: _Beside | None = None
) -> tuple[Tensor, Tensor]:
    """(vectors that blocks exchange, what else they write) for launches of a kernel, made EMPTY, on the second stream if there
    is one: lstm.cu's backward kernel has a ring of partial sums, that of lstm_cluster.cu STOPS numbers of teams.

    What was just written is in the L2 cache, where the blocks look for it: to write it long before costs more than it saves.
    """
    of, more = dict(layout.macros), 0
    blocks = _up(of["H"], 32)
    if layout.name == "backward":
        rows = _up(of["H"], of["ROW_UNITS"])
        blocks = rows * of["ROW_UNITS"] // 8
        more = 2 * STOPS
        if layout.cluster == 1:
            more = 2 * RING * rows * batch * _up(of["H"], of["COLUMNS"]) * of["COLUMNS"]
    vectors = launches * of["SLOTS"] * of["PARTS"] * of.get("TEAMS", 1) * of["GROUPS"] * blocks * of["TILES_N"] * 256
    both = torch.empty(vectors + more, dtype=torch.int16, device=device)
    if beside:
        beside.fork()
    with torch.cuda.stream(beside.side if beside else None):
        both.fill_(-1)
    return both[:vectors], both[vectors:]


class _Layer(torch.autograd.Function):
    """(y_TBH, last h_BH, last c_BH) of a layer whose units are a multiple of MULTIPLE."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx,
        x_TBI: Tensor,
        w_ih: Tensor,
        w_hh: Tensor,
        b_ih: Tensor,
        b_hh: Tensor,
        h_BH: Tensor,
        c_BH: Tensor,
        fore: Layout,
        back: Layout,
    ):
        T, B, _ = x_TBI.shape
        H, index, half = h_BH.shape[-1], x_TBI.device.index, x_TBI.dtype == torch.float16
        gates_TBG, y = x_TBI.new_empty(T, B, 4 * H), x_TBI.new_empty(T + 1, B, H)
        c = torch.empty(T + 1, B, H, dtype=torch.float32, device=y.device)
        h_BH, c_BH, w_hh = h_BH.to(y.dtype).contiguous(), c_BH.contiguous(), w_hh.contiguous()
        h_last, c_last = torch.empty_like(h_BH), torch.empty_like(c_BH)
        biases, short = (b_ih.contiguous(), b_hh.contiguous()), int(c_BH.dtype == y.dtype)

        def multiply(t0: int, t1: int) -> None:
            torch.mm(x_TBI[t0:t1].flatten(0, 1), w_ih.t(), out=gates_TBG[t0:t1].view(-1, 4 * H))

        ends, kernel = [*_stops(fore, T), T], _kernel(fore, half, index)
        with _Beside(index, len(ends) > 1) as beside:
            xs = exchange_of(fore, B, y.device, len(ends), beside)[0].chunk(len(ends))
            multiply(0, ends[0])
            for i, (t0, t1) in enumerate(itertools.pairwise((0, *ends))):
                beside.join()
                if t1 < T:
                    beside.fork()
                    with torch.cuda.stream(beside.side):
                        multiply(t1, ends[i + 1])
                state = (y[t0], c[t0]) if t0 else (h_BH, c_BH)
                given = w_hh, *biases, gates_TBG[t0:t1], *state, xs[i], y[t0:], c[t0:], h_last, c_last
                last = 2 * short + (0 if t0 else short), t1 - t0, _trouble(index), PATIENCE
                kernel(fore.blocks, 32 * fore.warps, (*given, *last))
        ctx.save_for_backward(x_TBI, w_ih, w_hh, gates_TBG, y, c)
        ctx.back, ctx.types = back, (h_BH.dtype, c_BH.dtype)
        ctx.set_materialize_grads(False)
        return y[1:], h_last, c_last

    @staticmethod
    @once_differentiable
    def backward(ctx, d_y: Tensor | None, d_h: Tensor | None, d_c: Tensor | None):  # type: ignore[override]
        x_TBI, w_ih, w_hh, gates_TBG, y, c = ctx.saved_tensors
        T, B, G = gates_TBG.shape
        H, index, half = G // 4, gates_TBG.device.index, gates_TBG.dtype == torch.float16
        back: Layout = ctx.back
        d_y = torch.zeros_like(y[1:]) if d_y is None else d_y.contiguous()
        d_hT, d_cT = (0 if d is None else d.contiguous() for d in (d_h, d_c if d_c is None else d_c.float()))
        d_h0, d_c0 = c.new_empty(2, B, H)
        needed, x_NI, d_gates = ctx.needs_input_grad, x_TBI.reshape(T * B, -1), torch.empty_like(gates_TBG)
        d_ih, d_hh = (torch.empty_like(w) if n else None for w, n in zip((w_ih, w_hh), needed[1:3], strict=True))
        d_NG, trouble = d_gates.view(T * B, G), (_trouble(index), PATIENCE)
        stops = _stops(back, T) if any(needed[1:3]) else []

        def multiply(since: int, to: int) -> None:
            """Adds to the weights' gradients those of steps since to `to` - 1, counted from the last; since 0, sets them."""
            some = slice((T - to) * B, (T - since) * B)
            for d, of in ((d_ih, x_NI), (d_hh, y.view(-1, H))):
                if d is not None and since:
                    d.addmm_(d_NG[some].t(), of[some])
                elif d is not None:
                    torch.mm(d_NG[some].t(), of[some], out=d)

        kernel, wait_for_steps = _kernel(back, half, index), _wait_for_steps(back, half, index) if stops else None
        with _Beside(index, bool(stops)) as beside:
            exchange, scratch = exchange_of(back, B, y.device, 1, beside)
            beside.join()  # this fill is the second stream's own: without it a graph has that stream's work behind the kernel
            given = w_hh, gates_TBG, c, d_y, d_hT, d_cT, exchange, d_gates, d_h0, d_c0, scratch
            wanted = (*stops, *[0] * STOPS)[:STOPS] if back.cluster > 1 else ()
            kernel(back.blocks, 32 * back.warps, (*given, *wanted, T, *trouble), beside.running)
            if beside.running and wait_for_steps:
                with torch.cuda.stream(beside.side):
                    beside.running.wait()
                    for i, (since, to) in enumerate(itertools.pairwise((0, *stops))):
                        of = scratch[2 * i :], back.blocks * back.get("TEAMS"), d_gates[T - to]
                        wait_for_steps(1, 32, (*of, *trouble))
                        multiply(since, to)
            d_bias = None
            if needed[3] or needed[4]:
                d_bias = d_gates.new_empty(G)
                _bias_gradient(back, half, index)(G // 32, 32 * back.warps, (d_gates, d_bias, T * B))
            d_x = (d_NG @ w_ih).view_as(x_TBI) if needed[0] else None
        multiply(stops[-1] if stops else 0, T)
        d_h0, d_c0 = (d.to(t) if n else None for d, t, n in zip((d_h0, d_c0), ctx.types, needed[5:], strict=False))
        return d_x, d_ih, d_hh, d_bias, d_bias, d_h0, d_c0, None, None


def lstm(
    x_TBI: Tensor, h_BH: Tensor, c_BH: Tensor, weights: Sequence[Tensor], layouts: tuple[Layout, Layout] | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """(y_TBH, last h_BH, last c_BH) of an LSTM layer; weights are W_ih, W_hh, b_ih, b_hh with gates i, f, g, o.

    Products in bf16 or fp16, sums and the cell in fp32, but the weights' gradients of a layer with products beside its kernel: up
    to three terms, added in 16 bits. c comes back in the type it was given. Equal calls give equal bits; no second derivatives.
    RuntimeError when the blocks cannot all run at once; a block that waits in vain for four seconds makes the outputs NaN.
    """
    w_ih, w_hh, b_ih, b_hh = weights
    H = h_BH.shape[-1]
    if layouts is None and _left_to_cudnn(H, x_TBI.shape[1], x_TBI.device.index):
        return reference.lstm(x_TBI, h_BH, c_BH, weights)
    layouts = layouts or best(H, x_TBI.shape[1], x_TBI.device.index)
    if layouts is None:
        why = obstacle(H, x_TBI.shape[1], x_TBI.device)
        warnings.warn(f"{why}: this LSTM layer runs by cuDNN, several times slower.", RuntimeWarning, stacklevel=3)
        return reference.lstm(x_TBI, h_BH, c_BH, weights)
    more = -H % MULTIPLE
    if more:
        w_ih = pad(w_ih.unflatten(0, (4, H)), (0, 0, 0, more)).flatten(0, 1)
        w_hh = pad(w_hh.unflatten(0, (4, H)), (0, more, 0, more)).flatten(0, 1)
        b_ih, b_hh = (pad(b.unflatten(0, (4, H)), (0, more)).flatten() for b in (b_ih, b_hh))
        h_BH, c_BH = pad(h_BH, (0, more)), pad(c_BH, (0, more))
    y_TBH, h, c = _Layer.apply(x_TBI, w_ih, w_hh, b_ih, b_hh, h_BH, c_BH, *layouts)  # type: ignore[misc]
    return (y_TBH[..., :H], h[:, :H], c[:, :H]) if more else (y_TBH, h, c)
