"""A proxy before an HTTP server, which can hold back or refuse the requests that carry a given word."""

import http.client
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

_OWN = {"connection", "transfer-encoding", "content-length", "date", "server"}
"""Headers of an answer that the proxy writes by itself."""


class StallingProxy(ThreadingHTTPServer):
    """Hands requests on to `server` and remembers their lines. What is held back is neither answered nor closed."""

    daemon_threads = True

    def __init__(self, server: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.server_place = urlsplit(server).netloc
        self.lines: list[str] = []
        """Of all requests so far, as METHOD PATH?QUERY, unquoted."""
        self.refuses: Callable[[str], bool] = lambda line: False
        """Whether a request is answered with 501."""
        self._holds: Callable[[str], bool] = lambda line: False
        self.held: list[str] = []
        """The lines of the requests that hang now; a client that gave up one has it here still."""
        self._changed = threading.Condition()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def hold(self, which: Callable[[str], bool]) -> None:
        """From now on, let the requests hang for whose line `which` is true, and only these."""
        with self._changed:
            self._holds = which
            self._changed.notify_all()

    def pass_on(self, line: str) -> None:
        """Return when the request may go on."""
        with self._changed:
            self.lines.append(line)
            self.held.append(line)
            self._changed.wait_for(lambda: not self._holds(line))
            self.held.remove(line)


class _Handler(BaseHTTPRequestHandler):
    server: StallingProxy
    protocol_version = "HTTP/1.1"

    def setup(self) -> None:
        super().setup()
        self.upstream = http.client.HTTPConnection(self.server.server_place)

    def finish(self) -> None:
        self.upstream.close()
        with suppress(OSError):
            super().finish()

    def handle(self) -> None:
        with suppress(OSError):  # a client that gave up
            super().handle()

    def hand_on(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        line = f"{self.command} {unquote(self.path)}"
        self.server.pass_on(line)
        if self.server.refuses(line):
            self.answer(501, [], b"")
            return
        self.upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
        for name, value in self.headers.items():
            self.upstream.putheader(name, value)
        self.upstream.endheaders(body or None)
        answer = self.upstream.getresponse()
        length = answer.headers.get("Content-Length")
        content = answer.read()
        headers = [(name, value) for name, value in answer.getheaders() if name.lower() not in _OWN]
        self.answer(answer.status, headers, content, length=length if self.command == "HEAD" else None)

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = hand_on  # noqa: N815 - the names that http.server calls

    def answer(self, status: int, headers: list[tuple[str, str]], content: bytes, length: str | None = None) -> None:
        self.send_response_only(status)
        for name, value in headers:
            self.send_header(name, value)
        if status != 204:
            self.send_header("Content-Length", length or str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *args: object) -> None:
        pass


@contextmanager
def stalling_proxy(server: str) -> Iterator[StallingProxy]:
    """A proxy to the server at this URL, for as long as the context lasts."""
    with StallingProxy(server) as proxy:
        thread = threading.Thread(target=proxy.serve_forever)
        thread.start()
        try:
            yield proxy
        finally:
            proxy.hold(lambda line: False)
            proxy.shutdown()
            thread.join()
