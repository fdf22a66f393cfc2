"""A task file is read as bash and the real parser read it on the node."""

import re
from pathlib import Path

import pytest

from finetune.arguments import parse_task
from finetune.errors import UserError
from finetune.node import BUCKET_MOUNT
from finetune.task_file import TaskFile
from helpers.paths import REPO, TASK_FILES

LORA = REPO / "gpt-oss-20b-lora.yaml"


@pytest.fixture(autouse=True)
def no_train_args(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRAIN_ARGS", raising=False)


def edited(tmp_path: Path, old: str, new: str) -> Path:
    """A copy of the 20b LoRA file, beside the accelerate configs that it names."""
    text = LORA.read_text()
    assert old in text
    (tmp_path / "sft").symlink_to(REPO / "sft")
    file = tmp_path / "edited.yaml"
    file.write_text(text.replace(old, new))
    return file


@pytest.mark.parametrize("path", TASK_FILES, ids=lambda path: path.stem)
def test_every_task_file_parses(path: Path) -> None:
    task = TaskFile.read(path)
    config = parse_task(task)
    assert task.name == path.stem
    assert config.model_id == task.envs["MODEL"]
    assert config.model.use_peft == path.stem.endswith("lora")
    assert task.is_sharded == path.stem.endswith("sft")
    assert config.training.output_dir == f"/checkpoints/{path.stem}"


@pytest.mark.parametrize("path", TASK_FILES, ids=lambda path: path.stem)
def test_the_probe_of_the_docs_is_the_same_run_but_short_and_outside_the_bucket(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint of the probe in the run's folder would have the real run refused."""
    run = parse_task(TaskFile.read(path))
    probes = re.findall(r'TRAIN_ARGS="(.*--output_dir .*)"', (REPO / "docs/spot.md").read_text())
    monkeypatch.setenv("TRAIN_ARGS", *probes)
    probe = parse_task(TaskFile.read(path))
    assert not Path(probe.training.output_dir).is_relative_to(BUCKET_MOUNT)
    assert (probe.script, probe.model, probe.data) == (run.script, run.model, run.data)
    before, now = run.training.to_dict(), probe.training.to_dict()
    changed = {name for name in before if before[name] != now[name]}
    assert changed <= {"output_dir", "logging_dir", "max_steps"}


def test_what_the_file_asks_for() -> None:
    task = TaskFile.read(REPO / "gpt-oss-120b-sft.yaml")
    assert (task.accelerator, task.gpus_per_node, task.num_nodes) == ("H200", 8, 4)
    assert task.num_gpus == 32
    training = parse_task(task).training  # 128 rows, four on each
    assert (training.per_device_train_batch_size, training.gradient_accumulation_steps) == (4, 1)
    assert task.envs["CHECKPOINT_BUCKET"] == ""  # null in the file: given at launch


@pytest.mark.parametrize(
    ("spelling", "expected"),
    [
        ("accelerators: H100", ("H100", 1)),
        ("accelerators: {A100-80GB: 4}", ("A100-80GB", 4)),
        ("accelerators: [H200:2, H100:8]", ("H200", 2)),
    ],
)
def test_the_first_accelerator_in_any_spelling(
    spelling: str, expected: tuple[str, int], tmp_path: Path
) -> None:
    own = re.search(r"accelerators: \[.*\]", LORA.read_text())
    assert own is not None
    task = TaskFile.read(edited(tmp_path, own[0], spelling))
    assert (task.accelerator, task.gpus_per_node) == expected


def test_an_edited_flag_is_seen(tmp_path: Path) -> None:
    task = TaskFile.read(edited(tmp_path, "--lora_r 8", "--lora_r 64  # more"))
    assert parse_task(task).model.lora_r == 64


def test_train_args_of_the_file_come_last(tmp_path: Path) -> None:
    args = """TRAIN_ARGS: '--lora_r 32 --lr_scheduler_kwargs {"min_lr_rate":0.5}'"""
    task = TaskFile.read(edited(tmp_path, 'TRAIN_ARGS: ""', args))
    config = parse_task(task)
    assert config.model.lora_r == 32
    assert config.training.lr_scheduler_kwargs == {"min_lr_rate": 0.5}


def test_train_args_of_the_environment_stand_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = edited(tmp_path, 'TRAIN_ARGS: ""', "TRAIN_ARGS: --lora_r 32 --max_steps 5")
    monkeypatch.setenv("TRAIN_ARGS", "--lora_r 16")
    config = parse_task(TaskFile.read(file))
    assert config.model.lora_r == 16 and config.training.max_steps == -1


def test_nothing_but_the_flags_is_run(tmp_path: Path) -> None:
    file = edited(tmp_path, "  set +m", f"  touch {tmp_path}/ran\n  set +m")
    TaskFile.read(file)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("  flags=(", "  others=(", "no flags="),
        ("name: gpt-oss-20b-lora\n", "", "KeyError"),
        ("ACCELERATE_CONFIG: /sft/ddp.yaml", "ACCELERATE_CONFIG: /sft/none.yaml", "none.yaml"),
        ("num_nodes: 1", "num_nodes: two", "two"),
        ('TRAIN_ARGS: ""', "TRAIN_ARGS: [", "edited.yaml"),
        ('--run_name="$RUN_NAME"', '--run_name="$RUN_NAME', "ValueError"),
    ],
)
def test_another_yaml_is_refused_by_name(old: str, new: str, reason: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="edited.yaml is no task file") as refused:
        TaskFile.read(edited(tmp_path, old, new))
    assert reason in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="none.yaml is no task file"):
        TaskFile.read(tmp_path / "none.yaml")
