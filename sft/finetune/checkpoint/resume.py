"""Which checkpoint a launch resumes from, and when it must stop instead of starting anew."""

from pathlib import Path

from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from finetune.checkpoint.artifact import ARTIFACT, SUMMARY
from finetune.checkpoint.contents import check_contents
from finetune.checkpoint.history import FOLDER, read_launches
from finetune.checkpoint.manifest import (
    check_complete,
    check_hashes,
    checkpoints,
    is_real_folder,
    print_skipped,
)
from finetune.checkpoint.ownership import is_unfinished
from finetune.checkpoint.writers import FOLDER as WRITERS
from finetune.errors import UserError

ANEW = "to start anew, take another RUN_NAME, or delete this folder"


class Search:
    """The checkpoints of a run that can be resumed from, the newest first."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.folders = iter(checkpoints(run_dir))
        self.skipped: dict[Path, str] = {}  # why each of these cannot be used

    def skip(self, folder: Path, problem: str) -> None:
        print_skipped(folder, problem)
        self.skipped[folder] = problem

    def next(self) -> Path | None:
        """The next one, or None if there is none and the run can begin at step 0.

        Raises UserError if there is none though the run has been further: beginning again would
        train, and pay for, the same steps a second time, and write over what may yet be mended.
        """
        for folder in self.folders:
            problem = check_complete(folder) or check_contents(folder)
            if problem is None:
                return folder
            self.skip(folder, problem)
        self.check_fresh_start()
        return None

    def check_fresh_start(self) -> None:
        """Raise UserError if the folder shows that the run has been further than step 0."""
        lost = [
            f"{folder.name}: {problem}"
            for folder, problem in self.skipped.items()
            if not is_unfinished(folder)
        ]
        if not lost:
            lost = traces(self.run_dir)
        if lost:
            raise UserError(
                "\n".join([f"no checkpoint in {self.run_dir} can be used; {ANEW}", *lost])
            )


def traces(run_dir: Path) -> list[str]:
    """What says, though no checkpoint does, that the run has been further than step 0."""
    complete = [step for launch in read_launches(run_dir) if (step := launch.get("complete"))]
    summary = run_dir / ARTIFACT / SUMMARY
    found = [f"{FOLDER}/ says that checkpoint-{step} was complete" for step in complete[-1:]]
    if summary.exists() or summary.is_symlink():
        found.append(f"there is {ARTIFACT}/{SUMMARY}, of a run that had come to its end")
    return found


def check_places(run_dir: str | Path) -> None:
    """Raise UserError if something else lies where the run keeps a folder."""
    for path in (Path(run_dir) / name for name in (ARTIFACT, FOLDER, WRITERS)):
        if (path.exists() or path.is_symlink()) and not is_real_folder(path):
            raise UserError(f"{path} is not a folder: the run keeps one there; move it elsewhere")


def check_named(flag: str) -> Path:
    """The checkpoint that the flag names. Raises UserError if it cannot be resumed from."""
    folder = Path(flag)
    problem = check_complete(folder) or check_contents(folder)
    if problem is not None:
        raise UserError(f"--resume_from_checkpoint {flag}: {problem}")
    return folder


def check_empty(flag: str | None, run_dir: Path) -> None:
    """Raise UserError if a run that begins at step 0 would write over checkpoints or a result."""
    kept = [folder.name for folder in checkpoints(run_dir) if not is_unfinished(folder)]
    if (run_dir / ARTIFACT / SUMMARY).exists():
        kept.append(ARTIFACT)
    if kept:
        raise UserError(
            f"{run_dir} holds {', '.join(kept)}; with --resume_from_checkpoint {flag or 'false'} "
            f"this run would begin at step 0 and write over that: {ANEW}"
        )


def find_checkpoint(flag: str | None, run_dir: str | Path) -> Path | None:
    """The checkpoint that resume_from would take if all hashes were right; for one process."""
    check_places(run_dir)
    if flag is None or flag.lower() == "false":
        check_empty(flag, Path(run_dir))
        return None
    return Search(Path(run_dir)).next() if flag.lower() == "true" else check_named(flag)


def resume_from(flag: str | None, run_dir: str | Path) -> Path | None:
    """The checkpoint that --resume_from_checkpoint asks for: a path, or `true` for the newest
    complete one in run_dir whose hashes are right. None: start from step 0.

    Called by all processes. Raises UserError on all of them if a path is given that cannot be
    resumed from, or if the run would begin again though it has been further.
    """
    if flag is None or flag.lower() != "true":
        folder = find_checkpoint(flag, run_dir)
        problem = check_hashes(folder) if folder else None
        if problem is not None:
            raise UserError(f"--resume_from_checkpoint {flag}: {problem}")
        return folder
    check_places(run_dir)
    search = Search(Path(run_dir))
    while True:
        found, error = next_of_all(search)
        if error is not None:
            raise UserError(error)
        damage = check_hashes(found) if found else None
        if found is None or damage is None:
            return found
        if PartialState().is_main_process:
            search.skip(found, damage)


def next_of_all(search: Search) -> tuple[Path | None, str | None]:
    """search.next() of the first process, and its error's message, on all processes.

    Only the first one looks: nodes may see a bucket's files at different times, and all must resume
    from the same checkpoint.
    """
    found, error = None, None
    if PartialState().is_main_process:
        try:
            found = search.next()
        except UserError as raised:
            error = str(raised)
    found, error = broadcast_object_list([found, error])
    return found, error
