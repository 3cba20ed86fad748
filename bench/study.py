"""The slides' advice on training, checked: optimisers, schedules, averaging and dropouts at one small budget.

    python bench/study.py text OUT.txt                        Shakespeare's words, punctuation apart, as train/valid/test
    python bench/study.py run DATA OUT.jsonl --name ptb       every setting (one GPU, several runs at a time)
    python bench/study.py report docs/study FILE.jsonl ...    tables and pictures of the curves

Optimisers, schedules and averaging are compared on a QRNN, whose runs share a GPU well, dropouts on an LSTM (both: tied
embedding of 400, layers of 650 and 400). Within a group every run has the same model, text and number of epochs. Nothing is
measured on test.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import re
import shutil
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

BASE = (
    "data.batch_size=40", "data.bptt=70", "data.bptt_full_share=0.95", "data.bptt_spread=5", "tokenizer.kind=word",
    "model.embedding_size=400", "model.hidden_sizes=[650,400]",
    "dropout.embedding=0.05", "dropout.input=0.3", "dropout.hidden=0.2", "dropout.output=0.3",
    "objective.ar=1", "objective.tar=0.5", "optimizer.clip=0.25", "schedule.warmup_steps=0",
    "train.tensorboard=false", "train.checkpoint_seconds=1e8", "train.log_every=1000000",
)  # fmt: skip
LSTM = ("model.layer=lstm", "dropout.weight=0.3")
QRNN = ("model.layer=qrnn", "model.windows=[2]", "dropout.weight=0.1")
SGD = ("optimizer.name=sgd", "optimizer.lr=40")
ADAM = ("optimizer.name=adam", "optimizer.lr=4e-3")
RATES = {
    "sgd": (10, 20, 40), "sgd, momentum 0.9": (1, 3, 6), "sgd, nesterov 0.9": (1, 3, 6), "adam": (1e-3, 2e-3, 4e-3),
    "amsgrad": (1e-3, 2e-3, 4e-3), "adamw, decay 0.01": (1e-3, 2e-3, 4e-3), "nadam": (1e-3, 2e-3, 4e-3),
    "rmsprop": (5e-4, 1e-3, 2e-3), "adagrad": (0.03, 0.1, 0.3), "adadelta": (0.5, 1, 2),
}  # fmt: skip
MORE = {
    "sgd, momentum 0.9": ("optimizer.momentum=0.9",),
    "sgd, nesterov 0.9": ("optimizer.momentum=0.9", "optimizer.nesterov=true"),
    "adamw, decay 0.01": ("optimizer.weight_decay=0.01",),
    "adadelta": ("optimizer.eps=1e-6",),
}
SCHEDULES = {
    "constant": ("schedule.name=constant",),
    "50-75, by 10": ("schedule.name=milestones", "schedule.milestone_shares=[0.5,0.75]"),
    "50-75, by 2": ("schedule.name=milestones", "schedule.milestone_shares=[0.5,0.75]", "schedule.factor=0.5"),
    "20-40, by 10 (early)": ("schedule.name=milestones", "schedule.milestone_shares=[0.2,0.4]"),
    "85-95, by 10 (late)": ("schedule.name=milestones", "schedule.milestone_shares=[0.85,0.95]"),
    "plateau, by 4": ("schedule.name=plateau", "schedule.factor=0.25"),
    "linear": ("schedule.name=linear",),
    "cosine": ("schedule.name=cosine",),
    "cosine, 3 cycles": ("schedule.name=cosine", "schedule.cycles=3"),
    "cyclic, 3 cycles": ("schedule.name=cyclic", "schedule.cycles=3", "schedule.floor=0.05"),
    "slanted triangle": ("schedule.name=slanted-triangular",),
}
AVERAGES = {
    "none": (),
    "nt-asgd": ("averaging.name=nt-asgd",),
    "ema 0.999": ("averaging.name=ema", "averaging.decay=0.999", "averaging.start=0.1"),
    "swa from half": ("averaging.name=swa", "averaging.start=0.5"),
    "tail from half": ("averaging.name=tail", "averaging.start=0.5"),
    "tail from a tenth": ("averaging.name=tail", "averaging.start=0.1"),
}
NONE = tuple(f"dropout.{name}=0" for name in ("embedding", "input", "hidden", "output", "weight"))
DROPOUTS = {
    "all": (),
    "none": NONE,
    "all but embedding": ("dropout.embedding=0",),
    "all but input": ("dropout.input=0",),
    "all but hidden": ("dropout.hidden=0",),
    "all but output": ("dropout.output=0",),
    "all but weight": ("dropout.weight=0",),
    "all, no ar and tar": ("objective.ar=0", "objective.tar=0"),
    "variational on h 0.2 for weight": ("dropout.weight=0", "dropout.recurrent=0.2"),
    "zoneout 0.1, 0.05 for weight": ("dropout.weight=0", "model.zoneout=0.1", "model.zoneout_hidden=0.05"),
}
BIG = ("data.batch_size=160",)


def jobs() -> list[tuple[str, str, tuple[str, ...]]]:
    """(group, name, settings) of every run."""
    linear, out = SCHEDULES["linear"], []
    for name, rates in RATES.items():
        kind = ("optimizer.name=" + name.split(",")[0], *MORE.get(name, ()))
        out += [("optimizer", f"{name} | {rate:g}", (*kind, f"optimizer.lr={rate}", *linear)) for rate in rates]
    for group, kind in (("schedule of sgd", SGD), ("schedule of adam", ADAM)):
        out += [(group, name, (*kind, *s)) for name, s in SCHEDULES.items()]
    often = ("train.eval_every=150", *SCHEDULES["constant"])
    out += [("averaging of sgd", name, (*SGD, *often, *s)) for name, s in AVERAGES.items()]
    out += [("averaging of adam", name, (*ADAM, *often, *s)) for name, s in AVERAGES.items()]
    for warm in (0, 100):
        more = (*linear, *BIG, f"schedule.warmup_steps={warm}")
        out += [
            ("batch of 160", f"adam {rate:g}, warm-up {warm}", (*ADAM, f"optimizer.lr={rate}", *more))
            for rate in (2e-3, 8e-3)
        ]
        out.append(("batch of 160", f"sgd 80, warm-up {warm}", (*SGD, "optimizer.lr=80", *more)))
    for seed in (1, 2):
        out += [
            ("seeds", f"{k}, seed {seed}", (*v, *linear, f"train.seed={seed}"))
            for k, v in (("sgd", SGD), ("adam", ADAM))
        ]
    out = [(group, name, (*QRNN, *settings)) for group, name, settings in out]
    # The loops over steps take longest: first.
    out += [("dropout", name, (*LSTM, *SGD, *linear, *s)) for name, s in reversed(DROPOUTS.items())]
    out.append(("dropout", "all, adam", (*LSTM, *ADAM, *linear)))
    return out


def one(job: tuple[str, str, tuple[str, ...]], data: str, epochs: int, more: list[str]) -> dict:
    """The record of one run."""
    from recurlm import api
    from recurlm.config import Config, apply_assignments
    from recurlm.errors import UserError
    from recurlm.training.monitor import read_metrics

    group, name, settings = job
    config = apply_assignments(Config(), [*BASE, *settings, *more, f"train.epochs={epochs}", f'data.path="{data}"'])
    folder, start, failed = Path(tempfile.mkdtemp()), time.time(), ""
    try:
        api.train(config, folder / "run", quiet=True)
    except UserError as error:
        failed = str(error)
    curve = [
        {"step": r["step"], "seconds": round(r["seconds"], 2), "valid": r["loss_nats"], "train": r["train_loss_nats"]}
        for r in read_metrics(folder / "run")
        if r["event"] == "valid"
    ]
    shutil.rmtree(folder)
    return {"group": group, "name": name, "settings": [*settings, *more], "curve": curve, "failed": failed,
            "wall": round(time.time() - start, 1)}  # fmt: skip


def run(
    data: str, out: Path, name: str, epochs: int, workers: int, deadline: float, only: str, more: list[str]
) -> None:
    import torch

    start, done = time.time(), 0
    todo = [job for job in jobs() if re.search(only, f"{job[0]}: {job[1]}")]
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    head = {"data": name, "epochs": epochs, "set": more, "device": device, "torch": torch.__version__}
    with out.open("w", encoding="utf-8") as file:
        file.write(json.dumps(head) + "\n")
        pool = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))
        futures = [pool.submit(one, job, data, epochs, more) for job in todo]
        try:
            for future in as_completed(futures, timeout=deadline):
                record = future.result()
                file.write(json.dumps(record) + "\n")
                file.flush()
                done += 1
                best = min((c["valid"] for c in record["curve"]), default=math.inf)
                line = f"{time.time() - start:6.0f} s  {done}/{len(todo)}  {record['group']}: {record['name']}"
                print(f"{line}  {math.exp(min(best, 20)):.2f}  {record['wall']} s {record['failed']}", flush=True)
        except TimeoutError:
            print(f"{len(todo) - done} runs were not finished in {deadline} s", flush=True)
        for process in list(pool._processes.values()):
            process.kill()
        pool.shutdown(wait=False, cancel_futures=True)


def text(out: Path) -> None:
    """Shakespeare's plays as lower-case words with punctuation apart, one file a split."""
    from recurlm.text.plays import splits

    out.mkdir(parents=True)
    for split, play in splits().items():
        lines = (" ".join(re.findall(r"[\w'’]+|[^\w\s]", line.lower())) for line in play.splitlines())
        (out / f"{split}.txt").write_text("".join(line + "\n" for line in lines if line), encoding="utf-8")


