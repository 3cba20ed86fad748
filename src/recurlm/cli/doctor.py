"""`recurlm doctor`: what is here, and whether it works."""

from __future__ import annotations

from itertools import groupby
from typing import Any

import typer

from recurlm.cli.common import Json, note, print_json, print_table
from recurlm.errors import RunError


def doctor(as_json: Json = False) -> None:
    """Say what this machine can do and which kernels are in use, and check them; exit code 1 if one is wrong."""
    try:
        from recurlm.doctor import examine
    except (ImportError, OSError) as error:
        raise RunError(f"recurlm cannot start here: {error}; install it anew in a fresh environment.") from error
    note("Checking the kernels; the first time they are compiled.")
    facts = examine()
    print_json(facts) if as_json else _print(facts)
    raise typer.Exit(0 if facts["ok"] else 1)


def _print(facts: dict[str, Any]) -> None:
    print("Versions")
    print_table({f"  {name}": version or "not installed" for name, version in facts["versions"].items()})
    cpu = facts["cpu"]
    having = [name for name, key in {"AVX-512 BF16": "avx512_bf16", "AMX": "amx"}.items() if cpu[key]]
    free = "unknown" if cpu["memory_free"] is None else f"{cpu['memory_free'] / 1e9:.1f} GB"
    print("\nCPU")
    print_table(
        {
            "  name": cpu["name"],
            "  cores": f"{cpu['cores']} usable, torch uses {cpu['threads']} threads",
            "  bf16": f"fast: {', '.join(having)}; try --dtype bf16" if cpu["multiplies_bf16"] else "not fast",
            "  memory": f"{free} free",
        }
    )
    print("\nGPU")
    for gpu in facts["gpus"]:
        print(f"  {gpu['index']}: {gpu['name']}, capability {gpu['capability']}")
        print(f"     {gpu['memory'] / 1e9:.1f} GB, {gpu['memory_free'] / 1e9:.1f} GB free")
        print(f"     driver {gpu['driver'] or 'unknown'}, CUDA {gpu['cuda']}, cuDNN {gpu['cudnn'] or 'none'}")
    if not facts["gpus"]:
        print("  failed: " + facts["gpu_error"] if facts["gpu_error"] else "  none that torch sees")
    print("\n--dtype auto")
    print_table({f"  {row['device']}": f"{row['dtype']} ({row['reason']})" for row in facts["precision"]})
    print("\nKernels: what serves each operation, and its largest relative difference from the slow twin")
    for (operation, device, function, reason), rows in groupby(facts["kernels"], key=_served):
        print(f"  {operation} on {device}: {function or 'none'}{f' ({reason})' if reason else ''}")
        for row in rows:
            gap = "" if row["difference"] is None else f"{row['difference']:.1e}"
            print(f"    {row['dtype']:<9} {row['check']:<8} {gap:<8} {row['said']}".rstrip())
    print("\nTraining step")
    ways = {True: "one CUDA graph a window length, fused kernels", False: "operation by operation"}
    print_table({f"  {row['device']}": f"{ways[row['captured']]} ({row['reason']})" for row in facts["training_step"]})
    data = facts["data"]
    print("\nFolders")
    print_table(
        {
            "  numba cache": facts["numba_cache"] or "none",
            "  data sets": f"{data['folder']} ({', '.join(data['present']) or 'empty'})",
        }
    )
    print("\nWarnings")
    print("\n".join(f"  {warning}" for warning in facts["warnings"]) or "  none")


def _served(row: dict[str, Any]) -> tuple[str, ...]:
    return row["operation"], row["device"], row["function"].removeprefix("recurlm."), row["reason"]
