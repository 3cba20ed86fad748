"""When should the mean of iterates start, and what should it forget? And: recipes that are through in minutes, and ablations.

    python bench/averaging.py means DATA OUT.jsonl --recipe awd-lstm-ptb --epochs 300 --seconds 500
    python bench/averaging.py run DATA OUT.jsonl --group fast --epochs 100 --seconds 500 --workers 4
    python bench/averaging.py report PICTURE.svg FILE.jsonl ...

`means`: one run, and all of MEANS on its way. A mean of iterates changes no update, so every mean sees the same weights:
what differs between them is the mean alone. It sees one iterate of ten, so that fourteen means cost little time.
`run`: the variants of a group, each a run of its own, so many side by side on one GPU (whose times then say little); a run
that is not through when the seconds are over ends there. Nothing is measured on test.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import multiprocessing
import re
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

QUIET = ("train.stages=1", "train.tensorboard=false", "train.checkpoint_seconds=1e8", "train.log_every=1000000")
NT, NONMONO = "averaging.name=nt-asgd", "averaging.trigger=nonmono"

MEANS: dict[str, tuple[str, ...]] = {
    "nt-asgd, n 5 (published)": (NT,),
    "n 10": (NT, "averaging.nonmono=10"),
    "n 20": (NT, "averaging.nonmono=20"),
    "n 5, patience 4": (NT, "averaging.patience=4"),
    "n 5, afresh at 5": (NT, "averaging.restart=5"),
    "n 5, afresh at 15": (NT, "averaging.restart=15"),
    "n 5, tail 1": ("averaging.name=tail", NONMONO, "averaging.forget=1"),
    "n 5, tail 3": ("averaging.name=tail", NONMONO, "averaging.forget=3"),
    "n 5, tail 10": ("averaging.name=tail", NONMONO, "averaging.forget=10"),
    "n 5, ema over 5,000": ("averaging.name=ema", NONMONO, "averaging.decay=0.9998"),
    "n 5, ema over 20,000": ("averaging.name=ema", NONMONO, "averaging.decay=0.99995"),
    "from a quarter": (NT, "averaging.trigger=share", "averaging.start=0.25"),
    "from half": (NT, "averaging.trigger=share", "averaging.start=0.5"),
    "from three quarters": (NT, "averaging.trigger=share", "averaging.start=0.75"),
}

NONE, TAIL = "averaging.name=none", ("averaging.name=tail", "averaging.start=0.1")
LINEAR, COSINE = "schedule.name=linear", "schedule.name=cosine"
MOVED = ("data.partial_shuffle=true", "data.random_offset=true")
ADAM = ("optimizer.name=adamw", "optimizer.weight_decay=0.02", "schedule.warmup_steps=200", NONE)
GROUPS: dict[str, tuple[str, dict[str, tuple[str, ...]]]] = {
    "decay": (
        "awd-lstm-ptb",
        {
            "constant, nt-asgd": (),
            "linear to zero": (NONE, LINEAR),
            "linear to a tenth, nt-asgd": (LINEAR, "schedule.floor=0.1"),
            "half held, linear to zero": (NONE, LINEAR, "schedule.hold=0.5"),
            "half held, linear to a tenth, tail": (*TAIL, LINEAR, "schedule.hold=0.5", "schedule.floor=0.1"),
            "cosine to zero": (NONE, COSINE),
        },
    ),
    "streams": (
        "awd-lstm-ptb",
        {
            "as published": (),
            "partial shuffle": ("data.partial_shuffle=true",),
            "random offset": ("data.random_offset=true",),
            "both": MOVED,
        },
    ),
    "fast": (
        "awd-lstm-ptb",
        {
            "sgd 30, batch 20, half held, linear to zero": (NONE, LINEAR, "schedule.hold=0.5", *MOVED),
            "sgd 30, batch 20, tail 3": ("averaging.name=tail", "averaging.start=0.1", "averaging.forget=3", *MOVED),
            "adamw 1e-3, batch 20, decay 0.1": (*ADAM, "optimizer.lr=1e-3", "optimizer.weight_decay=0.1", LINEAR, *MOVED),
            "adamw 2e-3, batch 40, decay 0.02": (*ADAM, "optimizer.lr=2e-3", "data.batch_size=40", LINEAR, *MOVED),
            "adamw 2e-3, batch 40, decay 0.1": (
                *ADAM, "optimizer.lr=2e-3", "optimizer.weight_decay=0.1", "data.batch_size=40", LINEAR, *MOVED,
            ),
            "adamw 4e-3, batch 40, decay 0.1, betas 0.8, 0.99, cosine": (
                *ADAM, "optimizer.lr=4e-3", "optimizer.weight_decay=0.1", "optimizer.betas=[0.8,0.99]",
                "data.batch_size=40", COSINE, *MOVED,
            ),
        },
    ),
    "ablation": (
        "awd-lstm-ptb",
        {
            "nothing removed": (),
            "no averaging": (NONE,),
            "fixed windows": ("data.bptt_spread=0", "data.bptt_full_share=1"),
            "no embedding dropout": ("dropout.embedding=0",),
            "no weight decay": ("optimizer.weight_decay=0",),
            "no ar and tar": ("objective.ar=0", "objective.tar=0"),
            "no weight drop": ("dropout.weight=0",),
            "variational 0.25 for weight drop": ("dropout.weight=0", "dropout.recurrent=0.25"),
            "variational 0.5 for weight drop": ("dropout.weight=0", "dropout.recurrent=0.5"),
            "zoneout 0.15, 0.05 for weight drop": ("dropout.weight=0", "model.zoneout=0.15", "model.zoneout_hidden=0.05"),
        },
    ),
}  # fmt: skip


def settings_of(recipe: str, data: str, epochs: int, *more: str):
    from recurlm.config import configure

    return configure(recipe, *QUIET, f"train.epochs={epochs}", f'data.path="{data}"', *more)


def means(
    data: str, out: Path, recipe: str, epochs: int, seconds: float, only: str, more: list[str], every: int, stride: int,
    folder: Path,
) -> None:  # fmt: skip
    from recurlm.config import apply_assignments
    from recurlm.evaluation.perplexity import mean_loss
    from recurlm.text.store import open_store, prepare
    from recurlm.training.averaging import AVERAGING, Averaging, applied
    from recurlm.training.trainer import Trainer

    config = settings_of(recipe, data, epochs, *more)
    averages: dict[str, Averaging] = {}
    losses: dict[str, list[float]] = {"raw": []}
    curves: dict[str, list[dict]] = {"raw": []}
    for name, settings in MEANS.items():
        if re.search(only, name):
            chosen = apply_assignments(config, settings).averaging
            wider = 1 - stride * (1 - chosen.decay)  # it sees one iterate of `stride`
            averages[name] = AVERAGING[chosen.name](dataclasses.replace(chosen, decay=wider))
            losses[name], curves[name] = [], []

    class Watched(Trainer):
        """The run as it would be, and what each mean of its iterates is worth on the way."""

        aside = 0.0  # seconds that the means took

        def advance(self) -> None:
            super().advance()
            if self.cursor.step % stride == 0:
                for average in averages.values():
                    average.move(self.parameters, average.enters(self.cursor.step, self.progress().share))

        def measured(self) -> float:
            rule = self.config.data.counting, self.config.data.batching
            return mean_loss(self.model, self.ids("valid"), self.boundary, self.config.data.eval_batch_size, *rule)

        def validate(self, *given, **how) -> None:
            super().validate(*given, **how)
            begun, epoch, raw, notes = time.monotonic(), self.cursor.epoch + 1, self.measured(), []
            due, seen = epoch % every == 0 or epoch == epochs, {"raw"}
            losses["raw"].append(raw)
            for name, average in averages.items():
                if average.count <= 0:
                    losses[name].append(raw)
                elif due or average.config.restart:
                    with applied(average, self.parameters):
                        losses[name].append(self.measured())
                else:
                    continue
                seen.add(name)
                if average.observe(losses[name]):
                    notes.append(f"{name}: starts")
            self.aside += time.monotonic() - begun
            took = round(time.monotonic() - started - self.aside, 1)
            for name in seen:
                curves[name].append({"epoch": epoch, "seconds": took, "valid": losses[name][-1]})
            if due or notes:
                shown = "  ".join(f"{math.exp(values[-1]):.2f}" for values in losses.values())
                print(f"{took:6.0f} s  epoch {epoch}  {shown}  {'; '.join(notes)}", flush=True)

    folder.mkdir(parents=True)
    is_store = (Path(data) / "store.json").is_file()
    store = open_store(data) if is_store else prepare(data, config.tokenizer, folder / "store")
    started = time.monotonic()
    Watched(config, store, folder, quiet=True).run(seconds)
    with out.open("w", encoding="utf-8") as file:
        file.write(json.dumps(head(f"means of {recipe}", epochs, more)) + "\n")
        for name, curve in curves.items():
            rest = {"settings": MEANS.get(name, ()), "curve": curve, "failed": ""}
            file.write(json.dumps({"group": f"means, {recipe}", "name": name, **rest}) + "\n")


def head(what: str, epochs: int, more: list[str]) -> dict:
    import torch

    from recurlm.provenance import facts

    card = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    return {"what": what, "epochs": epochs, "set": more, "device": card, **facts()}


def one(recipe: str, name: str, settings: tuple[str, ...], data: str, epochs: int, seconds: float) -> dict:
    """The record of one run."""
    from recurlm import api
    from recurlm.errors import UserError
    from recurlm.training.monitor import read_metrics

    started, failed = time.monotonic(), ""
    with tempfile.TemporaryDirectory() as scratch:
        run = Path(scratch) / "run"
        try:
            api.train(settings_of(recipe, data, epochs, *settings), run, max_seconds=seconds, quiet=True)
        except UserError as error:
            failed = str(error)
        records = [r for r in read_metrics(run) if r["event"] == "valid"]
    curve = [{"epoch": r["epoch"], "seconds": round(r["seconds"], 1), "valid": r["loss_nats"]} for r in records]
    return {"name": name, "settings": settings, "curve": curve, "failed": failed,
            "wall": round(time.monotonic() - started, 1)}  # fmt: skip


def run(
    data: str, out: Path, group: str, recipe: str, epochs: int, seconds: float, workers: int, only: str, more: list[str]
) -> None:
    own, variants = GROUPS[group]
    recipe, begun = recipe or own, time.monotonic()
    todo = {name: (*more, *settings) for name, settings in variants.items() if re.search(only, name)}
    rounds = math.ceil(len(todo) / workers)
    with out.open("w", encoding="utf-8") as file:
        file.write(json.dumps(head(f"{group}, {recipe}", epochs, more)) + "\n")
        with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
            share = seconds / rounds - 15  # of each; the rest for imports, tokens and the last validation
            futures = [pool.submit(one, recipe, name, s, data, epochs, share) for name, s in todo.items()]
            for future in as_completed(futures):
                record = {"group": f"{group}, {recipe}"} | future.result()
                file.write(json.dumps(record) + "\n")
                file.flush()
                best = min((c["valid"] for c in record["curve"]), default=math.inf)
                line = f"{time.monotonic() - begun:6.0f} s  {record['name']}: epoch {len(record['curve'])}"
                print(f"{line}, best {math.exp(min(best, 20)):.2f}  {record['wall']} s  {record['failed']}", flush=True)


def report(picture: Path, paths: list[Path]) -> None:
    from matplotlib.figure import Figure

    groups: dict[str, list[dict]] = {}
    for path in paths:
        first, *rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        print(f"{path.name}: {first['what']}, {first['device']}, torch {first['torch']}, commit {first['commit'][:12]}")
        for row in rows:
            groups.setdefault(row["group"], []).append(row)
    figure = Figure((11, 4.5 * len(groups)), layout="constrained")
    panels = figure.subplots(len(groups), 2, squeeze=False)
    for pair, (group, rows) in zip(panels, groups.items(), strict=True):
        rows = sorted((r for r in rows if r["curve"]), key=lambda r: min(c["valid"] for c in r["curve"]))
        most = max(r["curve"][-1]["epoch"] for r in rows)
        marks = sorted({round(most * share) for share in (0.1, 0.25, 0.5, 0.75, 1.0)} - {0})
        print(f"\n| {group} | best valid ppl | at epoch | " + " | ".join(f"epoch {m}" for m in marks) + " | minutes |")
        print("|---" * (4 + len(marks)) + "|")
        for row in rows:
            best = min(row["curve"], key=lambda c: c["valid"])
            upto = [[c for c in row["curve"] if c["epoch"] <= m and row["curve"][-1]["epoch"] >= m] for m in marks]
            cells = [f"{math.exp(some[-1]['valid']):.2f}" if some else "" for some in upto]
            minutes = row["curve"][-1]["seconds"] / 60
            print(
                f"| {row['name']} | {math.exp(best['valid']):.2f} | {best['epoch']} | {' | '.join(cells)} | {minutes:.1f} |"
            )
        low = min(math.exp(c["valid"]) for r in rows for c in r["curve"])
        for axes, key, label in zip(pair, ("epoch", "seconds"), ("epoch", "seconds"), strict=True):
            for n, row in enumerate(rows):
                values = [math.exp(min(c["valid"], 20)) for c in row["curve"]]
                style = ("-", "--", ":")[n // 10 % 3]
                axes.plot(
                    [c[key] for c in row["curve"]], values, style, color=f"C{n % 10}", label=row["name"], linewidth=1.2
                )
            axes.set(xlabel=label, ylabel="valid perplexity", title=group, yscale="log", ylim=(0.98 * low, 1.6 * low))
            ticks = [t for t in range(10, 400, 2) if 0.98 * low <= t <= 1.6 * low][:: max(1, int(low / 40))]
            axes.set_yticks(ticks, [str(t) for t in ticks])
            axes.minorticks_off()
            axes.grid(alpha=0.3)
        pair[0].legend(frameon=False, fontsize=8)
    figure.savefig(picture)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    for verb in ("means", "run"):
        p = verbs.add_parser(verb)
        p.add_argument("data")
        p.add_argument("out", type=Path)
        p.add_argument(
            "--recipe", default="awd-lstm-ptb" if verb == "means" else "", help="another than the group's own"
        )
        p.add_argument("--epochs", type=int, default=300 if verb == "means" else 100)
        p.add_argument("--seconds", type=float, default=500)
        p.add_argument("--only", default="", help="a pattern of names")
        p.add_argument("--set", action="append", default=[], dest="more", help="section.key=value for all")
        if verb == "means":
            p.add_argument("--every", type=int, default=5, help="epochs from one validation of a mean to the next")
            p.add_argument("--stride", type=int, default=10, help="the means see every so-manieth iterate")
            p.add_argument("-o", "--run", type=Path, help="keep the run here")
        else:
            p.add_argument("--group", choices=GROUPS, required=True)
            p.add_argument("--workers", type=int, default=3)
    p = verbs.add_parser("report")
    p.add_argument("picture", type=Path)
    p.add_argument("files", type=Path, nargs="+")
    a = parser.parse_args()
    if a.verb == "means":
        with tempfile.TemporaryDirectory() as scratch:
            run_at = a.run or Path(scratch) / "run"
            means(a.data, a.out, a.recipe, a.epochs, a.seconds, a.only, a.more, a.every, a.stride, run_at)
    elif a.verb == "run":
        run(a.data, a.out, a.group, a.recipe, a.epochs, a.seconds, a.workers, a.only, a.more)
    else:
        report(a.picture, a.files)


if __name__ == "__main__":
    main()