def records(path: Path) -> tuple[dict, dict[str, list[dict]]]:
    """(head, runs by group) of a file that `run` wrote; of each optimiser's rates the best one is kept for the picture."""
    head, *rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    groups: dict[str, list[dict]] = {}
    for row in rows:
        row["best"] = math.exp(min((c["valid"] for c in row["curve"]), default=math.inf)) if row["curve"] else math.inf
        row["last"] = math.exp(row["curve"][-1]["valid"]) if row["curve"] else math.inf
        groups.setdefault(row["group"], []).append(row)
    return head, {group: sorted(runs, key=lambda run: run["best"]) for group, runs in groups.items()}


def picture(title: str, runs: list[dict], path: Path) -> None:
    import matplotlib
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 4.5), layout="constrained")
    axes = figure.subplots()
    styles = ["-", "--", ":", "-."]
    for n, run in enumerate(runs):
        steps, values = zip(*((c["step"], math.exp(min(c["valid"], 20))) for c in run["curve"]), strict=True)
        axes.plot(steps, values, styles[n // 10 % 4], color=f"C{n % 10}", marker=".", label=run["name"])
    low = min(run["best"] for run in runs)
    axes.set(xlabel="updates", ylabel="valid perplexity", title=title, yscale="log", ylim=(0.96 * low, 4.5 * low))
    ticks = [
        t for t in (50, 60, 70, 80, 90, 100, 120, 150, 200, 250, 300, 400, 600, 800) if 0.96 * low <= t <= 4.5 * low
    ]
    axes.set_yticks(ticks, [str(t) for t in ticks])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8)
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "study"}):
        figure.savefig(path, metadata={"Date": None})


