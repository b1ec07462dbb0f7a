"""Blueprints that were submitted and kernels that were built, the latter by digest and by adaptation."""

import difflib
from typing import Any

from sqlalchemy import Row
from sqlalchemy import select
from sqlalchemy import update
from sqlalchemy.ext.asyncio import AsyncConnection

from esper.contracts.assets import Blueprint
from esper.contracts.assets import Kernel
from esper.contracts.enums import KernelState
from esper.errors import BlueprintError
from esper.errors import ConflictError
from esper.errors import NotFoundError
from esper.runtime.urza.rows import canonical
from esper.runtime.urza.rows import insert_new
from esper.runtime.urza.rows import require_run
from esper.runtime.urza.tables import blueprints as blueprint_table
from esper.runtime.urza.tables import builds as build_table
from esper.runtime.urza.tables import kernels as kernel_table


async def submit_blueprint(connection: AsyncConnection, blueprint: Blueprint) -> Blueprint:
    """Insert by (name, version), or find the same; `ConflictError` (ESP-504) for other content."""
    values = {"name": blueprint.name, "version": blueprint.version, "blueprint": blueprint}
    await insert_new(connection, blueprint_table, values)
    mine = blueprint_table.c.name == blueprint.name, blueprint_table.c.version == blueprint.version
    stored: Blueprint = (await connection.execute(select(blueprint_table.c.blueprint).where(*mine))).scalar_one()
    if canonical(stored) != canonical(blueprint):
        raise ConflictError(
            "ESP-504",
            f"blueprint {blueprint.name!r} version {blueprint.version} is stored with other content",
            hint=f"Submit it as version {blueprint.version + 1}",
        )
    return stored


async def list_blueprints(connection: AsyncConnection) -> tuple[Blueprint, ...]:
    """All submitted blueprints, by name and version."""
    query = select(blueprint_table.c.blueprint).order_by(blueprint_table.c.name, blueprint_table.c.version)
    return tuple((await connection.execute(query)).scalars())


async def get_blueprint(connection: AsyncConnection, name: str, version: int | None) -> Blueprint:
    """One blueprint, the newest version if `version` is `None`; `BlueprintError` (ESP-410)."""
    query = select(blueprint_table.c.blueprint).where(blueprint_table.c.name == name)
    if version is not None:
        query = query.where(blueprint_table.c.version == version)
    newest = query.order_by(blueprint_table.c.version.desc()).limit(1)
    found: Blueprint | None = (await connection.execute(newest)).scalar()
    if found is None:
        known = (await connection.execute(select(blueprint_table.c.name).distinct())).scalars().all()
        near = difflib.get_close_matches(name, known, n=3)
        what = f"there is no stored blueprint {name!r}" + ("" if version is None else f" version {version}")
        hint = f"Did you mean {', '.join(near)}?" if near else "`esper-cli blueprints list` shows all"
        raise BlueprintError("ESP-410", what, hint=hint)
    return found


async def publish_kernel(connection: AsyncConnection, kernel: Kernel, adaptation_id: str, run_id: str) -> Kernel:
    """Insert by adaptation and digest, or find the first; see `Library.publish_kernel`."""
    # Two forges may build for one adaptation: one of them publishes, the other finds its kernel.
    await require_run(connection, run_id, lock=True)
    built = select(kernel_table).join(build_table, build_table.c.kernel == kernel_table.c.digest)
    of_adaptation = built.where(build_table.c.adaptation_id == adaptation_id)
    earlier = (await connection.execute(of_adaptation)).first()
    if earlier is not None:
        return _kernel(earlier)
    await insert_kernel(connection, kernel)
    build = {"adaptation_id": adaptation_id, "run_id": run_id, "kernel": kernel.digest}
    await insert_new(connection, build_table, build)
    return _kernel((await connection.execute(of_adaptation)).one())


async def insert_kernel(connection: AsyncConnection, kernel: Kernel) -> None:
    """Insert by digest, unless it is there."""
    values = {"digest": kernel.digest, "blueprint": kernel.blueprint, "state": kernel.state, "kernel": kernel}
    await insert_new(connection, kernel_table, values)


async def kernel(connection: AsyncConnection, digest: str) -> Kernel:
    """One kernel in its present state; `NotFoundError` (ESP-430)."""
    row = (await connection.execute(select(kernel_table).where(kernel_table.c.digest == digest))).first()
    if row is None:
        raise NotFoundError(
            "ESP-430", f"there is no kernel {digest!r}", hint="`esper-cli kernels list` shows all kernels"
        )
    return _kernel(row)


async def kernels(connection: AsyncConnection, limit: int) -> tuple[Kernel, ...]:
    """The newest kernels, newest first."""
    query = select(kernel_table).order_by(kernel_table.c.number.desc()).limit(limit)
    return tuple(_kernel(row) for row in await connection.execute(query))


async def set_kernel_state(connection: AsyncConnection, digest: str, old: KernelState, new: KernelState) -> Kernel:
    """The guarded move from `old` to `new`; `ConflictError` (ESP-504) if it is in neither."""
    guarded = kernel_table.c.digest == digest, kernel_table.c.state == old
    moved = await connection.execute(update(kernel_table).where(*guarded).values(state=new))
    found = await kernel(connection, digest)
    if moved.rowcount == 0 and found.state is not new:
        raise ConflictError("ESP-504", f"kernel {digest} is {found.state}, not {old}; it cannot become {new}")
    return found


def _kernel(row: Row[Any]) -> Kernel:
    stored: Kernel = row.kernel
    return stored.model_copy(update={"state": row.state})
