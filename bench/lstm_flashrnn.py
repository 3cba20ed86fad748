"""The layer of bench/lstm.py by flashrnn 1.0.8 (cuda_fused), where it can be installed; it compiles with nvcc and ninja.

    python bench/lstm_flashrnn.py [FOLDER_WITH_flashrnn_AND_einops] [--seconds 60]

Input product and weight gradients are torch's; sizes are padded to what flashrnn takes: 1,152 units, batches of multiples of 8.
One line in any case: microseconds, or why there are none.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def cublas_to_link() -> str:
    """A folder with the libraries that flashrnn links by their names without a version, which wheels do not have."""
    folder = Path(tempfile.mkdtemp())
    for site in map(Path, sys.path):
        for name in ("cublas", "cublasLt", "cudart"):
            for library in site.glob(f"nvidia/*/lib/lib{name}.so.*"):
                if not (folder / f"lib{name}.so").exists():
                    (folder / f"lib{name}.so").symlink_to(library)
    return str(folder)


def measured(folder: str) -> None:
    if folder:
        sys.path.insert(0, folder)
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "9.0")
    os.environ.setdefault("MAX_JOBS", "16")
    import torch

    os.environ["LIBRARY_PATH"] = f"{cublas_to_link()}:/usr/local/cuda/lib64:{os.environ.get('LIBRARY_PATH', '')}"
    from flashrnn import flashrnn  # type: ignore[import-not-found]

    from recurlm.bench import lstm as bench
    from recurlm.bench.timing import gpu_time, in_turn

    def layer(x_TBI, h_BH, c_BH, weights):
        w_ih, w_hh, b_ih, b_hh = weights
        T, B, H = *x_TBI.shape[:2], h_BH.shape[-1]
        gates = torch.nn.functional.linear(x_TBI, w_ih).view(T, B, 4, 1, H).transpose(0, 1)
        recurrent = w_hh.view(4, 1, H, H)
        states = torch.stack((h_BH, c_BH)).view(2, B, 1, 1, H)
        found, _ = flashrnn(
            gates, recurrent, (b_ih + b_hh).view(4, 1, H), states=states, function="lstm", backend="cuda_fused",
            dtype=str(x_TBI.dtype).removeprefix("torch."),
        )  # fmt: skip
        return (found[0].view(B, T, H).transpose(0, 1),)

    start = time.monotonic()
    for T, B, width, H, kind in ((70, 24, 1152, 1152, "bf16"), (70, 32, 1024, 1024, "fp16")):
        dtype = bench.TYPES[kind]
        nbytes = 2 * (8 * H * H + 11 * T * B * H)
        for backward in (False, True):
            call = bench.layer(layer, T, B, width, H, dtype, backward)
            call()
            torch.cuda.synchronize()
            name = f"flashrnn 1.0.8 cuda_fused, T {T} B {B} {width} -> {H} {kind} {'f+b' if backward else 'f'}"
            print(f"{name}: ready after {time.monotonic() - start:.0f} s", flush=True)
            for graph in (False, True):
                try:
                    works = in_turn(lambda b=backward: bench.layer(layer, T, B, width, H, dtype, b), nbytes)  # noqa: B023
                    spent = f"{gpu_time(works, graph=graph, repeats=5):.1f} us"
                except RuntimeError as error:
                    spent = " ".join(str(error).split())[:150]
                print(f"{name}, {'graph' if graph else 'eager'}: {spent}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Times a layer by flashrnn.")
    parser.add_argument("folder", nargs="?", default="")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--here", action="store_true")
    given = parser.parse_args()
    if given.here:
        measured(given.folder)
        return
    command = [sys.executable, __file__, given.folder, "--here"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        out, _ = process.communicate(timeout=given.seconds)
        why = "" if process.returncode == 0 else f"it ended with {process.returncode}"
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)  # the compilers it started too
        out, _ = process.communicate()
        why = f"it was not through after {given.seconds:.0f} s"
    print("\n".join(line for line in out.splitlines() if line.startswith("flashrnn")))
    if why:
        lines = out.splitlines()
        found = [line[:300] for line in lines if "error" in line.lower() or "cannot find" in line][:12]
        print(f"flashrnn: {why}; what it said:", *found, *lines[-4:], sep="\n")


if __name__ == "__main__":
    main()
