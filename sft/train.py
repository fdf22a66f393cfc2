"""Fine-tune gpt-oss: all weights, or LoRA on every linear layer and every expert.

    accelerate launch --config_file sft/ddp.yaml sft/train.py --use_peft true \
        --model_name_or_path openai/gpt-oss-20b --dataset_name HuggingFaceH4/Multilingual-Thinking

Every flag of TRL's SFTConfig, ModelConfig and ScriptArguments works; the task files show the ones
to set.
"""

import os
import re
from pathlib import Path

import torch
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers import set_seed
from trl import ModelConfig, ScriptArguments, SFTConfig, SFTTrainer

from checkpoint import (
    ARTIFACT,
    RunFinished,
    StopIfFinished,
    is_finished,
    resume_from,
    save_artifact,
)
from data import load_datasets
from errors import one_line_errors
from flags import parse_args
from metrics import Throughput, flops_per_token, print_summary
from model import choose_attention, load_model, load_tokenizer, lora_config
from preflight import check_gpus, check_output_dir


def configure_wandb(training_args: SFTConfig) -> None:
    """W&B when a key is given: one run per SkyPilot task, however often that is recovered."""
    training_args.report_to = ["wandb"] if os.environ.get("WANDB_API_KEY") else []
    task_id = os.environ.get("SKYPILOT_TASK_ID")
    if task_id:
        os.environ.setdefault("WANDB_RUN_ID", re.sub(r"[^\w-]", "-", task_id))
        os.environ.setdefault("WANDB_NAME", f"{training_args.run_name} {task_id}")
        os.environ.setdefault("WANDB_RESUME", "allow")


def keep_fp32_gradients(trainer: SFTTrainer) -> None:
    """Under FSDP2, add gradients up over the ranks in fp32 and leave the loss alone.

    accelerate 1.15.0 sets all three dtypes of the policy to bf16, so that even the logged loss is
    rounded to three digits; torchtitan's defaults are these.
    """
    if trainer.is_fsdp_enabled:
        trainer.accelerator.state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16, reduce_dtype=torch.float32
        )


def train(script_args: ScriptArguments, training_args: SFTConfig, model_args: ModelConfig) -> None:
    model_id, revision = model_args.model_name_or_path, model_args.model_revision
    set_seed(training_args.seed)
    configure_wandb(training_args)
    training_args.include_num_input_tokens_seen = "all"
    tokenizer = load_tokenizer(model_id, revision=revision)
    train_dataset, eval_dataset = load_datasets(script_args, training_args, tokenizer)
    checkpoint = resume_from(training_args.resume_from_checkpoint, training_args.output_dir)
    attention = model_args.attn_implementation or choose_attention()
    model = load_model(model_id, revision=revision, attn_implementation=attention)

    mean_length = sum(map(len, train_dataset["input_ids"])) / len(train_dataset)
    trainer = SFTTrainer(
        model=model,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=tokenizer,
        peft_config=lora_config(model, model_args),
        callbacks=[StopIfFinished()],
    )
    keep_fp32_gradients(trainer)
    throughput = Throughput(
        flops_per_token(model.config, context=mean_length, lora=model_args.use_peft),
        num_processes=training_args.world_size,
    )
    # First, so that what it adds to a log entry reaches the callbacks that print and send it.
    trainer.callback_handler.callbacks.insert(0, throughput)

    say = trainer.accelerator.print
    say(f"attention: {attention}; processes: {training_args.world_size}")
    say(f"resuming from {checkpoint}" if checkpoint else "no checkpoint to resume: starting fresh")
    artifact = Path(training_args.output_dir) / ARTIFACT
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    except RunFinished:
        if is_finished(artifact):
            say(f"this run had finished at step {trainer.state.global_step}: {artifact}")
            return
    summary = throughput.summary(trainer.state) | {"artifact": str(artifact)}
    save_artifact(
        trainer.accelerator, trainer.model_wrapped, tokenizer, artifact=artifact, summary=summary
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
