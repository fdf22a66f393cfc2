"""Flags that contradict each other, and the defaults that are set on purpose."""

import pytest

from finetune.arguments import check_spelling, parse_args
from finetune.errors import UserError
from finetune.node import num_processes

BASE = ["--use_cpu=true", "--model_name_or_path=m", "--dataset_name=d", "--output_dir=o"]


def test_router_aux_loss_is_off_unless_asked_for() -> None:
    assert parse_args(BASE).training.router_aux_loss_coef == 0.0
    assert parse_args([*BASE, "--router_aux_loss_coef=0.01"]).training.router_aux_loss_coef == 0.01


def test_only_what_is_trained_is_unpacked() -> None:
    assert parse_args(BASE).run.dequantize
    assert not parse_args([*BASE, "--use_peft=true", "--lora_dropout=0"]).run.dequantize


@pytest.mark.parametrize(
    ("rows", "num_gpus", "most", "at_once", "times"),
    [
        (8, 1, 1, 1, 8),
        (8, 8, 1, 1, 1),
        (8, 1, 4, 4, 2),
        (8, 4, 4, 2, 1),  # a share of two rows
        (12, 2, 4, 3, 2),  # six rows: three at once, because four do not come out even
        (5, 1, 4, 1, 5),
        (128, 32, 4, 4, 1),
    ],
)
def test_a_global_batch_is_shared_out_among_any_number_of_gpus(
    rows: int, num_gpus: int, most: int, at_once: int, times: int
) -> None:
    flags = [*BASE, f"--per_device_train_batch_size={most}", f"--global_batch_size={rows}"]
    training = parse_args(flags, num_gpus=num_gpus).training
    assert training.per_device_train_batch_size == at_once
    assert training.gradient_accumulation_steps == times


def test_the_ranks_of_a_launch_are_those_that_its_launcher_started(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setenv("SKYPILOT_NUM_NODES", "2")
    monkeypatch.setenv("SKYPILOT_NUM_GPUS_PER_NODE", "4")
    assert num_processes() == 8  # in preflight, before there is a launcher
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert num_processes() == 2


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--logging_steps=1", "8 rows .* among 3 GPUs; set it to a multiple of 3"),
        ("--global_batch_size=6 --per_device_train_batch_size=0", "size 0 must be at least 1"),
        ("--gradient_accumulation_steps=2", "--gradient_accumulation_steps 2 is worked out"),
        ("--global_batch_size=0", "0 rows .* cannot be shared out"),
    ],
)
def test_a_global_batch_that_does_not_come_out_is_refused(flag: str, message: str) -> None:
    flags = [*BASE, "--per_device_train_batch_size=1", "--global_batch_size=8", *flag.split()]
    with pytest.raises(UserError, match=message) as refused:
        parse_args(flags, num_gpus=3)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([*BASE, "--lerning_rate=1"], "lerning_rate"),
        ([*BASE, "--lora_r=8"], "--lora_r is for LoRA"),
        ([*BASE, "--use_peft=true", "--lora_dropout=0.1"], "--lora_dropout must be 0"),
        ([*BASE, "--use_peft=true", "--lora_dropout=0", "--load_in_4bit=true"], "load_in_4bit"),
        ([*BASE, "--dequantize=false"], "--dequantize false keeps experts in MXFP4"),
        ([*BASE, "--use_peft=true", "--lora_dropout=0", "--use_dora=true"], "--use_dora"),
        ([*BASE, "--dataset_streaming=true"], "--dataset_streaming"),
        ([*BASE, "--completion_only_loss=true"], "--completion_only_loss: .* --train_on"),
        ([*BASE, "--assistant_only_loss=true"], "--assistant_only_loss: --train_on"),
        ([*BASE, "--use_liger_kernel=true"], "--use_liger_kernel"),
        ([*BASE, "--dtype=float16"], "--dtype: weights are trained in bfloat16"),
        ([*BASE, "--report_to=tensorboard"], "--report_to: only W&B"),
        (["--use_cpu=true", "--dataset_name=d", "--output_dir=o"], "no model"),
        (["--use_cpu=true", "--model_name_or_path=m", "--output_dir=o"], "no dataset"),
    ],
)
def test_flags_that_cannot_work_are_refused(flags: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_args(flags)


@pytest.mark.parametrize(
    "flag",
    [
        "--packing=false",
        "--dtype=bfloat16",
        "--dtype=auto",
        "--report_to=wandb",
        "--report_to=none",
        "--report_to=all",
        "--assistant_only_loss=false",
    ],
)
def test_flags_that_work_are_taken(flag: str) -> None:
    parse_args([*BASE, flag])


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "/", "a/b", "-x", "--max_steps", "a$^$b", "x[/y]", "a b", "a\n", "é", "a" * 65],
)
def test_a_run_name_that_is_no_name_is_refused_in_one_line(name: str) -> None:
    for check in (check_spelling, parse_args):
        with pytest.raises(UserError, match="^RUN_NAME .* cannot be used: give a name of") as error:
            check([*BASE, f"--run_name={name}"])
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["gpt-oss-20b-lora", "2026.1_a", "a" * 64])
def test_a_plain_run_name_is_taken(name: str) -> None:
    assert parse_args([*BASE, f"--run_name={name}"]).training.run_name == name
