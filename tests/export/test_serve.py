"""sft/serve.yaml compares what answers with what was trained, at start-up, if VERIFY is set.

Its own run block is run, with llama.cpp in the place of vLLM, which needs a GPU.
"""

import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import yaml

from finetune.export.gguf_model import MODEL, write_model
from finetune.model.loading import load_tokenizer
from helpers.finished_runs import open_run, save_adapter_run
from helpers.launching import LONGEST_WAIT, await_event
from helpers.paths import CPU_ENVS, REPO
from rehearse import free_port, kill_node, map_mounts


@pytest.fixture(scope="module")
def work(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bucket with a run, its base as GGUF, and the environment of vLLM."""
    work = tmp_path_factory.mktemp("serve")
    save_adapter_run(work / "checkpoints/my-run", tiny_model)
    save_adapter_run(work / "base", tiny_model, std=0.0)
    write_model(open_run(work / "base"), load_tokenizer(str(tiny_model)), work, name="base")
    (work / "bin").mkdir()
    vllm = work / "bin/vllm"
    vllm.write_text(f'#!/bin/bash\nexec {sys.executable} -m helpers.llama_as_vllm "$@"\n')
    vllm.chmod(0o755)
    (work / "bin/activate").write_text(f"PATH={work}/bin:$PATH\n")
    (work / "bin/python").symlink_to(sys.executable)
    return work


def serve(work: Path, log: Path, **envs: str) -> subprocess.Popen[str]:
    config = yaml.safe_load((REPO / "sft/serve.yaml").read_text())
    folders = {
        "/checkpoints": work / "checkpoints",
        "~/vllm-env": work,
        "/sft": REPO / "sft",
        "~/sft-env": Path(sys.prefix),
    }
    script = map_mounts(config["run"], folders).replace("8000", str(free_port()))
    given = {name: value or "" for name, value in config["envs"].items()}
    given |= {
        "RUN_NAME": "my-run",
        "VERIFY": "true",
        "API_KEY": "secret",
        "GGUF": str(work / MODEL),
    }
    with log.open("w") as output:
        return subprocess.Popen(
            ["bash", "-c", script],
            env=os.environ | CPU_ENVS | given | envs,
            stdout=output,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )


def addresses(shell: subprocess.Popen[str]) -> set[str]:
    """Where the processes of a shell listen."""
    found = set()
    for process in psutil.Process(shell.pid).children(recursive=True):
        with suppress(psutil.NoSuchProcess):  # a short one, such as curl
            connections = process.net_connections(kind="tcp")
            found |= {link.laddr.ip for link in connections if link.status == psutil.CONN_LISTEN}
    return found


@pytest.mark.slow
def test_a_server_whose_adapter_does_nothing_is_ended(work: Path, tmp_path: Path) -> None:
    """Until then it listens on loopback alone, whatever SERVE_ARGS says, so that no path of it can
    be asked from another machine.
    """
    log = tmp_path / "log"
    running = serve(work, log, ADAPTER="", SERVE_ARGS="--host 0.0.0.0")
    try:
        await_event(lambda: addresses(running), running)
        assert running.poll() is None, log.read_text()
        assert addresses(running) == {"127.0.0.1"}
        assert running.wait(timeout=LONGEST_WAIT) == 1, log.read_text()
        assert "the base answers: what was trained is not applied" in log.read_text()
        assert "secret" not in log.read_text()
    finally:
        kill_node(running)
