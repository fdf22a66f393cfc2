"""What all tests share: a tiny gpt-oss, and train.py launched as the task files launch it.

Which tests are slow (`make test-fast` leaves them out): those of tests/runs, those that launch
train.py, and those marked so.
"""

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

# Set before the hub's client and torch are imported. No test waits for an answer from the network.
os.environ["HF_HUB_OFFLINE"] = "1"
# Several processes share the cores: threads of torch's would wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from transformers import PreTrainedTokenizerBase

from helpers.launching import Launch, Start, defaults, finish, launch_command
from helpers.paths import CONVERSATIONS, CPU_ENVS, REPO, VOCABULARY
from helpers.vocabulary import fetch_ranks, make_tokenizer
from rehearse import kill_node
from tiny_gpt_oss import conversation_texts, save_tiny_gpt_oss

if TYPE_CHECKING:
    from openai_harmony import HarmonyEncoding

RUNS = REPO / "tests/runs"
# A node has pytest for the GPU tests, and no other tool of tests/requirements.lock.
IS_NODE = find_spec("hypothesis") is None
if IS_NODE:
    collect_ignore_glob = ["data/*", "evaluation/*", "export/*", "model/test_openai_reference.py"]


def pytest_report_header() -> str:
    return "without tests/requirements.lock: some tests are left out" if IS_NODE else ""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark as slow what starts real training processes. A launch takes half a minute or more."""
    for item in items:
        fixtures = set(getattr(item, "fixturenames", []))
        if item.path.is_relative_to(RUNS) or fixtures & {"start", "launch"}:
            item.add_marker(pytest.mark.slow)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print how far each engine is from the trained model, by format, if that was measured."""
    reports = terminalreporter.getreports("passed")
    found = [dict(report.user_properties).get("engines", []) for report in reports]
    rows = [row for rows in found for row in rows]
    if rows:
        from helpers.engines import table  # here, because it needs llama.cpp

        terminalreporter.section("mean |delta log p| from the trained model, in nats")
        for line in table(rows):
            terminalreporter.write_line(line)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny-gpt-oss"
    return save_tiny_gpt_oss(folder, conversation_texts(CONVERSATIONS))


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerBase:
    """A tokenizer with gpt-oss's real vocabulary; skips if that cannot be downloaded."""
    try:
        fetch_ranks(VOCABULARY)
    except (OSError, subprocess.SubprocessError) as error:
        pytest.skip(f"gpt-oss's vocabulary cannot be downloaded with npm: {error}")
    return make_tokenizer(VOCABULARY)


@pytest.fixture(scope="session")
def openai(tokenizer: PreTrainedTokenizerBase) -> "HarmonyEncoding":
    """OpenAI's own implementation of harmony, with the same vocabulary; skips without it."""
    harmony = pytest.importorskip("openai_harmony")
    os.environ["TIKTOKEN_ENCODINGS_BASE"] = str(VOCABULARY)
    return harmony.load_harmony_encoding(harmony.HarmonyEncodingName.HARMONY_GPT_OSS)


@pytest.fixture(scope="session")
def vllms() -> "HarmonyEncoding":
    """oss-harmony, the renderer that vLLM uses. It brings its vocabulary along."""
    # Its package is called openai_harmony too, so it is imported under a name of its own.
    folder = Path(sys.prefix) / "oss-harmony/openai_harmony"
    spec = spec_from_file_location(
        "oss_harmony", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None and spec.loader is not None
    harmony = module_from_spec(spec)
    sys.modules["oss_harmony"] = harmony
    spec.loader.exec_module(harmony)
    return harmony.load_harmony_encoding(harmony.HarmonyEncodingName.HARMONY_GPT_OSS)


@pytest.fixture
def start(tiny_model: Path, tmp_path: Path) -> Iterator[Start]:
    """Start train.py under `accelerate launch` with one of sft/'s configs, in a session of its own.

    prefix: a command that runs the launcher, for example nsenter with its flags. script: what runs
    train.py. A launcher that still runs when the test ends is killed with its ranks.
    """
    launchers = []

    def run(
        config: str,
        *flags: str,
        num_processes: int = 2,
        prefix: Sequence[str] = (),
        script: Path = REPO / "sft/train.py",
        **envs: str,
    ) -> subprocess.Popen[str]:
        flags = (*defaults(tiny_model, tmp_path), *flags)
        command = launch_command(config, *flags, num_processes=num_processes, script=script)
        launchers.append(
            subprocess.Popen(
                [*prefix, *command],
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
