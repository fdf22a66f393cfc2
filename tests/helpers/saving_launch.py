"""A launch of a run that claims, saves and resumes as it is told on stdin, without any training.

    python saving_launch.py RUN_DIR

Each line is one command: `claim`, `save STEP` (which begins a save), `finish` (which sees it
through), `resume`. Its answer is one line, and a launch that is fenced off says so and ends. Every
number that it saves is that of the launch.
"""

import sys
from pathlib import Path

import torch
from transformers import TrainerState

from finetune.checkpoint.fence import Fence, FencedOff
from finetune.checkpoint.fingerprint import RunRecord
from finetune.checkpoint.resume import resume_from
from finetune.checkpoint.saver import Saver
from finetune.preemption import PreemptionNotice
from helpers.checkpoints import FINGERPRINT


def main() -> None:
    run_dir = Path(sys.argv[1])
    run_dir.mkdir(exist_ok=True)
    fence = Fence(run_dir, RunRecord.from_json(FINGERPRINT, file=run_dir))
    saver = Saver(
        run_dir,
        notice=PreemptionNotice(),
        every_minutes=1000,
        keep=2,
        manifest={"fingerprint": FINGERPRINT},
        fence=fence,
    )
    print("ready", flush=True)
    for line in sys.stdin:
        command, *words = line.split()
        answer = command
        if command == "claim":
            saver.claim_run()
        elif command == "save":
            save(saver, int(words[0]))
        elif command == "finish":
            saver.finish()
        else:
            folder = resume_from("true", run_dir)
            answer = folder.name if folder else "no checkpoint"
        print(answer, flush=True)


def save(saver: Saver, step: int) -> None:
    assert saver.fence is not None and saver.fence.writer is not None
    weights = torch.full((100_000,), float(saver.fence.writer.number))

    def write(folder: Path) -> None:
        for name in ("scheduler.pt", "rng_state.pth"):
            torch.save({"cpu": weights[:100]}, folder / name)
        state = TrainerState(global_step=step, max_steps=10, epoch=0.1, total_flos=1.0)
        state.save_to_json(str(folder / "trainer_state.json"))

    saver.save(step, {"model": {"a": weights}}, write)


if __name__ == "__main__":
    try:
        main()
    except FencedOff as fenced:
        print(fenced, flush=True)
