"""Trains recipes in several compute types with one seed, and shows whether the cheaper ones cost quality.

    python bench/compute_types.py run DATA OUT SECONDS       all runs side by side on one GPU; OUT/NAME-TYPE.jsonl
    python bench/compute_types.py report FOLDER PICTURE.svg  the table, and a picture of the curves

The runs share the GPU, so their times say nothing. A run that is not through with its epochs when the seconds are over
ends there.
"""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

RUNS = {
    ("awd-qrnn-ptb", "bf16"): 41,
    ("awd-qrnn-ptb", "tf32"): 41,
    ("awd-lstm-ptb", "bf16"): 31,
    ("awd-lstm-ptb", "tf32"): 31,
}
COLOURS = {"bf16": "tab:orange", "tf32": "tab:blue", "bf16, cuDNN": "tab:green", "tf32, not captured": "tab:grey"}


def run(data: str, out: Path, seconds: str) -> None:
    out.mkdir(parents=True, exist_ok=True)
    commit = os.environ.get("RECURLM_COMMIT", "")
    started = []
    for (recipe, dtype), epochs in RUNS.items():
        folder = out / f"run-{recipe}-{dtype}"
        command = [
            sys.executable,
            "-m",
            "recurlm",
            "train",
            recipe,
            "--data",
            data,
            "-o",
            str(folder),
            "--dtype",
            dtype,
        ]
        command += ["--max-time", seconds, "--set", f"train.epochs={epochs}", "--set", "train.tensorboard=false"]
        log = (out / f"{recipe}-{dtype}.log").open("w")
        started.append((folder, recipe, dtype, subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)))
    import torch

    card = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    for folder, recipe, dtype, process in started:
        process.wait()
        lines = [json.dumps({"recipe": recipe, "dtype": dtype, "gpu": card, "torch": torch.__version__, "commit": commit,
                             "command": "recurlm train " + " ".join(process.args[4:])})]  # fmt: skip
        metrics = folder / "metrics.jsonl"
        if metrics.exists():
            lines += [line for line in metrics.read_text().splitlines() if '"event": "valid"' in line]
        (out / f"{recipe}-{dtype}.jsonl").write_text("\n".join(lines) + "\n")
        print(recipe, dtype, "exit", process.returncode, lines[-1][:220], flush=True)


def curves(folder: Path) -> dict[tuple[str, str], dict[int, dict]]:
    """The validations of each run by epoch."""
    found = {}
    for path in sorted(folder.glob("*-ptb-*.jsonl")):
        head, *records = [json.loads(line) for line in path.read_text().splitlines()]
        found[head["recipe"], head["dtype"]] = {r["epoch"]: r for r in records}
    return found


def report(folder: Path, picture: Path) -> None:
    from matplotlib.figure import Figure

    found = curves(folder)
    recipes = sorted({recipe for recipe, _ in found})
    figure = Figure(figsize=(10, 4), layout="constrained")
    for axes, recipe in zip(figure.subplots(1, len(recipes), squeeze=False)[0], recipes, strict=True):
        types = {dtype: runs for (name, dtype), runs in found.items() if name == recipe}
        epochs = sorted(set.union(*(set(runs) for runs in types.values())))
        last = [max(runs) for runs in types.values()]
        print(f"| {recipe}, epoch | " + " | ".join(f"{d} valid ppl | {d} train loss" for d in types) + " |")
        print("|---" * (1 + 2 * len(types)) + "|")
        for epoch in [e for e in epochs if e in (1, 2, 5, *last) or e % 5 == 0]:
            cells = [
                f"{math.exp(r[epoch]['loss_nats']):.2f} | {r[epoch]['train_loss_nats']:.4f}" if epoch in r else " | "
                for r in types.values()
            ]
            print(f"| {epoch} | " + " | ".join(cells) + " |")
        for dtype, runs in types.items():
            axes.plot(
                list(runs), [math.exp(r["loss_nats"]) for r in runs.values()], label=dtype, color=COLOURS.get(dtype)
            )
        axes.set(xlabel="epoch", ylabel="valid perplexity", yscale="log", title=recipe)
        axes.set_yticks([70, 80, 100, 150, 200, 400], labels=["70", "80", "100", "150", "200", "400"])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    figure.savefig(picture, metadata={"Date": None})


if __name__ == "__main__":
    if sys.argv[1:2] == ["run"] and len(sys.argv) == 5:
        run(sys.argv[2], Path(sys.argv[3]), sys.argv[4])
    elif sys.argv[1:2] == ["report"] and len(sys.argv) == 4:
        report(Path(sys.argv[2]), Path(sys.argv[3]))
    else:
        sys.exit(__doc__)
