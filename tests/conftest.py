"""A tiny gpt-oss made on the spot, and train.py launched as the task files launch it."""

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

# Before the hub's client is imported: tests ask nobody, and do not wait for an answer.
os.environ["HF_HUB_OFFLINE"] = "1"

from openai_harmony import HarmonyEncoding, HarmonyEncodingName, load_harmony_encoding
from transformers import PreTrainedTokenizerBase

from helpers.launching import Launch, Start, defaults, finish
from helpers.paths import CONVERSATIONS, CPU_ENVS, REPO, VOCABULARY
from helpers.vocabulary import fetch_ranks, make_tokenizer
from rehearse import kill_node
from tiny_gpt_oss import conversation_texts, save_tiny_gpt_oss


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny-gpt-oss"
    return save_tiny_gpt_oss(folder, conversation_texts(CONVERSATIONS))


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerBase:
    """Of gpt-oss's real vocabulary; skips where that cannot be had."""
    try:
        fetch_ranks(VOCABULARY)
    except (OSError, subprocess.SubprocessError) as error:
        pytest.skip(f"gpt-oss's vocabulary cannot be had: npm: {error}")
    return make_tokenizer(VOCABULARY)


@pytest.fixture(scope="session")
def openai(tokenizer: PreTrainedTokenizerBase) -> HarmonyEncoding:
    os.environ["TIKTOKEN_ENCODINGS_BASE"] = str(VOCABULARY)
    return load_harmony_encoding(HarmonyEncodingName.HARMONY_GPT_OSS)


@pytest.fixture
def start(tiny_model: Path, tmp_path: Path) -> Iterator[Start]:
    """Start train.py under `accelerate launch` with one of sft/'s configs, in a session of its own.

    prefix: a command that runs it. What still runs when the test ends is killed.
    """
    launchers = []

    def run(
        config: str, *flags: str, num_processes: int = 2, prefix: Sequence[str] = (), **envs: str
    ) -> subprocess.Popen[str]:
        command = [
            *prefix,
            str(Path(sys.executable).with_name("accelerate")),
            "launch",
            f"--config_file={REPO / 'sft' / config}",
            "--num_machines=1",
            f"--num_processes={num_processes}",
            "--main_process_port=0",
            str(REPO / "sft/train.py"),
            *defaults(tiny_model, tmp_path),
        ]
        launchers.append(
            subprocess.Popen(
                [*command, *flags],
                env=os.environ | CPU_ENVS | envs,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                start_new_session=True,
            )
        )
        return launchers[-1]

    yield run
    for launcher in launchers:
        kill_node(launcher)


@pytest.fixture
def launch(start: Start) -> Launch:
    """Run train.py under `accelerate launch` to its end."""

    def run(config: str, *flags: str, **options: Any) -> subprocess.CompletedProcess[str]:
        return finish(start(config, *flags, **options))

    return run
