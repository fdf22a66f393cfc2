"""The model card: what it tells, and what it keeps to itself."""

import json
from dataclasses import replace
from pathlib import Path

import yaml

from finetune.export.card import default_name, front_matter, write_card
from finetune.export.record import ExportRecord
from finetune.export.source import RunWeights, find_run_weights
from helpers.evaluations import EVALUATION


def record_of(run_weights: RunWeights) -> ExportRecord:
    return ExportRecord("bf16", run_weights.origin, run_weights.step, {})


def test_it_names_no_folder_of_this_machine(run_dir: Path, tiny_model: Path) -> None:
    run_weights = find_run_weights(run_dir)
    write_card(run_dir, run_weights, record_of(run_weights), name="mine")
    card = (run_dir / "README.md").read_text()
    assert "# mine" in card and "tiny-gpt-oss fine-tuned on conversations.jsonl" in card
    assert str(tiny_model.parent) not in card and str(run_dir) not in card
    assert "base_model" not in yaml.safe_load(card.split("---")[1])


def test_it_links_to_models_and_datasets_of_the_hub(run_dir: Path) -> None:
    run_weights = find_run_weights(run_dir)
    run = replace(
        run_weights.record, model="openai/gpt-oss-20b", dataset="me/data:train,you/more@v1"
    )
    fields = yaml.safe_load(front_matter(run, record_of(run_weights)).strip("-"))
    assert (fields["base_model"], fields["base_model_relation"]) == (run.model, "finetune")
    assert fields["datasets"] == ["me/data", "you/more"]
    assert fields["license"] == "apache-2.0" and "lora" in fields["tags"]


def test_it_has_the_evaluations_figures_and_not_its_texts(run_dir: Path) -> None:
    (run_dir / "final/evaluation.json").write_text(json.dumps(EVALUATION))
    run_weights = find_run_weights(run_dir)
    write_card(run_dir, run_weights, record_of(run_weights), name="mine")
    card = (run_dir / "README.md").read_text()
    assert "| overall | 1,234 | 2.0 -> 1.5 | 7.389 -> 4.4817 |" in card
    assert not any(row["question"] in card for row in EVALUATION["generations"])


def test_it_tells_how_faithful_the_export_is(run_dir: Path) -> None:
    run_weights, record = find_run_weights(run_dir), record_of(find_run_weights(run_dir))
    write_card(run_dir, run_weights, record, name="mine")
    assert "Not compared with the trained model" in (run_dir / "README.md").read_text()
    record.text, record.hints = "two conversations", ["Serve bf16."]
    record.fidelity = {"kl": 1.5e-5, "num_tokens": 1234, "experts_kept": 0.5, "loss": 2.0}
    write_card(run_dir, run_weights, record, name="mine")
    card = (run_dir / "README.md").read_text()
    assert "compared with the trained model on two conversations." in card
    for line in (
        "| tokens compared | 1,234 |",
        "| KL from the trained model, nats a token | 1.50e-05 |",
        "| share of the experts' change that the weights hold | 50.00% |",
        "| loss | 2.0000 |",
    ):
        assert line in card
    assert card.index("| loss |") < card.index("Serve bf16.")


def test_an_export_is_called_as_the_runs_folder(tmp_path: Path) -> None:
    assert default_name(tmp_path / "mine") == default_name(tmp_path / "mine/final") == "mine"
