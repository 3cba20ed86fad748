"""Trains a recipe for some epochs and prints its validation perplexities beside the original code's.

The reference figures are the original code's on the same machine class, README hyperparameters and seed, TF32.
Usage: python bench/published_curve.py awd-lstm-ptb DATA OUT_DIR [EPOCHS] [--set ...]; writes OUT_DIR/NAME.txt
"""

import json
import math
import os
import platform
import subprocess
import sys
from pathlib import Path

REFERENCE = {
    "awd-lstm-ptb": {1: 317.47, 7: 112.59, 13: 90.98, 25: 78.24, 31: 75.72},
    "awd-qrnn-ptb": {1: 751.21, 9: 111.82, 25: 80.67, 41: 73.50, 57: 70.74},
}


def main() -> None:
    name, data, out = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    epochs, extra = sys.argv[4], sys.argv[5:]
    run = out / f"run-{name}"
    command = [sys.executable, "-m", "recurlm", "train", name, "--data", data, "-o", str(run)]
    command += ["--set", f"train.epochs={epochs}", "--set", "train.tensorboard=false", *extra]
    subprocess.run(command, check=True)
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    valid = [r for r in records if r["event"] == "valid"]
    import torch

    card = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor()
    commit = (
        os.environ.get("COMMIT")
        or subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    )
    lines = [
        f"# {' '.join(['recurlm', *command[3:]])}",
        f"# {card}, torch {torch.__version__}, commit {commit or 'working tree'}",
    ]
    lines.append("epoch  step  train_loss  valid_loss  valid_ppl  averaged  seconds  original_ppl  ratio")
    for r in valid:
        known = REFERENCE.get(name, {}).get(r["epoch"])
        beside = f"{known:12.2f}  {math.exp(r['loss_nats']) / known:.3f}" if known else ""
        lines.append(
            f"{r['epoch']:5d} {r['step']:6d}  {r['train_loss_nats']:.4f}  {r['loss_nats']:.4f}  {math.exp(r['loss_nats']):8.2f}  "
            f"{r['averaged']!s:8s} {r['seconds']:8.1f}  {beside}"
        )
    text = "\n".join(lines) + "\n"
    (out / f"{name}.txt").write_text(text)
    print("\n".join([*lines[:3], *(line for line in lines[3:] if len(line.split()) > 7)]))


if __name__ == "__main__":
    main()
