"""Our kernels, compiled for Hopper and Blackwell, are bound by memory or by tensor cores."""

import pytest

from helpers.kernel_code import (
    ARCHITECTURES,
    BYTES_PER_SECOND,
    INSTRUCTIONS_PER_SECOND,
    KERNELS,
    PRODUCTS,
    WARP,
    Kernel,
    compile_kernel,
    machine_code,
    product_row,
    table_row,
)
from helpers.paths import REPO

EVERY_KERNEL = pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)


@EVERY_KERNEL
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_its_instructions_take_less_than_half_the_time_of_its_memory_traffic(
    kernel: Kernel, architecture: int
) -> None:
    """By the data sheet of H100. Half, because some instructions take more than one cycle."""
    code = machine_code(kernel, architecture)
    seconds = code.per_element(kernel) / WARP / INSTRUCTIONS_PER_SECOND
    assert seconds < 0.5 * kernel.bytes / BYTES_PER_SECOND
    assert code.stack_bytes == 0 and code.registers <= 80
    assert not [name for name in code.instructions if name.startswith(("LDL", "STL"))]
    assert "STG.E.128" in code.instructions  # 16 bytes at a time
    assert table_row(kernel, architecture) in (REPO / "docs/benchmarks.md").read_text()


@EVERY_KERNEL
def test_it_flushes_no_subnormal_number_to_zero(kernel: Kernel) -> None:
    """Unpacking multiplies such numbers; exp2 and rsqrt never see one that matters."""
    ptx = compile_kernel(kernel, 90).asm["ptx"]
    assert "mul.f32" in ptx or "add.f32" in ptx
    assert "mul.ftz" not in ptx and "add.ftz" not in ptx


@pytest.mark.parametrize("product", PRODUCTS, ids=lambda product: product.name)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_weights_are_unpacked_while_hoppers_tensor_cores_multiply(
    product: Kernel, architecture: int
) -> None:
    """On Hopper its instructions take less time than its products, on Blackwell they bound it."""
    code = machine_code(product, architecture)
    assert code.share_of_tensor_time(product, architecture) < (1 if architecture == 90 else 2)
    # One program unpacks while another multiplies: two have room on a multiprocessor.
    assert code.stack_bytes == 0 and 2 * code.registers * product.num_threads <= 65_536
    assert 2 * code.shared_bytes <= 227 * 1024
    # Rows and packed bytes are copied in the background, two bf16 numbers are scaled at once, and
    # the products are those of tensor cores.
    assert "LDGSTS.E.BYPASS.128" in code.instructions
    assert "HMUL2.BF16_V2" in code.instructions
    products = {90: "HGMMA", 100: "UTCHMMA"}
    assert any(name.startswith(products[architecture]) for name in code.instructions)
    assert product_row(product, architecture) in (REPO / "docs/benchmarks.md").read_text()


@pytest.mark.parametrize("product", PRODUCTS, ids=lambda product: product.name)
def test_a_product_flushes_no_subnormal_weight_to_zero(product: Kernel) -> None:
    ptx = compile_kernel(product, 90).asm["ptx"]
    assert "mul.bf16x2" in ptx and "ftz" not in ptx
