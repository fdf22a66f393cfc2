"""A real rclone whose bucket refuses every upload: the reason is told, and the wait has an end."""

import os
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import pytest

from finetune.checkpoint.bucket import Cache, await_upload
from finetune.errors import UserError
from helpers.paths import REPO

RCLONE = next(REPO.glob(".venv/sky*/bin/rclone"), None)
pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a small disk"),
    pytest.mark.skipif(RCLONE is None, reason="needs rclone, which `make sky` installs"),
]
CHECKPOINT = "run/checkpoint-4"
ADDRESS = re.compile(r"http://127\.0\.0\.1:\d+")
DEADLINE = 60.0  # seconds for what takes less than one


@pytest.fixture
def bucket(tmp_path: Path) -> Iterator[Path]:
    """A disk of 64 KiB: what is larger is refused, whenever rclone tries again."""
    folder = tmp_path / "bucket"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder], check=True)
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.fixture
def url(bucket: Path, tmp_path: Path) -> Iterator[str]:
    """Where rclone serves the bucket through the cache that a mount of MOUNT_CACHED has too."""
    flags = ["--vfs-cache-mode", "full", "--vfs-write-back", "100ms", "--log-level", "INFO"]
    log = tmp_path / "log"
    files = ["--cache-dir", str(tmp_path / "cache"), "--log-file", str(log)]
    server = subprocess.Popen(
        [str(RCLONE), "serve", "webdav", str(bucket), "--addr", "127.0.0.1:0", *flags, *files]
    )
    try:
        await_true(lambda: log.exists() and ADDRESS.search(log.read_text()))
        yield ADDRESS.findall(log.read_text())[0]
    finally:
        server.kill()
        server.wait()


def await_true(condition: Callable[[], Any]) -> None:
    """Poll for what rclone is about to do."""
    deadline = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_the_reason_is_told_the_wait_has_an_end_and_a_mended_bucket_gets_the_files(
    url: str, bucket: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On the clock here an hour passes in less than a second."""
    for folder in ("run", CHECKPOINT):
        urlopen(Request(f"{url}/{folder}", method="MKCOL"))
    for name, size in (("scheduler.pt", 100), ("__0_0.distcp", 100_000)):
        urlopen(Request(f"{url}/{CHECKPOINT}/{name}", data=bytes(size), method="PUT"))
        await_true((bucket / CHECKPOINT / "scheduler.pt").exists)
    records = next((tmp_path / "cache/vfsMeta").rglob("__0_0.distcp")).parent
    wait = partial(
        await_upload,
        [bucket / CHECKPOINT / name for name in ("scheduler.pt", "__0_0.distcp")],
        find_cache=lambda folder: Cache(records, tmp_path / "log", CHECKPOINT),
        clock=lambda: 5000 * time.monotonic(),
    )
    with pytest.raises(UserError, match=r"taken none of 1 files .*too big for remaining disk"):
        wait()
    assert "the bucket refuses them (preallocate: file too big" in capsys.readouterr().out
    subprocess.run(["mount", "-o", "remount,size=1m", bucket], check=True)
    wait(is_patient=lambda: True)
    assert (bucket / CHECKPOINT / "__0_0.distcp").stat().st_size == 100_000
