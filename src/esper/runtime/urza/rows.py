"""What every part of the library does with rows: insert-or-return, canonical form, near names, divergences."""

import difflib
import hashlib
import json
from collections.abc import Mapping
from typing import Any

from pydantic import JsonValue
from sqlalchemy import Row
from sqlalchemy import Table
from sqlalchemy import select
from sqlalchemy.dialects import postgresql
from sqlalchemy.dialects import sqlite
from sqlalchemy.ext.asyncio import AsyncConnection

from esper.contracts.base import Contract
from esper.contracts.orders import Lease
from esper.errors import LeaseLost
from esper.errors import NotFoundError
from esper.runtime.urza import tables

NEAR_AMONG = 2000
"""How many of the newest run ids an unknown one is compared with."""


async def insert_new(connection: AsyncConnection, table: Table, values: Mapping[str, Any]) -> bool:
    """True when the row is new; False when one with a key of its stands there already and stays as it is."""
    statement: sqlite.Insert | postgresql.Insert
    if connection.dialect.name == "sqlite":
        statement = sqlite.insert(table).values(**values).on_conflict_do_nothing()
    else:
        statement = postgresql.insert(table).values(**values).on_conflict_do_nothing()
    return (await connection.execute(statement)).rowcount == 1


def canonical(contract: Contract, *, ignoring: frozenset[str] = frozenset()) -> str:
    """Canonical JSON (sorted keys, no spaces), without the top-level fields `ignoring`."""
    return json.dumps(
        contract.model_dump(mode="json", exclude=set(ignoring)),
        sort_keys=True,
        separators=(",", ":"),
        ensure_ascii=False,
        allow_nan=False,
    )


async def note_divergence(
    connection: AsyncConnection,
    run_id: str,
    record: str,
    key: str,
    first: Contract,
    second: Contract,
    *,
    ignoring: frozenset[str] = frozenset(),
) -> None:
    """Keep `second` as a divergence when it differs from `first`, which stands; the same one counts once."""
    text = canonical(second, ignoring=ignoring)
    if text == canonical(first, ignoring=ignoring):
        return
    digest = f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"
    document: JsonValue = second.model_dump(mode="json")
    values = {"run_id": run_id, "record": record, "key": key, "digest": digest, "second": document}
    await insert_new(connection, tables.divergences, values)


async def require_run(connection: AsyncConnection, run_id: str, *, lock: bool = False) -> None:
    """Raises `NotFoundError` (ESP-505) naming near run ids when there is no such run.

    With `lock`, other writers of this run wait until the transaction ends (on SQLite they always do).
    """
    query = select(tables.runs.c.number).where(tables.runs.c.run_id == run_id)
    if (await connection.execute(query.with_for_update() if lock else query)).first() is None:
        raise await no_such_run(connection, run_id)


async def no_such_run(connection: AsyncConnection, run_id: str) -> NotFoundError:
    """The error for an unknown run (ESP-505), with near run ids."""
    query = select(tables.runs.c.run_id).order_by(tables.runs.c.number.desc()).limit(NEAR_AMONG)
    known = (await connection.execute(query)).scalars().all()
    near = difflib.get_close_matches(run_id, known, n=3)
    hint = f"Did you mean {', '.join(near)}?" if near else "`esper-cli list` shows all runs"
    return NotFoundError("ESP-505", f"there is no run {run_id!r}", hint=hint, run_id=run_id)


async def hold(connection: AsyncConnection, lease: Lease) -> Row[Any]:
    """The run's row, locked until the transaction ends, if `lease` is still the run's; else `LeaseLost`.

    A claim waits for that lock, so nothing is ever written under a lease after the next one was given.
    """
    query = select(tables.runs).where(tables.runs.c.run_id == lease.run_id).with_for_update()
    row = (await connection.execute(query)).first()
    if row is None:
        raise await no_such_run(connection, lease.run_id)
    if row.lease_gen != lease.lease_gen:
        raise lease_lost(lease, row.lease_gen, row.task_queue)
    return row


def lease_lost(lease: Lease, current: int, task_queue: str | None) -> LeaseLost:
    """The error for a stale `lease` (ESP-503), when the run is at lease `current`."""
    holder = f"{task_queue!r} holds" if task_queue else "somebody took"
    return LeaseLost(
        "ESP-503",
        f"run {lease.run_id} is no longer trained here: lease {lease.lease_gen} is stale, {holder} lease {current}",
        hint="Nothing to do: this process stops, and its successor goes on from the last checkpoint",
        run_id=lease.run_id,
    )
