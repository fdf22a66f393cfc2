"""The functions of expert_ops.py on a GPU: one Triton kernel each, under the same names.

All of them are bound by memory traffic. So the widths of the model are constants of the compiled
kernel and only the number of rows is known at run time: then addresses need no division, and every
thread reads and writes up to 16 bytes at a time. Each number is read once, computed with in fp32,
and rounded once. Sums are in a fixed order, so that two runs are equal bit for bit.

Gates and ups are interleaved in memory. A gate and its up are read as one integer of twice their
size, so that each thread has both, and no number has to move between threads.

Rows are counted in 64 bits: a long context has more than 2 ** 31 numbers.
"""

import torch
import triton
import triton.language as tl

# With TRITON_INTERPRET=1 in the environment Triton runs the kernels on a CPU, which tests use.
INTERPRETED = triton.knobs.runtime.interpret
ROWS = 4  # that a program of swiglu handles: mostly of one expert, whose bias is then in L1
BLOCK = 1024  # columns that a program of swiglu or swiglu_backward handles at a time
# Of sum_pairs: 64 is the largest power of two that divides gpt-oss's hidden size of 2880.
SUM_ROWS, SUM_BLOCK = 16, 64


@triton.jit
def unpair(pairs, HALF: tl.constexpr, NUMBER: tl.constexpr):  # type: ignore[no-untyped-def]
    """The first and the second number of each pair, in fp32.

    NUMBER: the type of the numbers. HALF: the integer of their size.
    """
    first = pairs.to(HALF).to(NUMBER, bitcast=True)
    second = (pairs >> HALF.primitive_bitwidth).to(HALF).to(NUMBER, bitcast=True)
    return first.to(tl.float32), second.to(tl.float32)


@triton.jit
def gates_and_ups(  # type: ignore[no-untyped-def]
    gate_up,
    lora,
    bias,
    row,
    expert,
    columns,
    inside,
    INTERMEDIATE: tl.constexpr,
    HAS_LORA: tl.constexpr,
    HALF: tl.constexpr,
    NUMBER: tl.constexpr,
):
    """Gates and ups of a row in fp32, with the bias of its expert and LoRA's part."""
    places = row * INTERMEDIATE + columns
    gate, up = unpair(tl.load(gate_up + places, mask=inside, other=0), HALF, NUMBER)
    if HAS_LORA:
        more_gate, more_up = unpair(tl.load(lora + places, mask=inside, other=0), HALF, NUMBER)
        gate, up = gate + more_gate, up + more_up
    places = expert * INTERMEDIATE + columns
    gate_bias, up_bias = unpair(tl.load(bias + places, mask=inside, other=0), HALF, NUMBER)
    return gate + gate_bias, up + up_bias


@triton.jit
def sigmoid(x):  # type: ignore[no-untyped-def]
    """1 / (1 + exp(-x)). A division takes more instructions than the square of rsqrt."""
    root = tl.rsqrt(1 + tl.exp2(-1.4426950408889634 * x))
    return root * root


