"""The gate: what a stranger or a client may send and hold. The door behind it is real, Ray is not there."""

import json
import select
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
import pytest

from serve_app.middleware import MAX_BODY_BYTES
from tests.support.live_door import LiveDoor, echo
from tests.support.stage import SPEC
from tunesmith.api.views import ErrorBody
from tunesmith.local import gate

pytestmark = pytest.mark.slow

A_KEY = "YWFhYWFhYWFhYWFhYWFhYQ=="
END = b"\r\n\r\n"
HOST = b"Host: door\r\n"
LIMIT_S = 60.0
"""A door that is stopped fails a test by this; none waits for it otherwise."""


@dataclass(frozen=True)
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes
    is_closed: bool

    def error(self) -> str:
        """The code of the one error shape, whose request id is the header's."""
        error = ErrorBody.model_validate_json(self.body).error
        assert error.request_id == self.headers["x-request-id"]
        return error.code


def connect(door: LiveDoor, *, peer: str = "127.0.0.1") -> socket.socket:
    return socket.create_connection(("127.0.0.1", door.settings.port), timeout=LIMIT_S, source_address=(peer, 0))


def send(connection: socket.socket, data: bytes) -> Answer:
    """The first answer to `data`, and whether the connection is closed after it."""
    with suppress(OSError):  # what was refused already is not read to its end
        connection.sendall(data)
    return receive(connection)


def receive(connection: socket.socket) -> Answer:
    head = body = b""
    while not head.endswith(END):
        head += _some(connection, 1)
    line, *rows = head.decode("latin-1").rstrip().split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (row.partition(":") for row in rows)}
    while missing := int(headers["content-length"]) - len(body):
        body += _some(connection, missing)
    is_closed = headers.get("connection") == "close"
    if is_closed:
        while connection.recv(65536):
            pass
    return Answer(int(line.split()[1]), headers, body, is_closed)


def _some(connection: socket.socket, size: int) -> bytes:
    got = connection.recv(size)
    if not got:
        raise ConnectionError("the gate said nothing")
    return got


def ask(door: LiveDoor, data: bytes) -> Answer:
    with connect(door) as connection:
        return send(connection, data)


def head(door: LiveDoor, line: str = "GET /v1/flavors", *headers: str, token: str | None = None) -> bytes:
    """A request's line and headers, with the door's token unless another is given; "" is none."""
    token = door.token if token is None else token
    rows = [f"{line} HTTP/1.1", "Host: door", *([f"Authorization: Bearer {token}"] if token else []), *headers]
    return "".join(f"{row}\r\n" for row in rows).encode() + b"\r\n"


def order(door: LiveDoor) -> httpx.Response:
    """What any good client asks, with a body."""
    with httpx.Client(base_url=door.url, trust_env=False, timeout=LIMIT_S) as client:
        return client.post("/v1/plans", json=SPEC, headers={"Authorization": f"Bearer {door.token}"})


@pytest.fixture(autouse=True)
def alive(gated_door: LiveDoor) -> Iterator[None]:
    """After every test the gate is the process that it was, holds nothing more, and a good client is answered."""
    before = haproxy(gated_door)
    yield
    assert haproxy(gated_door) == before
    answered = order(gated_door)
    assert answered.status_code == 200, answered.text
    assert json.loads(ask(gated_door, head(gated_door, "GET /v1/jobs")).body)["items"] == []


def haproxy(door: LiveDoor) -> psutil.Process:
    (found,) = {
        psutil.Process(connection.pid)
        for connection in psutil.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN and connection.laddr[1:] == (door.settings.port,) and connection.pid
    }
    return found


def test_a_good_client_gets_through_with_its_own_request_id(gated_door: LiveDoor) -> None:
    answer = ask(gated_door, head(gated_door, "GET /v1/nothing", "X-Request-Id: mine"))
    assert (answer.status, answer.error(), answer.headers["x-request-id"]) == (404, "not_found", "mine")
    assert len(ask(gated_door, head(gated_door, "GET /v1/flavors")).headers["x-request-id"]) > 20


def test_health_is_told_without_a_token_and_not_asked_of_the_door(gated_door: LiveDoor) -> None:
    answer = ask(gated_door, head(gated_door, "GET /healthz", token=""))
    assert answer.status == 200
    assert json.loads(answer.body)["status"] == "ok"
    assert "server" not in answer.headers


