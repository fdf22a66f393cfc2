"""A task file as the training script would see it: the GPUs it asks for, and its flags.

    task = TaskFile.read(Path("gpt-oss-20b-lora.yaml"))
    config = parse_task(task)      # finetune/arguments.py

Tools that speak of a recipe (preview.py, roofline.py, memory.py) read it this way, so that an edit
of the file changes what they say, wherever in the file it is made.
"""

import os
import re
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from finetune.errors import UserError

FLAGS_BLOCK = re.compile(r"^flags=\(\n.*?^\)$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class TaskFile:
    """One of this repository's task files.

    accelerator: the GPU's name in SkyPilot, for example H100. choices: all that the file lists, in
    its order, for example H100:8; the first of them is accelerator and gpus_per_node. envs: the
    file's, null as "". flags: what train.py is called with. accelerate_config: the file that lays
    out the processes.
    """

    name: str
    accelerator: str
    gpus_per_node: int
    choices: list[str]
    num_nodes: int
    envs: dict[str, str]
    flags: list[str]
    accelerate_config: dict[str, Any]

    @property
    def num_gpus(self) -> int:
        return self.num_nodes * self.gpus_per_node

    @property
    def is_sharded(self) -> bool:
        """Whether the weights are shared out over the GPUs, instead of kept whole by each."""
        return self.accelerate_config["distributed_type"] in ("FSDP", "DEEPSPEED")

    def on(self, choice: str) -> "TaskFile":
        """The same task on other GPUs, for example H100:1, as with `sky launch --gpus`."""
        accelerator, gpus_per_node = split_accelerator(choice)
        return replace(self, accelerator=accelerator, gpus_per_node=gpus_per_node)

    @classmethod
    def read(cls, path: Path) -> "TaskFile":
        """TRAIN_ARGS of the environment stands in for that of the file, as in `make rehearse`.

        Raises UserError if the file cannot be read, or is not one like those of this repository.
        """
        try:
            task = yaml.safe_load(path.read_text())
            envs = {name: str(value or "") for name, value in task["envs"].items()}
            envs["TRAIN_ARGS"] = os.environ.get("TRAIN_ARGS", envs["TRAIN_ARGS"])
            choices = accelerator_choices(task["resources"]["accelerators"])
            accelerator, gpus_per_node = split_accelerator(choices[0])
            return cls(
                name=task["name"],
                accelerator=accelerator,
                gpus_per_node=gpus_per_node,
                choices=choices,
                num_nodes=int(task.get("num_nodes", 1)),
                envs=envs,
                flags=expand_flags(task["run"], envs),
                accelerate_config=yaml.safe_load(
                    local_path(envs["ACCELERATE_CONFIG"], task["file_mounts"], path).read_text()
                ),
            )
        except (OSError, LookupError, TypeError, ValueError, yaml.YAMLError) as error:
            raise UserError(
                f"{path} is no task file like those of this repository: "
                f"{type(error).__name__}: {' '.join(str(error).split())}"
            ) from error


def accelerator_choices(accelerators: Any) -> list[str]:
    """["H100:8", ...] of any of SkyPilot's spellings."""
    if isinstance(accelerators, dict):
        return [
            name if count is None else f"{name}:{count}" for name, count in accelerators.items()
        ]
    return list(accelerators) if isinstance(accelerators, list) else [accelerators]


def split_accelerator(choice: str) -> tuple[str, int]:
    """("H100", 8) of "H100:8". Raises ValueError if there is no number behind the colon."""
    name, _, count = choice.partition(":")
    return name, int(count or 1)


def expand_flags(run: str, envs: dict[str, str]) -> list[str]:
    """The array `flags` of a run block, with variables, quotes and comments as bash reads them.

    Nothing else of the block is run. Raises LookupError if there is no such array.
    """
    block = FLAGS_BLOCK.search(run)
    if block is None:
        raise LookupError("its run block has no flags=( ... )")
    script = f'set -e\n{block[0]}\nprintf "%s\\0" "${{flags[@]}}"'
    result = subprocess.run(
        ["bash", "-c", script],
        env={"PATH": os.environ.get("PATH", ""), "HOME": os.environ.get("HOME", "")} | envs,
        capture_output=True,
        text=True,
    )
    if result.returncode != 0:
        raise ValueError(result.stderr)
    return result.stdout.split("\0")[:-1]


def local_path(path: str, file_mounts: dict[str, Any], task_file: Path) -> Path:
    """Where a path of the node lies beside the task file, by its file_mounts."""
    for mount, source in file_mounts.items():
        if isinstance(source, str) and Path(path).is_relative_to(mount):
            return task_file.parent / source / Path(path).relative_to(mount)
    return Path(path)
