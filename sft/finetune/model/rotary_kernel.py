"""rotary.rotate on a GPU: queries and keys by one Triton kernel, bound by memory traffic.

A program rotates all heads of one token, which share their cosines and sines. Results are laid out
in memory as the heads are given.
"""

import torch
import triton
import triton.language as tl

# With TRITON_INTERPRET=1 in the environment Triton runs the kernel on a CPU, which tests use.
INTERPRETED = triton.knobs.runtime.interpret


@triton.jit
def rotate_heads(  # type: ignore[no-untyped-def]
    x,
    y,
    head_stride,
    cosines,
    sines,
    columns,
    NUM_HEADS: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
):
    """All heads of a token, from x to y. HEADS: NUM_HEADS, up to a power of two."""
    heads = tl.arange(0, HEADS)
    inside = (heads < NUM_HEADS)[:, None] & (columns < HALF)[None, :]
    places = heads[:, None] * head_stride + columns[None, :]
    first = tl.load(x + places, mask=inside, other=0).to(tl.float32)
    second = tl.load(x + places + HALF, mask=inside, other=0).to(tl.float32)
    number = y.dtype.element_ty
    tl.store(y + places, (first * cosines - second * sines).to(number), mask=inside)
    tl.store(y + places + HALF, (second * cosines + first * sines).to(number), mask=inside)


@triton.jit(do_not_specialize=["length"])
def rotary_kernel(  # type: ignore[no-untyped-def]
    q,
    k,
    cos,
    sin,
    q_out,
    k_out,
    length,
    q_row,
    q_head,
    q_token,
    k_row,
    k_head,
    k_token,
    NUM_QUERIES: tl.constexpr,
    QUERIES: tl.constexpr,
    NUM_KEYS: tl.constexpr,
    KEYS: tl.constexpr,
    HALF: tl.constexpr,
    COLUMNS: tl.constexpr,
    BACKWARDS: tl.constexpr,
):
    """length: tokens of a row. q_row, q_head, q_token and those of k: how far apart they are."""
    # 64 bits: a long context has more than 2 ** 31 numbers.
    place = tl.program_id(0).to(tl.int64)
    row, token = place // length, place % length
    columns = tl.arange(0, COLUMNS)
    inside = columns < HALF
    cosines = tl.load(cos + place * HALF + columns, mask=inside, other=0).to(tl.float32)[None, :]
    sines = tl.load(sin + place * HALF + columns, mask=inside, other=0).to(tl.float32)[None, :]
    if BACKWARDS:
        sines = -sines
    start = row * q_row + token * q_token
    rotate_heads(
        q + start, q_out + start, q_head, cosines, sines, columns, NUM_QUERIES, QUERIES, HALF
    )
    start = row * k_row + token * k_token
    rotate_heads(k + start, k_out + start, k_head, cosines, sines, columns, NUM_KEYS, KEYS, HALF)


def rotate(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, backwards: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """rotary.rotate, as one kernel."""
    q, k = dense(q), dense(k)
    q_out, k_out = torch.empty_like(q), torch.empty_like(k)
    num_rows, num_queries, length, head_dim = q.shape
    num_keys, half = k.shape[1], head_dim // 2
    rotary_kernel[(num_rows * length,)](
        q,
        k,
        cos.contiguous(),
        sin.contiguous(),
        q_out,
        k_out,
        length,
        *q.stride()[:3],
        *k.stride()[:3],
        NUM_QUERIES=num_queries,
        QUERIES=triton.next_power_of_2(num_queries),
        NUM_KEYS=num_keys,
        KEYS=triton.next_power_of_2(num_keys),
        HALF=half,
        COLUMNS=triton.next_power_of_2(half),
        BACKWARDS=backwards,
    )
    return q_out, k_out


def dense(x: torch.Tensor) -> torch.Tensor:
    """x, or a copy of it, such that torch.empty_like lays its result out in the same way."""
    is_dense = x.stride(-1) == 1 and torch.empty_like(x).stride() == x.stride()
    return x if is_dense else x.contiguous()
