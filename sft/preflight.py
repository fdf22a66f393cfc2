"""Find what a user can get wrong before the ranks start, and say it in one line.

    python sft/preflight.py FLAGS       the flags of train.py

Run once on each node by the task files. It leaves the tokenised data in the cache, so that the
ranks only read it.
"""

import os
import shutil
import tempfile
from pathlib import Path

import torch
from wandb.sdk.lib.wbauth.validation import check_api_key

from checkpoint import checkpoints, find_problem, read_manifest
from data import load_datasets
from errors import UserError, one_line_errors
from fingerprint import check_same_run, fingerprint
from flags import parse_args
from launches import first_date
from model import load_config, load_tokenizer
from weights import Checkpoint

BUCKET_MOUNT = "/checkpoints"


def num_gpus() -> int:
    """Those of this node that the task asked for."""
    return int(os.environ.get("SKYPILOT_NUM_GPUS_PER_NODE", 1))


def check_gpus() -> None:
    """Raise UserError if this node has fewer usable GPUs than ranks."""
    wanted = num_gpus()
    use_cpu = os.environ.get("ACCELERATE_USE_CPU", "false").lower() == "true"
    if not use_cpu and torch.cuda.device_count() < wanted:
        raise UserError(
            f"{torch.cuda.device_count()} GPUs are usable, {wanted} wanted: "
            "does nvidia-smi work on this node?"
        )


def check_output_dir(output_dir: str) -> None:
    """Raise UserError if checkpoints cannot be kept there: not mounted, not writable, full."""
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
    key = os.environ.get("WANDB_API_KEY")
    problem = check_api_key(key) if key else None
    if key and key != key.strip():
        problem = "API key cannot start or end with whitespace."
    if problem:
        raise UserError(
            f"WANDB_API_KEY is not a key ({problem.rstrip('.')}): "
            "copy it from https://wandb.ai/authorize, or set it to '' to train without W&B"
        )


def main() -> None:
    check_gpus()
    check_wandb_key()
    script_args, training_args, model_args, data_args, run_args = parse_args()
    check_output_dir(training_args.output_dir)
    model_id, revision = model_args.model_name_or_path, model_args.model_revision
    load_config(model_id, revision=revision)
    tokenizer = load_tokenizer(model_id, revision=revision)
    date = data_args.conversation_start_date or first_date(training_args.output_dir)
    data_args.conversation_start_date = date
    train_dataset, _ = load_datasets(script_args, training_args, data_args, tokenizer)
    # Downloaded here, not by ranks that wait for each other no longer than a barrier's timeout.
    Checkpoint(model_id, revision=revision)
    if run_args.ignore_fingerprint or training_args.resume_from_checkpoint != "true":
        return
    num_processes = int(os.environ.get("SKYPILOT_NUM_NODES", 1)) * num_gpus()
    identity = fingerprint(
        script_args, training_args, model_args, data_args, train_dataset, num_processes
    )
    folders = checkpoints(training_args.output_dir)
    whole = next((folder for folder in folders if find_problem(folder) is None), None)
    if whole is not None:
        check_same_run(str(whole), read_manifest(whole)["fingerprint"], identity)


if __name__ == "__main__":
    with one_line_errors():
        main()
