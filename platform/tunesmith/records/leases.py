"""The table of leases. Each function works inside its caller's transaction; `now` is in seconds since the epoch."""

from __future__ import annotations

import sqlalchemy as sa

from tunesmith.errors import LeaseLostError
from tunesmith.records.record import Lease
from tunesmith.records.schema import LEASES


def acquire(connection: sa.Connection, name: str, holder: str, *, duration_s: float, now: float) -> Lease | None:
    """Take or renew the lease; None while another holds it."""
    row = connection.execute(sa.select(LEASES).where(LEASES.c.name == name)).first()
    expires_at = now + duration_s
    if row is None:
        connection.execute(LEASES.insert().values(name=name, holder=holder, epoch=1, expires_at=expires_at))
        return Lease(name, holder, 1)
    is_held = row.expires_at > now
    if is_held and row.holder != holder:
        return None
    epoch = row.epoch if is_held else row.epoch + 1
    update = LEASES.update().where(LEASES.c.name == name)
    connection.execute(update.values(holder=holder, epoch=epoch, expires_at=expires_at))
    return Lease(name, holder, epoch)


def check(connection: sa.Connection, lease: Lease, *, now: float) -> None:
    """LeaseLostError unless the lease is still held."""
    row = connection.execute(sa.select(LEASES).where(LEASES.c.name == lease.name)).first()
    if row is None or row.epoch != lease.epoch or row.expires_at <= now:
        raise LeaseLostError(f"the lease {lease.name!r} is no longer held by {lease.holder}")


def release(connection: sa.Connection, lease: Lease) -> None:
    """End the lease now; one that was lost already is no error."""
    held = (LEASES.c.name == lease.name) & (LEASES.c.epoch == lease.epoch)
    connection.execute(LEASES.update().where(held).values(expires_at=0.0))
