"""Fine-tune gpt-oss: all weights, or LoRA on every linear layer and every expert.

    accelerate launch --config_file sft/ddp.yaml sft/train.py --use_peft true \
        --model_name_or_path openai/gpt-oss-20b --dataset_name HuggingFaceH4/Multilingual-Thinking

Every flag of TRL's SFTConfig, ModelConfig and ScriptArguments works; the task files show the ones
to set.
"""

import os
import re
import sys
import time
from pathlib import Path

import torch
from accelerate.utils import broadcast_object_list
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers import PrinterCallback, set_seed
from trl import ModelConfig, ScriptArguments, SFTConfig, SFTTrainer

from artifact import ARTIFACT, LOSS_PLOT, is_finished, save_artifact
from attention import choose_attention
from checkpoint import read_manifest, resume_from
from data import load_datasets, mean_length
from errors import one_line_errors
from experts import keep_lora_beside_experts
from fingerprint import check_same_run, fingerprint, held_out
from flags import DataArguments, RunArguments, parse_args
from launches import LaunchLog, cost, first_date, first_wandb_run, read_launches
from metrics import EvaluateAtEnd, Throughput, flops_per_token, print_summary
from model import load_model, load_tokenizer, lora_config
from mxfp4 import leave_to_each_rank
from plot import plot_losses
from preemption import EXIT_STATUS
from preflight import check_gpus, check_output_dir
from resumable import ResumableSFTTrainer, RunFinished, StopIfFinished
from saver import Saver
from watchdog import Watchdog
from weights import Checkpoint


def configure_wandb(training_args: SFTConfig) -> None:
    """W&B when a key is given: a run goes on in the W&B run of its first launch."""
    training_args.report_to = ["wandb"] if os.environ.get("WANDB_API_KEY") else []
    task_id = os.environ.get("SKYPILOT_TASK_ID")
    run_id = first_wandb_run(training_args.output_dir)
    if run_id or task_id:
        run_id = run_id or re.sub(r"[^\w-]", "-", str(task_id))
        os.environ.setdefault("WANDB_RUN_ID", run_id)
        os.environ.setdefault("WANDB_NAME", f"{training_args.run_name} {run_id}")
        os.environ.setdefault("WANDB_RESUME", "allow")


def configure_gradients(trainer: SFTTrainer) -> None:
    """Under FSDP2, add gradients up over the ranks in fp32, batch by batch; leave the loss alone.

    accelerate 1.15.0 sets all three dtypes of the policy to bf16, so that even the logged loss is
    rounded to three digits; torchtitan's defaults are these. And while it accumulates batches it
    keeps the gradient of the whole model on every GPU: 84 GB for 20b.

    In data parallel, gradients lie in the buckets they are exchanged in: no second copy of them.
    """
    accelerator = trainer.accelerator
    if trainer.is_fsdp_enabled:
        accelerator.state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16, reduce_dtype=torch.float32
        )
        accelerator.gradient_state.plugin_kwargs["sync_each_batch"] = True
    elif accelerator.ddp_handler is not None:
        accelerator.ddp_handler.gradient_as_bucket_view = True


def train(
    script_args: ScriptArguments,
    training_args: SFTConfig,
    model_args: ModelConfig,
    data_args: DataArguments,
    run_args: RunArguments,
) -> None:
    model_id, revision = model_args.model_name_or_path, model_args.model_revision
    run_dir = Path(training_args.output_dir)
    set_seed(training_args.seed)
    configure_wandb(training_args)
    training_args.include_num_input_tokens_seen = "all"
    tokenizer = load_tokenizer(model_id, revision=revision)
    # The same on every rank, and for every launch of this run.
    dates = broadcast_object_list([first_date(run_dir)])
    data_args.conversation_start_date = data_args.conversation_start_date or dates[0]
    train_dataset, eval_dataset = load_datasets(script_args, training_args, data_args, tokenizer)
    checkpoint = resume_from(training_args.resume_from_checkpoint, training_args.output_dir)
    num_processes = training_args.world_size
    identity = fingerprint(
        script_args, training_args, model_args, data_args, train_dataset, num_processes
    )
    if checkpoint and not run_args.ignore_fingerprint:
        check_same_run(checkpoint, read_manifest(Path(checkpoint))["fingerprint"], identity)
    # What the base model scores: to be said once, by the first launch.
    training_args.eval_on_start = training_args.eval_strategy != "no" and checkpoint is None
    attention = model_args.attn_implementation or choose_attention()
    weights = Checkpoint(model_id, revision=revision)
    dequantize = bool(run_args.dequantize)
    model = load_model(weights, attn_implementation=attention, dequantize=dequantize)

    saver = Saver(
        run_dir,
        every_minutes=run_args.save_every_minutes,
        keep=training_args.save_total_limit,
        manifest={"num_processes": num_processes, "fingerprint": identity},
    )
    trainer = ResumableSFTTrainer(
        model=model,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=tokenizer,
        peft_config=lora_config(model, model_args),
        callbacks=[
            StopIfFinished(),
            EvaluateAtEnd(),
            LaunchLog(run_dir, saver, wandb_run_id=os.environ.get("WANDB_RUN_ID")),
            # Before NCCL's own timeout, which names no rank.
            Watchdog(timeout=0.8 * training_args.ddp_timeout, is_excused=lambda: saver.is_waiting),
        ],
        saver=saver,
        weights=weights,
    )
    leave_to_each_rank(trainer.model)
    keep_lora_beside_experts(trainer.model)
    configure_gradients(trainer)
    throughput = Throughput(
        flops_per_token(model.config, context=mean_length(train_dataset), lora=model_args.use_peft),
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
    summary = throughput.summary(trainer.state) | cost(read_launches(run_dir))
    summary["artifact"] = str(artifact)
    if trainer.is_world_process_zero():
        plot_losses(trainer.state.log_history, artifact / LOSS_PLOT, title=training_args.run_name)
    save_artifact(
        trainer.accelerator,
        trainer.model_wrapped,
        tokenizer,
        artifact=artifact,
        summary=summary | {"run": identity | held_out(script_args, training_args)},
    )
    if trainer.is_world_process_zero():
        print_summary(summary, title=f"{training_args.run_name}: finished")
    trainer.end()


if __name__ == "__main__":
    with one_line_errors():
        check_gpus()
        arguments = parse_args()
        check_output_dir(arguments[1].output_dir)
        train(*arguments)
