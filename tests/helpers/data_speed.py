"""How fast conversations become tokens on one core, and how much memory that takes.

    python tests/helpers/data_speed.py --tokenizer NAME_OR_FOLDER [--num 20000]

It writes `--num` different conversations as JSONL (seeded: the same ones each time), then reads,
renders, tokenises and masks them as a run does, and prints a line of JSON. Nothing is cached
between two calls. Seconds are those of the processor, so that other programs matter less. Memory
is what the process itself holds (RssAnon of /proc): the files of the cache are mapped beside it,
and the kernel drops their pages where others need the memory.
"""

import argparse
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[2]
WORDS = (REPO / "tests/rehearsal/conversations.jsonl", "messages")


def conversations(number: int) -> Iterator[dict[str, Any]]:
    """Different conversations: one to three turns, most with thinking, some with a call."""
    file, column = WORDS
    rows = [json.loads(line)[column] for line in file.read_text().splitlines()]
    words = " ".join(m["content"] or "" for turns in rows for m in turns).split()
    draw = random.Random(0)

    def text(most: int) -> str:
        return " ".join(draw.choices(words, k=draw.randint(5, most)))

    weather = {"name": "weather", "description": "The weather.", "parameters": {"type": "object"}}
    for _ in range(number):
        turns: list[dict[str, Any]] = []
        has_call = draw.random() < 0.2
        for _ in range(draw.randint(1, 3)):
            turns.append({"role": "user", "content": text(80)})
            if has_call:
                call = {"name": "weather", "arguments": json.dumps({"city": text(5)})}
                turns.append({"role": "assistant", "content": "", "tool_calls": [call]})
                turns.append({"role": "tool", "content": text(40)})
            thinking = {"thinking": text(200)} if draw.random() < 0.7 else {}
            turns.append({"role": "assistant", "content": text(200), **thinking})
        yield {"messages": turns, "tools": [weather] if has_call else []}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--num", type=int, default=20_000, help="how many conversations")
    args = parser.parse_args()
    # One core, and a cache of its own, before anything is imported that reads these.
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    os.environ["RAYON_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        os.environ["HF_DATASETS_CACHE"] = f"{folder}/cache"
        file = Path(folder) / "rows.jsonl"
        with file.open("w") as lines:
            lines.writelines(json.dumps(row) + "\n" for row in conversations(args.num))
        print(json.dumps(measure(file, args.tokenizer)))


def measure(file: Path, tokenizer_name: str) -> dict[str, float]:
    """Processor seconds, tokens a second, and the peak of memory before and after, in MiB."""
    sys.path[:0] = [str(REPO / "sft"), str(REPO / "tests")]
    from finetune.data.dataset import count_tokens, load_conversations, tokenize
    from finetune.data.options import DataArguments
    from finetune.model.loading import load_tokenizer
    from helpers.loading_memory import Peak

    tokenizer = load_tokenizer(tokenizer_name)
    options = DataArguments(conversation_start_date="2026-01-02")
    peak = Peak(seconds=0.05)  # more often, its own seconds would count
    peak.start()
    started = time.process_time()
    rows = load_conversations(str(file))
    read = time.process_time()
    tokens = tokenize(rows, tokenizer, options, max_length=4096)
    ended = time.process_time()
    num_tokens = count_tokens(tokens)
    peak.stop()
    return {
        "conversations": len(rows),
        "samples": len(tokens),
        "tokens": num_tokens,
        "seconds_reading": round(read - started, 2),
        "seconds_rendering_and_tokenising": round(ended - read, 2),
        "tokens_per_s": round(num_tokens / (ended - started)),
        "mib_before": peak.before >> 20,
        "peak_mib": peak.highest >> 20,
    }


if __name__ == "__main__":
    main()
