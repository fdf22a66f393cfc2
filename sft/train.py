"""Fine-tune gpt-oss: all weights, or LoRA on q, k, v, o and both projections of every expert.

    accelerate launch --config_file sft/ddp.yaml sft/train.py --use_peft true \\
        --model_name_or_path openai/gpt-oss-20b --dataset_name HuggingFaceH4/Multilingual-Thinking

The flags are this project's (finetune/arguments.py, finetune/data/options.py) and those of TRL's
SFTConfig, ModelConfig and ScriptArguments. The task files show the ones worth setting.
"""

import os
import signal

from finetune.launcher import end_with_launcher, end_workers_with_parent, terminate_shell
from finetune.node import task_id
from finetune.preemption import EXIT_STATUS, PreemptionNotice
from finetune.spot_notice import watch_for_spot_notice

notice = PreemptionNotice()


def end_task() -> None:
    """In a task of SkyPilot's: tell the shell of the recipe that this node's training ends."""
    if task_id() is not None:
        terminate_shell()


def take_machine_back() -> None:
    """What SIGTERM to all processes of the node does."""
    end_task()
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":  # before the imports below, which take eight seconds
    notice.listen()
    end_with_launcher(is_saving=lambda: notice.received)
    end_workers_with_parent()
    watch_for_spot_notice(on_final=take_machine_back, on_risk=notice.request_save)

from finetune.command_line import answer_help

if __name__ == "__main__":
    answer_help(__doc__)

import copy
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from datasets import Dataset
from transformers import PreTrainedTokenizerBase, PrinterCallback, ProgressCallback, set_seed
from trl import SFTConfig

from finetune.arguments import Config, check_spelling, parse_args
from finetune.checkpoint.artifact import ARTIFACT, LOSS_PLOT, is_finished, save_artifact
from finetune.checkpoint.fence import Fence, FencedOff
from finetune.checkpoint.fingerprint import (
    RunRecord,
    check_same_run,
    data_by_rules,
    launch_rules,
    read_record,
    run_record,
)
from finetune.checkpoint.history import (
    LaunchLog,
    conversation_date,
    interruption_cost,
    read_launches,
    run_cost,
)
from finetune.checkpoint.manifest import newest_checkpoint
from finetune.checkpoint.ownership import check_later_steps
from finetune.checkpoint.resume import resume_from
from finetune.checkpoint.saver import Saver
from finetune.credentials import without_secrets
from finetune.data.dataset import load_datasets, mean_length
from finetune.errors import one_line_errors, only_warn
from finetune.export.card import card_of_artifact
from finetune.model.attention import choose_attention
from finetune.model.expert_probe import check_experts
from finetune.model.experts import use_grouped_lora
from finetune.model.flops import flops_per_token
from finetune.model.loading import load_model, load_tokenizer
from finetune.model.lora import lora_config
from finetune.model.lora_linear import use_low_rank_linears
from finetune.model.mxfp4 import exclude_packed_from_ddp
from finetune.model.weights import BaseWeights
from finetune.node import check_gpus, check_output_dir
from finetune.plot import plot_losses
from finetune.summary import print_summary
from finetune.training.callbacks import EvaluateAtEnd, Throughput
from finetune.training.divergence import check_tensors
from finetune.training.log_line import LogLine
from finetune.training.num_steps import few_steps, sequences_per_step
from finetune.training.tracking import configure_wandb, send_summary
from finetune.training.trainer import (
    Beginning,
    ResumableSFTTrainer,
    RunFinished,
    configure_gradients,
)
from finetune.training.watchdog import Watchdog


@dataclass(frozen=True)
class Data:
    """What is trained on, ready for the trainer, and the record of the run that this makes it."""

    tokenizer: PreTrainedTokenizerBase
    train: Dataset
    held_out: Dataset | None
    record: RunRecord


def main() -> None:
    """One launch of a run: resume or start, train, save, leave the artifact in `final`.

    Exits with status 143 after a notice of preemption. Raises UserError for what a user can mend.
    """
    check_spelling()
    check_gpus()
    config = parse_args()
    sys.argv[1:] = map(without_secrets, sys.argv[1:])  # W&B records the command
    check_output_dir(config.training.output_dir)
    set_seed(config.training.seed)
    data = load_data(config)
    checkpoint = find_checkpoint(config, data.record)
    check_later_steps(
        config.training.output_dir, resumed=checkpoint, fingerprint=data.record.identity()
    )
    trainer, throughput = make_trainer(config, data)
    with one_writer(trainer):
        checkpoint = newest_again(config, data.record, checkpoint)
        train(config, data, trainer, throughput, checkpoint)
    trainer.end()


