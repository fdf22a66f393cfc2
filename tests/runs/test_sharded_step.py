"""A step on two processes, with FSDP2 and activation checkpointing, has the gradients of eager on
one process, and moves the bytes that roofline.py counts.
"""

import os
import subprocess
from pathlib import Path

import pytest
from safetensors import safe_open

from finetune.benchmark.traffic import bytes_between_gpus, count_parameters
from finetune.model.loading import load_config
from helpers import sharded_step
from helpers.launching import launch_command
from helpers.paths import CPU_ENVS, REPO
from helpers.tensors import assert_same


@pytest.mark.parametrize("what, config", [("all", "fsdp2.yaml"), ("lora", "fsdp2_lora.yaml")])
def test_a_sharded_step_has_eagers_gradients_and_moves_the_counted_bytes(
    what: str, config: str, tiny_model: Path, tmp_path: Path
) -> None:
    file = tmp_path / "gradients.safetensors"
    script = REPO / "tests/helpers/sharded_step.py"
    command = launch_command(config, str(tiny_model), what, str(file), script=script)
    command.insert(2, "--mixed_precision=no")
    subprocess.run(command, env=os.environ | CPU_ENVS, check=True)

    lora = what == "lora"
    model = sharded_step.make_model(str(tiny_model), "eager", use_peft=lora)
    sharded_step.randomize_adapters(model)
    for rank in range(2):
        (model(**sharded_step.batch(rank)).loss / 2).backward()
    with safe_open(file, "pt") as stored:
        gradients = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
        moved = int(stored.metadata()["bytes_moved"])
    assert_same(gradients, sharded_step.gradients(model), tolerance=1e-4)

    parameters = count_parameters(
        load_config(str(tiny_model)), sharded_step.lora_flags(use_peft=lora)
    )
    counted = bytes_between_gpus(parameters, sharded=True, lora=lora)
    reduced = 4 * (parameters.adapter if lora else parameters.model)
    # Counted are weights gathered in bf16. This step gathers them in fp32: twice the bytes.
    expected = 2 * (counted - reduced) + reduced
    assert moved == pytest.approx(expected, rel=0.01)
