"""Run a task file on this machine, to its end, with a tiny gpt-oss, before a GPU is rented.

    python tests/rehearsal/rehearse.py gpt-oss-20b-lora.yaml [--dataset my.jsonl]

What runs is the file's own envs and `run` block, with its mounts mapped to folders below
.rehearsal/ and the SKYPILOT_ variables of a cluster with two processes. The run is killed at its
first checkpoint, as a preempted node is, launched again as SkyPilot would, and what it leaves is
loaded and compared with the base model.
"""

import argparse
import ast
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import yaml
from rich.console import Console
from rich.table import Table

from tiny_gpt_oss import conversation_texts, save_tiny_gpt_oss

REPO = Path(__file__).resolve().parents[2]
CONVERSATIONS = REPO / "tests/rehearsal/conversations.jsonl"
# After the user's own: small enough for two CPU cores; the learning rate suits random weights.
TRAIN_ARGS = "--use_cpu true --max_steps 12 --max_length 1024 --learning_rate 1e-2 --save_steps 4"
NUM_PROCESSES = 2
SHOWN = ("data:", "attention:", "resuming", "no checkpoint", "this run", "checkpoint ")

console = Console(highlight=False, soft_wrap=True)


@dataclass
class Attempt:
    """What one launch of the run block printed."""

    log: Path
    losses: list[float] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    status: int | None = None


def read_task(task_file: Path) -> dict[str, Any]:
    """The task as SkyPilot reads it, null envs (to be given at launch) as empty ones."""
    task = yaml.safe_load(task_file.read_text())
    task["envs"] = {name: str(value or "") for name, value in task["envs"].items()}
    return task


def map_mounts(text: str, mounts: dict[str, Path]) -> str:
    """Replace each mount point, where it stands as a path of its own, by a local folder."""
    for mount, folder in mounts.items():
        text = re.sub(rf"(?<![\w./~-]){re.escape(mount)}(?=[/\s\"']|$)", str(folder), text)
    return text


