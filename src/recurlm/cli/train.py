"""`recurlm train`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from recurlm.cli.common import (
    Device,
    Dtype,
    Json,
    Threads,
    duration,
    note,
    parse_duration,
    print_json,
    print_table,
    program,
    set_threads,
)
from recurlm.config import (
    Config,
    apply_assignments,
    from_dict,
    from_toml,
    load_recipe,
    read_text_file,
    recipe_names,
    to_dict,
)
from recurlm.errors import ConfigError
from recurlm.files import size

NO_RUN = "No run directory was named: give -o, such as -o runs/first."


def build_config(recipe: str, run: Path | None, resume: bool, settings: list[str], values: dict) -> Config:
    """Defaults < recipe (or the resumed run's own config.toml) < --set < named options."""
    if recipe:
        config = load_recipe(recipe)
    elif resume and run is not None and (run / "config.toml").is_file():
        path = run / "config.toml"
        config = from_toml(read_text_file(path, "configuration"), str(path))
    elif resume and run is not None and not values.get("data"):
        raise ConfigError(f"{run}: no run here to go on with (no config.toml); to start one, give --data.")
    else:
        config = Config()
    return from_dict(values, apply_assignments(config, settings))


def train(
    recipe: Annotated[
        str,
        typer.Argument(
            metavar="RECIPE",
            help=f"A recipe ({', '.join(recipe_names())}) or a .toml file; none: defaults.",
        ),
    ] = "",
    data: Annotated[
        str, typer.Option("--data", help="Text file, folder with train/valid/test, store, or data set name.")
    ] = "",
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Run directory to make.")] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="section.key=value, any number of times; see docs/configuration.md."),
    ] = None,
    resume: Annotated[
        str, typer.Option("--resume", help="auto: go on with the run in -o; no: refuse to touch one.")
    ] = "no",
    max_time: Annotated[
        str, typer.Option("--max-time", help="Stop, validate and save after this long: 90s, 10m, 1h30m.")
    ] = "",
    seed: Annotated[int | None, typer.Option("--seed", help="Seed of weights, dropout and window lengths.")] = None,
    stages: Annotated[
        int | None, typer.Option("--stages", help="Run only so many of the recipe's stages; 0 = all.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print settings, parameters, memory and time; write nothing.")
    ] = False,
    lr_find: Annotated[
        bool,
        typer.Option("--lr-find", help="Learning-rate range test: plot to -o (default lr-find.svg), train nothing."),
    ] = False,
    device: Device = "",
    dtype: Dtype = "",
    threads: Threads = "auto",
    as_json: Json = False,
) -> None:
    """Train a language model on a text: recurlm train --data book.txt -o runs/book"""
    if resume not in ("auto", "no"):
        raise ConfigError(f"--resume {resume}: expected auto or no.")
    values: dict = {"data": {"path": data}} if data else {}
    named = {"seed": seed, "device": device or None, "dtype": dtype or None, "stages": stages}
    values["train"] = {key: value for key, value in named.items() if value is not None}
    config = build_config(recipe, out, resume == "auto", settings or [], values)
    seconds = parse_duration(max_time)
    if dry_run and max_time:
        raise ConfigError("--max-time says when training stops, but --dry-run does not train; leave one of them out.")
    if lr_find and (dry_run or max_time or resume == "auto"):
        raise ConfigError("--lr-find trains nothing that is kept; leave out --dry-run, --max-time and --resume.")
    if lr_find:
        return _lr_find(config, out or Path("lr-find.svg"), threads, as_json)
    if out is None and not dry_run:
        raise ConfigError(NO_RUN)
    set_threads(threads)
    from recurlm import api

    if out is None or dry_run:
        facts = api.plan(config)
        if as_json:
            print_json({**facts, "config": to_dict(config)})
        else:
            from recurlm.config import to_toml

            print(to_toml(config))
            estimated = facts["seconds_estimated"]
            shown = {"memory" if name == "memory_bytes" else name: value for name, value in facts.items()}
            shown |= {
                "seconds_estimated": f"{estimated:,.0f} ({duration(estimated)})",
                "memory": size(facts["memory_bytes"]),
            }
            print_table(shown)
        return None
    if out is None:
        raise ConfigError(NO_RUN)
    result = api.train(config, out, resume=resume == "auto", max_seconds=seconds)
    import math

    known = math.isfinite(result.best_loss)
    facts = {
        "run": str(out), "steps": result.step, "epochs": result.epoch, "finished": result.finished,
        "best_loss_nats": result.best_loss if known else None,
        "best_ppl": math.exp(min(result.best_loss, 700)) if known else None,
        "best_on": result.split, "seconds": result.seconds,
    }  # fmt: skip
    if result.stages > 1:
        facts |= {"stage": result.stage, "stages": result.stages}
    if as_json:
        print_json(facts)
    else:
        print_table(facts)
    if result.signal and not result.finished:
        note(f"Interrupted at step {result.step:,}; saved. Go on with: {program()} train --resume auto -o {out}")
        raise typer.Exit(128 + result.signal)
    if not as_json and not result.finished:
        note(f"Stopped by --max-time at step {result.step:,}. Go on with: {program()} train --resume auto -o {out}")
    if not as_json:
        name = program()
        note(f"Next: {name} eval {out}   |   {name} generate {out} --prompt '...'   |   echo text | {name} score {out}")
    return None


def _lr_find(config: Config, picture: Path, threads: str, as_json: bool) -> None:
    if picture.suffix not in (".svg", ".png", ".pdf"):
        raise ConfigError(
            f"-o {picture}: the range test writes a picture; give a name that ends with .svg, .png or .pdf."
        )
    if not picture.parent.is_dir():
        raise ConfigError(f"{picture.parent}: no such folder; make it first, or choose another -o.")
    if picture.exists():
        raise ConfigError(f"{picture} exists already; name another picture with -o.")
    set_threads(threads)
    from recurlm import api
    from recurlm.training.range_test import plot

    test = api.lr_find(config)
    plot(test, picture)
    facts = {
        "steepest": test.steepest, "tenth_of_lowest": test.lowest / 10, "lowest": test.lowest, "diverged": test.diverged,
        "steps": len(test.rates), "picture": str(picture),
    }  # fmt: skip
    if as_json:
        return print_json({**facts, "rates": test.rates, "losses": test.losses})
    print_table({key: f"{value:.3g}" if isinstance(value, float) else value for key, value in facts.items()})
    if not test.diverged:
        note(
            f"The loss did not break up to {test.rates[-1]:.2g}; test again with a larger optimizer.lr to see further."
        )
    return note(f"A first choice: --set optimizer.lr={test.steepest:.2g}")