def train(
    config: Config,
    data: Data,
    trainer: ResumableSFTTrainer,
    throughput: Throughput,
    checkpoint: Path | None,
) -> None:
    """Train from the checkpoint or from step 0, and leave the artifact, unless it is there."""
    trainer.accelerator.print(
        f"resuming from {checkpoint}" if checkpoint else "no checkpoint to resume: starting fresh"
    )
    # The base model is evaluated once, by the first launch, so that the summary can compare.
    trainer.args.eval_on_start = trainer.args.eval_strategy != "no" and checkpoint is None
    artifact = Path(config.training.output_dir) / ARTIFACT
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        trainer.saver.finish()
    except RunFinished:
        # The first rank looks for all: another node may have no `final`, or see it late.
        found = trainer.is_world_process_zero() and is_finished(artifact)
        if any(trainer.saver.gather(found)):
            step = trainer.state.global_step
            trainer.accelerator.print(f"this run had finished at step {step}: {artifact}")
            return
    exit_if_preempted(trainer)
    notice.promise = "SIGTERM: the last step is saved; the result is still written, if time allows"
    weights = dict(trainer.model.named_parameters())
    check_tensors(weights, "the trained weights", gather=trainer.saver.gather)
    save(config, data, trainer, throughput, artifact=artifact)


@contextmanager
def one_writer(trainer: ResumableSFTTrainer) -> Iterator[None]:
    """Within it this launch continues the run, and older ones stop. Claimed only now, with data and
    model loaded: a launch that cannot start stops nobody.

    A launch that a newer one fences off exits with status 0, so that SkyPilot does not launch it
    again: it would in turn stop the newer one.
    """
    saver = trainer.saver
    try:
        saver.claim_run()
        yield
    except FencedOff as fenced:
        trainer.accelerator.print(f"{fenced}; this one stops, and leaves the run to it", flush=True)
        os._exit(0)  # at once: threads of a save under way would go on until its upload
    finally:
        if saver.complete_step is None and saver.fence and trainer.is_world_process_zero():
            saver.fence.withdraw(has_saved=saver.folder is not None)


def load_data(config: Config) -> Data:
    """Read and tokenise the conversations; the same on every rank and in every launch."""
    tokenizer = load_tokenizer(config.model_id, revision=config.model.model_revision)
    # The system message holds a date. Ranks whose clocks stand on two sides of midnight must not
    # differ in it, and neither must a launch from the one before.
    run_dir = config.training.output_dir
    # A run goes on by the rules that it began with, and with the tokens that it began with.
    rules = launch_rules(config.training.resume_from_checkpoint, run_dir)
    date, rules = broadcast_object_list([conversation_date(run_dir), rules])
    date = config.data.conversation_start_date or date
    data_args = replace(data_by_rules(config.data, rules), conversation_start_date=date)
    train, held_out = load_datasets(config.script, config.training, data_args, tokenizer)
    record = run_record(
        config,
        train,
        conversation_start_date=date,
        num_processes=config.training.world_size,
        training_rules=rules,
    )
    return Data(tokenizer, train, held_out, record)


def find_checkpoint(config: Config, record: RunRecord) -> Path | None:
    """The checkpoint to resume from, or None. Raises UserError if it is another run's."""
    run_dir = config.training.output_dir
    checkpoint = resume_from(config.training.resume_from_checkpoint, run_dir)
    if checkpoint and not config.run.ignore_fingerprint:
        check_same_run(checkpoint, read_record(checkpoint), record)
    return checkpoint


def newest_again(config: Config, record: RunRecord, checkpoint: Path | None) -> Path | None:
    """The checkpoint to resume from now: until this launch claimed the run, an older one may have
    completed another than `checkpoint`.
    """
    flag = config.training.resume_from_checkpoint
    if flag is None or flag.lower() != "true":
        return checkpoint
    (newest,) = broadcast_object_list([newest_checkpoint(config.training.output_dir)])
    return checkpoint if newest == checkpoint else find_checkpoint(config, record)


