"""Starting a run, looking at runs, and taking away what one has grown."""

from typing import Annotated

import typer

from esper.commands import options
from esper.commands import output


def start_run(
    quick_start: options.QuickStartOption = None,
    config: options.ConfigOption = None,
    values: options.SetOption = None,
    run_id: options.RunIdOption = None,
    output_folder: options.OutputOption = None,
    detach: options.DetachFlag = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Build model and data, run one batch, contact nothing.")
    ] = False,
    as_json: options.JsonFlag = False,
) -> int:
    """Start a run, show it live until it ends, and write what was grown.

    Ctrl-C leaves the run running and says how to look again.
    """
    from esper.commands.actions import launch

    prepared = launch.prepare(
        quick_start=quick_start, config=config, values=values or [], run_id=run_id, output_folder=output_folder
    )
    if dry_run:
        # Only a rehearsal needs torch, which takes seconds to load.
        from esper.commands.actions import rehearsal

        return rehearsal.rehearse(prepared, as_json=as_json)
    return launch.start(prepared, detach=detach, as_json=as_json)


def watch(run: options.RunArgument, as_json: options.JsonFlag = False) -> int:
    """Show a run live, from anywhere, until it ends. Ctrl-C leaves the run running."""
    from esper.commands.actions import watching

    return watching.watch(run, as_json=as_json)


def list_runs(
    limit: Annotated[int, typer.Option("--limit", metavar="N", min=1, help="At most so many runs.")] = 100,
    as_json: options.JsonFlag = False,
) -> int:
    """All runs, newest first."""
    import asyncio

    from esper.commands.actions import records
    from esper.runtime.run_document import list_entry

    entries = [list_entry(record) for record in asyncio.run(records.all_runs(limit))]
    if as_json:
        output.write_json(entries)
    elif entries:
        headings = ("run", "outcome", "epochs", "steps", "created", "branch of")
        rows = [
            (
                entry["run_id"],
                entry["outcome"],
                f"{entry['epochs']}/{entry['max_epochs']}",
                entry["steps"],
                entry["created"],
                entry["parent"] or "",
            )
            for entry in entries
        ]
        output.write_table(headings, rows)
    else:
        output.say("No runs yet: `esper-cli start-run --quick-start digits` starts one.")
    return 0


def show(run: options.RunArgument, as_json: options.JsonFlag = False) -> int:
    """One run: where it stands, what was grown and what it cost."""
    import asyncio

    from esper.commands.actions import records
    from esper.commands.views import summary
    from esper.runtime.run_document import document_json

    view = asyncio.run(records.one_run(run))
    document = summary.document(view)
    if as_json:
        output.write_json(document_json(document))
    else:
        summary.write_summary(view, document)
    return 0


def seeds(run: options.RunArgument, as_json: options.JsonFlag = False) -> int:
    """The seeds of a run as its last report saw them."""
    import asyncio

    from esper.commands.actions import records
    from esper.runtime.run_document import seeds_document

    rows = seeds_document(asyncio.run(records.one_run(run)))
    if as_json:
        output.write_json(rows)
    elif rows:
        names = ("site", "kind", "index", "state", "blueprint", "parameters", "born_step", "kernel")
        output.write_table(
            ("site", "kind", "seed", "state", "blueprint", "parameters", "born", "kernel"),
            [[row[name] for name in names] for row in rows],
        )
    else:
        output.say(f"Run {run} has not finished an epoch yet.")
    return 0


def logs(
    run: options.RunArgument,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on as lines arrive.")] = False,
    as_json: options.JsonFlag = False,
) -> int:
    """The structured logs of a run, from the logs folder of ESPER_HOME."""
    from esper.commands.actions import records

    return records.print_logs(run, follow=follow, as_json=as_json)


def export(
    run: options.RunArgument,
    form: Annotated[
        str | None,
        typer.Option(
            "--format",
            metavar="FORMAT",
            help="The model as plain PyTorch: safetensors (weights), python (one file that needs torch only) or onnx.",
        ),
    ] = None,
    output_folder: Annotated[
        str | None,
        typer.Option("--output", metavar="DIR", help="Default: results/<run id>, with -<format> when one is given."),
    ] = None,
    verify: Annotated[
        bool,
        typer.Option("--verify", help="Run what is written, or was, on its stored probe batch; exit 4 if it differs."),
    ] = False,
    as_json: options.JsonFlag = False,
) -> int:
    """Write what a run has to give into a folder: its files, and with --format its model for use without Esper.

    Of a run that has not ended it is the model of its last finished epoch.
    """
    import asyncio

    from esper.commands.actions import records

    folder = asyncio.run(records.export(run, output_folder)) if form is None and not verify else None
    if folder is not None:
        if as_json:
            output.write_json({"run_id": run, "output": folder})
        else:
            output.write(folder)
        return 0
    # Only where the model has to be made torch is needed, which takes seconds to load.
    from esper.commands.actions import exporting

    written = exporting.export(run, output_folder, form, verify=verify)
    if as_json:
        output.write_json(written.to_json())
        return 0
    output.write(written.folder)
    if written.checked is not None:
        found, bound = written.checked.difference, written.checked.bound
        output.say(f"verified on the probe batch: largest difference {found:.2g}, allowed is {bound:.2g}")
    return 0


def report(
    run: options.RunArgument,
    file: Annotated[
        str | None, typer.Option("--output", metavar="FILE", help="Default: results/<run id>.html.")
    ] = None,
    as_json: options.JsonFlag = False,
) -> int:
    """Write one run as one HTML page: result, losses, what was grown and why, every decision."""
    import asyncio
    from pathlib import Path

    from esper.commands.actions import records
    from esper.commands.views import page
    from esper.commands.views import summary
    from esper.errors import ConfigurationError
    from esper.runtime.atomic_file import write_atomically

    view = asyncio.run(records.one_run(run))
    named = file or f"results/{run}.html"
    path = Path(named).expanduser()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, page.page(view, summary.document(view)).encode())
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise ConfigurationError("ESP-208", f"report {named!r} cannot be written: {reason}") from None
    if as_json:
        output.write_json({"run_id": run, "output": named})
    else:
        output.write(named)
    return 0