@triton.jit(do_not_specialize=["num_rows"])
def swiglu_kernel(  # type: ignore[no-untyped-def]
    gate_up,
    lora,
    bias,
    weights,
    expert_ids,
    order,
    result,
    num_rows,
    alpha,
    limit,
    INTERMEDIATE: tl.constexpr,
    HAS_LORA: tl.constexpr,
    HALF: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # Neighbouring programs have neighbouring columns of the same rows.
    num_blocks: tl.constexpr = (INTERMEDIATE + BLOCK - 1) // BLOCK
    columns = (tl.program_id(0) % num_blocks) * BLOCK + tl.arange(0, BLOCK)
    start = (tl.program_id(0) // num_blocks).to(tl.int64) * ROWS
    for row in range(start, tl.minimum(start + ROWS, num_rows)):
        inside = columns < INTERMEDIATE
        expert = tl.load(expert_ids + row)
        weight = tl.load(weights + tl.load(order + row)).to(tl.float32)
        gate, up = gates_and_ups(
            gate_up,
            lora,
            bias,
            row,
            expert,
            columns,
            inside,
            INTERMEDIATE,
            HAS_LORA,
            HALF,
            result.dtype.element_ty,
        )
        gate, up = tl.minimum(gate, limit), tl.clamp(up, -limit, limit)
        value = (up + 1) * gate * sigmoid(alpha * gate) * weight
        places = row * INTERMEDIATE + columns
        tl.store(result + places, value.to(result.dtype.element_ty), mask=inside)


@triton.jit
def swiglu_backward_kernel(  # type: ignore[no-untyped-def]
    grad,
    grad_lora,
    gate_up,
    lora,
    bias,
    weights,
    expert_ids,
    order,
    d_gate_up,
    d_weights,
    alpha,
    limit,
    INTERMEDIATE: tl.constexpr,
    HAS_LORA: tl.constexpr,
    HAS_GRAD_LORA: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # A program has a whole row, because the gradient of a pair's weight is the sum over its row.
    row = tl.program_id(0).to(tl.int64)
    expert, pair_number = tl.load(expert_ids + row), tl.load(order + row)
    weight = tl.load(weights + pair_number).to(tl.float32)
    d_weight = tl.zeros((BLOCK,), tl.float32)
    for start in tl.static_range(0, INTERMEDIATE, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < INTERMEDIATE
        gate, up = gates_and_ups(
            gate_up,
            lora,
            bias,
            row,
            expert,
            columns,
            inside,
            INTERMEDIATE,
            HAS_LORA,
            HALF,
            grad.dtype.element_ty,
        )
        places = row * INTERMEDIATE + columns
        d_value = tl.load(grad + places, mask=inside, other=0).to(tl.float32)
        if HAS_GRAD_LORA:
            d_value += tl.load(grad_lora + places, mask=inside, other=0).to(tl.float32)

        # A clamped value has no gradient. A value exactly at the limit has one, as in torch.clamp.
        lets_gate, lets_up = gate <= limit, (up >= -limit) & (up <= limit)
        gate, up = tl.minimum(gate, limit), tl.clamp(up, -limit, limit)
        share = sigmoid(alpha * gate)
        glu = gate * share
        d_up = d_value * glu
        d_weight += d_up * (up + 1)
        d_gate = d_value * (up + 1) * (share + alpha * glu * (1 - share))
        d_gate = tl.where(lets_gate, d_gate * weight, 0)
        d_up = tl.where(lets_up, d_up * weight, 0)
        both = 2 * start + tl.arange(0, 2 * BLOCK)
        d_both = tl.reshape(tl.join(d_gate, d_up), (2 * BLOCK,)).to(d_gate_up.dtype.element_ty)
        tl.store(d_gate_up + row * 2 * INTERMEDIATE + both, d_both, mask=both < 2 * INTERMEDIATE)
    tl.store(d_weights + pair_number, tl.sum(d_weight, 0).to(d_weights.dtype.element_ty))


@triton.jit(do_not_specialize=["num_tokens"])
def sum_pairs_kernel(  # type: ignore[no-untyped-def]
    pairs,
    lora,
    base,
    inverse,
    result,
    num_tokens,
    WIDTH: tl.constexpr,
    TOP_K: tl.constexpr,
    HAS_LORA: tl.constexpr,
    HAS_BASE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    num_blocks: tl.constexpr = (WIDTH + BLOCK - 1) // BLOCK
    columns = (tl.program_id(0) % num_blocks) * BLOCK + tl.arange(0, BLOCK)
    tokens = (tl.program_id(0) // num_blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = (tokens < num_tokens)[:, None] & (columns < WIDTH)[None, :]
    places = tokens[:, None] * WIDTH + columns[None, :]
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    if HAS_BASE:
        total += tl.load(base + places, mask=inside, other=0).to(tl.float32)
    for choice in tl.static_range(TOP_K):
        rows = tl.load(inverse + tokens * TOP_K + choice, mask=tokens < num_tokens, other=0)
        row_places = rows[:, None] * WIDTH + columns[None, :]
        total += tl.load(pairs + row_places, mask=inside, other=0).to(tl.float32)
        if HAS_LORA:
            total += tl.load(lora + row_places, mask=inside, other=0).to(tl.float32)
    tl.store(result + places, total.to(result.dtype.element_ty), mask=inside)


def swiglu(
    gate_up: torch.Tensor,
    lora: torch.Tensor | None,
    bias: torch.Tensor,
    weights: torch.Tensor,
    expert_ids: torch.Tensor,
    order: torch.Tensor,
    alpha: float,
    limit: float,
) -> torch.Tensor:
    """expert_ops.swiglu, as one kernel."""
    num_rows, intermediate = len(gate_up), gate_up.shape[1] // 2
    result = gate_up.new_empty(num_rows, intermediate)
    grid = (triton.cdiv(num_rows, ROWS) * triton.cdiv(intermediate, BLOCK),)
    swiglu_kernel[grid](
        as_pairs(gate_up),
        as_pairs(gate_up if lora is None else lora),
        as_pairs(bias),
        weights.contiguous(),
        expert_ids,
        order,
        result,
        num_rows,
        alpha,
        limit,
        INTERMEDIATE=intermediate,
        HAS_LORA=lora is not None,
        HALF=half_of(gate_up),
        ROWS=ROWS,
        BLOCK=BLOCK,
    )
    return result


def swiglu_backward(
    grad: torch.Tensor,
    grad_lora: torch.Tensor | None,
    gate_up: torch.Tensor,
    lora: torch.Tensor | None,
    bias: torch.Tensor,
    weights: torch.Tensor,
    expert_ids: torch.Tensor,
    order: torch.Tensor,
    alpha: float,
    limit: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """expert_ops.swiglu_backward, as one kernel."""
    d_gate_up = torch.empty_like(gate_up, memory_format=torch.contiguous_format)
    d_weights = torch.empty_like(weights, memory_format=torch.contiguous_format)
    swiglu_backward_kernel[(len(gate_up),)](
        grad.contiguous(),
        (grad if grad_lora is None else grad_lora).contiguous(),
        as_pairs(gate_up),
        as_pairs(gate_up if lora is None else lora),
        as_pairs(bias),
        weights.contiguous(),
        expert_ids,
        order,
        d_gate_up,
        d_weights,
        alpha,
        limit,
        INTERMEDIATE=gate_up.shape[1] // 2,
        HAS_LORA=lora is not None,
        HAS_GRAD_LORA=grad_lora is not None,
        HALF=half_of(gate_up),
        BLOCK=BLOCK,
    )
    return d_gate_up, d_weights


def sum_pairs(
    pairs: torch.Tensor,
    lora: torch.Tensor | None,
    base: torch.Tensor | None,
    inverse: torch.Tensor,
    top_k: int,
) -> torch.Tensor:
    """expert_ops.sum_pairs, as one kernel."""
    num_tokens, width = len(inverse) // top_k, pairs.shape[1]
    result = pairs.new_empty(num_tokens, width)
    grid = (triton.cdiv(num_tokens, SUM_ROWS) * triton.cdiv(width, SUM_BLOCK),)
    sum_pairs_kernel[grid](
        pairs.contiguous(),
        (pairs if lora is None else lora).contiguous(),
        (pairs if base is None else base).contiguous(),
        inverse,
        result,
        num_tokens,
        WIDTH=width,
        TOP_K=top_k,
        HAS_LORA=lora is not None,
        HAS_BASE=base is not None,
        ROWS=SUM_ROWS,
        BLOCK=SUM_BLOCK,
    )
    return result


def as_pairs(numbers: torch.Tensor) -> torch.Tensor:
    """Numbers (..., 2 N) of 16 or 32 bits as integers (..., N) of twice that size."""
    return numbers.contiguous().view(torch.int32 if numbers.element_size() == 2 else torch.int64)


def half_of(numbers: torch.Tensor) -> tl.dtype:
    """The integer that has the size of one number."""
    return tl.int16 if numbers.element_size() == 2 else tl.int32
