"""An implementation of attention that computes something else than eager is refused, and packed
conversations do not see each other.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from finetune.model.attention import (
    FASTEST_FIRST,
    TOLERANCE,
    choose_attention,
    outputs_and_gradients,
    probe,
    slowest,
)
from finetune.model.loading import load_model
from finetune.model.weights import BaseWeights
from helpers.paths import python_path

LENGTHS = [50, 1, 90, 40]  # below and above the tiny model's window of 32, and one token alone


def by_definition(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    scaling: float,
    position_ids: torch.Tensor,
    without: str = "",
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """gpt-oss's attention by its definition, without the masks of transformers.

    query: (1, H, T, d); key and value: (1, H / group, T, d). without: a part to leave out.
    """
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    place = torch.arange(query.shape[2])
    distance = place[:, None] - place
    seen = distance >= 0
    if module.layer_type == "sliding_attention" and without != "windows":
        seen &= distance < module.config.sliding_window
    if without != "boundaries":
        conversation = (position_ids[0] == 0).cumsum(0)
        seen &= conversation[:, None] == conversation
    weights = (query @ key.transpose(2, 3) * scaling).exp() * seen
    total = weights.sum(-1, keepdim=True)
    if without != "sinks":
        total = total + module.sinks.exp().view(1, -1, 1, 1)
    return (weights / total @ value).transpose(1, 2), None


def test_all_ranks_use_the_slowest_that_one_of_them_has() -> None:
    flash, flex = FASTEST_FIRST
    assert slowest([flash]) == slowest([flash, flash]) == flash
    assert slowest([flash, flex]) == flex
    assert slowest([flash, flex, "eager", flash]) == "eager"


@pytest.fixture(params=["nothing", "sinks", "windows", "boundaries"])
def without(request: pytest.FixtureRequest) -> Iterator[str]:
    """Registers an implementation of this name that lacks this part."""
    name = request.param
    ALL_ATTENTION_FUNCTIONS[name] = partial(by_definition, without=name)
    ALL_MASK_ATTENTION_FUNCTIONS[name] = eager_mask
    yield name
    del ALL_ATTENTION_FUNCTIONS[name], ALL_MASK_ATTENTION_FUNCTIONS[name]


def test_an_implementation_that_lacks_a_part_is_refused(without: str) -> None:
    refusal = probe(without, device="cpu")
    if without == "nothing":
        assert refusal is None
        expected = outputs_and_gradients("eager", device="cpu", dtype=torch.float32)
        actual = outputs_and_gradients(without, device="cpu", dtype=torch.float32)
        for name, value in expected.items():
            assert (actual[name] - value).norm() <= 1e-5 * value.norm(), name
    else:
        assert refusal is not None and "differs from eager's by" in refusal


def test_an_implementation_that_cannot_run_is_refused_with_the_reason() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    assert "Error: " in str(probe("flash_attention_4", device="cpu"))
    assert choose_attention() == "eager"


def test_packed_conversations_do_not_see_each_other(tiny_model: Path) -> None:
    model = load_model(BaseWeights(str(tiny_model)), attn_implementation="eager").float()
    ids = torch.randint(0, 256, (1, sum(LENGTHS)), generator=torch.Generator().manual_seed(0))
    positions = torch.cat([torch.arange(length) for length in LENGTHS])[None]
    with torch.no_grad():
        together = model(input_ids=ids, position_ids=positions).logits[0]
        alone = [model(input_ids=part).logits[0] for part in ids.split(LENGTHS, dim=1)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-5, atol=1e-5)


READ_BY_FLASH_ATTENTION = """
from finetune.model.attention import cache_flash_attention
cache_flash_attention()
from flash_attn.cute import cache_utils
print(cache_utils.CUTE_DSL_CACHE_ENABLED, cache_utils.CUTE_DSL_CACHE_DIR)
"""


@pytest.mark.skipif(find_spec("flash_attn") is None, reason="flash-attn-4 is for Linux alone")
def test_flash_attention_keeps_what_it_compiles() -> None:
    """In a process of its own, because flash-attn-4 reads the environment at its import."""
    envs = {name: value for name, value in os.environ.items() if "CUTE_DSL_CACHE" not in name}
    envs["PYTHONPATH"] = python_path("sft")
    command = [sys.executable, "-c", READ_BY_FLASH_ATTENTION]
    result = subprocess.run(command, env=envs, capture_output=True, text=True)
    kept = str(Path(sys.prefix) / "flash-attention-cache")
    assert result.stdout.split() == ["True", kept], result.stderr


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("lengths", [(1,), (129,), (1000, 24), (1, 300, 77, 130, 3588)])
@pytest.mark.parametrize("implementation", FASTEST_FIRST)
def test_it_equals_eager_on_the_gpu(implementation: str, lengths: tuple[int, ...]) -> None:
    if implementation == "flash_attention_4" and torch.cuda.get_device_capability()[0] not in (
        9,
        10,
    ):
        pytest.skip("flash-attn-4 needs Hopper or Blackwell")
    expected = outputs_and_gradients("eager", device="cuda", dtype=torch.float32, lengths=lengths)
    actual = outputs_and_gradients(
        implementation, device="cuda", dtype=torch.bfloat16, lengths=lengths
    )
    for name, value in expected.items():
        error = (actual[name].float() - value).norm() / value.norm()
        assert error <= TOLERANCE, f"{name}: {error:.1%}"