def node_envs(
    task: dict[str, Any], work: Path, *, dataset: str, model: Path
) -> list[dict[str, str]]:
    """Each node's environment: the task's envs, SkyPilot's own, what stands in for GPUs."""
    num_nodes = min(task.get("num_nodes", 1), NUM_PROCESSES)
    task_envs = {name: map_mounts(value, mounts(work)) for name, value in task["envs"].items()}
    envs = {
        **os.environ,
        **task_envs,
        "MODEL": str(model),
        "DATASET": dataset,
        "CHECKPOINT_BUCKET": "",
        "WANDB_API_KEY": "",
        "TRAIN_ARGS": f"{os.environ.get('TRAIN_ARGS', task_envs['TRAIN_ARGS'])} {TRAIN_ARGS}",
        "SKYPILOT_TASK_ID": f"rehearsal-{task['name']}",
        "SKYPILOT_NUM_NODES": str(num_nodes),
        "SKYPILOT_NUM_GPUS_PER_NODE": str(NUM_PROCESSES // num_nodes),
        "SKYPILOT_NODE_IPS": "\n".join(["127.0.0.1"] * num_nodes),
        "PYTHONPATH": str(REPO / "tests/rehearsal/cpu"),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "TOKENIZERS_PARALLELISM": "false",
    }
    return [envs | {"SKYPILOT_NODE_RANK": str(rank)} for rank in range(num_nodes)]


def mounts(work: Path) -> dict[str, Path]:
    """Where the node's paths lie on this machine; `setup` is what make has done."""
    return {
        "/sft": REPO / "sft",
        "/checkpoints": work / "checkpoints",
        "~/sft-env": Path(sys.prefix),
    }


def free_port() -> int:
    """For the ranks to meet: this machine may use the task file's for something else."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def launch(script: str, envs: list[dict[str, str]], *, log: Path) -> Iterator[tuple[str, Attempt]]:
    """Run the block on every node, yield the first one's lines. Closing it kills the nodes."""
    attempt = Attempt(log)
    with log.open("w") as output:
        nodes = [
            subprocess.Popen(
                ["bash", "-c", script],
                env=env,
                stdout=subprocess.PIPE if rank == 0 else output,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )
            for rank, env in enumerate(envs)
        ]
        try:
            assert nodes[0].stdout is not None
            for line in nodes[0].stdout:
                output.write(line)
                attempt.lines.append(line.rstrip())
                if line.startswith("{'loss'"):
                    attempt.losses.append(float(ast.literal_eval(line)["loss"]))
                yield line.rstrip(), attempt
            attempt.status = max(node.wait() for node in nodes)
        finally:
            for node in nodes:
                kill_node(node)
                node.wait()


def kill_node(launcher: subprocess.Popen[str]) -> None:
    """SIGKILL a launcher and the ranks, which torch starts in sessions of their own."""
    with suppress(psutil.NoSuchProcess):
        node = psutil.Process(launcher.pid)
        for process in (*node.children(recursive=True), node):
            with suppress(psutil.NoSuchProcess):
                process.kill()


def show(line: str) -> None:
    """Print what a person watches: the loss, and what the run says of itself."""
    if line.startswith("{'loss'"):
        entry = ast.literal_eval(line)
        rate = entry["tokens_per_sec_per_gpu"]
        console.print(f"  loss {float(entry['loss']):.3f}  {float(rate):,.0f} tokens/s/process")
    elif line.startswith(SHOWN):
        console.print(f"  {line}", markup=False)


def run(
    script: str, envs: list[dict[str, str]], *, log: Path, kill_at: Path | None = None
) -> Attempt:
    """Launch and follow; kill every node as soon as a checkpoint is whole below kill_at."""
    for line, attempt in launch(script, envs, log=log):
        show(line)
        if kill_at is not None and any(kill_at.glob("checkpoint-*/manifest.json")):
            console.print("  killed, as a preempted node is")
            return attempt
    if attempt.status != 0:
        errors = [n for n, line in enumerate(attempt.lines) if line.startswith("error:")]
        shown = attempt.lines[errors[0] :] if errors else attempt.lines[-40:]
        console.print("\n".join(shown), markup=False)
        console.print(f"[red]the rehearsal failed[/red]; its whole output: {log}")
        sys.exit(1)
    return attempt


def compare_with_base(artifact: Path, base: Path) -> tuple[float, str]:
    """Load the artifact as its users will. The largest change of a logit on a prompt, and a sample.

    Raises AssertionError if its logits are not finite or are the base model's.
    """
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer, GptOssForCausalLM, Mxfp4Config
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.simplefilter("ignore", FutureWarning)
    base_model = GptOssForCausalLM.from_pretrained(
        base, quantization_config=Mxfp4Config(dequantize=True), dtype=torch.bfloat16
    )
    tokenizer = AutoTokenizer.from_pretrained(artifact)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "How do I cook rice?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    with torch.no_grad():
        before = base_model(**prompt).logits.float()
        if (artifact / "adapter_config.json").exists():
            model = PeftModel.from_pretrained(base_model, artifact)
        else:
            model, report = AutoModelForCausalLM.from_pretrained(artifact, output_loading_info=True)
            assert model.dtype == torch.bfloat16, f"the artifact loads as {model.dtype}"
            assert not report["missing_keys"], f"the artifact lacks {report['missing_keys']}"
            assert not report["unexpected_keys"], f"unknown weights: {report['unexpected_keys']}"
        after = model(**prompt).logits.float()
        generated = model.generate(**prompt, max_new_tokens=12, do_sample=False)
    change = float((after - before).abs().max())
    assert torch.isfinite(after).all(), "the artifact's logits are not finite"
    assert change > 0, "the artifact's logits are the base model's"
    return change, tokenizer.decode(generated[0, prompt["input_ids"].shape[1] :])


def rehearse(task_file: Path, *, dataset: str) -> None:
    """The whole rehearsal; exits with status 1 where it fails."""
    started = time.monotonic()
    task = read_task(task_file)
    work = REPO / ".rehearsal" / task["name"]
    shutil.rmtree(work, ignore_errors=True)
    run_dir = work / "checkpoints" / task["envs"]["RUN_NAME"]
    base = save_tiny_gpt_oss(work / "tiny-gpt-oss", conversation_texts(CONVERSATIONS))
    envs = node_envs(task, work, dataset=dataset, model=base)
    script = map_mounts(task["run"], mounts(work)).replace("29500", str(free_port()))

    console.rule(f"{task_file.name}: {len(envs)} node(s), {NUM_PROCESSES} processes, tiny model")
    first = run(script, envs, log=work / "launch-1.log", kill_at=run_dir)
    if first.status is not None:
        console.print("[red]the rehearsal ended before its first checkpoint[/red]")
        sys.exit(1)
    console.rule("launched again")
    second = run(script, envs, log=work / "launch-2.log")
    change, sample = compare_with_base(run_dir / "final", base)

    resumed = [line for line in second.lines if line.startswith("resuming from")]
    losses = [*first.losses, *second.losses]
    assert resumed, f"the second launch did not resume: {second.log}"
    assert losses[-1] < losses[0], f"the loss did not fall: {losses}"
    table = Table(title=f"{task_file.name}: rehearsed", show_header=False)
    table.add_column()
    table.add_column(overflow="fold")
    table.add_row("loss", f"{losses[0]:.3f} -> {losses[-1]:.3f}")
    table.add_row("resumed", Path(resumed[0].split()[-1]).name)
    table.add_row("artifact", str((run_dir / "final").relative_to(REPO)))
    table.add_row("logits moved by", f"{change:.3f}")
    table.add_row("a sample (random weights: no sense)", repr(sample))
    table.add_row("seconds", f"{time.monotonic() - started:.0f}")
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("task", type=Path, help="a task file, for example gpt-oss-20b-lora.yaml")
    parser.add_argument("--dataset", help="your own data; default: the conversations shipped here")
    args = parser.parse_args()
    dataset = args.dataset or str(CONVERSATIONS)
    if Path(dataset).exists():
        dataset = str(Path(dataset).resolve())
    if not args.task.is_file():
        parser.error(f"no task file {args.task}")
    rehearse(args.task, dataset=dataset)


if __name__ == "__main__":
    main()
