"""Rotary position embedding of queries and keys, as one operation each way.

transformers' own is fourteen operations in forward, each of which reads and writes a tensor of the
queries' size. Here the products are added up in fp32 and rounded once.
"""

from typing import Any

import torch
from transformers.models.gpt_oss import modeling_gpt_oss

from finetune.model.probing import failure_of, relative_difference

try:
    from finetune.model import rotary_kernel
except ImportError:  # a CPU build of torch comes without Triton
    rotary_kernel = None  # type: ignore[assignment]

# Relative error of the kernel against the definition: each result is rounded to bf16 once.
TOLERANCE = 0.01


class Rotary(torch.autograd.Function):
    """rotate(), whose backward rotates back. cos and sin have no gradient."""

    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        # Not by save_for_backward: all layers share them, and a checkpointed layer need not compute
        # anything again for them.
        ctx.angles = cos, sin
        return on_device(q)(q, k, cos, sin, backwards=False)

    @staticmethod
    def backward(  # type: ignore[override]
        ctx: Any, d_q: torch.Tensor, d_k: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        return *on_device(d_q)(d_q, d_k, *ctx.angles, backwards=True), None, None


def on_device(like: torch.Tensor) -> Any:
    """The kernel where `like` is on a GPU, or else its definition."""
    if rotary_kernel is not None and (like.is_cuda or rotary_kernel.INTERPRETED):
        return rotary_kernel.rotate
    return rotate


def rotate(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, backwards: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate pairs of numbers, one of each half of a head, by their angles, or back.

    q (B, Hq, T, D), k (B, Hk, T, D); cos and sin (B, T, D / 2), which hold YaRN's scaling as well.
    """
    cos, sin = cos.float()[:, None], sin.float()[:, None]
    if backwards:
        sin = -sin

    def rotated(x: torch.Tensor) -> torch.Tensor:
        first, second = x.float().chunk(2, -1)
        y = torch.empty_like(x)  # tokens stay before heads in memory, as flash attention wants them
        y[..., : first.shape[-1]] = first * cos - second * sin
        y[..., first.shape[-1] :] = second * cos + first * sin
        return y

    return rotated(q), rotated(k)


def apply_rotary_pos_emb(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, unsqueeze_dim: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """Takes the place of modeling_gpt_oss.apply_rotary_pos_emb."""
    assert unsqueeze_dim == 1  # heads come before tokens, as GptOssAttention has them
    return Rotary.apply(q, k, cos, sin)


def use_fused_rotary() -> None:
    """Let transformers' gpt-oss rotate by one operation, by our kernel if that is right here.

    Prints in one line why the kernel is not used, or nothing if all is well.
    """
    global rotary_kernel
    # GptOssAttention looks the function up by its name, and has no other place for one's own.
    modeling_gpt_oss.apply_rotary_pos_emb = apply_rotary_pos_emb
    if not torch.cuda.is_available() or rotary_kernel is None:
        return
    refusal = probe("cuda")
    if refusal is not None:
        print(f"rotary: our kernel is not used, which takes longer: {refusal}", flush=True)
        rotary_kernel = None  # type: ignore[assignment]


def probe(device: str) -> str | None:
    """Why the kernel cannot be trusted on this device; None if it equals its definition."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(device, torch.bfloat16)

    # As GptOssAttention has them: tokens before heads in memory.
    q, k = (random(2, 37, heads, 64).transpose(1, 2) for heads in (64, 8))
    cos, sin = random(2, 37, 32), random(2, 37, 32)
    for backwards in (False, True):
        expected = rotate(q.float(), k.float(), cos, sin, backwards=backwards)
        try:
            actual = rotary_kernel.rotate(q, k, cos, sin, backwards=backwards)
        except Exception as error:  # whatever a kernel's compiler raises
            return failure_of(error)
        for ours, exact in zip(actual, expected, strict=True):
            difference = relative_difference(ours, exact)
            if not difference <= TOLERANCE:
                return f"it differs from its definition by {difference:.1%}"
    return None