@pytest.mark.parametrize("token", ["", "wrong"])
def test_a_body_without_the_token_is_not_read(gated_door: LiveDoor, token: str) -> None:
    answer = ask(gated_door, head(gated_door, "POST /v1/jobs", f"Content-Length: {MAX_BODY_BYTES}", token=token) + b"{")
    assert (answer.status, answer.error(), answer.is_closed) == (401, "unauthorized", True)


def test_a_token_that_was_changed_counts_at_once(gated_door: LiveDoor) -> None:
    path, old = gated_door.settings.api_token_path, gated_door.token
    try:
        path.write_text("another\n")
        assert ask(gated_door, head(gated_door, token=old)).status == 401
        assert ask(gated_door, head(gated_door, token="another")).status == 200
        path.write_text("\n")
        assert ask(gated_door, head(gated_door, token="another")).status == 401
        path.unlink()
        assert ask(gated_door, head(gated_door, token="another")).status == 401
    finally:
        path.write_text(old)


@pytest.mark.parametrize(
    "headers",
    [
        pytest.param([f"X-{number}: a" for number in range(gate.MAX_HEADERS)], id="many"),
        pytest.param([f"X: {'a' * gate.MAX_HEADER_BYTES}"], id="long"),
    ],
)
def test_headers_a_little_over_the_bound_are_refused_in_our_shape(gated_door: LiveDoor, headers: list[str]) -> None:
    answer = ask(gated_door, head(gated_door, "GET /v1/flavors", *headers))
    assert (answer.status, answer.error()) == (431, "headers_too_large")


@pytest.mark.parametrize(
    "start",
    [
        pytest.param(b"GET / HTTP/1.1\r\nHost: door\r\nX: ", id="header"),
        pytest.param(b"GET /", id="path"),
        pytest.param(b"", id="method"),
    ],
)
def test_a_header_without_end_ends_at_the_buffer(gated_door: LiveDoor, start: bytes) -> None:
    with connect(gated_door) as connection:
        sent = len(start)
        connection.sendall(start)
        with pytest.raises(OSError, match=r"reset|pipe"):
            while sent < 64 << 20:
                sent += connection.send(b"a" * 65536)
    # What the kernel holds on both sides comes on top of the gate's buffer.
    assert sent < 64 << 20


def test_header_lines_without_end_end_at_the_bound(gated_door: LiveDoor) -> None:
    with connect(gated_door) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\n" + HOST)
        with pytest.raises(OSError, match=r"reset|pipe"):
            for _ in range(1 << 16):
                connection.sendall(b"X: a\r\n" * 100)


def test_a_body_over_the_bound_is_refused_before_it_is_read(gated_door: LiveDoor) -> None:
    answer = ask(gated_door, head(gated_door, "POST /v1/jobs", f"Content-Length: {MAX_BODY_BYTES + 1}") + b"{")
    assert (answer.status, answer.error(), answer.is_closed) == (413, "body_too_large", True)


def test_a_body_of_the_largest_size_gets_through(gated_door: LiveDoor) -> None:
    body = json.dumps(SPEC).ljust(MAX_BODY_BYTES).encode()
    lines = ("Content-Type: application/json", f"Content-Length: {len(body)}")
    assert ask(gated_door, head(gated_door, "POST /v1/plans", *lines) + body).status == 200


def test_a_body_that_does_not_say_its_length_is_refused(gated_door: LiveDoor) -> None:
    answer = ask(gated_door, head(gated_door, "POST /v1/jobs", CHUNKED) + b"5\r\nhello\r\n")
    assert (answer.status, answer.error(), answer.is_closed) == (411, "length_required", True)


def drip(connection: socket.socket) -> Answer:
    """Send a byte a second until there is an answer."""
    connection.settimeout(1)
    for _ in range(int(LIMIT_S)):
        try:
            return receive(connection)
        except TimeoutError:
            connection.sendall(b"a")
    raise AssertionError("the gate still waits")


def test_a_header_that_comes_slowly_is_not_waited_for(gated_door: LiveDoor) -> None:
    with connect(gated_door) as idle, connect(gated_door) as slow:
        slow.sendall(b"GET / HTTP/1.1\r\nHost: ")
        assert order(gated_door).status_code == 200
        # HAProxy's own answer: no request has begun.
        assert drip(slow).status == 408
        assert receive(idle).status == 408


