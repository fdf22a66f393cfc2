"""Fine-tune gpt-oss: all weights, or LoRA on every linear layer and every expert.

    accelerate launch --config_file sft/ddp.yaml sft/train.py --use_peft true \\
        --model_name_or_path openai/gpt-oss-20b --dataset_name HuggingFaceH4/Multilingual-Thinking

The flags are ours (finetune/arguments.py, finetune/data/options.py) and those of TRL's SFTConfig,
ModelConfig and ScriptArguments; the task files show the ones to set.
"""

from finetune.command_line import answer_help

if __name__ == "__main__":
    answer_help(__doc__)  # before the imports below, which take eight seconds

import copy
import sys
import time
from dataclasses import replace
from pathlib import Path

from accelerate.utils import broadcast_object_list
from transformers import PrinterCallback, set_seed
from trl import SFTConfig

from finetune.arguments import Config, check_spelling, parse_args
from finetune.checkpoint.artifact import ARTIFACT, LOSS_PLOT, is_finished, save_artifact
from finetune.checkpoint.fingerprint import check_same_run, read_record, run_record
from finetune.checkpoint.history import (
    LaunchLog,
    conversation_date,
    interruption_cost,
    read_launches,
)
from finetune.checkpoint.manifest import resume_from
from finetune.checkpoint.saver import Saver
from finetune.data.dataset import load_datasets, mean_length
from finetune.errors import one_line_errors
from finetune.model.attention import choose_attention
from finetune.model.experts import use_grouped_lora
from finetune.model.flops import flops_per_token
from finetune.model.loading import load_model, load_tokenizer
from finetune.model.lora import lora_config
from finetune.model.mxfp4 import exclude_packed_from_ddp
from finetune.model.weights import BaseWeights
from finetune.node import check_gpus, check_output_dir
from finetune.plot import plot_losses
from finetune.preemption import EXIT_STATUS, PreemptionNotice
from finetune.summary import print_summary
from finetune.training.callbacks import EvaluateAtEnd, Throughput
from finetune.training.tracking import configure_wandb
from finetune.training.trainer import (
    ResumableSFTTrainer,
    RunFinished,
    StopIfFinished,
    configure_gradients,
)
from finetune.training.watchdog import Watchdog


def trainer_arguments(config: Config, *, checkpoint: str | None) -> SFTConfig:
    """The flags as the trainer is given them. The base model is evaluated once, at step 0."""
    args = copy.copy(config.training)
    args.eval_on_start = args.eval_strategy != "no" and checkpoint is None
    args.save_total_limit = None  # the saver deletes, once the next checkpoint is durable
    return args


def train(config: Config) -> None:
    """One launch of a run: resume or start, train, save, leave the artifact in `final`.

    Exits with status 143 after a notice. Raises UserError for what a user can mend.
    """
    run_dir, num_processes = Path(config.training.output_dir), config.training.world_size
    set_seed(config.training.seed)
    wandb_run_id = configure_wandb(str(run_dir), run_name=config.training.run_name)
    tokenizer = load_tokenizer(config.model_id, revision=config.model.model_revision)

    # The date must be the same on every rank, and for every launch of this run.
    (date,) = broadcast_object_list([conversation_date(run_dir)])
    data_args = replace(
        config.data, conversation_start_date=config.data.conversation_start_date or date
    )
    train_dataset, eval_dataset = load_datasets(
        config.script, config.training, data_args, tokenizer
    )

    checkpoint = resume_from(config.training.resume_from_checkpoint, str(run_dir))
    record = run_record(
        config,
        train_dataset,
        conversation_start_date=data_args.conversation_start_date,
        num_processes=num_processes,
    )
    if checkpoint and not config.run.ignore_fingerprint:
        check_same_run(checkpoint, read_record(Path(checkpoint)), record)

    attention = config.model.attn_implementation or choose_attention()
    weights = BaseWeights(config.model_id, revision=config.model.model_revision)
    model = load_model(
        weights, attn_implementation=attention, dequantize=bool(config.run.dequantize)
    )
    notice = PreemptionNotice()
    notice.listen()  # until here SIGTERM ends the process: there is nothing to save
    saver = Saver(
        run_dir,
        notice=notice,
        every_minutes=config.run.save_every_minutes,
        keep=config.training.save_total_limit,
        manifest={"num_processes": num_processes, "fingerprint": record.identity()},
    )
    trainer = ResumableSFTTrainer(
        model=model,
        args=trainer_arguments(config, checkpoint=checkpoint),
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=tokenizer,
        peft_config=lora_config(model, config.model),
        callbacks=[
            StopIfFinished(),
            EvaluateAtEnd(),
            LaunchLog(run_dir, saver, wandb_run_id=wandb_run_id),
            # Before NCCL's own timeout, which names no rank.
            Watchdog(
                timeout=0.8 * config.training.ddp_timeout, is_excused=lambda: saver.is_waiting
            ),
        ],
        saver=saver,
        weights=weights,
    )
    exclude_packed_from_ddp(trainer.model)
    use_grouped_lora(trainer.model)
    configure_gradients(trainer)
    throughput = Throughput(
        flops_per_token(
            model.config, context=mean_length(train_dataset), lora=config.model.use_peft
        ),
        num_processes=num_processes,
    )
    if not trainer.is_world_process_zero():
        trainer.remove_callback(PrinterCallback)  # it would print the loss on every node
    # First, so that what it adds to a log entry reaches the callbacks that print and send it.
    trainer.callback_handler.callbacks.insert(0, throughput)

    say = trainer.accelerator.print
    say(f"attention: {attention}; processes: {num_processes}")
    say(f"resuming from {checkpoint}" if checkpoint else "no checkpoint to resume: starting fresh")
    artifact = run_dir / ARTIFACT
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
        saver.finish()
    except RunFinished:
        if is_finished(artifact):
            say(f"this run had finished at step {trainer.state.global_step}: {artifact}")
            trainer.end()
            return
    if saver.preempted and trainer.state.global_step < trainer.state.max_steps:
        seconds = time.monotonic() - saver.noticed_at
        say(f"preempted, and saved at step {trainer.state.global_step} within {seconds:.1f} s")
        sys.exit(EXIT_STATUS)

    summary = throughput.summary(trainer.state) | interruption_cost(read_launches(run_dir))
    summary["artifact"] = str(artifact)
    if trainer.is_world_process_zero():
        plot_losses(trainer.state.log_history, artifact / LOSS_PLOT, title=config.training.run_name)
    save_artifact(
        trainer.accelerator,
        trainer.model_wrapped,
        tokenizer,
        artifact=artifact,
        summary=summary | {"run": record.to_json()},
    )
    if trainer.is_world_process_zero():
        print_summary(summary, title=f"{config.training.run_name}: finished")
    trainer.end()


if __name__ == "__main__":
    with one_line_errors():
        check_spelling()
        check_gpus()
        parsed = parse_args()
        check_output_dir(parsed.training.output_dir)
        train(parsed)
