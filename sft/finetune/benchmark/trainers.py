"""The trainer of a path: a model with random weights, random conversations, the path's levers."""

from pathlib import Path
from typing import Any

import torch
from transformers import GptOssForCausalLM
from trl import ModelConfig, SFTConfig, SFTTrainer
from trl.models import enable_selective_activation_checkpointing

from finetune.benchmark.options import BenchArguments
from finetune.benchmark.synthetic import conversations, make_config, make_model, make_tokenizer
from finetune.benchmark.variants import Setup
from finetune.checkpoint.saver import Saver
from finetune.model import mxfp4
from finetune.model.attention import choose_attention, isolate_packed_sequences
from finetune.model.experts import EXPERTS_IMPLEMENTATION, register_experts, use_grouped_lora
from finetune.model.lora import lora_config
from finetune.model.lora_linear import use_low_rank_linears
from finetune.model.norms import use_fused_norms
from finetune.model.rotary import use_fused_rotary
from finetune.model.unpacking_probe import choose_unpacking
from finetune.preemption import PreemptionNotice
from finetune.training.trainer import ResumableSFTTrainer, configure_gradients


def gpt_oss(model: torch.nn.Module) -> GptOssForCausalLM:
    """The model itself, without PEFT's wrappers."""
    return next(module for module in model.modules() if isinstance(module, GptOssForCausalLM))


def training_arguments(args: BenchArguments, setup: Setup, folder: Path) -> SFTConfig:
    return SFTConfig(
        **{
            "output_dir": str(folder),
            "max_steps": args.max_steps,
            "per_device_train_batch_size": args.per_device_train_batch_size,
            "packing": setup.packing,
            "max_length": args.max_length,
            "learning_rate": 1e-6,
            "router_aux_loss_coef": 0.0,
            "activation_checkpointing": True,
            "include_num_input_tokens_seen": "non_padding",
            "use_cpu": not torch.cuda.is_available(),
            "logging_steps": 1000,
            "save_strategy": "no",
            "report_to": [],
            "disable_tqdm": True,
            "bf16": True,
            **setup.flags,
        }
    )


def path_model(args: BenchArguments, setup: Setup) -> GptOssForCausalLM:
    """gpt-oss with the attention and the experts of a path, before LoRA is added."""
    num_layers = args.num_layers[0] if args.num_layers else None
    config = make_config(args.model, num_layers=num_layers, tiny=args.tiny)
    config._attn_implementation = setup.attn_implementation or choose_attention()
    register_experts()
    config._experts_implementation = setup.experts_implementation or EXPERTS_IMPLEMENTATION
    is_packed = args.use_peft and not setup.dequantize
    if is_packed and setup.unpacks_in_product is None:
        num_tokens = args.per_device_train_batch_size * args.max_length
        choose_unpacking(config, num_tokens=num_tokens)
    elif setup.unpacks_in_product is not None:
        mxfp4.unpacks_in_product = setup.unpacks_in_product
    model = make_model(config, packed=is_packed)
    if setup.fused_norms:
        use_fused_norms(model)
    if setup.fused_rotary:
        use_fused_rotary()
    if setup.packing and setup.isolated:
        isolate_packed_sequences(model)
    if (setup.flags.get("activation_checkpointing_kwargs") or {}).get("selective"):
        # TRL 1.16.0 does this to PEFT's wrapper, but transformers looks for it on the model itself.
        enable_selective_activation_checkpointing(model)
    return model


def make_trainer(args: BenchArguments, setup: Setup, folder: Path) -> SFTTrainer:
    """A trainer that is ready to train. folder: where its checkpoints go."""
    model = path_model(args, setup)
    kwargs: dict[str, Any] = {
        "model": model,
        "args": training_arguments(args, setup, folder),
        # One step's tokens more than packed rows need: the parts are timed on another batch. A
        # path that does not pack takes a conversation a row, and leaves some over.
        "train_dataset": conversations(
            (args.max_steps + 1) * args.per_device_train_batch_size * args.max_length,
            max_length=args.max_length,
            vocab_size=model.config.vocab_size,
        ),
        "processing_class": make_tokenizer(),
        "peft_config": lora_config(
            model, ModelConfig(use_peft=args.use_peft, lora_r=8, lora_alpha=16, lora_dropout=0.0)
        ),
    }
    if setup.saves_in_background:
        # It saves only when asked: an interval that never passes, and a notice that never comes.
        saver = Saver(folder, notice=PreemptionNotice(), every_minutes=1e6, keep=None, manifest={})
        trainer = ResumableSFTTrainer(**kwargs, saver=saver)
        configure_gradients(trainer)
    else:
        trainer = SFTTrainer(**kwargs)
    if setup.grouped_lora:
        use_grouped_lora(trainer.model)
    if setup.low_rank_linears:
        use_low_rank_linears(trainer.model)
    if setup.compiles_layers:
        for layer in gpt_oss(trainer.model).model.layers:
            layer.compile()
    return trainer
