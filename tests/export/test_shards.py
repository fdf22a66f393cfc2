"""Shards on disk: byte for byte where nothing changed, resumable, one stack in memory at a time."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from finetune.errors import UserError
from finetune.export.merge import MergedWeights
from finetune.export.shards import INDEX, UNFINISHED, plan_shards, write_weights
from helpers.finished_runs import open_run, save_adapter_run
from helpers.paths import CONVERSATIONS, CPU_ENVS
from helpers.tensors import load_shards
from tiny_gpt_oss import conversation_texts, save_tiny_gpt_oss

SMALL = 100_000  # bytes of a shard: many shards of the tiny model


def test_an_unchanged_base_is_written_byte_for_byte(tiny_model: Path, tmp_path: Path) -> None:
    base = shutil.copytree(tiny_model, tmp_path / "base")
    published = load_file(base / "model.safetensors")
    name = "model.layers.0.mlp.experts.down_proj_blocks"
    # Blocks for which a quantiser would choose other bytes: zeros, negative zeros, small values.
    published[name][0, 0], published[name][0, 1] = 0, 0x88
    published[name][0, 2] &= 0x11
    save_file(published, base / "model.safetensors", metadata={"format": "pt"})
    save_adapter_run(tmp_path / "run", base, std=0.0)
    write_weights(open_run(tmp_path / "run"), tmp_path, form="mxfp4")
    ours = load_shards(tmp_path)
    assert ours.keys() == published.keys()
    for name, tensor in published.items():
        assert ours[name].dtype == tensor.dtype and ours[name].shape == tensor.shape
        assert ours[name].view(torch.uint8).equal(tensor.view(torch.uint8)), name


class InterruptedAt(MergedWeights):
    """Weights of which one cannot be read, because the user presses ctrl-c."""

    def __init__(self, merged: MergedWeights, name: str) -> None:
        super().__init__(merged.base, merged.run_weights, merged.targets)
        self.interrupted_at = name

    def rows(self, name: str, **options: object) -> torch.Tensor:  # type: ignore[override]
        if name == self.interrupted_at:
            raise KeyboardInterrupt
        return super().rows(name, **options)  # type: ignore[arg-type]


def test_an_interrupted_export_writes_only_the_missing_shards(
    run_dir: Path, tmp_path: Path
) -> None:
    output, merged = tmp_path / "out", open_run(run_dir)
    output.mkdir()
    third = plan_shards(merged, form="bf16", max_bytes=SMALL)[2]
    with pytest.raises(KeyboardInterrupt):
        write_weights(InterruptedAt(merged, third[0]), output, form="bf16", max_bytes=SMALL)
    first, second = sorted(output.glob("*.safetensors"))
    assert not (output / INDEX).exists()

    second.write_bytes(second.read_bytes()[:-1])  # as if the machine had died
    unfinished = output / UNFINISHED
    unfinished.mkdir()
    (unfinished / ".tmpAbC123").write_bytes(b"half a file")  # as safetensors names it
    before = first.stat().st_mtime_ns, second.stat().st_mtime_ns
    # Its room is free again before the room is measured.
    write_weights(
        merged,
        output,
        form="bf16",
        max_bytes=SMALL,
        free_bytes=lambda folder: 0 if (folder / UNFINISHED).exists() else 10**9,
    )
    assert first.stat().st_mtime_ns == before[0] and second.stat().st_mtime_ns > before[1]
    assert not unfinished.exists()

    modes = {file.stat().st_mode for file in output.iterdir()}
    assert len(modes) == 1  # who may read the index may read the shards
    index = json.loads((output / INDEX).read_text())["weight_map"]
    assert len(set(index.values())) > 3
    stored = load_shards(output)
    assert index.keys() == stored.keys() == set(merged.names)
    for name in merged.names:
        assert stored[name].equal(merged.dense(name)), name


def test_a_full_disk_is_noticed_before_anything_is_written(run_dir: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    with pytest.raises(UserError, match="0.0 GB of room, the export takes"):
        write_weights(open_run(run_dir), output, form="bf16", free_bytes=lambda _: 1000)
    assert not list(output.iterdir())


PEAK = """
import resource, sys
from pathlib import Path
import torch
from finetune.export.shards import stored_tensors, write_weights
from helpers.finished_runs import open_run

def peak_bytes():
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

run, output, form, num_layers = sys.argv[1:]
torch.set_num_threads(1)
merged = open_run(Path(run))
merged.chunk_bytes = 2**21  # an expert
layers = tuple(f"model.layers.{number}." for number in range(int(num_layers)))
merged.names = [name for name in merged.names if name.startswith(layers)]
stack = 2 * max(merged.shape(name).numel() for name in merged.names)
Path(output).mkdir()
stored_tensors(merged, merged.names[0], form="bf16")  # what is loaded once does not count
before = peak_bytes()
write_weights(merged, Path(output), form=form, max_bytes=stack)
total = sum(2 * merged.shape(name).numel() for name in merged.names)
print(stack, peak_bytes() - before, total)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("form", "num_layers", "stacks"), [("bf16", 8, 3), ("mxfp4", 4, 2)])
def test_memory_is_that_of_a_few_stacks_of_experts(
    form: str, num_layers: int, stacks: int, tmp_path: Path
) -> None:
    save_wide_base(tmp_path / "base")
    save_adapter_run(tmp_path / "run", tmp_path / "base")
    result = subprocess.run(
        [sys.executable, "-c", PEAK, tmp_path / "run", tmp_path / "out", form, str(num_layers)],
        env=os.environ | CPU_ENVS,
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    stack, peak, total = map(int, result.stdout.splitlines()[-1].split())
    # bf16: a stack, the same again that is being written, what a chunk takes, what malloc keeps.
    assert peak < stacks * stack < total / 2, (stack, peak, total)


def save_wide_base(folder: Path) -> None:
    """gpt-oss with stacks of 24 MiB, so that what else a process holds does not matter."""
    sizes = {"num_hidden_layers": 8, "hidden_size": 512, "intermediate_size": 768}
    texts = conversation_texts(CONVERSATIONS)[:20]
    save_tiny_gpt_oss(folder, texts, num_local_experts=16, **sizes)
