"""Fixtures of the Slurm lab. These tests belong to the environment .venv/sky (make sky)."""

import os
import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest

# The training environment, on a laptop or a node, has neither boto3 nor SkyPilot.
if find_spec("boto3") is None:
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(scope="session")
def bucket() -> str:
    """The bucket that the recipes are given, made empty on the lab's S3 server."""
    import boto3

    from lab import BUCKET

    boto3.client("s3").create_bucket(Bucket=BUCKET)
    return BUCKET


@pytest.fixture(scope="session")
def model(bucket: str) -> Path:
    """A tiny gpt-oss in the home that login host and nodes share, made by the training stack.

    No recipe runs without a bucket, so a test that has the model has the bucket too.
    """
    from lab import CONVERSATIONS, REHEARSAL, REPO

    folder = Path.home() / "tiny-gpt-oss"
    python = os.environ.get("TRAIN_PYTHON", REPO / ".venv/train/bin/python")
    command = [python, REHEARSAL / "tiny_gpt_oss.py", folder, CONVERSATIONS]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return folder
