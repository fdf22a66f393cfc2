"""The model card: what it tells, and what it keeps to itself."""

import ast
import json
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from finetune.checkpoint.summary_file import read_summary, write_summary
from finetune.export.base import open_base
from finetune.export.card import (
    card_of_artifact,
    default_name,
    front_matter,
    update_evaluation,
    write_card,
)
from finetune.export.card_usage import Usage, usage_section
from finetune.export.record import ExportRecord, Format
from finetune.export.source import RunWeights, find_run_weights
from helpers.evaluations import EVALUATION
from helpers.markdown import FENCE

FORMATS: tuple[Format, ...] = ("adapter", "bf16", "mxfp4", "gguf", "gguf-adapter")


def record_of(run_weights: RunWeights) -> ExportRecord:
    return ExportRecord("bf16", run_weights.origin, run_weights.step, {})


def card_in(run_dir: Path, record: ExportRecord | None = None, *, name: str = "mine") -> str:
    """The card of an export of this run."""
    run_weights = find_run_weights(run_dir)
    base = open_base(run_weights.record)
    write_card(run_dir, run_weights, base, record or record_of(run_weights), name=name)
    return (run_dir / "README.md").read_text()


def artifacts_card(run_dir: Path, **summary: Any) -> str:
    """The card that train.py writes into `final`."""
    record = find_run_weights(run_dir).record
    return card_of_artifact(run_dir / "final", record, open_base(record), summary)


def test_it_names_no_folder_of_this_machine(run_dir: Path, tiny_model: Path) -> None:
    for card in (card_in(run_dir), artifacts_card(run_dir)):
        assert "tiny-gpt-oss, whose experts are in MXFP4, fine-tuned on conversations.jsonl" in card
        assert str(tiny_model.parent) not in card and str(run_dir) not in card
        assert "base_model" not in yaml.safe_load(card.split("---")[1])


def test_its_title_is_the_runs_name(run_dir: Path) -> None:
    assert "\n# mine\n" in card_in(run_dir, name="mine")
    assert f"\n# {run_dir.name}\n" in artifacts_card(run_dir)


def test_it_links_to_models_and_datasets_of_the_hub(run_dir: Path) -> None:
    run_weights = find_run_weights(run_dir)
    run = replace(
        run_weights.record,
        model="openai/gpt-oss-20b",
        model_revision="6" * 40,
        dataset="me/data:train,you/more@v1",
    )
    fields = yaml.safe_load(front_matter(run, "bf16").strip("-"))
    assert (fields["base_model"], fields["base_model_relation"]) == (run.model, "finetune")
    assert fields["datasets"] == ["me/data", "you/more"]
    assert fields["license"] == "apache-2.0" and "lora" in fields["tags"]
    local = replace(run, model="models/tiny", model_revision="6" * 16, dataset="sft/my.jsonl")
    assert (
        not {"base_model", "datasets"}
        & yaml.safe_load(front_matter(local, "bf16").strip("-")).keys()
    )


def test_it_has_the_evaluations_figures_and_not_its_texts(run_dir: Path) -> None:
    (run_dir / "final/evaluation.json").write_text(json.dumps(EVALUATION))
    card = card_in(run_dir)
    assert "| overall | 1,234 | 2.0 -> 1.5 | 7.389 -> 4.4817 |" in card
    section = card.partition("## Evaluation")[2]
    for row in EVALUATION["generations"]:
        assert row["question"] not in section and row["before"]["text"] not in section


def test_it_tells_how_faithful_the_export_is(run_dir: Path) -> None:
    record = record_of(find_run_weights(run_dir))
    assert "Not compared with the trained model" in card_in(run_dir, record)
    record.text, record.hints = "two conversations", ["Serve bf16."]
    record.fidelity = {"kl": 1.5e-5, "num_tokens": 1234, "experts_kept": 0.5, "loss": 2.0}
    card = card_in(run_dir, record)
    assert "compared with the trained model on two conversations." in card
    for line in (
        "| tokens compared | 1,234 |",
        "| KL from the trained model, nats a token | 1.50e-05 |",
        "| share of the experts' change that the weights hold | 50.00% |",
        "| loss | 2.0000 |",
    ):
        assert line in card
    assert card.index("| loss |") < card.index("Serve bf16.")


def test_a_results_card_counts_the_data_and_has_the_evaluation(run_dir: Path) -> None:
    card = artifacts_card(run_dir, samples=97, held_out_samples=3, steps=12, eval_loss=[2.5, 1.5])
    for line in (
        "| samples trained on | 97 |",
        "| samples held out | 3 |",
        "| optimizer steps | 12 |",
        "| lora r | 4 |",
        "| loss | 2.5 -> 1.5 |",
    ):
        assert line in card, line


def test_an_evaluation_after_the_run_is_added_to_its_card_once(run_dir: Path) -> None:
    artifact = run_dir / "final"
    (artifact / "README.md").write_text(artifacts_card(run_dir, eval_loss=[2.5, 1.5]))
    (artifact / "evaluation.json").write_text(json.dumps(EVALUATION))
    for _ in range(2):
        update_evaluation(artifact)
        card = (artifact / "README.md").read_text()
        assert card.count("## Evaluation") == card.count("| overall | 1,234 |") == 1
        assert card.count("## Training") == card.count("## Licence") == 1


def test_an_earlier_versions_card_is_left_as_its_hash_has_it(run_dir: Path) -> None:
    artifact = run_dir / "final"
    (artifact / "README.md").write_text("blank")
    write_summary(artifact, {"steps": 4}, [artifact / "README.md"])
    (artifact / "evaluation.json").write_text(json.dumps(EVALUATION))
    update_evaluation(artifact)
    assert (artifact / "README.md").read_text() == "blank"
    read_summary(artifact)


@pytest.mark.parametrize("where", [".", "me/mine"])
@pytest.mark.parametrize("form", FORMATS)
def test_every_format_has_examples_that_parse(form: Format, where: str) -> None:
    base = "openai/gpt-oss-20b"
    usage = Usage(where, "mine", base, revision="6" * 40, base_is_mxfp4=True, rank=20)
    text = usage_section(form, usage)
    found = [(language, code) for _, language, code in FENCE.findall(text)]
    assert {language for language, _ in found} <= {"python", "bash"} and found
    for language, code in found:
        if language == "python":
            ast.parse(code)
        else:
            subprocess.run(["bash", "-n"], input=code, text=True, check=True)
    programs = {"gguf": ["llama-server", "ollama run"], "gguf-adapter": ["llama-server"]}
    wanted = programs.get(form, ["from transformers import", "vllm serve", "ollama run"])
    assert all(program in text for program in wanted)
    if form == "adapter":
        assert "--max-lora-rank 32" in text and 'revision="' + "6" * 40 in text


def test_an_export_is_called_as_the_runs_folder(tmp_path: Path) -> None:
    assert default_name(tmp_path / "mine") == default_name(tmp_path / "mine/final") == "mine"
