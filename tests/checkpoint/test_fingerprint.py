"""What makes two launches the same run."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from datasets import Dataset, concatenate_datasets
from huggingface_hub import constants

from finetune.arguments import parse_args
from finetune.checkpoint.fingerprint import (
    HELD_OUT,
    LORA,
    PACKAGES,
    TRAINING,
    TRAINING_RULES,
    RunRecord,
    check_same_run,
    data_by_rules,
    dataset_sha256,
    launch_rules,
    model_revision,
    read_record,
    run_record,
)
from finetune.checkpoint.manifest import MANIFEST, read_manifest, write_manifest
from finetune.data.options import DataArguments, EarlierDataArguments
from finetune.errors import UserError
from helpers.hub import COMMIT, put_in_cache
from helpers.launching import defaults
from helpers.paths import REPO

EARLIER_RUN = REPO / "tests/runs/earlier_run"
FILE = Path("summary.json")

ROWS = [{"input_ids": list(range(n)), "labels": [-100] * n} for n in range(1, 40)]


def test_the_dataset_is_hashed_by_its_tokens_not_by_its_files() -> None:
    whole = Dataset.from_list(ROWS)
    parts = concatenate_datasets([Dataset.from_list(ROWS[:7]), Dataset.from_list(ROWS[7:])])
    assert dataset_sha256(parts) == dataset_sha256(whole)
    assert dataset_sha256(whole.select(range(38))) != dataset_sha256(whole)
    assert dataset_sha256(whole.select([1, 0, *range(2, 39)])) != dataset_sha256(whole)
    recut = [{"input_ids": [0, 0], "labels": [1, 1]}, {"input_ids": [0], "labels": [1]}]
    assert dataset_sha256(Dataset.from_list(recut)) != dataset_sha256(
        Dataset.from_list(recut[::-1])
    )


def test_a_changed_flag_is_refused_and_named(tiny_model: Path, tmp_path: Path) -> None:
    dataset = Dataset.from_list(ROWS)

    def of(*flags: str, num_processes: int = 2) -> RunRecord:
        config = parse_args([*defaults(tiny_model, tmp_path), *flags], num_gpus=num_processes)
        return run_record(
            config, dataset, conversation_start_date="2026-01-02", num_processes=num_processes
        )

    saved = of()
    check_same_run("checkpoint-2", saved, of())
    check_same_run("checkpoint-2", saved, of("--gradient_accumulation_steps=2", num_processes=1))
    for num_processes in (1, 2):
        same = of("--global_batch_size=2", num_processes=num_processes)
        check_same_run("checkpoint-2", saved, same)
    with pytest.raises(UserError) as refused:
        check_same_run("checkpoint-2", saved, of("--learning_rate=0.5", "--seed=7"))
    assert "learning_rate 0.01 -> 0.5; seed 42 -> 7" in str(refused.value)
    assert "RUN_NAME" in str(refused.value) and "--ignore_fingerprint true" in str(refused.value)
    with pytest.raises(UserError, match="train_on assistant -> everything"):
        check_same_run("checkpoint-2", saved, of("--train_on=everything"))
    with pytest.raises(UserError, match="global_batch_size 2 -> 4"):
        check_same_run("checkpoint-2", saved, of(num_processes=4))


def test_other_weights_in_the_same_folder_are_another_model(
    tiny_model: Path, tmp_path: Path
) -> None:
    before = model_revision(str(tiny_model), revision="main")
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in tiny_model.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    assert model_revision(str(copy), revision="main") == before
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    assert model_revision(str(copy), revision="main") != before


def test_a_model_of_the_hub_is_known_by_its_commit(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    folder = put_in_cache(tiny_model, tmp_path, "ada/tiny")
    for model_id, revision in (("ada/tiny", "main"), ("ada/tiny", COMMIT), (str(folder), "main")):
        assert model_revision(model_id, revision=revision) == COMMIT


TODAYS_DATA = DataArguments(train_on="everything", conversation_start_date="2026-01-02")


def make_record() -> RunRecord:
    """A record in which nothing has its default."""
    return RunRecord(
        model="openai/gpt-oss-20b",
        model_revision="abc",
        dataset="data.jsonl",
        seed=7,
        use_peft=True,
        data=data_by_rules(TODAYS_DATA, 1),
        dataset_sha256="def",
        max_length=512,
        global_batch_size=8,
        training={name: f"{name}'s value" for name in TRAINING},
        lora={name: f"{name}'s value" for name in LORA},
        packages=dict.fromkeys(PACKAGES, "1.2.3"),
        eval_strategy="epoch",
        dataset_config="fr",
        dataset_train_split="some",
        dataset_test_split="others",
    )


def test_an_older_run_goes_on_under_its_own_rules_of_training() -> None:
    assert not {"training_rules", "learn_past_thinking"} & make_record().to_json().keys()
    assert "learn_past_thinking" not in replace(make_record(), training_rules=2).to_json()
    for rules in (1, 2, 3):
        older = replace(make_record(), data=data_by_rules(TODAYS_DATA, rules), training_rules=rules)
        read = RunRecord.from_json(older.to_json(), file=FILE)
        check_same_run("checkpoint-2", read, older)
        assert read == older
        assert isinstance(read.data, EarlierDataArguments) == (rules < 3)
        assert read.data.learn_past_thinking == (rules == 3)


def test_the_rules_of_a_launch_are_those_of_the_checkpoint_that_it_resumes(tmp_path: Path) -> None:
    folder, later = tmp_path / "checkpoint-3", tmp_path / "later/checkpoint-3"
    for path, rules in ((folder, 2), (later, TRAINING_RULES + 1)):
        path.mkdir(parents=True)
        record = replace(make_record(), training_rules=rules)
        write_manifest(path, {"files": {}, "fingerprint": record.identity()})
    assert launch_rules("true", str(tmp_path)) == launch_rules(str(folder), "elsewhere") == 2
    for flag in (None, "false", str(tmp_path / "checkpoint-4")):
        assert launch_rules(flag, str(tmp_path)) == TRAINING_RULES
    # A run of rules that are unknown here is compared as one of ours, and refused.
    assert launch_rules("true", str(later.parent)) == TRAINING_RULES
    current = replace(make_record(), training_rules=TRAINING_RULES)
    with pytest.raises(UserError, match=f"training_rules {TRAINING_RULES + 1}"):
        check_same_run(later, read_record(later), current)


def test_a_record_survives_json() -> None:
    record = make_record()
    values = json.loads(json.dumps(record.to_json()))
    assert RunRecord.from_json(values, file=FILE) == record
    identity = json.loads(json.dumps(record.identity()))
    assert RunRecord.from_json(identity, file=FILE).identity() == record.identity()


def test_the_keys_are_those_of_a_run_made_by_earlier_code() -> None:
    """Runs in users' buckets hold these keys."""
    manifest = read_manifest(EARLIER_RUN / "interrupted/checkpoint-3")
    summary = json.loads((EARLIER_RUN / "finished/final/summary.json").read_text())
    assert make_record().identity().keys() == manifest["fingerprint"].keys()
    assert make_record().to_json().keys() == summary["run"].keys()
    for values in (manifest["fingerprint"], summary["run"]):
        record = RunRecord.from_json(values, file=FILE)
        assert record.other == {}
        written = record.to_json()
        changed = {name for name, value in values.items() if written[name] != value}
        assert changed <= {"torch"}  # without +cpu


