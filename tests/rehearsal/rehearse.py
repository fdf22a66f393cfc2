"""Run a task file on this machine, to its end, with a tiny gpt-oss, before you rent a GPU.

    python tests/rehearsal/rehearse.py gpt-oss-20b-lora.yaml [--dataset my.jsonl]

The rehearsal runs the file's own envs and `run` block. The node's paths are mapped to folders below
.rehearsal/, and the SKYPILOT_ variables describe a cluster with two processes. It kills the run at
its first checkpoint, as a preemption does, and launches it again, as SkyPilot would. At last it
loads the artifact and compares it with the base model.

TRAIN_ARGS of the environment replaces that of the file, as `sky launch --env` does. Without
--dataset the rehearsal adds its own small numbers (REHEARSAL_FLAGS) for the flags that TRAIN_ARGS
of the environment does not give. With --dataset the lengths, the learning rate and the steps are
the recipe's, but for steps beyond twelve (own_data.py). It prints what it sets.
"""

import argparse
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
from typing import NoReturn

import psutil
import yaml
from rich.console import Console
from rich.table import Table

REPO = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPO / "sft"))

from finetune.errors import UserError, one_line_errors
from finetune.task_file import TaskFile

CONVERSATIONS = REPO / "tests/rehearsal/conversations.jsonl"
# Small enough for two CPU cores. The learning rate is that of a model that starts at random.
REHEARSAL_FLAGS = {
    "use_cpu": "true",
    "max_steps": "12",
    "max_length": "1024",
    "learning_rate": "1e-2",
    "save_steps": "4",
    "global_batch_size": "4",  # two batches on each process: gradients are accumulated, as on GPUs
    "per_device_train_batch_size": "1",  # attention on a CPU takes memory with the rows' square
}
NUM_PROCESSES = 2
SHOWN_LINES = (
    "step ",
    "data:",
    "attention:",
    "resuming",
    "no checkpoint",
    "this run",
    "checkpoint ",
)

# The line that a run prints for a step of training (finetune/training/log_line.py).
LOGGED_STEP = re.compile(r"step \d+/\d+ .*\bloss (?P<loss>\S+) · lr ")

console = Console(highlight=False, soft_wrap=True)


@dataclass
class Attempt:
    """What one launch of the run block printed, and its exit status if it ran to its end."""

    log: Path
    losses: list[float] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    status: int | None = None


def given_flags() -> set[str]:
    """The names of the flags in TRAIN_ARGS of the environment, with underscores."""
    words = os.environ.get("TRAIN_ARGS", "").split()
    names = [word[2:].split("=")[0] for word in words if word.startswith("--")]
    return {name.replace("-", "_") for name in names}


def added_flags(given: set[str]) -> str:
    """The flags that the rehearsal sets: all of its own but those the user gives."""
    return " ".join(
        f"--{name} {value}" for name, value in REHEARSAL_FLAGS.items() if name not in given
    )


def prepare(task: TaskFile, folder: Path, *, dataset: str, is_own: bool) -> tuple[Path, str]:
    """The tiny model, saved to a folder, and the flags that the rehearsal sets.

    is_own: the dataset is the user's, and so are the lengths, the learning rate and the steps.
    """
    from own_data import VOCABULARY, flags_for, load, recipe_steps, texts_of  # torch takes seconds
    from tiny_gpt_oss import conversation_texts, make_tokenizer, save_tiny_gpt_oss

    given = given_flags()
    try:
        rows = load(task, dataset) if is_own else None
        if rows is not None:
            tokenizer = make_tokenizer(texts_of(rows), vocab_size=VOCABULARY)
            base = save_tiny_gpt_oss(folder, [], tokenizer=tokenizer)
            steps = recipe_steps(task, rows, base)
            console.print(f"with this data the recipe takes {steps} steps")
            words = flags_for(steps, given).items()
            return base, " ".join(f"--{name} {value}" for name, value in words)
    except UserError:
        pass  # the run says it, as it would on the node
    return save_tiny_gpt_oss(folder, conversation_texts(CONVERSATIONS)), added_flags(given)


def map_mounts(text: str, mounts: dict[str, Path]) -> str:
    """Replace each mount point by a local folder, where it is a path or the start of one."""
    for mount, folder in mounts.items():
        text = re.sub(rf"(?<![\w./~-]){re.escape(mount)}(?=[/\s\"']|$)", str(folder), text)
    return text


