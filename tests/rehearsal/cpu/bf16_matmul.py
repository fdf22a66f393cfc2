"""Products of bf16 matrices, by way of fp32, for processors that have no instructions for bf16.

On those torch 2.13.0 multiplies bf16 ten to twenty times more slowly than fp32, and a rehearsal
spends most of its time there. Converted, multiplied and rounded once, the result is the one that
a GPU's tensor cores aim at: sums in fp32, rounded to bf16.
"""

import warnings
from typing import Any

import torch
from torch import Tensor

PRODUCTS = ("mm", "mm.out", "bmm", "bmm.out", "addmm", "addmm.out")


def replace_slow_kernels(library: torch.library.Library) -> None:
    """Take the place of torch's kernels, below autograd, if this processor has none for bf16.

    library: of "aten" and "IMPL". torch takes its own kernels back when it is collected.
    """
    has_mkldnn = torch.backends.mkldnn.is_available()
    if not (has_mkldnn and torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        for name in PRODUCTS:
            replace_kernel(library, name)


def replace_kernel(library: torch.library.Library, name: str) -> None:
    kernel = torch.library.get_kernel(f"aten::{name}", "CPU")
    in_fp32 = getattr(torch.ops.aten, name.removesuffix(".out")).default

    def product(keyset: Any, *factors: Tensor, out: Tensor | None = None, **scales: Any) -> Tensor:
        if factors[-1].dtype is not torch.bfloat16:
            given = {} if out is None else {"out": out}
            return kernel.call_boxed(keyset, *factors, **scales, **given)
        result = in_fp32(*(factor.float() for factor in factors), **scales)
        return result.bfloat16() if out is None else out.copy_(result)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that a kernel is replaced
        library.impl(name, product, "CPU", with_keyset=True)
