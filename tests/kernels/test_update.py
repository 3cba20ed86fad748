"""The fused update against torch.optim and an independent Philox; Triton in its interpreter without a GPU."""

import numpy as np
import pytest
import torch
from philox import philox

from support import in_the_interpreter

CUDA = torch.cuda.is_available()

CASES = (  # raw, padded, blocks of each axis, weight drop
    ((6, 10), (8, 16), (2, 2), 0.3),
    ((20, 7), (20, 7), (1, 1), 0.0),
    ((9,), (12,), (3,), 0.0),
    ((30, 300), (48, 304), (3, 1), 0.5),
    ((12, 3), (12, 3), (4, 1), 0.25),
    ((5,), (5,), (1,), 0.0),
    ((1, 1), (1, 1), (1, 1), 0.1),
    ((17, 40), (17, 40), (1, 1), 0.0),
)
METHODS = ("sgd", "momentum", "nesterov", "adam", "adamw")
HYPER = {"decay": 1e-2, "beta_1": 0.9, "beta_2": 0.99, "eps": 1e-8}


def spread(x, padded, parts):
    """x in a tensor of zeros of the padded shape, block by block."""
    out = torch.zeros(padded, dtype=x.dtype, device=x.device)
    places = []
    for n, q, g in zip(x.shape, padded, parts, strict=True):
        i = torch.arange(n, device=x.device)
        places.append(i // (n // g) * (q // g) + i % (n // g))
    out[places[0] if x.ndim == 1 else (places[0][:, None], places[1][None])] = x
    return out


def mask_of(key, raw, number, p):
    """The weight-drop factors by an independent Philox: 16 bits an element, 8 rows of a column to a counter."""
    rows, columns = raw if len(raw) == 2 else (1, *raw)
    kept = np.zeros((rows, columns), bool)
    for group in range(-(-rows // 8)):
        words = philox(key, np.arange(columns), group, number)
        for j in range(min(8, rows - 8 * group)):
            kept[8 * group + j] = (words[j // 2] >> 16 * (j % 2) & 0xFFFF) >= round(p * 65536)
    return torch.from_numpy(kept).float().view(raw) / (1 - p)


class Bench:
    """Weights of all cases, the device's vectors, and the same weights in torch."""

    def __init__(self, device, method, clip, dtype=torch.float32, mean=False, cases=CASES, numbers=None):
        from recurlm.kernels import update_triton as U

        self.U, self.device, self.cases, self.clip = U, torch.device(device), cases, clip
        self.g = torch.Generator().manual_seed(5)
        self.rule = U.Rule(method, clip, **HYPER)
        self.numbers = numbers or range(len(cases))
        self.weights = []
        for number, (raw, padded, parts, p) in zip(self.numbers, cases, strict=True):
            shape = U.shape_of(raw, padded, parts)
            copies = raw != padded or p > 0 or dtype != torch.float32
            poison = spread(torch.full(raw, float("nan"), dtype=dtype), padded, parts).to(device)
            bits = U.empty_bits(shape, self.device).fill_(255) if p else None
            moments = tuple(torch.zeros(raw, device=device) for _ in range(2 if "adam" in method else method != "sgd"))
            w = self.random(raw)
            self.weights.append(U.Weight(number, shape, p, w, poison if copies else None, bits, moments))
        self.mean = [w.raw.clone() for w in self.weights] if mean else []
        self.controls = torch.zeros(U.CONTROLS, dtype=torch.float64, device=device)
        self.status, self.t = torch.ones(2, device=device), 0
        self.ring = torch.full((3, 4), float("nan"), device=device)
        self.terms = torch.tensor([1.5, 2.5], device=device)

    def random(self, shape):
        return torch.randn(shape, generator=self.g).to(self.device)

    def control(self, newest=0.0):
        self.t += 1
        corrections = (1 - HYPER["beta_1"] ** self.t, 1 - HYPER["beta_2"] ** self.t)
        row = (0.1, newest, *corrections, self.key(self.t), self.key(self.t + 1), 0, self.t % 3)
        self.controls.copy_(torch.tensor(row, dtype=torch.float64))

    @staticmethod
    def key(t):
        return (1 << 40) + 11 * t

    def factors(self, t):
        return [
            mask_of(self.key(t), raw, n, p).to(self.device) if p else torch.ones(raw, device=self.device)
            for n, (raw, _, _, p) in zip(self.numbers, self.cases, strict=True)
        ]

    def refresh(self):
        self.control()
        self.t -= 1
        controls = self.controls.clone()
        controls[self.U.NEXT_SEED] = controls[self.U.SEED]
        self.U.update(self.weights, [], [], controls, self.status, self.U.Rule("none", 0, 0, 0, 0, 0))

    def step(self, gradients, newest=0.0):
        self.control(newest)
        self.U.judge(self.weights, gradients, self.terms, self.controls, self.status, self.ring, self.clip)
        self.U.update(self.weights, gradients, self.mean, self.controls, self.status, self.rule)

    def padded(self, tensors):
        return [spread(x, padded, parts) for x, (_, padded, parts, _) in zip(tensors, self.cases, strict=True)]

    def tensors(self):
        """All that a step may change."""
        own = [x for w in self.weights for x in (w.raw, w.working, w.bits, *w.moments) if x is not None]
        return [x.clone() for x in (*own, *self.mean)]

    def working_is(self, t):
        """The working copies are the weights times the masks of step t, rounded once, and zero in the padding."""
        full = self.padded([w.raw * f for w, f in zip(self.weights, self.factors(t), strict=True)])
        for w, expected in zip(self.weights, full, strict=True):
            if w.working is not None:
                eps = torch.finfo(w.working.dtype).eps
                torch.testing.assert_close(w.working.float(), expected, rtol=eps, atol=0)


def optimizer_of(method, parameters):
    if "adam" in method:
        make = torch.optim.AdamW if method == "adamw" else torch.optim.Adam
        return make(parameters, 0.1, (HYPER["beta_1"], HYPER["beta_2"]), HYPER["eps"], HYPER["decay"])
    momentum = HYPER["beta_1"] if method != "sgd" else 0.0
    return torch.optim.SGD(parameters, 0.1, momentum, weight_decay=HYPER["decay"], nesterov=method == "nesterov")


def check_methods(device):
    for n, (method, clip) in enumerate((("sgd", 0.0), *((method, 0.5) for method in METHODS))):
        bench = Bench(device, method, clip, mean=n % 2 == 0)
        theirs = [w.raw.double().clone().requires_grad_() for w in bench.weights]
        mean = [w.raw.double().clone() for w in bench.weights]
        optimizer = optimizer_of(method, theirs)
        bench.refresh()
        bench.working_is(1)
        for t, newest in enumerate((1.0, 0.25), start=1):
            gradients = [bench.random(raw) for raw, *_ in CASES]
            bench.step(bench.padded(gradients), newest)
            for p, g, f in zip(theirs, gradients, bench.factors(t), strict=True):
                p.grad = (g * f).double()
            norm = torch.nn.utils.clip_grad_norm_(theirs, clip if clip else float("inf"))
            optimizer.step()
            expected = torch.tensor([norm.item(), 1.5, 2.5, 1.0], device=device)
            torch.testing.assert_close(bench.ring[t % 3], expected, rtol=1e-5, atol=0)
            for w, p in zip(bench.weights, theirs, strict=True):
                torch.testing.assert_close(w.raw, p.float(), rtol=2e-5, atol=2e-5)
            bench.working_is(t + 1)
            for a, w, m in zip(bench.mean, bench.weights, mean, strict=False):
                m += newest * (w.raw.double() - m)
                torch.testing.assert_close(a, m.float())
                assert newest < 1 or torch.equal(a, w.raw)
        for w, p in zip(bench.weights, theirs, strict=True):
            names = ("exp_avg", "exp_avg_sq") if "adam" in method else ("momentum_buffer",)
            for moment, name in zip(w.moments, names, strict=False):
                torch.testing.assert_close(moment, optimizer.state[p][name].float(), rtol=2e-5, atol=2e-6)


def check_types(device):
    """Gradients and working copies in 16 bits: every element is written, the padding stays 0, two runs agree."""
    for dtype in (torch.bfloat16, torch.float16):
        runs = []
        for _ in range(2):
            bench = Bench(device, "sgd", 0.5, dtype)
            bench.refresh()
            for t in (1, 2):
                gradients = [g.to(dtype) for g in bench.padded([bench.random(raw) for raw, *_ in CASES])]
                before = [w.raw.clone() for w in bench.weights]
                bench.step(gradients)
                masks = bench.padded(bench.factors(t))
                norm = torch.stack([(g.float() * f).norm() for g, f in zip(gradients, masks, strict=True)]).norm()
                torch.testing.assert_close(bench.ring[t % 3, 0], norm)
                assert not any(torch.equal(a, w.raw) for a, w in zip(before, bench.weights, strict=True))
                bench.working_is(t + 1)
            runs.append([*bench.tensors(), bench.ring])
        for a, b in zip(*runs, strict=True):
            assert torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))


def check_failures(device):
    """After a number that is not finite nothing moves, whatever follows, until the status is set again."""
    for bad in ("gradient", "infinite", "term"):
        bench = Bench(device, "adam", 0.5, mean=True)
        bench.refresh()
        good = bench.padded([bench.random(raw) for raw, *_ in CASES])
        bench.step(good, 0.5)
        before = bench.tensors()
        gradients = [g.clone() for g in good]
        if bad == "term":
            bench.terms[1] = float("inf")
        else:
            gradients[3][0, 0] = float("nan") if bad == "gradient" else 1e30
            assert gradients[3][0, 0] != good[3][0, 0]
            bench.weights[3].bits.fill_(255)  # so that it is not dropped
            before = bench.tensors()
        bench.step(gradients, 0.5)
        assert bench.ring[2, -1] == 0
        assert bad != "term" or bench.ring[2, 2] == float("inf")
        bench.terms[1] = 2.5
        bench.step(good, 0.5)
        assert bench.ring[0, -1] == 0
        assert torch.equal(bench.ring[0, 1:3], bench.terms)
        old = torch.zeros(5, device=device)
        bench.U.keep_if_ok(old, old + 1, bench.status)
        assert not old.any()
        assert all(torch.equal(a, b) for a, b in zip(before, bench.tensors(), strict=True))
        bench.status.fill_(1.0)
        bench.step(good, 0.5)
        assert bench.ring[1, -1] == 1
        assert not torch.equal(before[0], bench.weights[0].raw)
        bench.working_is(5)


def check_masks(device):
    """Shares as asked, and independence between neighbours, weights and steps."""
    case, p = ((64, 250), (64, 250), (1, 1), 0.3), 0.3
    bench = Bench(device, "sgd", 0.0, cases=(case, case), numbers=(1, 5))
    bench.refresh()
    first = [(w.working == 0).float() for w in bench.weights]
    bench.step([torch.ones(64, 250, device=device)] * 2)
    second = [(w.working == 0).float() for w in bench.weights]
    masks = [*first, *second]
    for n, mask in enumerate(masks):
        assert abs(mask.mean().item() - p) < 0.015
        pairs = [mask[1:] * mask[:-1], mask[:, 1:] * mask[:, :-1], mask[8:] * mask[:-8]]
        for pair in (*pairs, *(mask * other for other in masks[:n])):
            assert abs(pair.mean().item() - p * p) < 0.012


def check_many(device):
    """More weights than one launch serves, of every unit, and a state of many leaves."""
    from recurlm.kernels import update_triton as U

    cases = tuple(((n % 5 + 1, n + 1), (n % 5 + 1, n + 1), (1, 1), 0.5 * (n % 2)) for n in range(37))
    bench = Bench(device, "sgd", 0.0, cases=cases)
    bench.refresh()
    gradients = [bench.random(raw) for raw, *_ in cases]
    before = [w.raw.clone() for w in bench.weights]
    bench.step(gradients)
    for w, b, g, f in zip(bench.weights, before, gradients, bench.factors(1), strict=True):
        torch.testing.assert_close(w.raw, b - 0.1 * (g * f + HYPER["decay"] * b))
    bench.working_is(2)
    kinds = (torch.float32, torch.bfloat16, torch.int64)
    news = [bench.random((n * n * 3,)).mul(9).to(kinds[n % 3]) for n in range(21)]
    olds = [torch.zeros_like(x) for x in news]
    U.keep_if_ok(olds, news, bench.status)
    assert all(torch.equal(a, b) for a, b in zip(olds, news, strict=True))


CHECKS = ("check_methods", "check_types", "check_failures", "check_masks", "check_many")


@pytest.mark.parametrize("check", CHECKS)
def test_in_the_interpreter(check):
    in_the_interpreter("kernels/test_update", f"{check}('cpu')")


@pytest.mark.skipif(not CUDA, reason="no GPU here")
@pytest.mark.parametrize("check", CHECKS)
def test_on_the_gpu(check):
    globals()[check]("cuda")


@pytest.mark.skipif(not CUDA, reason="no GPU here")
@pytest.mark.parametrize("tiles", [(1, 256, 1, 4, False), (4, 512, 4, 8, True), (2, 1024, 3, 2, True)])
def test_any_tiles(tiles, monkeypatch):
    from recurlm.kernels import update_triton as U

    monkeypatch.setattr(U, "SQUARES", U.Tiles(*tiles))
    monkeypatch.setattr(U, "UPDATE", U.Tiles(*tiles))
    check_types("cuda")
