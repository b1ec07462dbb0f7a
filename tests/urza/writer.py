"""Processes of their own that write through the library at once: `writer.py URL PROCESSES TIMES`."""

import asyncio
import os
import sys
import traceback
from pathlib import Path

from sqlalchemy import select
from sqlalchemy import update

from esper.contracts.enums import FactKind
from esper.contracts.operational import Fact
from esper.runtime.urza.engine import make_engine
from esper.runtime.urza.engine import parse_url
from esper.runtime.urza.engine import writing
from esper.runtime.urza.library import Library
from esper.runtime.urza.tables import runs


async def insert_facts(url: str, number: int, times: int) -> None:
    """Each insert reads the highest `seq` and writes the next."""
    async with await Library.open(url, default_file=Path("unused")) as library:
        lease = await library.lease("r1")
        assert lease is not None
        for index in range(1, times + 1):
            name = f"r1/a{number * times + index}"
            fact = Fact(run_id="r1", adaptation_id=name, kind=FactKind.GRAFT, apply_step=index, seq=0)
            await library.insert_fact(lease, fact)


async def count_up(url: str, times: int) -> None:
    """A read-modify-write with nothing to protect it but the transaction."""
    engine = make_engine(parse_url(url, Path("unused")))
    try:
        for _ in range(times):
            async with writing(engine) as connection:
                seen = (await connection.execute(select(runs.c.restarts))).scalar_one()
                await connection.execute(update(runs).values(restarts=seen + 1))
    finally:
        await engine.dispose()


async def write(url: str, number: int, times: int) -> None:
    await insert_facts(url, number, times)
    # PostgreSQL promises this only to those who lock the row first.
    if url.startswith("sqlite"):
        await count_up(url, times)


def main(url: str, processes: int, times: int) -> int:
    """Forked after the imports, which cost more than the writing."""
    children = []
    for number in range(processes):
        child = os.fork()
        if child == 0:
            status = 1
            try:
                asyncio.run(write(url, number, times))
                status = 0
            except Exception:
                traceback.print_exc()
            finally:
                os._exit(status)
        children.append(child)
    return max(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
