"""What the front door's routes answer with, made from records and manifests."""

from __future__ import annotations

import json

from tunesmith.api.views import AssetView, EventView, JobView
from tunesmith.assets.catalog import Manifest
from tunesmith.records.record import Event, Record
from tunesmith.storage import layout


def job_view(record: Record) -> JobView:
    status = record.status
    return JobView(
        id=record.id,
        kind=record.kind,
        name=record.name,
        account=record.account,
        state=status.state,
        phase=status.phase,
        reason=status.reason,
        message=status.message,
        attempt=status.attempt,
        submission_id=record.submission_id,
        output_kind=record.output.kind,
        output=f"{record.output.name}@{record.output.version}",
        created_at=record.created_at,
        started_at=record.started_at,
        ended_at=record.ended_at,
        job=json.loads(record.text),
    )


def event_view(event: Event) -> EventView:
    change = event.change
    return EventView(
        seq=event.seq,
        time=event.time,
        attempt=change.attempt,
        state=change.state,
        phase=change.phase,
        reason=change.reason,
        message=change.message,
        data=event.data,
    )


def asset_view(manifest: Manifest, root: str) -> AssetView:
    """`root` is the URL of the storage."""
    return AssetView(
        kind=manifest.kind,
        name=manifest.name,
        version=manifest.version,
        ref=manifest.ref,
        task_type=manifest.task_type,
        base=manifest.base,
        dataset=manifest.dataset,
        job=manifest.job,
        created_at=manifest.created_at,
        size_bytes=sum(file.size_bytes for file in manifest.files),
        files_url=layout.join(root, manifest.stored.prefix),
        files=manifest.files,
        tables=manifest.tables,
        details=manifest.details,
        training=manifest.training if manifest.kind == "model" else None,
        gallery=manifest.gallery,
    )
