"""Our kernels, compiled for Hopper and Blackwell, are bound by memory and spill nothing."""

import pytest

from helpers.kernel_code import (
    ARCHITECTURES,
    BYTES_PER_SECOND,
    INSTRUCTIONS_PER_SECOND,
    KERNELS,
    WARP,
    Kernel,
    compile_kernel,
    machine_code,
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
