"""Each file of a run's folder may be garbage: a launch goes on from something complete, or stops
with one error that names the file. The export's side is in tests/export.
"""

import json
import shutil
from pathlib import Path

import pytest

from finetune.checkpoint.artifact import is_finished
from finetune.checkpoint.fingerprint import launch_rules, read_record
from finetune.checkpoint.history import conversation_date, interruption_cost, read_launches
from finetune.checkpoint.resume import find_checkpoint, resume_from
from finetune.errors import UserError
from helpers.checkpoints import flip_a_bit, make_checkpoint
from helpers.paths import REPO
from helpers.ruins import RUINS as BASIC_RUINS

EARLIER_RUN = REPO / "tests/runs/earlier_run"


def files_of(run: str) -> list[str]:
    folder = EARLIER_RUN / run
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def of_another_run(file: Path) -> None:
    """The file of that name from another run, or else that of another name."""
    other = make_checkpoint(file.parents[2] / "another", 3, seed=1)
    found = other / file.name
    shutil.copy(found if found.exists() else other / "scheduler.pt", file)


RUINS = BASIC_RUINS | {"bit flipped": flip_a_bit, "another run's": of_another_run}


def launch(run_dir: Path) -> Path | None:
    """What a launch reads of a run's folder before it trains; the checkpoint it goes on from."""
    found = find_checkpoint("true", run_dir)
    conversation_date(run_dir)
    assert resume_from("true", run_dir) == found or found is None
    if found is not None:
        assert read_record(found).model == "model"
        assert launch_rules("true", str(run_dir)) == 1
    interruption_cost(read_launches(run_dir))
    return found


@pytest.mark.parametrize("ruin", RUINS)
@pytest.mark.parametrize("name", files_of("interrupted"))
def test_each_file_of_an_interrupted_run(name: str, ruin: str, tmp_path: Path) -> None:
    run_dir = Path(shutil.copytree(EARLIER_RUN / "interrupted", tmp_path / "run"))
    record = run_dir / "launches/0001.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"complete": 3}))
    RUINS[ruin](run_dir / name)
    if name.startswith("launches/"):
        assert launch(run_dir) == run_dir / "checkpoint-3"
        return
    with pytest.raises(UserError) as stopped:
        launch(run_dir)
    message = str(stopped.value)
    if (Path(name).name, ruin) == ("manifest.json", "removed"):
        # It looks like a save that did not come to its end, but for the launch's record.
        assert "launches/ says that checkpoint-3 was complete" in message
    elif (Path(name).name, ruin) == ("manifest.json", "another run's"):
        assert "checkpoint-3: .metadata has 48999 bytes, not" in message
    else:
        assert Path(name).name in message
    assert (run_dir / "checkpoint-3").is_dir()


@pytest.mark.parametrize("ruin", RUINS)
@pytest.mark.parametrize("name", files_of("finished"))
def test_each_file_of_a_finished_run(name: str, ruin: str, tmp_path: Path) -> None:
    run_dir = Path(shutil.copytree(EARLIER_RUN / "finished", tmp_path / "run"))
    shutil.copytree(EARLIER_RUN / "interrupted/checkpoint-3", run_dir / "checkpoint-3")
    RUINS[ruin](run_dir / name)
    assert launch(run_dir) == run_dir / "checkpoint-3"
    # Only sizes are compared here.
    is_whole = is_finished(run_dir / "final")
    if name == "final/summary.json" and ruin != "bit flipped":
        assert not is_whole
    if name.startswith("launches/"):
        assert is_whole
