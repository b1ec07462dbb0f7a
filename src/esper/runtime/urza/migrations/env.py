"""Alembic's entry: runs the migrations on the connection that `urza.migration` brings."""

from typing import Any
from typing import Literal

from alembic import context

from esper.runtime.urza.tables import Document
from esper.runtime.urza.tables import metadata


def _render(kind: str, item: Any, _context: Any) -> str | Literal[False]:
    # A migration must not change when a contract does: to the database a document is JSON.
    return "sa.JSON()" if kind == "type" and isinstance(item, Document) else False


context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    render_as_batch=True,
    render_item=_render,
)
with context.begin_transaction():
    context.run_migrations()
