"""Compare the experts as they would run on this GPU with their definition in fp32, before training.

Some GPUs have been reported to give wrong gradients, or NaN, for experts that no token goes to.
"""

from types import SimpleNamespace
from typing import Any

import torch

from finetune.errors import UserError
from finetune.model import expert_ops, mxfp4
from finetune.model.experts import experts_forward
from finetune.model.mxfp4 import BLOCK_SIZE, Mxfp4Weight
from finetune.model.probing import failure_of, relative_difference

# Relative error against fp32: bf16 itself rounds by 0.4%, and what is left out or wrong is more.
TOLERANCE = 0.05
NUM_TOKENS, NUM_EXPERTS, HIDDEN, INTERMEDIATE, RANK = 40, 8, 128, 160, 8
USED = (1, 2, 5, 6)  # the first, the last and some between get no token
ALPHA, LIMIT, SCALING = 1.702, 7.0, 2.0


def check_experts() -> None:
    """Turn our kernels off if they are wrong on this GPU; PyTorch's operations then stand in.

    Each rank does so for itself: both compute the same but for rounding. Prints what was found in
    one line, or nothing if all is well. Raises UserError if PyTorch's own are wrong too.
    """
    if not torch.cuda.is_available():
        return
    major, minor = torch.cuda.get_device_capability()
    if major < 9:
        print(
            f"experts: torch has fast grouped GEMMs from Hopper (sm_90) on; this GPU is "
            f"sm_{major}{minor}, where their fallback takes longer",
            flush=True,
        )
    refusal = probe("cuda")
    if refusal is None:
        return
    print(f"experts: our kernels are not used, which takes longer: {refusal}", flush=True)
    # None is what these modules have where Triton is not installed.
    expert_ops.expert_kernels = mxfp4.kernels = None  # type: ignore[assignment]
    refusal = probe("cuda")
    if refusal is not None:
        raise UserError(
            f"experts: PyTorch's grouped GEMMs are wrong on this GPU ({refusal}): "
            "train on another kind of GPU, or with another version of torch"
        )


def probe(device: str) -> str | None:
    """Why the experts cannot be trusted on this device; None if they equal their definition."""
    expected = outputs_and_gradients("cpu", torch.float32)
    try:
        actual = outputs_and_gradients(device, torch.bfloat16)
    except Exception as error:  # whatever a kernel's compiler raises
        return failure_of(error)
    for name, value in expected.items():
        difference = relative_difference(actual[name], value)
        if not difference <= TOLERANCE:
            return f"{name} differs from fp32's by {difference:.1%}"
    return None


def outputs_and_gradients(device: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The experts with LoRA on a base in MXFP4: their output (T, D), and all gradients.

    In fp32 by their definition, else as they are trained. The random numbers are always the same.
    """
    generator = torch.Generator().manual_seed(0)

    def leaf(*shape: int, std: float) -> torch.Tensor:
        values = std * torch.randn(*shape, generator=generator)
        return values.to(torch.bfloat16).to(device, dtype).requires_grad_()

    def packed(inner: int, out: int) -> tuple[torch.Tensor, torch.Tensor]:
        shape = (NUM_EXPERTS, out, inner // BLOCK_SIZE)
        blocks = torch.randint(0, 256, (*shape, BLOCK_SIZE // 2), generator=generator)
        scales = torch.randint(119, 123, shape, generator=generator)
        return blocks.byte().to(device), scales.byte().to(device)

    stacks = {
        "gate_up_proj": packed(HIDDEN, 2 * INTERMEDIATE),
        "down_proj": packed(INTERMEDIATE, HIDDEN),
    }
    leaves = {
        "tokens": leaf(NUM_TOKENS, HIDDEN, std=1.0),
        "router's weights": leaf(NUM_TOKENS, 2, std=0.5),
        "A of gate_up": leaf(NUM_EXPERTS, HIDDEN, RANK, std=0.1),
        "B of gate_up": leaf(NUM_EXPERTS, RANK, 2 * INTERMEDIATE, std=0.1),
        "A of down": leaf(NUM_EXPERTS, INTERMEDIATE, RANK, std=0.1),
        "B of down": leaf(NUM_EXPERTS, RANK, HIDDEN, std=0.1),
    }
    tokens, weights, a1, b1, a2, b2 = leaves.values()
    experts = SimpleNamespace(
        num_experts=NUM_EXPERTS,
        alpha=ALPHA,
        limit=LIMIT,
        gate_up_proj_bias=leaf(NUM_EXPERTS, 2 * INTERMEDIATE, std=0.5).detach(),
        down_proj_bias=leaf(NUM_EXPERTS, HIDDEN, std=0.5).detach(),
        lora_factors={"gate_up_proj": (a1, b1, SCALING), "down_proj": (a2, b2, SCALING)},
        **{name: Mxfp4Weight(*stack) for name, stack in stacks.items()},
    )
    choices = [torch.randperm(len(USED), generator=generator)[:2] for _ in range(NUM_TOKENS)]
    index = torch.tensor(USED)[torch.stack(choices)].to(device)
    run = by_definition if dtype == torch.float32 else experts_forward
    y = run(experts, tokens, index, weights)
    (y * leaf(*y.shape, std=1.0).detach()).sum().backward()
    named = {f"the gradient of {name}": leaf.grad for name, leaf in leaves.items()}
    return {"the output": y.detach(), **named}  # type: ignore[dict-item]


def by_definition(
    experts: Any, tokens: torch.Tensor, index: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """gpt-oss's experts one by one, as GptOssExperts of transformers has them, in fp32."""
    a1, b1, scaling = experts.lora_factors["gate_up_proj"]
    a2, b2, _ = experts.lora_factors["down_proj"]
    gate_up_proj = experts.gate_up_proj.dense().float() + scaling * a1 @ b1
    down_proj = experts.down_proj.dense().float() + scaling * a2 @ b2
    y = torch.zeros_like(tokens)
    for expert in range(experts.num_experts):
        token, choice = torch.where(index == expert)
        both = tokens[token] @ gate_up_proj[expert] + experts.gate_up_proj_bias[expert]
        gate, up = both[:, ::2].clamp(max=LIMIT), both[:, 1::2].clamp(-LIMIT, LIMIT)
        out = ((up + 1) * gate * torch.sigmoid(gate * ALPHA)) @ down_proj[expert]
        out = (out + experts.down_proj_bias[expert]) * weights[token, choice, None]
        y = y.index_add(0, token, out)
    return y