def test_a_local_version_suffix_does_not_matter() -> None:
    values = make_record().to_json()
    on_cpu = RunRecord.from_json(values | {"torch": "2.13.0+cpu"}, file=FILE)
    on_gpu = RunRecord.from_json(values | {"torch": "2.13.0+cu130"}, file=FILE)
    later = RunRecord.from_json(values | {"torch": "2.14.0+cpu"}, file=FILE)
    check_same_run("checkpoint-2", on_cpu, on_gpu)
    with pytest.raises(UserError, match="torch 2.13.0 -> 2.14.0"):
        check_same_run("checkpoint-2", on_cpu, later)


def test_what_is_only_evaluated_may_change() -> None:
    values = make_record().to_json()
    for name in HELD_OUT:
        other = RunRecord.from_json(values | {name: "another"}, file=FILE)
        check_same_run("checkpoint-2", make_record(), other)


def test_a_key_that_an_old_record_lacks() -> None:
    """A flag of the data has its default; a flag of the training differs from any value."""
    old = make_record().to_json()
    del old["learn_no_thinking"], old["weight_decay"]
    record = RunRecord.from_json(old, file=FILE)
    assert record.data.learn_no_thinking is False
    with pytest.raises(UserError) as refused:
        check_same_run("checkpoint-2", record, make_record())
    assert "(weight_decay None -> weight_decay's value)" in str(refused.value)


def test_a_key_that_this_version_does_not_know_is_still_compared() -> None:
    record = RunRecord.from_json(make_record().to_json() | {"new_flag": 3}, file=FILE)
    assert record.to_json()["new_flag"] == 3
    with pytest.raises(UserError, match="new_flag 3 -> None"):
        check_same_run("checkpoint-2", record, make_record())


@pytest.mark.parametrize("name", ["model", "model_revision", "dataset", "seed", "use_peft"])
def test_a_manifest_without_a_required_key_is_named(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint-3"
    folder.mkdir()
    fingerprint = make_record().identity()
    del fingerprint[name]
    write_manifest(folder, {"files": {}, "fingerprint": fingerprint})
    with pytest.raises(UserError, match=f"{folder / MANIFEST} does not hold the run's {name}:"):
        read_record(folder)


def test_a_manifest_without_a_record_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint-3"
    folder.mkdir()
    write_manifest(folder, {"files": {}})
    with pytest.raises(UserError, match=f"{folder / MANIFEST} does not hold the run's model, "):
        read_record(folder)
