"""Markers around the first executions of a kernel: one that was left open tells that its process ended in between."""

from collections.abc import Mapping
from types import MappingProxyType

from sqlalchemy import ColumnElement
from sqlalchemy import select
from sqlalchemy import update
from sqlalchemy.ext.asyncio import AsyncConnection

from esper.contracts.enums import KernelState
from esper.contracts.orders import Lease
from esper.runtime.urza.rows import hold
from esper.runtime.urza.rows import insert_new
from esper.runtime.urza.tables import kernels as kernel_table
from esper.runtime.urza.tables import markers as marker_table


async def open_marker(connection: AsyncConnection, lease: Lease, adaptation_id: str, kernel: str) -> None:
    """The holder of the lease is about to execute the kernel; `LeaseLost` (ESP-503) if it is stale."""
    await hold(connection, lease)
    values = {"run_id": lease.run_id, "adaptation_id": adaptation_id, "kernel": kernel, "opened": lease.lease_gen}
    if not await insert_new(connection, marker_table, {**values, "crashes": 0}):
        await connection.execute(update(marker_table).where(*_of(lease, adaptation_id)).values(opened=lease.lease_gen))


async def close_marker(connection: AsyncConnection, lease: Lease, adaptation_id: str) -> None:
    """The kernel was executed, and the process lives; `LeaseLost` (ESP-503) if the lease is stale."""
    await hold(connection, lease)
    await connection.execute(update(marker_table).where(*_of(lease, adaptation_id)).values(opened=None))


async def crashes(connection: AsyncConnection, lease: Lease) -> Mapping[str, int]:
    """How often a process of the run ended between the markers of each adaptation's kernel, where any did.

    A marker that an earlier lease left open is such an end: it is counted, once, and closed.
    """
    left_open = marker_table.c.run_id == lease.run_id, marker_table.c.opened < lease.lease_gen
    counted = update(marker_table).where(*left_open).values(opened=None, crashes=marker_table.c.crashes + 1)
    await connection.execute(counted)
    query = select(marker_table).where(marker_table.c.run_id == lease.run_id, marker_table.c.crashes > 0)
    return MappingProxyType({row.adaptation_id: row.crashes for row in await connection.execute(query)})


async def quarantine_kernel(connection: AsyncConnection, digest: str) -> None:
    """Never graft this kernel again, in whatever run."""
    row = kernel_table.c.digest == digest
    await connection.execute(update(kernel_table).where(row).values(state=KernelState.QUARANTINED))


async def quarantined_kernels(connection: AsyncConnection) -> frozenset[str]:
    """The digests of all kernels in quarantine."""
    query = select(kernel_table.c.digest).where(kernel_table.c.state == KernelState.QUARANTINED)
    return frozenset((await connection.execute(query)).scalars())


def _of(lease: Lease, adaptation_id: str) -> tuple[ColumnElement[bool], ColumnElement[bool]]:
    return marker_table.c.run_id == lease.run_id, marker_table.c.adaptation_id == adaptation_id
