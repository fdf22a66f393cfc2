"""Two launches of one run on two mounts of its bucket, as two nodes have them.

One is cut off while files of a checkpoint wait in its cache. The other continues the run and saves
the same step. Then the first one is back, and its rclone uploads what it has.

The mounts are those of SkyPilot's MOUNT_CACHED. No cluster is started: outside the lab this runs
where there are FUSE and fusermount3.
"""

import hashlib
import itertools
import json
import logging
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import boto3
import psutil
import pytest
from moto.server import ThreadedMotoServer
from sky.data.mounting_utils import get_mount_cached_cmd

from lab import REPO, wait_until

BUCKET = "two-mounts"
SAVED = 2  # the step that the older launch completes before it is cut off
TRAIN_PYTHON = Path(os.environ.get("TRAIN_PYTHON", REPO / ".venv/train/bin/python"))
PATH = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # rclone's first

pytestmark = [
    pytest.mark.sky,
    pytest.mark.skipif(os.geteuid() != 0, reason="only root mounts for all users"),
    pytest.mark.skipif(not os.path.exists("/dev/fuse"), reason="there is no /dev/fuse"),
    pytest.mark.skipif(shutil.which("fusermount3") is None, reason="needs fusermount3 (fuse3)"),
    pytest.mark.skipif(not TRAIN_PYTHON.exists(), reason="needs .venv/train"),
]


class Node:
    """A mount of the bucket with a cache of its own, and a launch on it."""

    def __init__(self, home: Path, endpoint: str) -> None:
        self.home, self.mount = home, home / "checkpoints"
        self.mount.mkdir(parents=True)
        self.launch: subprocess.Popen[str] | None = None
        config = home / "rclone.conf"
        config.write_text(
            f"[s3]\ntype = s3\nprovider = Other\nendpoint = {endpoint}\n"
            "access_key_id = lab\nsecret_access_key = lab\n"
        )
        (home / ".sky/rclone_log").mkdir(parents=True)
        # Only the mount of SkyPilot's command: what comes before it installs FUSE.
        command = get_mount_cached_cmd("", "s3", BUCKET, str(self.mount)).partition("rclone mount")
        words = ["rclone", "mount", *shlex.split(command[2].partition(" > ")[0])]
        words = [word.replace("~", str(home), 1) for word in words]
        envs = {"HOME": str(home), "RCLONE_CONFIG": str(config), "PATH": PATH}
        subprocess.run(words, env=os.environ | envs, check=True)
        (self.rclone,) = [p for p in psutil.process_iter(["cmdline"]) if self.is_rclone(p)]

    def is_rclone(self, process: psutil.Process) -> bool:
        words = process.info["cmdline"] or []
        return "mount" in words and str(self.mount) in words

    def start_launch(self) -> None:
        folders = os.pathsep.join([f"{REPO}/sft", f"{REPO}/tests"])
        self.launch = subprocess.Popen(
            [TRAIN_PYTHON, REPO / "tests/helpers/saving_launch.py", self.mount / "run"],
            env=os.environ | {"PYTHONPATH": folders, "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def say(self, command: str) -> None:
        assert self.launch is not None and self.launch.stdin is not None
        print(command, file=self.launch.stdin, flush=True)

    def answer(self) -> str:
        assert self.launch is not None and self.launch.stdout is not None
        return self.launch.stdout.readline().strip()

    def do(self, command: str) -> str:
        self.say(command)
        return self.answer()

    def records(self, step: int, name: str = "*") -> list[Path]:
        """rclone's records of that step's files."""
        return list(self.home.glob(f".cache/rclone/**/vfsMeta/**/checkpoint-{step}/{name}"))

    def close(self) -> None:
        self.rclone.resume()
        if self.launch is not None:
            self.launch.kill()
            self.launch.communicate()
        subprocess.run(["umount", "--lazy", self.mount], check=True)


def is_dirty(record: Path) -> bool:
    with suppress(OSError, ValueError):  # it is being written
        return bool(json.loads(record.read_text())["Dirty"])
    return False


@pytest.fixture
def s3() -> Iterator[Any]:
    """A client of an S3 server with the bucket."""
    logging.getLogger("werkzeug").setLevel(logging.WARNING)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    keys = {"aws_access_key_id": "lab", "aws_secret_access_key": "lab"}
    client = boto3.client(
        "s3", endpoint_url=f"http://{host}:{port}", region_name="us-east-1", **keys
    )
    client.create_bucket(Bucket=BUCKET)
    yield client
    server.stop()


@pytest.fixture
def make_node(tmp_path: Path, s3: Any) -> Iterator[Callable[[str], Node]]:
    nodes: list[Node] = []

    def make(name: str) -> Node:
        nodes.append(Node(tmp_path / name, s3.meta.endpoint_url))
        return nodes[-1]

    yield make
    for node in nodes:
        node.close()


def contents(s3: Any) -> dict[str, str]:
    """The SHA-256 of each object of the bucket."""
    keys = [item["Key"] for item in s3.list_objects_v2(Bucket=BUCKET).get("Contents", [])]
    bodies = {key: s3.get_object(Bucket=BUCKET, Key=key)["Body"].read() for key in keys}
    return {key: hashlib.sha256(body).hexdigest() for key, body in bodies.items()}


def cut_off_in_a_save(node: Node) -> int:
    """Save until weights wait for their upload while the node's rclone is stopped; the step.

    The launch itself is not stopped: it goes on as far as it can. rclone waits a second before it
    uploads, and where this test has missed that, the next save is tried.
    """
    for step in itertools.count(SAVED + 1):
        assert node.do(f"save {step}") == "save"
        node.say("finish")
        wait_until(partial(node.records, step, "*.distcp"), interval=0.01)
        node.rclone.suspend()
        if any(map(is_dirty, node.records(step, "*.distcp"))):
            return step
        node.rclone.resume()
        assert node.answer() == "finish"
    raise AssertionError


def test_a_node_that_was_cut_off_writes_over_nothing_of_the_launch_that_went_on(
    make_node: Callable[[str], Node], s3: Any
) -> None:
    older, newer = make_node("older"), make_node("newer")
    older.start_launch()
    assert older.answer() == "ready"
    newer.start_launch()
    assert older.do("claim") == "claim"
    assert [older.do(command) for command in (f"save {SAVED}", "finish")] == ["save", "finish"]
    step = cut_off_in_a_save(older)
    before = contents(s3)
    assert not any(key.endswith(".distcp") and f"checkpoint-{step}" in key for key in before)

    assert newer.answer() == "ready"
    assert newer.do("claim") == "claim"
    assert newer.do("resume") == f"checkpoint-{step - 1}"
    assert [newer.do(command) for command in (f"save {step}", "finish")] == ["save", "finish"]
    written = contents(s3)
    saved = f"run/checkpoint-{step}.0002"
    manifest = json.loads(s3.get_object(Bucket=BUCKET, Key=f"{saved}/manifest.json")["Body"].read())
    for name, entry in manifest["files"].items():
        assert written[f"{saved}/{name}"] == entry["sha256"]

    older.rclone.resume()
    assert "fenced off: a newer launch continues this run: number 2" in older.answer()
    wait_until(lambda: not any(map(is_dirty, older.records(step))))
    now = contents(s3)
    late = now.keys() - written.keys()
    assert f"run/checkpoint-{step}/__0_0.distcp" in late
    assert {key.rpartition("/")[0] for key in late} == {f"run/checkpoint-{step}"}
    assert {key: now.get(key) for key in written} == written
    assert newer.do("resume") == f"checkpoint-{step}.0002"
