"""Starting a run, looking at runs, and taking away what one has grown."""

from typing import Annotated

import typer

from esper.commands import options
from esper.commands import output


def start_run(
    quick_start: options.QuickStartOption = None,
    config: options.ConfigOption = None,
    values: options.SetOption = None,
    run_id: Annotated[
        str | None, typer.Option("--run-id", metavar="ID", help="Default: <name>-<UTC time>-<4 hex digits>.")
    ] = None,
    output_folder: options.OutputOption = None,
    detach: Annotated[bool, typer.Option("--detach", "-d", help="Return as soon as the run has begun.")] = False,
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
        headings = ("run", "outcome", "epochs", "steps", "created")
        rows = [
            (
                entry["run_id"],
                entry["outcome"],
                f"{entry['epochs']}/{entry['max_epochs']}",
                entry["steps"],
                entry["created"],
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
    output_folder: options.OutputOption = None,
    as_json: options.JsonFlag = False,
) -> int:
    """Write everything that a finished run has to give into a folder."""
    import asyncio

    from esper.commands.actions import records

    folder = asyncio.run(records.export(run, output_folder))
    if as_json:
        output.write_json({"run_id": run, "output": folder})
    else:
        output.write(folder)
    return 0
