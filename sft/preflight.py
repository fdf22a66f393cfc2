"""Find what a user can get wrong before the ranks start, and say it in one line.

    python sft/preflight.py FLAGS       the flags of train.py

Run once on each node by the task files; if it fails on one node, it fails on all. It leaves the
tokenised data in the cache, so that the ranks only read it.
"""

from finetune.launcher import end_workers_with_parent
from finetune.node import main_port, node_addresses, node_rank, task_id
from finetune.preemption import PreemptionNotice
from finetune.rendezvous import Rendezvous

if __name__ == "__main__":  # before the imports below, which take eight seconds
    PreemptionNotice().listen()
    end_workers_with_parent()
    nodes = Rendezvous(node_rank(), node_addresses(), port=main_port(), run=task_id() or "")

from finetune.command_line import answer_help

if __name__ == "__main__":
    answer_help(__doc__)

from dataclasses import replace
from pathlib import Path

from finetune.arguments import check_spelling, parse_args
from finetune.checkpoint.fingerprint import (
    check_same_run,
    data_by_rules,
    launch_rules,
    read_record,
    run_record,
)
from finetune.checkpoint.history import conversation_date
from finetune.checkpoint.ownership import check_later_steps
from finetune.checkpoint.resume import find_checkpoint
from finetune.checkpoint.writers import check_newest_writer
from finetune.data.dataset import load_datasets
from finetune.errors import one_line_errors
from finetune.model.loading import load_config, load_tokenizer
from finetune.model.weights import BaseWeights
from finetune.node import check_gpus, check_output_dir, check_wandb_key, num_processes
from finetune.training.num_steps import few_steps_of


def main() -> None:
    check_spelling()
    check_gpus()
    check_wandb_key()
    config = parse_args()
    run_dir = config.training.output_dir
    check_output_dir(run_dir)
    checkpoint = find_checkpoint(config.training.resume_from_checkpoint, run_dir)
    model_id, revision = config.model_id, config.model.model_revision
    load_config(model_id, revision=revision)
    tokenizer = load_tokenizer(model_id, revision=revision)
    date = config.data.conversation_start_date or conversation_date(run_dir)
    rules = launch_rules(config.training.resume_from_checkpoint, run_dir)
    data_args = replace(data_by_rules(config.data, rules), conversation_start_date=date)
    train_dataset, _ = load_datasets(config.script, config.training, data_args, tokenizer)
    warning = few_steps_of(train_dataset, config.training, num_gpus=num_processes())
    if warning:
        print(f"warning: {warning}", flush=True)
    # Downloaded here, not by ranks that wait for each other no longer than a barrier's timeout.
    BaseWeights(model_id, revision=revision)
    record = run_record(
        config,
        train_dataset,
        conversation_start_date=date,
        num_processes=num_processes(),
        training_rules=rules,
    )
    if config.run.ignore_fingerprint:
        return
    if checkpoint is not None:
        check_same_run(checkpoint, read_record(checkpoint), record)
    check_newest_writer(Path(run_dir), record)
    check_later_steps(run_dir, resumed=checkpoint, fingerprint=record.identity())


if __name__ == "__main__":
    with one_line_errors(), nodes:
        main()