def node_envs(
    task: TaskFile, work: Path, *, dataset: str, model: Path, flags: str
) -> list[dict[str, str]]:
    """Each node's environment: the task's envs, those SkyPilot sets, and what replaces GPUs.

    flags: added to the task's TRAIN_ARGS.
    """
    num_nodes = min(task.num_nodes, NUM_PROCESSES)
    task_envs = {name: map_mounts(value, mounts(work)) for name, value in task.envs.items()}
    envs = {
        **os.environ,
        **task_envs,
        "MODEL": str(model),
        "DATASET": dataset,
        "CHECKPOINT_BUCKET": "",
        "WANDB_API_KEY": "",
        "TRAIN_ARGS": f"{task_envs['TRAIN_ARGS']} {flags}",
        "SKYPILOT_TASK_ID": f"rehearsal-{task.name}",
        "SKYPILOT_NUM_NODES": str(num_nodes),
        "SKYPILOT_NUM_GPUS_PER_NODE": str(NUM_PROCESSES // num_nodes),
        "SKYPILOT_NODE_IPS": "\n".join(["127.0.0.1"] * num_nodes),
        "PYTHONPATH": os.pathsep.join(
            filter(None, [str(REPO / "tests/rehearsal/cpu"), os.environ.get("PYTHONPATH")])
        ),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "TOKENIZERS_PARALLELISM": "false",
    }
    return [envs | {"SKYPILOT_NODE_RANK": str(rank)} for rank in range(num_nodes)]


def mounts(work: Path) -> dict[str, Path]:
    """The node's paths on this machine. make has done what `setup` does on a node."""
    return {
        "/sft": REPO / "sft",
        "/checkpoints": work / "checkpoints",
        "~/sft-env": Path(sys.prefix),
    }


def free_port() -> int:
    """A port for the ranks to meet: the task file's own may be in use on this machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def launch(script: str, envs: list[dict[str, str]], *, log: Path) -> Iterator[tuple[str, Attempt]]:
    """Run the block on every node and yield the first node's lines. Closing it kills the nodes."""
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
                if step := LOGGED_STEP.match(line):
                    attempt.losses.append(float(step["loss"]))
                yield line.rstrip(), attempt
            attempt.status = max(node.wait() for node in nodes)
        finally:
            for node in nodes:
                kill_node(node)
                node.wait()


def kill_node(launcher: subprocess.Popen[str]) -> None:
    """SIGKILL a launcher and its ranks, which torch starts in sessions of their own."""
    with suppress(psutil.NoSuchProcess):
        node = psutil.Process(launcher.pid)
        for process in (*node.children(recursive=True), node):
            with suppress(psutil.NoSuchProcess):
                process.kill()


def show(line: str) -> None:
    """Print the lines that a person watches: the losses, and what the run reports of itself."""
    if line.startswith(SHOWN_LINES):
        console.print(f"  {line}", markup=False)


def run(
    script: str, envs: list[dict[str, str]], *, log: Path, kill_at: Path | None = None
) -> Attempt:
    """Launch and print what happens.

    kill_at: a run's folder; every node is killed once it holds a complete checkpoint.
    """
    for line, attempt in launch(script, envs, log=log):
        show(line)
        if kill_at is not None and any(kill_at.glob("checkpoint-*/manifest.json")):
            console.print("  killed, as a preempted node is")
            return attempt
    if attempt.status != 0:
        errors = [n for n, line in enumerate(attempt.lines) if line.startswith("error:")]
        shown = attempt.lines[errors[0] :] if errors else attempt.lines[-40:]
        console.print("\n".join(shown), markup=False)
        fail(f"all output is in {log}")
    return attempt


def fail(reason: str) -> NoReturn:
    console.print("[red]the rehearsal failed[/red]:", reason)
    sys.exit(1)


def compare_with_base(artifact: Path, base: Path) -> tuple[float, str]:
    """Load the artifact as its users will; return the largest change of a logit, and a sample.

    Raises AssertionError if its logits are not finite, or equal those of the base model.
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


def rehearse(task_file: Path, *, dataset: str, is_own: bool) -> None:
    """Rehearse a task file. Exits with status 1 if the rehearsal fails.

    is_own: the dataset is the user's.
    """
    started = time.monotonic()
    task = TaskFile.read(task_file)
    run_block = yaml.safe_load(task_file.read_text())["run"]
    work = REPO / ".rehearsal" / task.name
    shutil.rmtree(work, ignore_errors=True)
    run_dir = work / "checkpoints" / task.envs["RUN_NAME"]
    base, flags = prepare(task, work / "tiny-gpt-oss", dataset=dataset, is_own=is_own)
    envs = node_envs(task, work, dataset=dataset, model=base, flags=flags)
    script = map_mounts(run_block, mounts(work)).replace("29500", str(free_port()))

    console.rule(f"{task_file.name}: {len(envs)} node(s), {NUM_PROCESSES} processes, tiny model")
    console.print(f"rehearsal sets: {flags}", markup=False)
    first = run(script, envs, log=work / "launch-1.log", kill_at=run_dir)
    if first.status is not None:
        fail("it ended before its first checkpoint; --save_steps must be less than --max_steps")
    console.rule("launched again")
    second = run(script, envs, log=work / "launch-2.log")
    change, sample = compare_with_base(run_dir / "final", base)

    resumed = [line for line in second.lines if line.startswith("resuming from")]
    losses = [*first.losses, *second.losses]
    if not resumed:
        fail(f"the second launch did not resume: see {second.log}")
    # With the user's own learning rate or number of steps the loss of random weights need not fall.
    is_free = is_own or bool(given_flags() & {"learning_rate", "max_steps"})
    if losses[-1] >= losses[0] and not is_free:
        fail(f"the loss did not fall: {losses}")
    rows = {
        "loss": f"{losses[0]:.3f} -> {losses[-1]:.3f}",
        "resumed": Path(resumed[0].split()[-1]).name,
        "artifact": str((run_dir / "final").relative_to(REPO)),
        "logits moved by": f"{change:.3f}",
        "a sample (nonsense: random weights)": repr(sample),
        "seconds": f"{time.monotonic() - started:.0f}",
    }
    print_table(f"{task_file.name}: rehearsed", rows)


def print_table(title: str, rows: dict[str, str]) -> None:
    table = Table(title=title, show_header=False)
    table.add_column()
    table.add_column(overflow="fold")
    for name, value in rows.items():
        table.add_row(name, value)
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
    try:
        with one_line_errors():
            rehearse(args.task, dataset=dataset, is_own=args.dataset is not None)
    except KeyboardInterrupt:
        print("interrupted: what was printed so far is in .rehearsal/", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
