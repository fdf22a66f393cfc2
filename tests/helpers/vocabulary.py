"""gpt-oss's real tokenizer of 201,088 tokens, made from the npm package js-tiktoken.

It needs no model hub. To write the tokenizer into a folder, for `make preview TOKENIZER=FOLDER`:

    python tests/helpers/vocabulary.py FOLDER
"""

import hashlib
import json
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import TikTokenConverter
from trl import chat_template_utils

PACKAGE = "js-tiktoken@1.0.21"
RANKS_FILE = "o200k_base.tiktoken"  # the name under which openai-harmony and tiktoken look for it
RANKS_SHA256 = "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d"
FIRST_SPECIAL, VOCAB_SIZE = 199_998, 201_088
SPECIAL_TOKENS = {
    199_998: "<|startoftext|>",
    199_999: "<|endoftext|>",
    200_002: "<|return|>",
    200_003: "<|constrain|>",
    200_005: "<|channel|>",
    200_006: "<|start|>",
    200_007: "<|end|>",
    200_008: "<|message|>",
    200_012: "<|call|>",
    200_018: "<|endofprompt|>",
}


def fetch_ranks(folder: Path) -> None:
    """Write RANKS_FILE and the file `pattern` into the folder, unless they are there.

    Raises OSError or subprocess.SubprocessError if npm is missing or cannot reach its registry.
    """
    if (folder / RANKS_FILE).exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    # In a folder of its own, and renamed at the end: two test processes may fetch it at once.
    with tempfile.TemporaryDirectory(dir=folder) as download:
        command = ["npm", "pack", "--silent", "--pack-destination", download, PACKAGE]
        subprocess.run(command, check=True, capture_output=True, timeout=300)
        with tarfile.open(next(Path(download).glob("js-tiktoken-*.tgz"))) as archive:
            source = archive.extractfile("package/dist/ranks/o200k_base.js")
            assert source is not None
            text = source.read().decode()
    encoding = json.loads(text[text.index("{") : text.rindex("}") + 1])
    # A line of js-tiktoken's format holds many tokens: "! FIRST_RANK TOKEN TOKEN ...". tiktoken's
    # own format has one token on each line: "TOKEN RANK".
    lines = []
    for line in encoding["bpe_ranks"].split("\n"):
        _, first, *tokens = line.split(" ")
        lines += [f"{token} {rank}\n" for rank, token in enumerate(tokens, int(first))]
    ranks = "".join(lines).encode()
    assert hashlib.sha256(ranks).hexdigest() == RANKS_SHA256
    for name, content in (("pattern", encoding["pat_str"].encode()), (RANKS_FILE, ranks)):
        part = folder / f"{name}.{os.getpid()}"
        part.write_bytes(content)
        part.rename(folder / name)


def make_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """The tokenizer of the published checkpoints, from the files that fetch_ranks has written."""
    special = range(FIRST_SPECIAL, VOCAB_SIZE)
    converter = TikTokenConverter(
        vocab_file=str(folder / RANKS_FILE),
        pattern=(folder / "pattern").read_text(),
        extra_special_tokens=[SPECIAL_TOKENS.get(n, f"<|reserved_{n}|>") for n in special],
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=converter.converted(),
        bos_token="<|startoftext|>",
        eos_token="<|return|>",
        pad_token="<|endoftext|>",
    )
    templates = Path(chat_template_utils.__file__).parent / "chat_templates"
    tokenizer.chat_template = (templates / "gptoss.jinja").read_text()
    return tokenizer


if __name__ == "__main__":
    fetch_ranks(Path(sys.argv[1]))
    make_tokenizer(Path(sys.argv[1])).save_pretrained(sys.argv[1])
