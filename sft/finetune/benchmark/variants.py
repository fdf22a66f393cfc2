"""The paths bench.py measures: the recipe, stock TRL, and the recipe but for one lever.

Levers that are left out, since the lock holds no package for them: Liger's or the hub's kernels for
RMSNorm and rotary (liger-kernel, kernels), 8-bit AdamW (torchao, bitsandbytes).
"""

import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import GptOssForCausalLM
from trl import ModelConfig, SFTConfig, SFTTrainer
from trl.models import enable_selective_activation_checkpointing

from finetune.benchmark.synthetic import conversations, make_config, make_model, make_tokenizer
from finetune.checkpoint.saver import Saver
from finetune.model.attention import choose_attention, isolate_packed_sequences
from finetune.model.experts import EXPERTS_IMPLEMENTATION, register_experts, use_grouped_lora
from finetune.model.lora import lora_config
from finetune.preemption import PreemptionNotice
from finetune.training.trainer import ResumableSFTTrainer, configure_gradients


@dataclass(frozen=True)
class Setup:
    """What a path trains with; the defaults are the recipe's."""

    packing: bool = True
    isolated: bool = True  # conversations of a packed row, whatever the attention
    dequantize: bool = False  # of LoRA's base
    attn_implementation: str | None = None  # None: what attention.py chooses
    experts_implementation: str = EXPERTS_IMPLEMENTATION
    grouped_lora: bool = True
    saves_in_background: bool = True
    compiles_layers: bool = False
    flags: dict[str, Any] = field(default_factory=dict)  # of SFTConfig


STOCK = Setup(
    packing=False,
    isolated=False,
    dequantize=True,
    attn_implementation="eager",
    experts_implementation="grouped_mm",
    grouped_lora=False,
    saves_in_background=False,
)
PATHS = {
    "recipe": Setup(),
    "stock": STOCK,
    "stock_packed": replace(STOCK, packing=True),
    # The recipe but for one lever.
    "bf16_base": Setup(dequantize=True),
    "no_packing": Setup(packing=False),
    "eager_attention": Setup(attn_implementation="eager"),
    "flex_attention": Setup(attn_implementation="flex_attention"),
    "stock_experts": Setup(
        dequantize=True, experts_implementation="grouped_mm", grouped_lora=False
    ),
    "stock_expert_lora": Setup(dequantize=True, grouped_lora=False),
    "no_checkpointing": Setup(flags={"activation_checkpointing": False}),
    # TRL's: what attention has made is kept, the rest computed again.
    "selective_checkpointing": Setup(
        flags={"activation_checkpointing_kwargs": {"selective": True}}
    ),
    "every_other_layer": Setup(flags={"activation_checkpointing_kwargs": {"every_n_layers": 2}}),
    "compiled": Setup(flags={"torch_compile": True}),
    "compiled_layers": Setup(compiles_layers=True),  # "regional": each decoder layer on its own
    "unfused_adamw": Setup(flags={"optim": "adamw_torch"}),
    "data_workers": Setup(flags={"dataloader_num_workers": 2, "dataloader_prefetch_factor": 2}),
}


@dataclass
class BenchArguments:
    """What to measure, and how long."""

    model: Literal["20b", "120b"] = "20b"
    num_layers: list[int] = field(
        default_factory=list,
        metadata={"help": "Fewer than the model has; of two numbers, scaled to all of them."},
    )
    use_peft: bool = True
    max_length: int = 4096
    per_device_train_batch_size: int = field(
        default=4, metadata={"help": "Packed sequences a step; stock pads as many conversations."}
    )
    num_windows: int = 5
    steps_per_window: int = 4
    warmup_steps: int = 4
    tiny: bool = False
    paths: list[str] = field(
        default_factory=lambda: ["recipe", "stock"], metadata={"help": " ".join(PATHS)}
    )
    trace: str | None = field(
        default=None, metadata={"help": "A folder for the profiler's traces."}
    )
    output: str | None = field(default=None, metadata={"help": "A file for the results as JSON."})

    @property
    def max_steps(self) -> int:
        return self.warmup_steps + self.num_windows * self.steps_per_window


def gpt_oss(model: torch.nn.Module) -> GptOssForCausalLM:
    """The model itself, below PEFT's wrappers."""
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


def make_trainer(args: BenchArguments, setup: Setup, folder: Path) -> SFTTrainer:
    num_layers = args.num_layers[0] if args.num_layers else None
    config = make_config(args.model, num_layers=num_layers, tiny=args.tiny)
    config._attn_implementation = setup.attn_implementation or choose_attention()
    register_experts()
    config._experts_implementation = setup.experts_implementation
    model = make_model(config, packed=args.use_peft and not setup.dequantize)
    if setup.packing and setup.isolated:
        isolate_packed_sequences(model)
    if (setup.flags.get("activation_checkpointing_kwargs") or {}).get("selective"):
        # TRL 1.16.0 does so to PEFT's wrapper, on which transformers does not look for it.
        enable_selective_activation_checkpointing(model)
    kwargs: dict[str, Any] = {
        "model": model,
        "args": training_arguments(args, setup, folder),
        # Without packing a row is a conversation, and some are left.
        "train_dataset": conversations(
            (args.max_steps + 1) * args.per_device_train_batch_size * args.max_length,
            max_length=args.max_length,
            vocab_size=config.vocab_size,
        ),
        "processing_class": make_tokenizer(),
        "peft_config": lora_config(
            model, ModelConfig(use_peft=args.use_peft, lora_r=8, lora_alpha=16, lora_dropout=0.0)
        ),
    }
    if setup.saves_in_background:
        saver = Saver(folder, notice=PreemptionNotice(), every_minutes=1e6, keep=None, manifest={})
        trainer = ResumableSFTTrainer(**kwargs, saver=saver)
        configure_gradients(trainer)
    else:
        trainer = SFTTrainer(**kwargs)
    if setup.grouped_lora:
        use_grouped_lora(trainer.model)
    if setup.compiles_layers:
        for layer in gpt_oss(trainer.model).model.layers:
            layer.compile()
    return trainer


def is_launched() -> bool:
    """Whether accelerate has started this process to train all weights as the recipe does."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
