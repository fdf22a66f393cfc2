"""The record that a launch leaves in a run's folder."""

import json
from pathlib import Path

NUMBERS = ("from_step", "step", "seconds", "saving_seconds", "started", "updated")


def record_launch(run_dir: Path, number: int, *, wandb_run_id: str | None) -> None:
    """Write launches/NUMBER.json of a launch that trained nothing."""
    (run_dir / "launches").mkdir(exist_ok=True)
    record = dict.fromkeys(NUMBERS, 0) | {"wandb_run_id": wandb_run_id}
    (run_dir / f"launches/{number:04}.json").write_text(json.dumps(record))
