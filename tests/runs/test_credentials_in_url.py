"""A run whose data come from a signed URL leaves the signature and the password nowhere."""

import http.server
import threading
from pathlib import Path
from typing import Any

import pytest

from helpers.launching import LORA, Launch
from helpers.paths import CONVERSATIONS

SIGNATURE = "5ecretSignature"


# One row cannot be read, and is named with its file.
CONTENT = CONVERSATIONS.read_bytes() + b'{"messages": 7}\n'


class SignedFile(http.server.BaseHTTPRequestHandler):
    """Serves the conversations to whoever has the signature."""

    def do_GET(self) -> None:
        self.answer(CONTENT)

    def do_HEAD(self) -> None:
        self.answer(b"")

    def answer(self, content: bytes) -> None:
        self.send_response(200 if SIGNATURE in self.path else 403)
        self.send_header("Content-Length", str(len(CONTENT)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args: Any) -> None:
        pass


@pytest.mark.long  # tests/test_credentials.py has the parts
def test_nothing_that_a_run_leaves_holds_the_signature(launch: Launch, tmp_path: Path) -> None:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), SignedFile) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/rows.jsonl"
        flags = ("--max_steps=2", "--save_steps=1", "--skip_bad_rows=true")
        envs = {
            "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567",
            "WANDB_MODE": "offline",
            "WANDB_DIR": str(tmp_path),
        }
        for date in ("1", "2"):  # the second is signed anew, and resumes the same run
            url = f"{address}?X-Amz-Date={date}&X-Amz-Signature={SIGNATURE}{date}"
            result = launch(*LORA, *flags, f"--dataset_name={url}", num_processes=1, **envs)
            assert result.returncode == 0, result.stderr
            assert "1 bad rows left out" in result.stdout
            assert SIGNATURE not in result.stdout + result.stderr
        assert "this run had finished" in result.stdout
        server.shutdown()
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert any("wandb-metadata" in file.name or file.suffix == ".wandb" for file in files)
    assert (tmp_path / "run/final/summary.json") in files
    held = [
        file
        for file in files
        for secret in (SIGNATURE, envs["WANDB_API_KEY"])
        if secret.encode() in file.read_bytes()
    ]
    assert not held
