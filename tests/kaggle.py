"""A small server that answers as Kaggle's does, for kagglehub to ask."""

import contextlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@contextlib.contextmanager
def serving(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    """The address of a server that answers by ``handler``, as long as it runs."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


@dataclass
class Kaggle:
    """What the server has, how it misbehaves, and what it was asked for."""

    files: dict[str, bytes]
    status: int = 200
    hang_up_after: int | None = None  # bytes of a file
    md5: str | None = None
    asked: list[str] = field(default_factory=list)

    def handler(self) -> type[BaseHTTPRequestHandler]:
        kaggle = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):  # the interface
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                if kaggle.status != 200:
                    self.send(kaggle.status)
                elif self.path.endswith("GetDataset"):
                    assert request["datasetSlug"] == "google-landmarks-2020-tfrecords"
                    self.send(200, b'{"currentVersionNumber": 7}')
                elif request["fileName"] in kaggle.files:
                    self.send(302, Location=f"/storage/{request['fileName']}")
                else:
                    self.send(404)

            def do_GET(self):  # the storage
                name = self.path.split("/")[-1]
                start = int(self.headers.get("Range", "bytes=0-")[6:-1])
                kaggle.asked.append(f"{name} from {start}")
                headers = {"x_goog_hash": f"crc32c=AAAAAA==,md5={kaggle.md5}"} if kaggle.md5 else {}
                self.send(200, kaggle.files[name][start:], Accept_Ranges="bytes", **headers)

            def send(self, status, body=b"", **headers):
                self.send_response(status)
                for key, value in {"Content_Length": len(body), **headers}.items():
                    self.send_header(key.replace("_", "-"), str(value))
                self.end_headers()
                self.wfile.write(body[: kaggle.hang_up_after])

            def log_message(self, *_):
                pass

        return Handler

    def serving(self) -> contextlib.AbstractContextManager[str]:
        """The server's address, as long as it runs."""
        return serving(self.handler())