def report(folder: Path, paths: list[Path]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    lines = [
        "# The study's figures",
        "",
        "Written by `bench/study.py report`; best and last valid perplexity of every run.",
        "",
    ]
    for path in paths:
        head, groups = records(path)
        lines += [f"## {head['data']}, {path.stem}", ""]
        budget = (
            f"{head['epochs']} epochs" if not head.get("set") else f"{head['epochs']} epochs, {', '.join(head['set'])}"
        )
        lines += [f"{head['device']}, torch {head['torch']}; {budget}.", ""]
        for group, runs in groups.items():
            shown = list({run["name"].split(" | ")[0]: run for run in reversed(runs)}.values())  # the best rate of each
            name = re.sub(r"\W+", "-", f"{path.stem} {group}").lower()
            picture(f"{head['data']}: {group}", sorted(shown, key=lambda r: r["best"]), folder / f"{name}.svg")
            lines += [f"### {group}", "", f"![{group}]({name}.svg)", "", "| run | best | last |", "|---|---|---|"]
            lines += [f"| {r['name'].replace('|', 'at')} | {r['best']:.1f} | {r['last']:.1f} |" for r in runs] + [""]
    (folder / "figures.md").write_text("\n".join(lines), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    made = verbs.add_parser("text")
    made.add_argument("out", type=Path)
    ran = verbs.add_parser("run")
    ran.add_argument("data")
    ran.add_argument("out", type=Path)
    ran.add_argument("--name", default="")
    ran.add_argument("--epochs", type=int, default=10)
    ran.add_argument("--workers", type=int, default=8)
    ran.add_argument("--deadline", type=float, default=1e6)
    ran.add_argument("--only", default="", help="a regular expression over 'group: name'")
    ran.add_argument("--set", action="append", default=[], help="a setting for every run, after its own")
    told = verbs.add_parser("report")
    told.add_argument("folder", type=Path)
    told.add_argument("files", type=Path, nargs="+")
    given = parser.parse_args()
    if given.verb == "text":
        text(given.out)
    elif given.verb == "report":
        report(given.folder, given.files)
    else:
        rest = (given.epochs, given.workers, given.deadline, given.only, given.set)
        run(given.data, given.out, given.name or given.data, *rest)


if __name__ == "__main__":
    main()
