"""`recurlm`: mounts the verbs and turns every user error into one sentence and an exit code."""

from __future__ import annotations

import io
import os
import sys
from typing import Annotated, Any, NoReturn

import typer

from recurlm import __version__
from recurlm.cli import bench, compare, data, demo, doctor, embed, export, ngram, signals, train, use
from recurlm.errors import UserError

USAGE_ERROR: type[Exception] = typer.BadParameter.__mro__[1]  # typer names no common class of its usage errors
OUT_OF_MEMORY = "Out of memory; lower data.batch_size, data.bptt or the model's sizes, in a new run."

app = typer.Typer(
    name="recurlm",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Train, measure and use recurrent neural language models. Try `recurlm demo` first.",
    epilog="Exit codes: 0 ok; 1 failed; 2 usage, configuration or missing path; 3 content of data or model is wrong; "
    "129/130/143 interrupted (training saves a checkpoint first).",
)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"recurlm {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show a traceback with an error.")] = False,
) -> None:
    """Options before the verb."""


app.command()(demo.demo)
app.add_typer(data.app, name="data")
app.command()(train.train)
app.command("eval")(use.eval_)
app.command()(use.score)
app.command()(use.generate)
app.add_typer(embed.app, name="embed")
app.add_typer(ngram.app, name="ngram")
app.command()(export.export)
app.command()(compare.compare)
app.command()(doctor.doctor)
app.command()(bench.bench)


def run(stopped: list[int] | None = None) -> None:
    """Runs the command line and exits with the code of its outcome; `stopped`: see `signals.listen`."""
    stopped = signals.listen() if stopped is None else stopped
    # Idle OpenMP threads spin for long by default: with one other busy process here that made small steps up to 60
    # times slower. A short spin costs about 15 % on an idle machine (docs/log.md).
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a file's name need not be Unicode
    arguments = sys.argv[1:]
    debug = "--debug" in arguments
    try:
        code = app(args=[a for a in arguments if a != "--debug"], prog_name="recurlm", standalone_mode=False)
        sys.exit(code if type(code) is int else 0)
    except UserError as error:
        _fail(str(error), error.exit_code, debug)
    except USAGE_ERROR as error:
        _usage(error, debug)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader left: nothing to say
        sys.exit(0)
    except MemoryError:
        _fail(OUT_OF_MEMORY, 1, debug)
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        _fail(f"{place}{error.strerror or error}.", 1, debug)
    except RuntimeError as error:
        if "out of memory" not in str(error).lower() and "can't allocate memory" not in str(error).lower():
            raise
        _fail(OUT_OF_MEMORY, 1, debug)
    finally:
        if stopped:
            sys.exit(128 + stopped[0])  # whatever the interruption was turned into on its way


def _usage(error: Any, debug: bool) -> NoReturn:
    """Exits with a usage error of typer as one sentence, or with the help when a verb was called without arguments."""
    verb = error.ctx.command_path if error.ctx else "recurlm"
    if "NoArgs" in type(error).__name__:
        error.show()
        sys.exit(2)
    sentence = error.format_message()
    _fail(f"{sentence if sentence.endswith('?') else sentence.rstrip('.') + '.'} See `{verb} --help`.", 2, debug)


def _fail(sentence: str, code: int, debug: bool) -> NoReturn:
    if debug:
        import traceback

        traceback.print_exc()
    print("recurlm: " + "".join(c if c.isprintable() else ascii(c)[1:-1] for c in sentence), file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    run()
