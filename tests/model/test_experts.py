"""Experts and their LoRA equal transformers' eager ones: the output and every gradient."""

from functools import partial
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import ParamWrapper
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from transformers import GptOssConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssMLP

from finetune.model import (
    experts,
    flops,  # noqa: F401  it registers the FLOPs of grouped GEMMs
)
from finetune.model.experts import (
    EXPERTS_IMPLEMENTATION,
    LowRankParamWrapper,
    register_experts,
    use_grouped_lora,
)
from helpers.tensors import GPU, assert_same

HIDDEN, INTERMEDIATE, NUM_EXPERTS, TOP_K = 64, 96, 8, 4


def make_mlp(implementation: str, *, std: float = 0.3) -> GptOssMLP:
    """A router with its experts. With the default `std` some gates and ups are clamped."""
    register_experts()
    torch.manual_seed(0)
    config = GptOssConfig(
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_local_experts=NUM_EXPERTS,
        num_experts_per_tok=TOP_K,
        experts_implementation=implementation,
    )
    mlp = GptOssMLP(config)
    for parameter in mlp.parameters():
        torch.nn.init.normal_(parameter, std=std)
    return mlp


def with_lora(mlp: torch.nn.Module, *, low_rank: bool, r: int = 8) -> torch.nn.Module:
    torch.manual_seed(1)
    config = LoraConfig(
        r=r, lora_alpha=16, target_parameters=["experts.gate_up_proj", "experts.down_proj"]
    )
    model = get_peft_model(torch.nn.ModuleDict({"mlp": mlp}), config).model["mlp"]
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)  # B is zero at first
    if low_rank:
        use_grouped_lora(model)
    return model


