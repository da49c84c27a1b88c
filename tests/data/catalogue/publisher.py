"""A server on this machine that publishes files, as the publishers of the datasets do."""

import gzip
import tarfile
import threading
import zipfile
from collections.abc import Callable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class Publisher:
    """Serves ``files`` by name.

    Attributes:
        files: name and content.
        asked: the names of the files that were asked for, in order.
        cut: names of files of which only the first half arrives.
        before_body: called before the body of a file is sent.
        after_half: called after the first half of a cut file is sent, before the connection ends.
    """

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.asked: list[str] = []
        self.cut: set[str] = set()
        self.before_body: Callable[[], object] = lambda: None
        self.after_half: Callable[[], object] = lambda: None
        publisher = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                publisher._answer(self)

            def log_message(self, *arguments: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        # Requests of killed clients must not keep the tests from ending.
        self.server.daemon_threads = True
        self.server.block_on_close = False
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def url(self, file: str) -> str:
        return f"http://127.0.0.1:{self.server.server_address[1]}/{file}"

    def stop(self) -> None:
        """From now on connections are refused."""
        self.server.shutdown()
        self.server.server_close()

    def _answer(self, request: BaseHTTPRequestHandler) -> None:
        name = request.path.removeprefix("/")
        self.asked.append(name)
        if name not in self.files:
            request.send_error(404)
            return
        body = self.files[name]
        request.send_response(200)
        request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        self.before_body()
        with suppress(OSError):  # the client may have gone
            if name in self.cut:
                request.wfile.write(body[: len(body) // 2])
                self.after_half()
            else:
                request.wfile.write(body)


def pack(folder: Path, entries: tuple[str, ...], archive: Path) -> None:
    """Pack entries of a folder as the ending of the archive's name says."""
    archive.parent.mkdir(parents=True, exist_ok=True)
    if archive.suffix == ".zip":
        with zipfile.ZipFile(archive, "w") as zipped:
            for entry in entries:
                for path in sorted((folder / entry).rglob("*")):
                    zipped.write(path, path.relative_to(folder))
    elif archive.name.endswith((".tar", ".tgz", ".tar.gz")):
        with tarfile.open(archive, "w" if archive.suffix == ".tar" else "w:gz") as packed:
            for entry in entries:
                packed.add(folder / entry, entry)
    else:
        content = (folder / entries[0]).read_bytes()
        archive.write_bytes(gzip.compress(content) if archive.suffix == ".gz" else content)
