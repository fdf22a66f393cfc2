"""Each file of a run's folder in turn is ruined: export.py and evaluate.py go on with the right
result, or end with an error that names the file.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from evaluate import EvaluateArguments, evaluate
from export import ExportArguments, export
from finetune.checkpoint.summary_file import SUMMARY, write_summary
from finetune.errors import UserError
from finetune.export.source import ADAPTER
from helpers.paths import REPO
from helpers.ruins import RUINS as BASIC_RUINS

EARLIER_RUN = REPO / "tests/runs/earlier_run"
FINISHED = sorted(path.name for path in (EARLIER_RUN / "finished/final").iterdir())
INTERRUPTED = sorted(
    str(path.relative_to(EARLIER_RUN / "interrupted"))
    for path in (EARLIER_RUN / "interrupted").rglob("*")
    if path.is_file()
)


def flip_bits(file: Path) -> None:
    """In the first bytes (of safetensors: the header), keeping the size."""
    content = bytearray(file.read_bytes())
    for place in range(min(64, len(content))):
        content[place] ^= 0x15
    file.write_bytes(content)


RUINS = BASIC_RUINS | {"bits flipped": flip_bits}


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the model and the data are; the runs' records name them by relative paths."""
    shutil.copytree(EARLIER_RUN / "model", tmp_path / "model")
    shutil.copy(EARLIER_RUN / "conversations.jsonl", tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def finished_run(run: Path, *, hashes: bool) -> None:
    """A finished run as today's code leaves it, or one whose summary has no hashes."""
    shutil.copytree(EARLIER_RUN / "finished", run)
    if hashes:
        seal(run / "final")


def seal(artifact: Path) -> None:
    """Write the summary anew, with the hashes of the files as they are."""
    summary = json.loads((artifact / SUMMARY).read_text())
    files = sorted(path for path in artifact.iterdir() if path.name != SUMMARY)
    write_summary(artifact, {k: v for k, v in summary.items() if k != "files"}, files)


def export_adapter(run: Path) -> dict[str, torch.Tensor]:
    """The adapter that an export writes. Raises UserError."""
    output = run.with_name("out")
    shutil.rmtree(output, ignore_errors=True)
    export(run, ExportArguments(format="adapter", output=output, verify=False))
    return load_file(output / ADAPTER)


def evaluate_run(run: Path) -> Any:
    return evaluate(run, EvaluateArguments(num_generations=0))["loss"]


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(first[n].equal(second[n]) for n in first)


@pytest.mark.parametrize("read", [export_adapter, evaluate_run])
def test_a_ruined_file_of_a_finished_run_is_named(
    read: Callable[[Path], Any], workplace: Path
) -> None:
    run = workplace / "run"
    for name in FINISHED:
        for ruin in RUINS:
            shutil.rmtree(run, ignore_errors=True)
            finished_run(run, hashes=True)
            RUINS[ruin](run / "final" / name)
            with pytest.raises(UserError) as error:
                read(run)
            assert name in str(error.value) and len(str(error.value).splitlines()) == 1, ruin


def test_without_hashes_a_ruined_file_is_named_where_it_is_read(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Artifacts of earlier versions: their sizes are right, and their content is not."""
    run = workplace / "run"
    finished_run(run, hashes=False)
    expected = export_adapter(run)
    assert "only the sizes are compared" in capsys.readouterr().out
    for name in FINISHED:
        shutil.rmtree(run)
        finished_run(run, hashes=False)
        flip_bits(run / "final" / name)
        if name in (SUMMARY, ADAPTER, "adapter_config.json"):
            with pytest.raises(UserError, match=name):
                export_adapter(run)
        else:
            assert same(export_adapter(run), expected), name
        if name.endswith((".json", ".safetensors")):
            with pytest.raises(UserError, match="tokenizer" if "token" in name else name):
                evaluate_run(run)


@pytest.mark.parametrize("read", [export_adapter, evaluate_run])
def test_a_file_of_another_run_is_named(read: Callable[[Path], Any], workplace: Path) -> None:
    run, other = workplace / "run", workplace / "other"
    finished_run(other, hashes=False)
    tensors = {name: t + 1 for name, t in load_file(other / "final" / ADAPTER).items()}
    save_file(tensors, other / "final" / ADAPTER, metadata={"format": "pt"})
    seal(other / "final")
    for name in (ADAPTER, SUMMARY):
        shutil.rmtree(run, ignore_errors=True)
        finished_run(run, hashes=True)
        shutil.copy(other / "final" / name, run / "final" / name)
        with pytest.raises(UserError, match=ADAPTER):
            read(run)


@pytest.mark.parametrize("read", [export_adapter, evaluate_run])
@pytest.mark.parametrize("ruin", ["a folder", "a dangling link", "{}"])
def test_a_final_that_is_no_folder_is_named(
    ruin: str, read: Callable[[Path], Any], workplace: Path
) -> None:
    run = workplace / "run"
    run.mkdir()
    (run / "final").touch()
    if ruin != "a folder":  # then it stays a file
        RUINS[ruin](run / "final")
    with pytest.raises(UserError, match="final is not a folder"):
        read(run)


def test_an_interrupted_run_gives_the_right_adapter_or_names_the_file(workplace: Path) -> None:
    run = workplace / "run"
    shutil.copytree(EARLIER_RUN / "interrupted", run)
    expected = export_adapter(run)
    for name in INTERRUPTED:
        for ruin in RUINS:
            shutil.rmtree(run)
            shutil.copytree(EARLIER_RUN / "interrupted", run)
            RUINS[ruin](run / name)
            if name.startswith("launches"):
                assert same(export_adapter(run), expected)
                continue
            with pytest.raises(UserError) as error:
                export_adapter(run)
            assert Path(name).name in str(error.value), (name, ruin)
            assert len(str(error.value).splitlines()) == 1


def test_a_ruined_evaluation_costs_the_card_its_figures_alone(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = workplace / "run"
    finished_run(run, hashes=True)
    for content in ("", "{}", "[]", '{"loss": 3}'):
        (run / "final/evaluation.json").write_text(content)
        export_adapter(run)
        assert "evaluation.json is damaged" in capsys.readouterr().out
        assert (workplace / "out/README.md").exists()
