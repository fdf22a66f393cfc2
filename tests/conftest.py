"""A tiny gpt-oss made on the spot, and train.py launched as the task files launch it."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

# Before the hub's client is imported: tests ask nobody, and do not wait for an answer.
os.environ["HF_HUB_OFFLINE"] = "1"

from openai_harmony import HarmonyEncoding, HarmonyEncodingName, load_harmony_encoding
from transformers import PreTrainedTokenizerBase

from rehearse import kill_node
from tiny_gpt_oss import conversation_texts, save_tiny_gpt_oss
from vocabulary import fetch_ranks, make_tokenizer

REPO = Path(__file__).resolve().parents[1]
CONVERSATIONS = REPO / "tests/rehearsal/conversations.jsonl"
VOCABULARY = REPO / ".cache/vocabulary"
TASK_FILES = sorted(REPO.glob("*.yaml"))

CPU_ENVS = {
    "PYTHONPATH": str(REPO / "tests/rehearsal/cpu"),
    "ACCELERATE_USE_CPU": "true",
    "CUDA_VISIBLE_DEVICES": "",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "WANDB_API_KEY": "",
}

Launch = Callable[..., subprocess.CompletedProcess[str]]
Start = Callable[..., subprocess.Popen[str]]


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


def finish(launcher: subprocess.Popen[str]) -> subprocess.CompletedProcess[str]:
    """Wait for a launcher's end and hold what it printed."""
    stdout, stderr = launcher.communicate(timeout=300)
    return subprocess.CompletedProcess(launcher.args, launcher.returncode, stdout, stderr)


def defaults(model: Path, output_dir: Path) -> list[str]:
    """Flags of a run of four short steps."""
    return [
        f"--model_name_or_path={model}",
        f"--dataset_name={CONVERSATIONS}",
        f"--output_dir={output_dir / 'run'}",
        "--run_name=test",
        "--use_cpu=true",
        "--packing=true",
        "--max_length=256",
        "--truncate=true",
        "--max_steps=4",
        "--save_steps=2",
        "--learning_rate=1e-2",
        "--activation_checkpointing=true",
        "--per_device_train_batch_size=1",
        "--logging_steps=1",
        "--disable_tqdm=true",
        "--resume_from_checkpoint=true",
    ]