def test_a_body_that_comes_slowly_is_not_waited_for(gated_door: LiveDoor) -> None:
    with connect(gated_door) as slow:
        slow.sendall(head(gated_door, "POST /v1/plans", "Content-Length: 100") + b"{")
        assert order(gated_door).status_code == 200
        answer = drip(slow)
        assert (answer.status, answer.error(), answer.is_closed) == (408, "request_timeout", True)


def test_large_bodies_that_do_not_come_hold_up_their_like_alone(gated_door: LiveDoor) -> None:
    with ExitStack() as held:
        for _ in range(gate.REQUESTS + 20):
            slow = held.enter_context(connect(gated_door))
            slow.sendall(head(gated_door, "POST /v1/plans", f"Content-Length: {MAX_BODY_BYTES}") + b" " * (1 << 15))
        assert order(gated_door).status_code == 200


def test_many_connections_of_one_peer_leave_room_for_others(gated_door: LiveDoor) -> None:
    with ExitStack() as held:
        for _ in range(2000):
            held.enter_context(connect(gated_door, peer="127.0.0.2")).sendall(b"GET / HT")
        assert order(gated_door).status_code == 200


def test_connections_of_one_peer_are_bounded(gated_door: LiveDoor) -> None:
    peer, too_many, ended = outer_address(), 50, 0
    with ExitStack() as held:
        connections: list[socket.socket] = []
        for _ in range(gate.PEER_CONNECTIONS + too_many):
            try:
                connections.append(held.enter_context(connect(gated_door, peer=peer)))
            except ConnectionResetError:  # so soon that it was never there
                ended += 1
        for connection in connections[gate.PEER_CONNECTIONS - too_many :]:
            try:
                assert send(connection, head(gated_door)).status == 200
            except OSError:
                ended += 1
        assert ended == too_many
        assert order(gated_door).status_code == 200


