"""LoRA that a matrix product adds itself computes what PEFT computes, or leaves it to PEFT."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch.utils.checkpoint import checkpoint

from finetune.model import lora_linear
from finetune.model.lora_linear import LowRankLinear, use_low_rank_linears
from helpers.tensors import GPU, assert_same

IN, OUT = 48, 40


class Projections(torch.nn.Module):
    """Two layers that read the same input, one of them without a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.o_proj = torch.nn.Linear(IN, OUT), torch.nn.Linear(IN, OUT, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.q_proj(x) * self.o_proj(x)


def adapted(dtype: torch.dtype, device: str = "cpu", **options: Any) -> PeftModel:
    """With an adapter of random numbers, which PEFT keeps in fp32."""
    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=12, target_modules=["q_proj", "o_proj"], **options)
    model = get_peft_model(Projections().to(device, dtype), config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def outputs_and_gradients(
    model: PeftModel, dtype: torch.dtype, *, autocast: bool = False, checkpointed: bool = False
) -> dict[str, torch.Tensor]:
    device = next(model.parameters()).device
    x = torch.randn(3, 7, IN, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    x.requires_grad_()
    with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
        y = checkpoint(model, x, use_reentrant=False) if checkpointed else model(x)
    y.backward(torch.linspace(-1, 1, y.numel(), device=device).view_as(y).to(y.dtype))
    grads: dict[str, Any] = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    return {"y": y.detach(), "x": x.grad, **grads}  # type: ignore[dict-item]


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """What has been computed by LoraProduct and not by PEFT."""
    found = []

    def run(*args: Any) -> torch.Tensor:
        found.append(apply(*args))
        return found[-1]

    apply: Callable[..., torch.Tensor] = lora_linear.LoraProduct.apply
    monkeypatch.setattr(lora_linear.LoraProduct, "apply", run)
    return found


@pytest.mark.parametrize("device", ["cpu", GPU])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_outputs_and_gradients_are_pefts_own(
    device: str, checkpointed: bool, products: list[torch.Tensor]
) -> None:
    expected = outputs_and_gradients(adapted(torch.float32, device), torch.float32)
    model = adapted(torch.float32, device)
    use_low_rank_linears(model)
    actual = outputs_and_gradients(model, torch.float32, checkpointed=checkpointed)
    assert len(products) == (4 if checkpointed else 2)
    assert_same(actual, expected, tolerance=1e-5)
    assert {n for n, p in model.named_parameters()} == {
        n for n, p in adapted(torch.float32).named_parameters()
    }


@pytest.mark.parametrize("device", ["cpu", GPU])
def test_under_autocast_bf16_is_no_further_from_fp32_than_pefts_own(
    device: str, products: list[torch.Tensor]
) -> None:
    base = adapted(torch.bfloat16, device)
    exact = outputs_and_gradients(base.float(), torch.float32)

    def errors(model: PeftModel) -> dict[str, float]:
        found = outputs_and_gradients(model, torch.bfloat16, autocast=True)
        assert all(v.dtype is torch.float32 for name, v in found.items() if "lora_" in name)
        return {n: float((v.float() - exact[n]).norm() / exact[n].norm()) for n, v in found.items()}

    ours = adapted(torch.bfloat16, device)
    use_low_rank_linears(ours)
    theirs = errors(adapted(torch.bfloat16, device))
    assert not products
    for name, error in errors(ours).items():
        assert error <= 1.1 * theirs[name] + 1e-4, name
    assert len(products) == 2


@pytest.mark.parametrize(
    "case", ["dropout", "rslora and bias", "dora", "disabled", "merged", "two adapters", "trained"]
)
def test_what_is_more_than_plain_lora_is_left_to_peft(
    case: str, products: list[torch.Tensor]
) -> None:
    cases: dict[str, dict[str, Any]] = {
        "dropout": {"lora_dropout": 0.5},
        "rslora and bias": {"lora_bias": True, "use_rslora": True},
        "dora": {"use_dora": True},
    }
    options = cases.get(case, {})
    results = []
    for fused in (False, True):
        model = adapted(torch.float32, **options)
        if fused:
            use_low_rank_linears(model)
            layers = [m for m in model.modules() if type(m) is LowRankLinear]
            assert len(layers) == 2
        if case == "merged":
            model.merge_adapter()
        if case == "two adapters":
            model.add_adapter("second", model.peft_config["default"])
            model.base_model.set_adapter(["default", "second"])
        if case == "trained":
            model.base_model.model.q_proj.base_layer.weight.requires_grad_()
            model.base_model.model.o_proj.base_layer.weight.requires_grad_()
        torch.manual_seed(2)
        x = torch.randn(5, IN)
        if case == "disabled":
            with model.disable_adapter():
                results.append(model(x))
        else:
            results.append(model(x))
    assert torch.equal(*results)
    assert not products
