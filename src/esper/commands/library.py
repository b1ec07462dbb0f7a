"""The library: what kernels are stored (`kernels`) and what can be built (`blueprints`)."""

from typing import Annotated
from typing import Any

import typer

from esper.commands import options
from esper.commands import output

kernels = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="The stored kernels.")
blueprints = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="What kernels are built from.")

KernelArgument = Annotated[
    str, typer.Argument(metavar="KERNEL", help="Its digest, sha256:<hex>, or an unambiguous beginning.")
]


@kernels.command("list")
def kernels_list(as_json: options.JsonFlag = False) -> int:
    """All kernels, oldest first."""
    import asyncio

    from esper.commands.actions import stored

    found = asyncio.run(stored.all_kernels())
    if as_json:
        output.write_json([kernel.model_dump(mode="json") for kernel in found])
    elif found:
        output.write_table(
            ("kernel", "blueprint", "site", "parameters", "state"),
            [
                (kernel.digest, kernel.blueprint, kernel.site.site, kernel.parameter_count, kernel.state.value)
                for kernel in found
            ],
        )
    else:
        output.say("No kernels yet.")
    return 0


@kernels.command("show")
def kernels_show(kernel: KernelArgument, as_json: options.JsonFlag = False) -> int:
    """One kernel with its birth certificate."""
    import asyncio

    from esper.commands.actions import stored

    document = asyncio.run(stored.one_kernel(kernel))
    if as_json:
        output.write_json(document)
    else:
        output.write_pairs(stored.flat(document))
    return 0


@kernels.command("verify")
def kernels_verify(
    kernel: Annotated[
        str | None, typer.Argument(metavar="[KERNEL]", help="Its digest or the beginning of one. Default: all.")
    ] = None,
    as_json: options.JsonFlag = False,
) -> int:
    """Read kernels from the store and check everything of them. Damage is exit 4."""
    import asyncio

    from esper.commands.actions import stored

    results = asyncio.run(stored.verify_kernels(kernel))
    if as_json:
        output.write_json([result.to_json() for result in results])
    else:
        for result in results:
            output.write(f"{result.kernel}  {'valid' if result.valid else 'DAMAGED'}")
    stored.raise_damage(results)
    return 0


@blueprints.command("list")
def blueprints_list(as_json: options.JsonFlag = False) -> int:
    """All blueprints."""
    from esper.runtime.tezzeret.blueprints.documents import learn
    from esper.runtime.tezzeret.blueprints.registry import list_blueprints

    list_blueprints()  # what is installed comes before what was submitted under the same name
    for blueprint in submitted():
        learn(blueprint)
    found = list_blueprints()
    if as_json:
        output.write_json([blueprint.model_dump(mode="json") for blueprint in found])
    else:
        output.write_table(
            ("blueprint", "hosts", "formula", "description"),
            [(item.name, ",".join(item.host_kinds), item.formula, item.description) for item in found],
        )
    return 0


@blueprints.command("show")
def blueprints_show(
    name: Annotated[str, typer.Argument(metavar="NAME", help="See `blueprints list`.")],
    as_json: options.JsonFlag = False,
) -> int:
    """One blueprint: what it computes, where it fits, its hyperparameters."""
    from esper.commands.actions import stored
    from esper.runtime.tezzeret.blueprints.registry import get_blueprint

    document = get_blueprint(name).model_dump(mode="json")
    if as_json:
        output.write_json(document)
    else:
        output.write_pairs(stored.flat(document))
    return 0


@blueprints.command("submit")
def blueprints_submit(
    file: Annotated[str, typer.Argument(metavar="FILE", help="A blueprint as JSON; - reads it from standard input.")],
    as_json: options.JsonFlag = False,
) -> int:
    """Check a blueprint that is data and store it: runs of this database may grow it by name from then on."""
    import asyncio

    from esper.commands.actions import stored

    blueprint = asyncio.run(stored.submit(file))
    if as_json:
        output.write_json(blueprint.model_dump(mode="json"))
    else:
        output.write(f"{blueprint.name} version {blueprint.version}")
    return 0


def submitted() -> tuple[Any, ...]:
    """The blueprints that were submitted to the database of the environment, of each name the newest first."""
    from esper.commands.actions import stored

    return stored.submitted()