def outer_address() -> str:
    """An address of this machine that is not loopback's."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
        except OSError:
            pytest.skip("this machine has no address but loopback")
        return str(probe.getsockname()[0])


def test_requests_of_one_peer_at_once_are_bounded(tmp_path: Path) -> None:
    go, too_many = threading.Event(), 10
    with echo(tmp_path, go=go) as door, ExitStack() as stack:
        sent = {stack.enter_context(connect(door, peer="127.0.0.7")) for _ in range(gate.PEER_REQUESTS + too_many)}
        for connection in sent:
            connection.sendall(head(door, "GET /held/"))
        refused: set[socket.socket] = set()
        while len(refused) < too_many:
            answered = select.select(list(sent - refused), [], [], LIMIT_S)[0]
            assert answered
            refused |= set(answered)
        for answer in map(receive, refused):
            assert (answer.status, answer.error(), answer.headers["retry-after"]) == (429, "too_many_requests", "1")
        assert ask(door, head(door)).status == 200, "another peer is let in"
        go.set()
        assert [receive(connection).status for connection in sent - refused] == [200] * gate.PEER_REQUESTS


def test_what_a_client_says_about_itself_does_not_reach_serve(gated_door: LiveDoor, tmp_path: Path) -> None:
    said = (
        "Forwarded: for=1.2.3.4", "X-Forwarded-For: 1.2.3.4", "X-Forwarded-Proto: https", "X-Forwarded-Host: evil",
        "X-Request-Timeout-Seconds: 0.001", "X-Request-Disconnect-Disabled: ?1", "serve_multiplexed_model_id: x",
        "Upgrade: h2c", "HTTP2-Settings: AAA", "X-Else: stays",
    )  # fmt: skip
    with echo(tmp_path) as door:
        answer = ask(door, head(door, "GET /v1/anything", *said))
    assert answer.status == 200
    got = {name for name, _ in json.loads(answer.body)}
    assert got == {"host", "authorization", "x-request-id", "x-forwarded-for", "x-else"}
    assert ["x-forwarded-for", "127.0.0.1"] in json.loads(answer.body)


def test_garbage_behind_a_good_request_ends_the_connection(gated_door: LiveDoor) -> None:
    with connect(gated_door) as connection:
        assert send(connection, head(gated_door) + b"\x00\xff garbage \r\n\r\n" * 1000).status == 200
        assert receive(connection).status == 400


def request(*lines: str, target: str = "GET /v1/jobs HTTP/1.1", body: bytes = b"", host: str = "Host: door") -> bytes:
    """A request of exactly these lines; `TOKEN` stands for the right header."""
    return "\r\n".join([target, *([host] if host else []), *lines, "", ""]).encode("utf-8", "surrogateescape") + body


TOKEN = "Authorization: Bearer TOKEN"
CHUNKED = "Transfer-Encoding: chunked"
SMUGGLED = b"0\r\n\r\nGET /v1/flavors HTTP/1.1\r\nHost: door\r\n" + TOKEN.encode() + END

HOSTILE = {
    # Two readers, two lengths.
    "length and chunks": (request(TOKEN, "Content-Length: 5", CHUNKED, body=SMUGGLED), 411),
    "chunks and length": (request(TOKEN, CHUNKED, "Content-Length: 5", body=SMUGGLED), 411),
    "two lengths": (request(TOKEN, "Content-Length: 0", "Content-Length: 5", body=b"hello"), 400),
    "two lengths in one": (request(TOKEN, "Content-Length: 0, 5", body=b"hello"), 400),
    "a negative length": (request(TOKEN, "Content-Length: -1"), 400),
    "a signed length": (request(TOKEN, "Content-Length: +5", body=b"hello"), 400),
    "a length in hex": (request(TOKEN, "Content-Length: 0x5", body=b"hello"), 400),
    "a length of many digits": (request(TOKEN, f"Content-Length: {'9' * 40}"), 400),
    "a length over the bound": (request(TOKEN, "Content-Length: 99999999999"), 413),
    "an empty length": (request(TOKEN, "Content-Length: "), 400),
    "chunks by another name": (request(TOKEN, "Transfer-Encoding: xchunked", body=b"0\r\n\r\n"), 400),
    "chunks twice": (request(TOKEN, "Transfer-Encoding: chunked, chunked", body=b"0\r\n\r\n"), 400),
    "chunks in two headers": (request(TOKEN, "Transfer-Encoding: identity", CHUNKED, body=b"0\r\n\r\n"), 422),
    "chunks with a tab": (request(TOKEN, "Transfer-Encoding:\tchunked", body=b"0\r\n\r\n"), 411),
    "chunks of HTTP/1.0": (request(TOKEN, CHUNKED, target="POST /v1/jobs HTTP/1.0", body=b"0\r\n\r\n"), 411),
    "a chunk's extension": (request(TOKEN, CHUNKED, body=b"0;x=" + b"a" * 9999 + END), 411),
    "a chunk without end": (request(TOKEN, CHUNKED, body=b"ffffffffffffffff\r\n" + b"a" * 9999), 400),
    "a space before the colon": (request(TOKEN, "Content-Length : 5", body=b"hello"), 400),
    "a header's name with a space": (request(TOKEN, "Content Length: 5"), 400),
    "a header without a colon": (request(TOKEN, "Content-Length"), 400),
    "a header without a name": (request(TOKEN, ": 5"), 400),
    "a folded length": (request(TOKEN, "Content-Length:", " 5", body=b"hello"), 200),
    "a folded chunked": (request(TOKEN, "Transfer-Encoding:", " chunked", body=b"0\r\n\r\n"), 411),
    "a folded token": (request("Authorization: Bearer", " TOKEN"), 200),
    "a bare CR": (request(TOKEN, "X: a\rContent-Length: 5"), 400),
    "a NUL in a value": (request(TOKEN, "X: a\0b"), 400),
    "a NUL in a name": (request(TOKEN, "X\0: a"), 400),
    "a NUL in the path": (request(TOKEN, target="GET /v1/jobs\0 HTTP/1.1"), 400),
    "letters that are not ASCII in a name": (request(TOKEN, "Ключ: a"), 400),
    "letters that are not ASCII in the path": (request(TOKEN, target="GET /v1/jobs/é HTTP/1.1"), 400),
    "a header of one's own that ends another": (request(TOKEN, "X-Request-Id: a\r\n\r\nb"), 200),
    # What is asked for.
    "the whole address": (request(TOKEN, target="GET http://door/v1/jobs HTTP/1.1"), 200),
    "another's whole address": (request(TOKEN, target="GET http://evil/v1/jobs HTTP/1.1"), 400),
    "a file's address": (request(TOKEN, target="GET file:///etc/passwd HTTP/1.1"), 400),
    "an address with a user": (request(TOKEN, target="GET http://a:b@door/v1/jobs HTTP/1.1"), 200),
    "no path": (request(TOKEN, target="GET v1/jobs HTTP/1.1"), 400),
    "a star": (request(TOKEN, target="GET * HTTP/1.1"), 404),
    "HTTP/0.9": (b"GET /v1/jobs\r\n\r\n", 400),
    "HTTP/1.2": (request(TOKEN, target="GET /v1/jobs HTTP/1.2"), 400),
    "HTTP/2 in the line": (request(TOKEN, target="GET /v1/jobs HTTP/2.0"), 400),
    "HTTP/9 in the line": (request(TOKEN, target="GET /v1/jobs HTTP/9.9"), 400),
    "no version": (request(TOKEN, target="GET /v1/jobs"), 400),
    "HTTP/2 by prior knowledge": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0", 400),
    "HTTP/2 by an upgrade": (request(TOKEN, "Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c"), 200),
    "a WebSocket": (request(TOKEN, "Connection: Upgrade", "Upgrade: websocket", f"Sec-WebSocket-Key: {A_KEY}"), 200),
    "a WebSocket without a key": (request(TOKEN, "Connection: Upgrade", "Upgrade: websocket"), 400),
    "a TLS hello": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(range(256)) * 2, 400),
    "a PROXY header": (b"PROXY TCP4 1.2.3.4 1.2.3.4 1 2\r\n" + request(TOKEN), 400),
    "a proxy's header in bytes": (b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c" + b"\1" * 12 + request(TOKEN), 400),
    "lines of the shell": (b"$(reboot) `reboot` HTTP/1.1\r\n\r\n", 400),
    "CONNECT": (request(TOKEN, target="CONNECT door:22 HTTP/1.1", host="Host: door:22"), 405),
    "TRACE": (request(TOKEN, target="TRACE /v1/jobs HTTP/1.1"), 405),
    "PROPFIND": (request(TOKEN, target="PROPFIND / HTTP/1.1"), 405),
    "a method in small letters": (request(TOKEN, target="get /v1/jobs HTTP/1.1"), 405),
    "a method of thousand letters": (request(TOKEN, target=f"{'A' * 1000} /v1/jobs HTTP/1.1"), 405),
    "a method by a header": (request(TOKEN, "X-HTTP-Method-Override: DELETE"), 200),
    # Paths to what is not the door's.
    "Serve's routes": (request(TOKEN, target="GET /-/routes HTTP/1.1"), 404),
    "Serve's health": (request(TOKEN, target="GET /-/healthz HTTP/1.1"), 404),
    "Serve's routes in percents": (request(TOKEN, target="GET /%2d/routes HTTP/1.1"), 404),
    "Serve's routes in percents and capitals": (request(TOKEN, target="GET /%2D%2Froutes HTTP/1.1"), 404),
    "Serve's routes by two slashes": (request(TOKEN, target="GET //-/routes HTTP/1.1"), 404),
    "Serve's routes by a dot": (request(TOKEN, target="GET /./-/routes HTTP/1.1"), 404),
    "routes of Serve's from below": (request(TOKEN, target="GET /v1/../-/routes HTTP/1.1"), 404),
    "a file by dots": (request(TOKEN, target="GET /../../../../etc/passwd HTTP/1.1"), 404),
    "a file by dots in percents": (request(TOKEN, target="GET /%2e%2e/%2e%2e/etc/passwd HTTP/1.1"), 404),
    "a file by dots in percents twice": (request(TOKEN, target="GET /%252e%252e/etc/passwd HTTP/1.1"), 404),
    "the token's file": (request(TOKEN, target="GET /api_token HTTP/1.1"), 404),
    "HAProxy's statistics": (request(TOKEN, target="GET /haproxy?stats HTTP/1.1"), 404),
    "metrics": (request(TOKEN, target="GET /metrics HTTP/1.1"), 404),
    "a percent that is none": (request(TOKEN, target="GET /v1/jobs/%zz HTTP/1.1"), 404),
    "a NUL in percents": (request(TOKEN, target="GET /v1/jobs/%00 HTTP/1.1"), 404),
    "an id that is a path": (request(TOKEN, target="GET /v1/jobs/..%2f..%2fmodels HTTP/1.1"), 404),
    # Who asks.
    "no token": (request(), 401),
    "an empty token": (request("Authorization: Bearer "), 401),
    "no scheme": (request("Authorization: TOKEN"), 401),
    "another scheme": (request("Authorization: Basic TOKEN"), 401),
    "the beginning of the token": (request("Authorization: Bearer TOK"), 401),
    "the token and more": (request("Authorization: Bearer TOKENx"), 401),
    "the token twice": (request("Authorization: Bearer TOKEN TOKEN"), 401),
    "two headers, the right one first": (request(TOKEN, "Authorization: Bearer wrong"), 401),
    "two headers, the right one last": (request("Authorization: Bearer wrong", TOKEN), 401),
    "two right headers": (request(TOKEN, TOKEN), 401),
    "a token that is not ASCII": (request("Authorization: Bearer é漢字"), 401),
    "a token that is no UTF-8": (request("Authorization: Bearer \udcff\udcfe"), 401),
    "a token with a NUL": (request("Authorization: Bearer TOKEN\0"), 400),
    "a token of 5 KB": (request(f"Authorization: Bearer {'a' * 5000}"), 401),
    "the token in the address": (request(target="GET /v1/jobs?token=TOKEN HTTP/1.1"), 401),
    "the token as a cookie": (request("Cookie: Authorization=Bearer TOKEN"), 401),
    "the token for a proxy": (request("Proxy-Authorization: Bearer TOKEN"), 401),
    "the open path with more behind it": (request(target="GET /healthz/../v1/jobs HTTP/1.1"), 401),
    "the open path with a parameter": (request(target="GET /healthz;/v1/jobs HTTP/1.1"), 401),
    "the open path in percents": (request(target="GET /healthz%2f..%2fv1%2fjobs HTTP/1.1"), 401),
    "the open path with a body": (request("Content-Length: 99", target="POST /healthz HTTP/1.1"), 401),
    "the documents": (request(target="GET /openapi.json HTTP/1.1"), 401),
    "an address of loopback by a header": (request("X-Forwarded-For: 127.0.0.1", "Forwarded: for=127.0.0.1"), 401),
    "another path by a header": (request("X-Original-URL: /healthz", "X-Rewrite-URL: /healthz"), 401),
    # From where, and to whom.
    "no host": (request(TOKEN, host=""), 400),
    "two hosts": (request(TOKEN, "Host: evil"), 400),
    "another's host": (request(TOKEN, host="Host: evil"), 200),
    "a host with a path": (request(TOKEN, host="Host: door/../evil"), 400),
    "an endless host": (request(TOKEN, host=f"Host: {'a' * 9000}"), 431),
    "forwarded for many": (request(TOKEN, f"X-Forwarded-For: {'1.2.3.4, ' * 300}"), 200),
    "no time to answer": (request(TOKEN, "X-Request-Timeout-Seconds: 0.000001"), 200),
    "Serve's, with a quote in the id": (request(TOKEN, 'X-Request-Id: "}{', target="GET /-/ HTTP/1.1"), 404),
    "Serve's, with an id of 5 KB": (request(TOKEN, f"X-Request-Id: {'a' * 5000}", target="GET /- HTTP/1.1"), 404),
    "connection: authorization": (request(TOKEN, "Connection: close, Authorization"), 200),
    "waiting to be told to go on": (request(TOKEN, "Expect: 200-ok"), 200),
}  # fmt: skip
"""What is sent, `TOKEN` standing for the token, and the status of the answer."""


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_request_is_answered_by_this_and_changes_nothing(gated_door: LiveDoor, name: str) -> None:
    data, status = HOSTILE[name]
    token = gated_door.token.encode()
    answer = ask(gated_door, data.replace(b"TOKEN", token).replace(b"TOK\r", token[:-1] + b"\r"))
    assert answer.status == status, answer
    assert token not in answer.body
    if status >= 400 and answer.headers["content-type"] == "application/json":
        answer.error()
    else:
        assert status in (200, 400, 422)
    assert (b"nothing below /-/" in answer.body) == name.startswith("Serve's")
    if status in (200, 404):
        assert b"passwd" not in answer.body.replace(b"etc/passwd", b"") and b"root:" not in answer.body
