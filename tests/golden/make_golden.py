"""Makes the golden files of one release: `python tests/golden/make_golden.py FOLDER`, with the release's own `esper` on
the path. They are made once, when it is released, and never again: later code must load them or refuse them clearly.

FOLDER holds one run of three epochs with a graft on probation: `urza-<revision>.sql` (the database at each revision
that this release can hold it in), `objects/` (every blob), `library/` (what `esper.save` writes), `config.yaml`, and
`golden.json` (with which torch, and in which digest the run ends when it goes on to epoch 6).
"""

import asyncio
import json
import shutil
import sqlite3
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "support"))

import torch  # noqa: E402
from tolaria_tasks import Small  # noqa: E402
from tolaria_world import Driver  # noqa: E402
from tolaria_world import World  # noqa: E402
from tolaria_world import make_config  # noqa: E402
from tolaria_world import ordered  # noqa: E402
from tolaria_world import silent  # noqa: E402

import esper  # noqa: E402
from esper.contracts.enums import DecisionKind  # noqa: E402
from esper.contracts.operational import AdaptationDecision  # noqa: E402
from esper.runtime.configuration import dump_config  # noqa: E402
from esper.runtime.urza import migration  # noqa: E402

EPOCHS = 6
CONFIG = make_config(run={"max_epochs": EPOCHS}, tamiyo={"hold_epochs": 2, "hold_steps": 0, "keep_margin": 0.0})


def grown(world: World) -> str:
    """Three epochs, with a graft at the start of the third; gives the digest of its kernel."""
    driver = Driver(world, world.open(CONFIG))
    order = ordered(1, 14)
    driver.schedule = (order,)
    (first,) = driver.train(1, expects_decision=True)
    decision = AdaptationDecision(
        run_id="run", epoch=1, policy="golden", kind=DecisionKind.GERMINATE, code="grow", reason="golden"
    )
    world.call(world.library.record_decision(decision))
    delivery = world.deliver(first, order)
    assert driver.session.install(delivery).accepted
    driver.train(2, 3)
    driver.session.close()
    return delivery.kernel


def ended(world: World) -> str:
    """The same run, loaded anew and trained to its end."""
    driver = Driver(world, world.open(CONFIG))
    driver.train(4)
    driver.session.judge("run/a1", silent)
    driver.train(5, EPOCHS)
    return driver.digest()


def dumps(database: Path) -> Iterator[tuple[str, str]]:
    """The database as SQL, with the tables and columns of its own revision and of every older one."""
    for number in range(1, int(migration.REVISION) + 1):
        revision = f"{number:04}"
        older = database.with_name(f"urza-{revision}.db")
        asyncio.run(migration.upgrade(f"sqlite+aiosqlite:///{older}", revision=revision))
        with sqlite3.connect(older) as connection:
            connection.execute("ATTACH ? AS newest", (str(database),))
            names = [row[0] for row in connection.execute("SELECT name FROM main.sqlite_master WHERE type = 'table'")]
            for table in sorted(set(names) - {"alembic_version", "sqlite_sequence"}):
                columns = ", ".join(f'"{row[1]}"' for row in connection.execute(f'PRAGMA main.table_info("{table}")'))
                connection.execute(f'INSERT INTO main."{table}" ({columns}) SELECT {columns} FROM newest."{table}"')
            connection.commit()
            connection.execute("DETACH newest")
            yield revision, "\n".join(connection.iterdump()) + "\n"


def make(folder: Path) -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        world = World(place)
        kernel = grown(world)
        stood = place / "stood"
        shutil.copytree(place / "objects", stood / "objects")
        with sqlite3.connect(place / "urza.db") as live, sqlite3.connect(stood / "urza.db") as copy:
            live.backup(copy)
        digest = ended(world)
        world.close()
        folder.mkdir(parents=True)
        for revision, text in dumps(stood / "urza.db"):
            (folder / f"urza-{revision}.sql").write_text(text)
        shutil.copytree(stood / "objects", folder / "objects")
    model = esper.wrap(Small(), example_inputs=torch.zeros(2, 12))
    esper.graft(model, "first", "bottleneck", rank=2)
    esper.save(model, folder / "library")
    (folder / "config.yaml").write_text(dump_config(CONFIG))
    facts = {"torch": torch.__version__, "digest": digest, "kernel": kernel, "model": esper.weights_digest(model)}
    (folder / "golden.json").write_text(json.dumps(facts, indent=2) + "\n")


if __name__ == "__main__":
    make(Path(sys.argv[1]))
