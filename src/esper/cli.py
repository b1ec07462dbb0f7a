"""`esper-cli`: assembles the commands, and is the one place where a command line ends.

Every way out leads through `main`: an exit code that `interface.md` documents, one line for an error
(or its JSON form), no traceback unless `--debug`, and `os._exit` after a flush, because ordinary
finalisation of a process that used a Temporal client was seen to crash or hang.
"""

import logging
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated
from typing import NoReturn

import typer

from esper.commands import branching
from esper.commands import collection
from esper.commands import configuration
from esper.commands import control
from esper.commands import database
from esper.commands import history
from esper.commands import library
from esper.commands import output
from esper.commands import runs
from esper.commands import stack
from esper.errors import EsperError
from esper.errors import UsageError
from esper.runtime.logs import OneLine
from esper.runtime.tezzeret.blueprints import sources

INTERRUPTED = 130
GLOBAL_FLAGS = frozenset({"-v", "-vv", "--verbose", "--debug"})

app = typer.Typer(
    name="esper-cli",
    help="Grow neural networks while they train: durable, replayable, certified.",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def global_options(
    verbose: Annotated[
        int,
        typer.Option("-v", "--verbose", count=True, show_default=False, help="Say more on stderr; -vv: everything."),
    ] = 0,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Grow neural networks while they train: durable, replayable, certified."""
    sources.follow(library.submitted)
    # What a person must know is said by the commands themselves; logs are for those who ask.
    talk: logging.Handler = logging.StreamHandler(sys.stderr) if verbose else logging.NullHandler()
    talk.setFormatter(OneLine())
    logging.basicConfig(level=(logging.WARNING, logging.INFO, logging.DEBUG)[min(verbose, 2)], handlers=[talk])


app.command("start-run")(runs.start_run)
app.command("watch")(runs.watch)
app.command("list")(runs.list_runs)
app.command("show")(runs.show)
app.command("seeds")(runs.seeds)
app.command("logs")(runs.logs)
app.command("export")(runs.export)
app.command("report")(runs.report)
app.command("history")(history.history)
app.command("replay")(history.replay)
app.command("reproduce")(history.reproduce)
app.command("what-if")(history.what_if)
app.command("fork")(branching.fork)
app.command("pause")(control.pause)
app.command("resume")(control.resume)
app.command("recover")(control.recover)
app.command("stop")(control.stop)
app.command("adapt")(control.adapt)
app.command("veto")(control.veto)
app.command("pin")(control.pin)
app.command("cull")(control.cull)
app.add_typer(library.kernels, name="kernels")
app.add_typer(library.blueprints, name="blueprints")
app.command("gc")(collection.collect_garbage)
app.command("up")(stack.up)
app.command("down")(stack.down)
app.command("worker")(stack.worker)
app.command("doctor")(stack.doctor)
app.add_typer(configuration.config, name="config")
app.add_typer(database.database, name="db")


def run(arguments: Sequence[str]) -> int:
    """Do what the command line says and return its exit code. Never raises, but for a fault of the interpreter."""
    as_json = "--json" in arguments
    debug = "--debug" in arguments
    try:
        code = app(_global_flags_first(arguments), prog_name="esper-cli", standalone_mode=False)
        return code if isinstance(code, int) else 0
    except typer.TyperException as error:
        return _usage_error(error, as_json=as_json)
    except EsperError as error:
        if debug:
            traceback.print_exc()
        output.report_error(error, as_json=as_json)
        return error.exit_code
    except (KeyboardInterrupt, typer.Abort):
        return INTERRUPTED
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else 1
    except BrokenPipeError:
        output.silence_stdout()
        return 0
    except Exception as error:
        if debug:
            traceback.print_exc()
        output.report_error(_unexpected(error), as_json=as_json)
        return 1


def main() -> NoReturn:
    """The whole of a process; what `esper.__main__` calls."""
    output.prepare_streams()
    code = run(sys.argv[1:])
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (BrokenPipeError, ValueError):
            continue
    os._exit(code)


def _global_flags_first(arguments: Sequence[str]) -> list[str]:
    """`-v` and `--debug` may stand anywhere before `--`: a person adds them at the end of the line."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    flags = [argument for argument in arguments[:end] if argument in GLOBAL_FLAGS]
    return flags + [argument for argument in arguments[:end] if argument not in GLOBAL_FLAGS] + list(arguments[end:])


def _usage_error(error: typer.TyperException, *, as_json: bool) -> int:
    message = error.format_message()
    if message.startswith("Usage: "):
        output.say(message)
        return error.exit_code
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "esper-cli"
    output.report_error(
        UsageError("ESP-200", " ".join(message.split()).rstrip("."), hint=f"Try '{command} --help'"), as_json=as_json
    )
    return error.exit_code


def _unexpected(error: Exception) -> EsperError:
    return EsperError(
        "ESP-602",
        f"unexpected {type(error).__name__}: {error}",
        hint="This is a fault of Esper; run it again with --debug to see where",
    )
