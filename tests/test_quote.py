"""quote.py with real data, real counts, and SkyPilot's own catalog of a few machines."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.paths import REPO

SKY = REPO / ".venv/sky/bin/python"
CLOUDS = ("aws", "gcp", "lambda", "nebius")
CONVERSATIONS = "tests/rehearsal/conversations.jsonl"


@pytest.fixture(scope="module")
def catalog(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A HOME in which SkyPilot finds catalogs, so that it asks nobody for them."""
    if not SKY.exists():
        pytest.skip("SkyPilot is not installed: make sky")
    home = tmp_path_factory.mktemp("home")
    shutil.copytree(REPO / "tests/sky/catalogs", home / ".sky/catalogs/v8")
    return home


def quote(home: Path, tokenizer: str, *args: str | Path) -> subprocess.CompletedProcess[str]:
    flags = ("--dataset", CONVERSATIONS, "--tokenizer", tokenizer)
    return subprocess.run(
        [sys.executable, "sft/quote.py", *flags, *map(str, args)],
        env=os.environ | {"HOME": str(home), "SKYPILOT_DISABLE_USAGE_COLLECTION": "1"},
        cwd=REPO,
        capture_output=True,
        text=True,
    )


def rows(output: str) -> list[list[str]]:
    """The cells of all lines of tables."""
    return [
        [cell.strip() for cell in line.split("│")[1:-1]]
        for line in output.splitlines()
        if line.startswith("│")
    ]


@pytest.mark.slow
def test_recipes_are_quoted_with_the_prices_of_each_cloud(catalog: Path, tiny_model: Path) -> None:
    """One with few GPUs and one of four nodes. With a rate that was measured the hours are one
    number, and no step is counted.
    """
    tasks = ("gpt-oss-20b-lora.yaml", "gpt-oss-120b-sft.yaml")
    flags = ("--tokens_per_sec_per_gpu", "0.01", "--sky", SKY, "--clouds", *CLOUDS, "--", *tasks)
    result = quote(catalog, str(tiny_model), *flags)
    assert result.returncode == 0, result.stderr
    prices = {(row[0], row[1]): row[2:4] for row in rows(result.stdout) if len(row) == 7}
    # Google's host and its GPUs, 2.36502 + 8.40152; the others as the catalogs have them.
    assert prices["H100:2", "gcp, us-central1"] == ["$10.77", "$6.71"]
    assert prices["H100:1", "aws, us-east-1"] == ["$6.88", "-"]
    assert prices["H200:8", "nebius, eu-north1"] == ["$112.00", "$46.40"]  # four nodes
    told = dict(row for row in rows(result.stdout) if len(row) == 2)  # of the last task
    hours = next(row[4] for row in rows(result.stdout) if row[:1] == ["H200:8"] and len(row) == 7)
    rows_of_a_gpu = 128 // 32
    assert float(hours.replace(",", "")) == pytest.approx(
        int(told["optimizer steps"]) * rows_of_a_gpu * 4096 / 0.01 / 3600, abs=0.5
    )
    launches = re.findall(r"^sky (?:jobs )?launch .*$", result.stdout, re.MULTILINE)
    assert len(launches) == 2 * len(tasks)
    assert "--infra nebius/eu-north1 --gpus H100:1 " in launches[0]
    assert "--env DATASET=/sft/conversations.jsonl --env PRICE_PER_HOUR=2.95 " in launches[0]


@pytest.mark.slow
def test_without_prices_everything_but_dollars_is_told(tiny_model: Path, tmp_path: Path) -> None:
    """And without a rate the hours are a range."""
    result = quote(tmp_path, str(tiny_model), "gpt-oss-20b-sft.yaml")
    assert result.returncode == 0, result.stderr
    offers = [row for row in rows(result.stdout) if len(row) == 7]
    assert {tuple(offer[1:4]) for offer in offers} == {("no offer found", "-", "-")}
    assert re.fullmatch(r"[\d.]+ to [\d.]+", next(o[4] for o in offers if o[0] == "H100:8"))
    assert "no prices of any cloud: --sky names no environment (make sky)" in result.stdout
    assert "sky launch" not in result.stdout


def test_a_wrong_environment_or_number_is_one_line(tiny_model: Path, tmp_path: Path) -> None:
    wrong = ("--interrupted_every_hours", "0", "gpt-oss-20b-sft.yaml")
    result = quote(tmp_path, str(tiny_model), *wrong)
    assert result.returncode == 1
    assert result.stderr == "error: --interrupted_every_hours 0.0 must be a number above 0\n"
