"""`recurlm --help` beside `python -c pass` and `import torch`: medians of 7 starts each, in one run."""

import statistics
import subprocess
import sys
import time

COMMANDS = {
    "python -c pass": [sys.executable, "-c", "pass"],
    "recurlm --help": [sys.executable, "-m", "recurlm", "--help"],
    "import torch": [sys.executable, "-c", "import torch"],
}


def main() -> None:
    medians = {}
    for name, command in COMMANDS.items():
        times = []
        for _ in range(7):
            start = time.perf_counter()
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            times.append(time.perf_counter() - start)
        medians[name] = statistics.median(times)
        print(f"{name:<16} {medians[name]:.3f} s")
    print(f"help / bare python {medians['recurlm --help'] / medians['python -c pass']:.1f}, ", end="")
    print(f"help / import torch {medians['recurlm --help'] / medians['import torch']:.2f}")


if __name__ == "__main__":
    main()
