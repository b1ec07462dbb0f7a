import asyncio
import shutil

from esper.contracts.config import UrzaConfig
from esper.runtime.urza.connections import Connections


def test_one_library_and_one_store_a_configuration(tmp_path, sqlite_file):
    assert sqlite_file.parent == tmp_path
    other = tmp_path / "other.db"
    shutil.copyfile(sqlite_file, other)

    async def main():
        connections = Connections(tmp_path)
        default = UrzaConfig()
        elsewhere = UrzaConfig(database=f"sqlite+aiosqlite:///{other}", objects=str(tmp_path / "elsewhere"))
        first, again = await asyncio.gather(connections.library(default), connections.library(default))
        assert first is again
        assert await connections.library(elsewhere) is not first
        assert first.describe().endswith("/urza.db")
        assert connections.store(default) is connections.store(default)
        assert connections.store(default).describe() == str(tmp_path / "objects")
        assert connections.store(elsewhere).describe() == str(tmp_path / "elsewhere")
        await connections.close()

    asyncio.run(main())