def make_trainer(config: Config, data: Data) -> tuple[ResumableSFTTrainer, Throughput]:
    """The model with its adapter, and the trainer with all that saves, watches and logs."""
    run_dir, num_processes = Path(config.training.output_dir), config.training.world_size
    check_experts()
    attention = config.model.attn_implementation or choose_attention()
    weights = BaseWeights(config.model_id, revision=config.model.model_revision)
    context = mean_length(data.train)
    row = config.training.max_length or context
    model = load_model(
        weights,
        attn_implementation=attention,
        dequantize=bool(config.run.dequantize),
        num_tokens=round(config.training.per_device_train_batch_size * row),
    )
    saver = Saver(
        run_dir,
        notice=notice,
        every_minutes=config.run.save_every_minutes,
        keep=config.training.save_total_limit,
        manifest={"num_processes": num_processes, "fingerprint": data.record.identity()},
        fence=Fence(run_dir, data.record, ignore_fingerprint=bool(config.run.ignore_fingerprint)),
    )
    wandb_run_id = configure_wandb(str(run_dir), run_name=config.training.run_name)
    # NCCL has a timeout of its own, which names no rank. The watchdog speaks before it.
    patience = 0.8 * config.training.ddp_timeout
    trainer = ResumableSFTTrainer(
        model=model,
        args=trainer_arguments(config),
        train_dataset=data.train,
        eval_dataset=data.held_out,
        processing_class=data.tokenizer,
        peft_config=lora_config(model, config.model),
        callbacks=[
            Beginning(saver),
            EvaluateAtEnd(),
            LogLine(),
            LaunchLog(
                run_dir,
                saver,
                wandb_run_id=wandb_run_id,
                price_per_hour=config.run.price_per_hour,
                fence=saver.fence,
            ),
            Watchdog(timeout=patience, is_excused=lambda: saver.is_waiting),
        ],
        saver=saver,
        weights=weights,
        training_rules=data.record.training_rules,
    )
    exclude_packed_from_ddp(trainer.model)
    use_grouped_lora(trainer.model)
    use_low_rank_linears(trainer.model)
    configure_gradients(trainer)

    flops = flops_per_token(model.config, context=context, lora=config.model.use_peft)
    throughput = Throughput(flops, num_processes=num_processes)
    # First in the list, so that what it adds to a log entry reaches the callbacks that print it and
    # send it to W&B.
    trainer.callback_handler.callbacks.insert(0, throughput)
    for stock in (PrinterCallback, ProgressCallback):  # LogLine prints instead
        trainer.remove_callback(stock)

    args = trainer.args
    rows = sequences_per_step(args, num_gpus=num_processes)
    trainer.accelerator.print(
        f"attention: {attention}; processes: {num_processes}; global batch: {rows} rows "
        f"({args.per_device_train_batch_size} a GPU, {args.gradient_accumulation_steps} times)"
    )
    return trainer, throughput


def trainer_arguments(config: Config) -> SFTConfig:
    """The flags as the trainer is given them; config itself stays as it was parsed."""
    args = copy.copy(config.training)
    # The saver deletes old checkpoints, once the next one is complete in the bucket.
    args.save_total_limit = None
    return args


def exit_if_preempted(trainer: ResumableSFTTrainer) -> None:
    """Exit with status 143, which tells SkyPilot to launch again, unless the last step is done."""
    state, saver = trainer.state, trainer.saver
    if saver.preempted and state.global_step < state.max_steps:
        seconds = time.monotonic() - saver.noticed_at
        trainer.accelerator.print(
            f"preempted, and saved at step {state.global_step} within {seconds:.1f} s"
        )
        if trainer.accelerator.is_local_main_process:
            end_task()  # the notice may have come to another node alone
        sys.exit(EXIT_STATUS)


def save(
    config: Config,
    data: Data,
    trainer: ResumableSFTTrainer,
    throughput: Throughput,
    *,
    artifact: Path,
) -> None:
    """Write the weights or the adapter, the plot and the summary, and print the summary."""
    trainer.saver.check_fence()
    launches = read_launches(config.training.output_dir)
    summary: dict[str, Any] = throughput.summary(trainer.state)
    summary |= interruption_cost(launches) | run_cost(launches)
    summary["artifact"] = str(artifact)
    if rows := trainer.uneven_rows():
        summary["rows of an epoch"] = rows
    if warning := few_steps(trainer.state.max_steps):
        summary["warning"] = warning
    title = config.training.run_name
    saved = summary | {
        "samples": len(data.train),
        "held_out_samples": len(data.held_out or ()),
        "run": data.record.to_json(),
    }
    card = None
    if trainer.is_world_process_zero():
        with only_warn("the plot of the losses cannot be drawn"):
            plot_losses(trainer.state.log_history, artifact / LOSS_PLOT, title=title)
        with only_warn("the model card cannot be written"):
            assert trainer.weights is not None  # as make_trainer gave them
            card = card_of_artifact(artifact, data.record, trainer.weights, saved)
    save_artifact(
        trainer.accelerator,
        trainer.model_wrapped,
        data.tokenizer,
        artifact=artifact,
        summary=saved,
        card=card,
        check_fence=trainer.saver.fence.check if trainer.saver.fence else lambda: None,
    )
    if trainer.is_world_process_zero():
        with only_warn("the summary cannot be printed"):
            print_summary(summary, title=f"{title}: finished")
        with only_warn("the summary cannot be sent to W&B"):
            send_summary(summary)


if __name__ == "__main__":
    with one_line_errors():
        main()
