"""Paths of this repository, and the environment in which train.py runs without a GPU."""

import os
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
CONVERSATIONS = REPO / "tests/rehearsal/conversations.jsonl"
VOCABULARY = REPO / ".cache/vocabulary"
TASK_FILES = sorted(REPO.glob("*.yaml"))


def python_path(*folders: str) -> str:
    """A value for PYTHONPATH: these folders of the repository, then what it already holds."""
    before = filter(None, [os.environ.get("PYTHONPATH")])
    return os.pathsep.join([*(str(REPO / folder) for folder in folders), *before])


CPU_ENVS = {
    "PYTHONPATH": python_path("tests/rehearsal/cpu", "sft", "tests", "tests/rehearsal"),
    "ACCELERATE_USE_CPU": "true",
    "CUDA_VISIBLE_DEVICES": "",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "WANDB_API_KEY": "",
}
