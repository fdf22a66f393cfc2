"""The metadata service of a cloud's machine, as its documentation describes it.

    python tests/helpers/metadata_server.py AWS FOLDER [HOST] [PORT]

Answers come from the files of a folder, by their path; what is not there is 404. A test gives a
notice by writing the file. Requests that the cloud refuses are refused as it does.
"""

import secrets
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

HOST = "169.254.169.254"  # of all three clouds
AWS_NOTICE = "latest/meta-data/spot/instance-action"
AWS_REBALANCE = "latest/meta-data/events/recommendations/rebalance"
GCP_NOTICE = "computeMetadata/v1/instance/preempted"
AZURE_NOTICE = "metadata/scheduledevents"
AZURE_NAME = "metadata/instance/compute/name"

TOKEN_HEADER = "X-aws-ec2-metadata-token"
# The header without which GCP and Azure answer nobody, and with which status.
HEADERS = {"GCP": ("Metadata-Flavor", "Google", 403), "Azure": ("Metadata", "true", 400)}


class MetadataServer(ThreadingHTTPServer):
    """cloud: AWS, GCP or Azure."""

    daemon_threads = True

    def __init__(self, cloud: str, folder: Path, host: str = "127.0.0.1", port: int = 0) -> None:
        super().__init__((host, port), Handler)
        self.cloud, self.folder = cloud, folder
        self.tokens: set[str] = set()
        self.requests: list[str] = []

    @property
    def address(self) -> str:
        return f"http://{self.server_address[0]!s}:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: MetadataServer

    def do_PUT(self) -> None:
        """Only AWS's: a token for the requests that follow."""
        seconds = int(self.headers.get("X-aws-ec2-metadata-token-ttl-seconds", 0))
        if (self.server.cloud, self.path) != ("AWS", "/latest/api/token"):
            self.answer(405)
        elif not 1 <= seconds <= 21600:
            self.answer(400)
        else:
            token = secrets.token_urlsafe()
            self.server.tokens.add(token)
            self.answer(200, token)

    def do_GET(self) -> None:
        path = self.path.split("?")[0].lstrip("/")
        self.server.requests.append(path)
        refusal = self.refusal()
        file = self.server.folder / path
        if refusal is not None:
            self.answer(refusal)
        elif file.is_file():
            self.answer(200, file.read_text())
        else:
            self.answer(404)

    def refusal(self) -> int | None:
        """The status of a request that the cloud would not answer, or None."""
        if self.server.cloud == "AWS":
            return None if self.headers.get(TOKEN_HEADER) in self.server.tokens else 401
        name, value, status = HEADERS[self.server.cloud]
        return None if self.headers.get(name) == value else status

    def answer(self, status: int, text: str = "") -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(text.encode())))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *args: object) -> None:
        """Nothing: tests look at what was asked."""


def write_answer(folder: Path, path: str, text: str) -> None:
    """Have the server answer a path with a text from now on, whole or not at all."""
    file = folder / path
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_suffix(".unfinished")
    unfinished.write_text(text)
    unfinished.rename(file)


def main(cloud: str, folder: str, host: str = HOST, port: str = "80") -> None:
    with MetadataServer(cloud, Path(folder), host, int(port)) as server:
        print("listens", flush=True)
        server.serve_forever()


if __name__ == "__main__":
    main(*sys.argv[1:])
