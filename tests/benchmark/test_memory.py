"""Memory is counted as it is taken, and what the task files promise is kept."""

import gc
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from trl import ModelConfig

from finetune.benchmark.memory_count import LiveBytes, count, count_layers
from finetune.benchmark.synthetic import make_config
from finetune.errors import UserError
from helpers.paths import REPO
from helpers.task_files import PLACES, task_with_flag
from memory import MemoryArguments, count_task, main

KIB = 1024
LORA = ModelConfig(use_peft=True, lora_r=8, lora_alpha=16, lora_dropout=0.0)
SHORT = MemoryArguments(max_length="64")


def test_a_tensor_counts_until_its_last_view_is_freed() -> None:
    model = torch.nn.Linear(16, 16, bias=False)  # 1 KiB, which is there before
    with LiveBytes(model) as live:
        x = torch.ones(4, 16)
        y = model(x)
        assert live.now == 2 * 4 * 16 * 4
        z = torch.ones(KIB)
        view = z[10:]
        del z
        assert live.now == 2 * 4 * 16 * 4 + 4 * KIB
        del view
        live.as_kernel(lambda a: (a * 2).sum())(y)
        y.sum().backward()
        del y
        gc.collect()
        assert live.now == x.nbytes + model.weight.nbytes  # its gradient
        assert live.peak == 2 * 4 * 16 * 4 + 4 * KIB


@pytest.mark.slow
@pytest.mark.parametrize(
    "size, published, gigabytes",
    [("20b", 13.76e9, 20), ("120b", 65.25e9, 80)],
)
def test_lora_fits_the_card_that_its_task_file_names(
    size: str, published: float, gigabytes: int
) -> None:
    """And the weights are as large as the published files."""
    held = count(make_config(size), LORA, max_length=4096, batch_size=1, packed=True)
    weights = held["experts"] + held["other weights, bf16"]
    assert weights == pytest.approx(published, rel=0.001)
    assert weights < held["peak"] < gigabytes * 1e9


@pytest.mark.slow
@pytest.mark.parametrize(
    "length, offloads, gibibytes",
    [(262_144, False, 74.5 - 6), (131_072, False, 44.7), (65_536, True, 22.5)],
    ids=["80 GB", "48 GB", "24 GB with offloading"],
)
def test_long_rows_fit_the_card_that_the_docs_name(
    length: int, offloads: bool, gibibytes: float
) -> None:
    """With some GiB left on the two larger ones, and half of one on the smallest."""
    shape: dict[str, Any] = {"max_length": length, "batch_size": 1, "packed": True}
    held = count(make_config("20b"), LORA, activation_offloading=offloads, **shape)
    assert held["peak"] < gibibytes * 2**30


def test_offloading_takes_a_hidden_state_from_each_layer() -> None:
    config = make_config("20b", num_layers=6)
    shape: dict[str, Any] = {"max_length": 2048, "batch_size": 1, "packed": True}
    name = "activations, working memory"
    kept, offloaded = (
        count(config, LORA, activation_offloading=offloads, **shape)[name]
        for offloads in (False, True)
    )
    hidden_state = 2048 * config.hidden_size * 2
    # The layer whose backward runs has its own back, and the one before it is next.
    assert kept - offloaded >= (config.num_hidden_layers - 2) * hidden_state


def test_experts_in_bf16_take_four_times_the_memory_and_activations_more_if_they_are_kept() -> None:
    config = make_config("20b", num_layers=2)
    shape: dict[str, Any] = {"max_length": 256, "batch_size": 1}
    packed = count(config, LORA, packed=True, **shape)
    dense = count(config, LORA, packed=False, **shape)
    assert dense["experts"] / packed["experts"] == pytest.approx(16 / 4.25)
    assert dense["its gradients"] == packed["its gradients"] > 0
    kept = count(config, LORA, packed=True, activation_checkpointing=False, **shape)
    name = "activations, working memory"
    assert kept[name] > packed[name]


def test_few_layers_scale_to_all() -> None:
    """Six layers are counted at two and at four; counted as they are, they hold the same.

    But for some kilobytes, which show only in shapes as small as these.
    """
    config = make_config("20b", tiny=True, num_layers=6)
    scaled = count(config, LORA, max_length=256, batch_size=1, packed=True)
    whole = count_layers(config, LORA, ids=(1, 256), packed=True, activation_checkpointing=True)
    assert scaled == pytest.approx(whole, rel=1e-3)


@pytest.mark.parametrize("place", PLACES)
def test_a_larger_rank_takes_as_much_more_wherever_it_is_given(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    task = task_with_flag(
        "gpt-oss-20b-lora", "--lora_r 64", place, folder=tmp_path, monkeypatch=monkeypatch
    )
    make_config("20b", num_layers=1).save_pretrained(tmp_path / "model")  # counted in seconds
    task.write_text(task.read_text().replace("openai/gpt-oss-20b ", f"{tmp_path / 'model'} "))
    _, of_rank_8 = count_task(task, replace(SHORT, lora_r=8), "64")
    main(SHORT, [task])
    output = capsys.readouterr().out
    (adapter,) = (line for line in output.splitlines() if "adapter, fp32" in line)
    gibibytes = 8 * of_rank_8["adapter, fp32"] / 2**30
    assert gibibytes > 0.1 and f" {gibibytes:.2f} " in adapter
    assert "r=64" in output and "64 tokens" in output


def test_help_imports_neither_torch_nor_transformers() -> None:
    command = [sys.executable, "-X", "importtime", str(REPO / "sft/memory.py"), "--help"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0 and "--lora_r" in result.stdout
    imported = {line.split("|")[-1].strip() for line in result.stderr.splitlines()}
    assert "finetune.command_line" in imported
    assert not imported & {"torch", "transformers", "datasets"}


@pytest.mark.parametrize(
    "file, args, reason",
    [
        ("README.md", SHORT, "README.md is no task file"),
        ("sft/ddp.yaml", SHORT, "ddp.yaml is no task file"),
        ("gpt-oss-20b-lora.yaml", MemoryArguments(lora_r=0), "--lora_r 0 must be at least 1"),
    ],
)
def test_what_cannot_be_counted_is_refused_in_one_line(
    file: str, args: MemoryArguments, reason: str
) -> None:
    with pytest.raises(UserError, match=reason) as error:
        main(args, [REPO / file])
    assert "\n" not in str(error.value)
