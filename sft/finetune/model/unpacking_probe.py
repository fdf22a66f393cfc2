"""Find out, before training, how this GPU multiplies with experts in MXFP4 sooner.

They are unpacked to bf16 before the product (mxfp4.py) or on their way into it
(fused_unpacking.py). Both compute the same but for rounding. Which takes less time depends on the
GPU and on how many rows an expert has, so both are timed in the shapes of the run.
"""

from dataclasses import dataclass

import torch
from accelerate import PartialState
from transformers import GptOssConfig

from finetune.model import mxfp4
from finetune.model.experts import TILE
from finetune.model.mxfp4 import BLOCK_SIZE
from finetune.model.probing import failure_of, relative_difference

# Relative difference of two results: each is rounded to bf16 once, by at most 0.4%.
TOLERANCE = 0.01
# A draw would end differently at each launch, and a resumed run would round in other places.
LEAST_GAIN = 0.05


@dataclass(frozen=True)
class Product:
    """A product of a layer: x (S, in or out) with a stack. times: how often a step computes it."""

    name: str
    x: torch.Tensor
    blocks: torch.Tensor
    scales: torch.Tensor
    offsets: torch.Tensor
    transpose: bool
    times: int = 1

    def compute(self, *, in_product: bool) -> torch.Tensor:
        module = mxfp4.fused_unpacking if in_product else mxfp4
        return module.packed_grouped_mm(
            self.x, self.blocks, self.scales, self.offsets, transpose=self.transpose
        )


def choose_unpacking(config: GptOssConfig, *, num_tokens: int) -> None:
    """Unpack on the way into the product from now on, if that is right and faster on this GPU.

    num_tokens: of a microbatch. Prints what was found, on the first rank. Each rank decides for
    itself. Takes two seconds and, until it returns, some GB; call it before a model is loaded.
    """
    if not torch.cuda.is_available() or mxfp4.kernels is None:
        return
    mxfp4.unpacks_in_product = False  # an earlier choice would be timed as both
    products = products_of_layer(config, num_tokens=num_tokens, device="cuda")
    refusal = probe(products)
    if refusal is None:
        before, within = (milliseconds(products, in_product=choice) for choice in (False, True))
        is_faster = within < (1 - LEAST_GAIN) * before
        found = f"{before:.2f} ms a layer before the product, {within:.2f} ms within it"
    else:
        is_faster, found = False, f"not within the product, which is refused: {refusal}"
    chosen = "within" if is_faster else "before"
    PartialState().print(f"unpacking MXFP4: {found}; training does it {chosen} it", flush=True)
    del products
    torch.cuda.empty_cache()
    mxfp4.unpacks_in_product = is_faster


def products_of_layer(config: GptOssConfig, *, num_tokens: int, device: str) -> list[Product]:
    """The products of a checkpointed layer on random weights, forward and backward.

    Of more tokens than a tile has, those of one tile. The first and the last expert get no token.
    """
    num_tokens = min(num_tokens, TILE)
    generator = torch.Generator(device).manual_seed(0)
    num_experts, hidden = config.num_local_experts, config.hidden_size
    num_rows, width = num_tokens * config.num_experts_per_tok, config.intermediate_size
    routed = torch.randint(1, num_experts - 1, (num_rows,), generator=generator, device=device)
    offsets = torch.bincount(routed, minlength=num_experts).cumsum(0).int()

    def packed(inner: int, out: int) -> tuple[torch.Tensor, torch.Tensor]:
        shape = (num_experts, out, inner // BLOCK_SIZE)
        blocks = torch.randint(
            256, (*shape, 16), generator=generator, device=device, dtype=torch.uint8
        )
        scales = torch.randint(
            118, 124, shape, generator=generator, device=device, dtype=torch.uint8
        )
        return blocks, scales

    def rows(size: int) -> torch.Tensor:
        return torch.randn(num_rows, size, generator=generator, device=device, dtype=torch.bfloat16)

    gate_up, down = packed(hidden, 2 * width), packed(width, hidden)
    x, y = rows(hidden), rows(2 * width)
    return [
        # Twice, in the forward and in its recomputation; what comes after it is not recomputed.
        Product("gate_up", x, *gate_up, offsets, transpose=True, times=2),
        Product("down", y[:, :width].contiguous(), *down, offsets, transpose=True),
        Product("the gradient of down", x, *down, offsets, transpose=False),
        Product("the gradient of gate_up", y, *gate_up, offsets, transpose=False),
    ]


def probe(products: list[Product]) -> str | None:
    """Why unpacking within the product cannot be trusted; None if it computes the same."""
    for product in products:
        expected = product.compute(in_product=False)
        try:
            actual = product.compute(in_product=True)
        except Exception as error:  # whatever a kernel's compiler raises
            return failure_of(error)
        difference = relative_difference(actual, expected)
        if not difference <= TOLERANCE:
            return f"{product.name} differs by {difference:.1%}"
    return None


def milliseconds(products: list[Product], *, in_product: bool) -> float:
    """How long this GPU takes for all of them, the sum of their medians."""
    from triton.testing import do_bench  # here, because a CPU build of torch comes without Triton

    return sum(
        product.times
        * do_bench(lambda p=product: p.compute(in_product=in_product), return_mode="median")
        for product in products
    )
