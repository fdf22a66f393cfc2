"""This node, as SkyPilot and the task file set it up: its GPUs, the bucket's mount, W&B's key.

The only module that reads SKYPILOT_*, CHECKPOINT_BUCKET, UPLOAD_MINUTES and MASTER_PORT. Every
check is made before a GPU is used, and raises UserError with what to do.
"""

import os
import shutil
import tempfile
from pathlib import Path

from finetune.errors import UserError

BUCKET_MOUNT = "/checkpoints"
DRIVER_OF_CUDA_13 = 580  # the first branch of NVIDIA's Linux drivers that runs CUDA 13


def num_gpus() -> int:
    """GPUs of this node that the task asked for."""
    return int(os.environ.get("SKYPILOT_NUM_GPUS_PER_NODE", 1))


def num_processes() -> int:
    """Ranks of the whole run, one a GPU: as the launcher says, or as SkyPilot does before it."""
    nodes = int(os.environ.get("SKYPILOT_NUM_NODES", 1))
    return int(os.environ.get("WORLD_SIZE", nodes * num_gpus()))


def node_rank() -> int:
    """This node among those of the run; 0 is the one where they meet."""
    return int(os.environ.get("SKYPILOT_NODE_RANK", 0))


def node_addresses() -> list[str]:
    """The addresses of all nodes of the run, by rank."""
    return os.environ.get("SKYPILOT_NODE_IPS", "127.0.0.1").split()


def main_port() -> int:
    """The port of node 0 where the nodes meet: the task files set it, for their launcher too."""
    return int(os.environ.get("MASTER_PORT", 29500))


def task_id() -> str | None:
    """SkyPilot's id of this task, the same for every recovery of a managed job; None elsewhere."""
    return os.environ.get("SKYPILOT_TASK_ID")


def upload_minutes() -> float:
    """For how long a bucket may take no file before it is given up. Raises UserError if
    UPLOAD_MINUTES is no number.
    """
    value = os.environ.get("UPLOAD_MINUTES") or "60"
    try:
        return float(value)
    except ValueError as error:
        raise UserError(f"UPLOAD_MINUTES {value!r} is not a number of minutes") from error


def check_gpus() -> None:
    """Raise UserError if this node's driver is too old, or its usable GPUs are fewer than ranks."""
    import torch  # here, so that tools without a GPU start in a second

    if os.environ.get("ACCELERATE_USE_CPU", "false").lower() == "true":
        return
    problem = driver_problem(nvidia_driver(), cuda=torch.version.cuda)
    if problem is not None:  # torch counts GPUs that an old driver cannot use
        raise UserError(problem)
    if torch.cuda.device_count() < num_gpus():
        raise UserError(
            f"{torch.cuda.device_count()} GPUs are usable, {num_gpus()} wanted: "
            "does nvidia-smi work on this node?"
        )


def nvidia_driver() -> str | None:
    """The version of this node's NVIDIA driver, for example 580.95.05; None if there is none."""
    import pynvml

    try:
        pynvml.nvmlInit()
        return str(pynvml.nvmlSystemGetDriverVersion())
    except pynvml.NVMLError:
        return None


def driver_problem(driver: str | None, *, cuda: str | None) -> str | None:
    """What is wrong with this driver for torch built with this CUDA version; None if nothing is.

    Source: NVIDIA's CUDA Toolkit release notes, "CUDA Toolkit and Minimum Required Driver Version".
    """
    if driver is None or cuda is None or int(cuda.split(".")[0]) < 13:
        return None
    if int(driver.split(".")[0]) >= DRIVER_OF_CUDA_13:
        return None
    return (
        f"this node's NVIDIA driver is {driver}, and CUDA {cuda} needs {DRIVER_OF_CUDA_13} or "
        "newer: launch on a machine or an image that brings one; docs/launch.md says which do"
    )


def check_output_dir(output_dir: str) -> None:
    """Raise UserError if checkpoints cannot be kept there: not mounted, not writable, full."""
    upload_minutes()
    bucket = os.environ.get("CHECKPOINT_BUCKET")
    if bucket and output_dir.startswith(BUCKET_MOUNT) and not os.path.ismount(BUCKET_MOUNT):
        raise UserError(
            f"CHECKPOINT_BUCKET is {bucket!r} but nothing is mounted at {BUCKET_MOUNT}: restore "
            "its lines in file_mounts, or set it to '' to keep checkpoints on the node's disk"
        )
    try:
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output_dir) as probe:
            probe.write(b"0" * 4096)
    except OSError as error:
        raise UserError(
            f"{output_dir} cannot be written ({error.strerror}): it keeps the checkpoints"
        ) from error
    if shutil.disk_usage(output_dir).free < 2**30:
        raise UserError(f"less than 1 GiB is free at {output_dir}: it keeps the checkpoints")


def check_wandb_key() -> None:
    """Raise UserError if W&B would refuse the form of WANDB_API_KEY; its value is never shown."""
    from wandb.sdk.lib.wbauth.validation import check_api_key  # here: wandb takes a second

    key = os.environ.get("WANDB_API_KEY")
    problem = check_api_key(key) if key else None
    if key and key != key.strip():
        problem = "API key cannot start or end with whitespace."
    if problem:
        raise UserError(
            f"WANDB_API_KEY is not a key ({problem.rstrip('.')}): "
            "copy it from https://wandb.ai/authorize, or set it to '' to train without W&B"
        )
