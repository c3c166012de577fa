"""The database below the record store: connections, transactions, and its schema brought up to date."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from tunesmith.errors import SpecError

MIGRATIONS = Path(__file__).with_name("migrations")


class Database:
    """A SQLite file in WAL mode."""

    def __init__(self, url: str) -> None:
        parsed = sa.make_url(url)
        if parsed.get_backend_name() != "sqlite" or not parsed.database:
            raise SpecError(f"the record store is a SQLite file in this version, got {url!r}")
        Path(parsed.database).parent.mkdir(parents=True, exist_ok=True)
        self.engine = sa.create_engine(parsed, connect_args={"timeout": 30})
        sa.event.listen(self.engine, "connect", _on_connect)
        self._writer = threading.Lock()

    @contextmanager
    def reading(self) -> Iterator[sa.Connection]:
        """A connection that only reads."""
        with self.engine.connect() as connection:
            yield connection

    @contextmanager
    def writing(self) -> Iterator[sa.Connection]:
        """A transaction that writes; it takes SQLite's write lock at once, so that what it reads stays true.

        The threads of a process wait for each other here: those that wait for SQLite's lock sleep and look again.
        """
        with self._writer, self.engine.connect() as connection, connection.begin():
            connection.exec_driver_sql("BEGIN IMMEDIATE")
            yield connection

    def migrate(self) -> None:
        """Bring the schema up to date (Alembic), safe when several processes do it at once."""
        from alembic import command
        from alembic.config import Config

        config = Config()
        config.set_main_option("script_location", str(MIGRATIONS))
        with self.writing() as connection:
            config.attributes["connection"] = connection
            command.upgrade(config, "head")


def _on_connect(connection: Any, _: object) -> None:
    # Transactions are begun by hand, so that they can be IMMEDIATE.
    connection.isolation_level = None
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
        connection.execute(f"PRAGMA {pragma}")