def gradients(mlp: torch.nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """The output, and the gradients of the input and of all parameters that have one."""
    x = x.clone().requires_grad_()
    y, _ = mlp(x)
    weight = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
    (y * weight).sum().backward()
    named = {name: p.grad for name, p in mlp.named_parameters() if p.grad is not None}
    return {"output": y.detach(), "input": x.grad, **named}


def tokens(shape: tuple[int, int]) -> torch.Tensor:
    return torch.randn(*shape, HIDDEN, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("shape", [(2, 37), (1, 1), (1, 128)])
def test_experts_equal_eager(shape: tuple[int, int]) -> None:
    expected = gradients(make_mlp("eager"), tokens(shape))
    actual = gradients(make_mlp(EXPERTS_IMPLEMENTATION), tokens(shape))
    assert {"router.weight", "router.bias", "experts.gate_up_proj_bias"} <= actual.keys()
    assert_same(actual, expected, tolerance=1e-5)


@pytest.mark.parametrize("shape", [(2, 37), (1, 1), (1, 128)])
def test_lora_equals_pefts_own_path(shape: tuple[int, int]) -> None:
    expected = gradients(with_lora(make_mlp("eager"), low_rank=False), tokens(shape))
    actual = gradients(with_lora(make_mlp(EXPERTS_IMPLEMENTATION), low_rank=True), tokens(shape))
    assert sum("lora_" in name for name in actual) == 4
    assert not any(name.endswith(("gate_up_proj", "down_proj")) for name in actual)
    assert_same(actual, expected, tolerance=1e-5)


@pytest.mark.parametrize("device", ["cpu", GPU])
@pytest.mark.parametrize("r", [0, 3, 8], ids=["experts", "r=3", "r=8"])
def test_bf16_is_as_near_to_fp32_as_eager_is(device: str, r: int) -> None:
    def of(implementation: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        # With a std of 0.1 no gate is near its clamp: rounding one across it would hide the rest.
        model: torch.nn.Module = make_mlp(implementation, std=0.1)
        if r:
            model = with_lora(model, low_rank=implementation == EXPERTS_IMPLEMENTATION, r=r)
        return gradients(model.to(device, dtype), tokens((2, 64)).to(device, dtype))

    reference = of("eager", torch.float32)
    eager, actual = of("eager", torch.bfloat16), of(EXPERTS_IMPLEMENTATION, torch.bfloat16)
    for name, value in reference.items():
        error, allowed = ((x[name].float() - value).norm() for x in (actual, eager))
        assert error <= 1.2 * allowed, name


@pytest.mark.parametrize("chosen", [[3, 0, 5, 6], [7, 6, 5, 4]])
def test_experts_without_any_token_change_nothing(chosen: list[int]) -> None:
    """All tokens go to the same experts, so that the first, the last or some between have none."""
    index = torch.tensor([chosen]).repeat(5, 1)
    weights = torch.rand(5, TOP_K, generator=torch.Generator().manual_seed(3))
    results = []
    for implementation in ("eager", EXPERTS_IMPLEMENTATION):
        mlp = make_mlp(implementation)
        x, w = tokens((1, 5))[0].requires_grad_(), weights.clone().requires_grad_()
        y = mlp.experts(x, index, w)
        y.square().sum().backward()
        named = {name: p.grad for name, p in mlp.experts.named_parameters()}
        results.append({"output": y.detach(), "input": x.grad, "weights": w.grad, **named})
    assert_same(results[1], results[0], tolerance=1e-5)


@pytest.mark.parametrize("is_checkpointed", [False, True])
@pytest.mark.parametrize("shape", [(2, 37), (1, 32), (1, 33)])
def test_tiles_equal_the_whole(
    shape: tuple[int, int], is_checkpointed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also inside a layer that is a checkpoint itself, and with what a full run trains."""
    for make in (partial(with_lora, low_rank=True), lambda mlp: mlp):
        monkeypatch.setattr(experts, "TILE", 10**6)
        expected = gradients(make(make_mlp(EXPERTS_IMPLEMENTATION)), tokens(shape))
        monkeypatch.setattr(experts, "TILE", 16)
        mlp = make(make_mlp(EXPERTS_IMPLEMENTATION))
        if is_checkpointed:
            forward = mlp.forward
            mlp.forward = lambda x, forward=forward: checkpoint(forward, x, use_reentrant=False)
        assert_same(gradients(mlp, tokens(shape)), expected, tolerance=1e-5)


def test_two_steps_are_equal_bit_for_bit() -> None:
    first, second = (gradients(make_mlp(EXPERTS_IMPLEMENTATION), tokens((2, 64))) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_disabled_adapter_leaves_the_base_model() -> None:
    x = tokens((1, 16))
    model = with_lora(make_mlp(EXPERTS_IMPLEMENTATION), low_rank=True)
    wrappers = [module for module in model.modules() if isinstance(module, ParamWrapper)]
    assert {type(wrapper) for wrapper in wrappers} == {LowRankParamWrapper}
    for wrapper in wrappers:
        wrapper.enable_adapters(False)
    assert torch.equal(model(x)[0], make_mlp(EXPERTS_IMPLEMENTATION)(x)[0])


def test_pefts_merge_still_works() -> None:
    x = tokens((1, 16))
    model = with_lora(make_mlp(EXPERTS_IMPLEMENTATION), low_rank=True)
    expected = model(x)[0]
    for module in model.modules():
        if isinstance(module, LowRankParamWrapper):
            module.merge()
    torch.testing.assert_close(model(x)[0], expected, rtol=1e-4, atol=1e-4)


class LargestTensor(torch.utils._python_dispatch.TorchDispatchMode):
    """Keeps the number of elements of the largest tensor that any operation makes."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore
        result = func(*args, **(kwargs or {}))
        views = func.is_view or "detach" in func.__name__ or "transpose" in func.__name__
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and not views:
                self.largest = max(self.largest, tensor.numel())
        return result


def test_lora_makes_nothing_as_large_as_a_stack_of_experts() -> None:
    x = tokens((1, 4))
    stack = NUM_EXPERTS * HIDDEN * INTERMEDIATE
    made = {}
    for low_rank in (False, True):
        model = with_lora(make_mlp(EXPERTS_IMPLEMENTATION), low_rank=low_rank)
        with LargestTensor() as mode:
            gradients(model, x)
        made[low_rank] = mode.largest
    assert made[False] >= stack  # PEFT's own path makes one, so the measurement works
    assert made[True] <= NUM_EXPERTS * 8 * 2 * INTERMEDIATE  # the gradient of a factor


def test_lora_computes_no_gradient_of_the_frozen_weights() -> None:
    """Its FLOPs are those of the output and of the input's gradient, and those of the factors."""
    x, num_pairs = tokens((1, 64)), 64 * TOP_K
    model = with_lora(make_mlp(EXPERTS_IMPLEMENTATION), low_rank=True)
    with FlopCounterMode(display=False) as counter:
        gradients(model, x)
    base = num_pairs * 3 * HIDDEN * INTERMEDIATE + 64 * HIDDEN * NUM_EXPERTS
    factors = num_pairs * 8 * (HIDDEN + 2 * INTERMEDIATE + INTERMEDIATE + HIDDEN)
    assert 4 * base <= counter.get_total_flops() <= 1.05 * 4 * base + 6 * factors
    with FlopCounterMode(display=False) as pefts:
        gradients(with_lora(make_mlp(EXPERTS_IMPLEMENTATION), low_rank=False), x)
    assert pefts.get_total_flops() > 1.4 * counter.get_total_flops()


def test_a_checkpointed_layer_multiplies_by_down_only_twice() -> None:
    """Its recomputation ends where the tensors for backward are there, before the last product."""
    x = tokens((1, 64)).requires_grad_()
    counts: list[int] = []
    gradients: list[Any] = []
    for checkpointed in (False, True):
        model = with_lora(make_mlp(EXPERTS_IMPLEMENTATION), low_rank=True)
        with FlopCounterMode(display=False) as counter:
            y = checkpoint(model, x, use_reentrant=False)[0] if checkpointed else model(x)[0]
            y.square().sum().backward()
        counts.append(counter.get_total_flops())
        gradients.append({name: p.grad for name, p in model.named_parameters() if "lora" in name})
    down = 2 * 64 * TOP_K * HIDDEN * INTERMEDIATE
    assert 2 * down < counts[1] - counts[0] < 3 * down  # gate_up has twice the size of down
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])
