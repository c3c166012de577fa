"""The S3 server that all tests of the session share."""

import http.client
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest

from benchmarks.s3_server import BUCKET, endpoint, free_ports, s3_keys, s3_process


@dataclass(frozen=True)
class S3Server:
    """Where the server listens, and the environment in which boto3 finds its keys."""

    endpoint: str
    filer_port: int
    """Of the server's own HTTP interface, which takes small objects faster and asks for no keys."""
    env: dict[str, str]

    def url(self, prefix: str) -> str:
        return f"s3://{BUCKET}/{prefix}"


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """One server for the session, with one bucket; its keys are in the environment while it runs."""
    with s3_keys() as env:
        folder, ports = tmp_path_factory.mktemp("s3"), free_ports(8)
        with s3_process(folder, ports):
            yield S3Server(endpoint(ports), ports[3], env)


def fill(filer_port: int, count: int, folder: str) -> None:
    """So many small objects in a folder of the bucket, put there past S3: it is the faster way."""

    def put(first: int) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", filer_port)
        for number in range(first, count, 8):
            connection.request("PUT", f"/buckets/{BUCKET}/{folder}/{number:08d}", body=b"{}")
            answer = connection.getresponse()
            answer.read()
            assert answer.status < 300

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(put, range(8)))
