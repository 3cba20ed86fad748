"""What a row of the results table needs of a trained run: alone, with a neural cache, by dynamic evaluation, with both.

    python bench/row.py RUN OUT.json [--base RUN] [--windows 500,2000] [--segments 5,10] [--tokens 30000] [--with OTHER]
                        [--mc-dropout K] [--dtype TYPE]

Whatever is chosen (window, theta, lambda, segment, lr, decay, weights) is chosen on valid; test is read once for each row.
`--base` is measured alone, as the first row. `--tokens` of valid decide while lr and decay are searched; all of valid
decides between segments. Every row goes to OUT.json as soon as it is there.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

from recurlm import api, load
from recurlm.errors import UserError
from recurlm.model.precision import device_name
from recurlm.provenance import facts


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("out", type=Path)
    parser.add_argument("--base", default="")
    parser.add_argument("--windows", type=numbers, default=[500, 2000])
    parser.add_argument("--segments", type=numbers, default=[5])
    parser.add_argument("--tokens", type=int, default=30_000)
    parser.add_argument("--with", dest="others", action="append", default=[])
    parser.add_argument("--mc-dropout", type=int, default=0)
    parser.add_argument("--dtype", default="auto")
    a = parser.parse_args()
    begun, rows = time.perf_counter(), []
    record = {
        "run": a.run,
        "argv": sys.argv[1:],
        "device": device_name(load(a.run).model.device),
        **facts(),
        "rows": rows,
    }

    def measured(split: str, **how: Any) -> dict[str, Any]:
        return api.evaluate(a.run, split=split, dtype=a.dtype, with_ranks=False, **how)

    def row(name: str, **how: Any) -> dict[str, Any]:
        """Prints and keeps one row; a failure is kept too and stops no other."""
        try:
            found = {"name": name, **measured("test", **how)}
        except UserError as error:
            found = {"name": name, "failed": str(error), "ppl": math.nan}
        tuned = math.exp(found.get("tuned_loss_nats", math.nan))
        where = {k: found[k] for k in ("cache", "dynamic", "weights", "seconds") if k in found}
        found["valid_ppl"] = tuned
        print(f"{time.perf_counter() - begun:6.0f} s  {name:<28} test {found['ppl']:7.2f}  "
              f"{found.get('failed', '')} {where}", flush=True)  # fmt: skip
        rows.append(found)
        a.out.write_text(json.dumps(record, indent=1), encoding="utf-8")
        return found

    for name, run in (("base", a.base), ("alone", a.run)):
        if run:
            alone = [api.evaluate(run, split=split, dtype=a.dtype) for split in ("valid", "test")]
            rows.append({"name": name, "valid_ppl": alone[0]["ppl"], **alone[1]})
            print(f"{time.perf_counter() - begun:6.0f} s  {name:<28} valid {alone[0]['ppl']:7.2f}  test {alone[1]['ppl']:7.2f}  "
                  f"{alone[1]['tokens_per_s']:,.0f} tokens/s", flush=True)  # fmt: skip
    if a.mc_dropout:
        row(f"mean of {a.mc_dropout} thinned networks", mc_dropout=a.mc_dropout)
    tried = [measured("valid", caches=[{"window": w}], tune_on="valid") for w in a.windows]
    best = min(tried, key=lambda t: t["loss_nats"])
    cached = row("cache", caches=[best["cache"]])
    cached["valid_ppl"] = best["ppl"]
    tried = []
    for segment in a.segments:
        how = {"segment": segment, "tune_tokens": a.tokens}
        tried.append(measured("valid", dynamic=how, tune_on="valid"))
        print(f"{time.perf_counter() - begun:6.0f} s  segment {segment}: valid {tried[-1]['ppl']:.2f}  {tried[-1]['dynamic']}  "
              f"{tried[-1]['seconds']}", flush=True)  # fmt: skip
    best_dynamic = min(tried, key=lambda t: t["loss_nats"])
    moved = row("dynamic evaluation", dynamic=best_dynamic["dynamic"])
    moved["valid_ppl"] = best_dynamic["ppl"]
    window = best["cache"]["window"]
    row("dynamic evaluation, cache", dynamic=best_dynamic["dynamic"], caches=[{"window": window}], tune_on="valid")
    for other in a.others:
        row(f"with {Path(other).name}", mixed_with=[other])
    if a.others:
        everything = {"dynamic": best_dynamic["dynamic"], "caches": [{"window": window}], "tune_on": "valid"}
        row("everything", mixed_with=a.others, **everything)
    print(f"\n| {Path(a.run).name} | valid | test | seconds |\n|---|---|---|---|")
    for r in rows:
        took = r.get("seconds", {}).get("evaluation", r.get("targets", 0) / r.get("tokens_per_s", math.inf))
        print(f"| {r['name']} | {r['valid_ppl']:.2f} | {r['ppl']:.2f} | {took:.1f} |")
    a.out.write_text(json.dumps(record, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
