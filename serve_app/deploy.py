"""The front door and the reconciler as Ray Serve applications."""

from __future__ import annotations

import logging
import os
import secrets
import socket
import threading
from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.serve.config import HTTPOptions, ProxyLocation

from serve_app.app import make_app
from serve_app.inner_ports import keep_replica_on_loopback
from serve_app.reconciler.launcher import RayLauncher
from serve_app.reconciler.reconciler import Reconciler
from tunesmith.log_lines import LineFormatter
from tunesmith.records.store import RecordStore
from tunesmith.settings import Settings
from tunesmith.storage.urls import open_promptly

DOOR = "door"
RECONCILER = "reconciler"
JOIN_S = 4.0
"""How long an ending reconciler waits for its round, and then for what its threads are doing, seconds."""

logger = logging.getLogger(__name__)

# Serve checks its replicas this often, so a killed one is back within seconds.
_CARE = {
    "num_replicas": 1,
    "health_check_period_s": 1,
    "health_check_timeout_s": 10,
    "graceful_shutdown_timeout_s": 10,
    "ray_actor_options": {"num_cpus": 0},
}


@serve.deployment(name=DOOR, max_ongoing_requests=300, **_CARE)
@serve.ingress()
class DoorReplica:
    """One replica of the front door; it holds no job state."""

    def __init__(self, settings: Settings) -> None:
        log_to_stderr()
        keep_replica_on_loopback()
        self._settings = settings

    def __serve_build_asgi_app__(self) -> FastAPI:
        return make_app(self._settings, proxied=True, capacity=RayLauncher(self._settings).capacity)


@serve.deployment(name=RECONCILER, **_CARE)
class ReconcilerReplica:
    """A thread that runs the reconciler's rounds; Serve starts another replica when the thread ends."""

    def __init__(self, settings: Settings) -> None:
        log_to_stderr()
        keep_replica_on_loopback()
        self._pause_s = settings.reconcile_interval_s
        self._reconciler = Reconciler(
            RecordStore(settings.database_url),
            open_promptly(settings.storage_url, settings),
            RayLauncher(settings),
            settings,
            holder=f"{socket.gethostname()}:{os.getpid()}:{secrets.token_hex(4)}",
        )
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run, name=RECONCILER, daemon=True)
        self._thread.start()

    def check_health(self) -> None:
        if not self._thread.is_alive():
            raise RuntimeError("the reconciler's thread has ended")

    def __del__(self) -> None:
        self._ending.set()
        self._thread.join(JOIN_S)
        self._reconciler.close(JOIN_S)

    def _run(self) -> None:
        while not self._ending.wait(self._pause_s):
            try:
                self._reconciler.round()
            except Exception:
                logger.exception("a round failed; the next one follows")


def deploy(settings: Settings, address: str, *, proxy_port: int) -> None:
    """Run both applications on the Ray cluster at `address` (HOST:PORT); returns when they are up.

    Serve's proxy listens on `proxy_port` of loopback: it is the gate that listens where the settings say.
    """
    import ray

    RecordStore(settings.database_url).migrate()
    ray.init(address=address, log_to_driver=False)
    serve.start(
        proxy_location=ProxyLocation.HeadOnly,
        http_options=HTTPOptions(host="127.0.0.1", port=proxy_port),
    )
    serve.run(_bind(DoorReplica, settings), name=DOOR, route_prefix="/")
    serve.run(_bind(ReconcilerReplica, settings), name=RECONCILER, route_prefix=None)


def _bind(deployment: Any, settings: Settings) -> Any:
    return deployment.bind(settings)


def log_to_stderr() -> None:
    """Set up logging in one of the platform's processes; libraries log warnings alone."""
    handler = logging.StreamHandler()
    handler.setFormatter(LineFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(handlers=[handler])
    for name in ("serve_app", "tunesmith"):
        logging.getLogger(name).setLevel(logging.INFO)
