"""The paths that bench.py measures: the recipe, stock TRL, and the recipe with one lever changed.

Not measured, because the lock file has no package for it: 8-bit AdamW (torchao, bitsandbytes).
"""

from dataclasses import dataclass, field, replace
from typing import Any


@dataclass(frozen=True)
class Setup:
    """What a path trains with. The defaults are the recipe's.

    isolated: the conversations of a packed row do not attend to each other. dequantize: LoRA's base
    is in bf16 instead of MXFP4. flags: arguments of SFTConfig that differ.
    """

    packing: bool = True
    isolated: bool = True
    dequantize: bool = False
    attn_implementation: str | None = None  # None: the one that choose_attention() finds
    experts_implementation: str | None = None  # None: the recipe's, of model/experts.py
    grouped_lora: bool = True
    low_rank_linears: bool = True
    fused_norms: bool = True
    fused_rotary: bool = True
    unpacks_in_product: bool | None = None  # None: what choose_unpacking() finds to be faster
    saves_in_background: bool = True
    compiles_layers: bool = False
    flags: dict[str, Any] = field(default_factory=dict)


STOCK = Setup(
    packing=False,
    isolated=False,
    dequantize=True,
    attn_implementation="eager",
    experts_implementation="grouped_mm",
    grouped_lora=False,
    low_rank_linears=False,
    fused_norms=False,
    fused_rotary=False,
    saves_in_background=False,
)
PATHS = {
    "recipe": Setup(),
    "stock": STOCK,
    "stock_packed": replace(STOCK, packing=True),
    # Each of the following is the recipe with one lever changed.
    "bf16_base": Setup(dequantize=True),
    "no_packing": Setup(packing=False),
    "eager_attention": Setup(attn_implementation="eager"),
    "flex_attention": Setup(attn_implementation="flex_attention"),
    "stock_experts": Setup(
        dequantize=True, experts_implementation="grouped_mm", grouped_lora=False
    ),
    "stock_expert_lora": Setup(dequantize=True, grouped_lora=False),
    "stock_linear_lora": Setup(low_rank_linears=False),
    "eager_norms": Setup(fused_norms=False),
    "eager_rotary": Setup(fused_rotary=False),
    "unpack_before_product": Setup(unpacks_in_product=False),
    "unpack_in_product": Setup(unpacks_in_product=True),
    "no_checkpointing": Setup(flags={"activation_checkpointing": False}),
    # TRL's option: attention's outputs are kept, everything else is recomputed.
    "selective_checkpointing": Setup(
        flags={"activation_checkpointing_kwargs": {"selective": True}}
    ),
    "every_other_layer": Setup(flags={"activation_checkpointing_kwargs": {"every_n_layers": 2}}),
    "compiled": Setup(flags={"torch_compile": True}),
    "compiled_layers": Setup(compiles_layers=True),  # "regional": each decoder layer on its own
    "unfused_adamw": Setup(flags={"optim": "adamw_torch"}),
    "data_workers": Setup(flags={"dataloader_num_workers": 2, "dataloader_prefetch_factor": 2}),
}
