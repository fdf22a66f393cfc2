"""One run is one W&B run, however often it is launched."""

import os
import re

from finetune.checkpoint.history import first_wandb_run
from finetune.node import task_id


def configure_wandb(output_dir: str, *, run_name: str | None) -> str | None:
    """Tell wandb, by its own variables, which run to go on with; the id of that run.

    It is the run of the first launch that had a key, else one named after SkyPilot's task. None
    outside SkyPilot on a first launch: wandb makes an id of its own.
    """
    task = task_id()
    run_id = first_wandb_run(output_dir) or (re.sub(r"[^\w-]", "-", task) if task else None)
    if run_id is not None:
        os.environ.setdefault("WANDB_RUN_ID", run_id)
        os.environ.setdefault("WANDB_NAME", f"{run_name} {run_id}")
        os.environ.setdefault("WANDB_RESUME", "allow")
    return os.environ.get("WANDB_RUN_ID")
