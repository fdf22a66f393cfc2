"""All launches of a run continue the same W&B run, which ends with the run's summary."""

import os
import re
import sys
from typing import Any

from finetune.checkpoint.history import first_wandb_run
from finetune.node import task_id


def configure_wandb(output_dir: str, *, run_name: str | None) -> str | None:
    """Set wandb's environment variables so that it continues this run's W&B run; return its id.

    That is the W&B run of the first launch that had an API key, or else one whose id is SkyPilot's
    task id. None on a first launch outside SkyPilot: wandb makes up an id. Variables that the user
    has set are left as they are.
    """
    task = task_id()
    # wandb accepts no other characters than these in an id.
    run_id = first_wandb_run(output_dir) or (re.sub(r"[^\w-]", "-", task) if task else None)
    if run_id is not None:
        os.environ.setdefault("WANDB_RUN_ID", run_id)
        os.environ.setdefault("WANDB_NAME", f"{run_name} {run_id}")
        os.environ.setdefault("WANDB_RESUME", "allow")
    return os.environ.get("WANDB_RUN_ID")


def send_summary(summary: dict[str, Any]) -> None:
    """Add the figures of the end of a run to its W&B run, if there is one in this process."""
    wandb = sys.modules.get("wandb")  # imported by the trainer, which alone begins a run
    if wandb is not None and wandb.run is not None:
        wandb.run.summary.update({f"run/{name}": value for name, value in summary.items()})
