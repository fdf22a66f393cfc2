"""Text as tokens, by tiktoken where it gives what the tokenizer gives, as it does for gpt-oss.

On one core tiktoken is about three times as fast as the tokenizers library. It is also the encoder
of openai-harmony, and with it of the server. A tokenizer of another kind is used as it is.

Names of control tokens in the text are ordinary text: no user can forge one.
"""

import json
import os
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any

import tiktoken
from tokenizers import Tokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

# Longer texts could take tiktoken minutes, or exhaust its stack: a run of spaces, for example.
MAX_CHARACTERS = 50_000
CHUNK = 64  # texts


class TextTokens:
    """Encodes texts. settings: the JSON of a tokenizer, as `Tokenizer.to_str` writes it."""

    def __init__(self, settings: str) -> None:
        self.settings = settings
        self.fast = fast_encoding(settings)
        self.tokenizer: Tokenizer | None = None  # made when it is needed, which takes seconds

    def __getstate__(self) -> str:
        """What `datasets` hashes for its cache: the text, and not what was made of it."""
        return self.settings

    def __setstate__(self, settings: str) -> None:
        self.__init__(settings)  # type: ignore[misc]

    def encode(self, texts: list[str]) -> list[list[int]]:
        """The tokens of each text. It uses all cores, so give it many texts at once."""
        if self.fast is None:
            return self.encode_slowly(texts)
        short = [text for text in texts if len(text) <= MAX_CHARACTERS]
        long = [text for text in texts if len(text) > MAX_CHARACTERS]
        ids_of_text = dict(zip(short, self.encode_fast(short), strict=True))
        if long:
            ids_of_text |= dict(zip(long, self.encode_slowly(long), strict=True))
        return [ids_of_text[text] for text in texts]

    def encode_fast(self, texts: list[str]) -> list[list[int]]:
        """By tiktoken, which lets other threads run while it encodes."""
        assert self.fast is not None
        encode = self.fast.encode_ordinary
        # Many texts for each call of a thread, which costs as much as a short text does.
        chunks = [texts[start : start + CHUNK] for start in range(0, len(texts), CHUNK)]
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as threads:
            encoded = threads.map(lambda chunk: [encode(text) for text in chunk], chunks)
            return [ids for chunk in encoded for ids in chunk]

    def encode_slowly(self, texts: list[str]) -> list[list[int]]:
        """By the tokenizers library, which encodes texts of any length and by any tokenizer."""
        if self.tokenizer is None:
            self.tokenizer = text_tokenizer(self.settings)
        encodings = self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [encoding.ids for encoding in encodings]


def text_tokenizer(settings: str) -> Tokenizer:
    """A tokenizer to which the names of control tokens are text."""
    # encode_special_tokens spares only tokens that are marked as special, so all that are added to
    # the vocabulary are marked so here, whatever the model's files say.
    values = json.loads(settings)
    for token in values["added_tokens"]:
        token["special"] = True
    tokenizer = Tokenizer.from_str(json.dumps(values))
    tokenizer.encode_special_tokens = True
    return tokenizer


@lru_cache(maxsize=1)  # it takes seconds, and several encoders are made of one tokenizer
def fast_encoding(settings: str) -> tiktoken.Encoding | None:
    """The same encoding for tiktoken; None if the tokenizer is not of the kind that it knows.

    tiktoken splits a text by a pattern, and then merges the two neighbours whose bytes together
    make the token of the lowest id. A tokenizer does so too if its merges are all that there are
    between its tokens, and in the order of the tokens that they make.
    """
    values = json.loads(settings)
    pattern, ranks = pattern_of(values), byte_ranks(values)
    if pattern is None or ranks is None or not merges_by_rank(values["model"], ranks):
        return None
    return tiktoken.Encoding("texts", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})


def pattern_of(settings: dict[str, Any]) -> str | None:
    """The pattern by which the tokenizer splits texts before it merges; None if it does more."""
    steps = (settings.get("pre_tokenizer") or {}).get("pretokenizers") or []
    if settings.get("normalizer") is not None or len(steps) != 2:
        return None
    split, byte_level = steps
    pattern = (split.get("pattern") or {}).get("Regex")
    is_plain = split.get("behavior") == "Isolated" and not split.get("invert")
    is_bytes = byte_level.get("type") == "ByteLevel" and not (
        byte_level.get("add_prefix_space") or byte_level.get("use_regex", True)
    )
    return pattern if is_plain and is_bytes else None


def byte_ranks(settings: dict[str, Any]) -> dict[bytes, int] | None:
    """The id of each token by its bytes, without those added to the vocabulary.

    None if a token is not spelt in the characters that stand for bytes, or a single byte is none.
    """
    model = settings["model"]
    added = {token["content"] for token in settings["added_tokens"]}
    byte_of = {ord(character): number for number, character in bytes_to_unicode().items()}
    ranks = {}
    for token, number in model["vocab"].items():
        if token in added:
            continue
        try:
            ranks[token.translate(byte_of).encode("latin-1")] = number
        except UnicodeEncodeError:
            return None
    return ranks if all(bytes([number]) in ranks for number in range(256)) else None


def merges_by_rank(model: dict[str, Any], ranks: dict[bytes, int]) -> bool:
    """Whether the tokenizer merges any two tokens that make a third, lowest id first.

    With `ignore_merges` a piece of text that is itself a token is never split, as in tiktoken.
    """
    options = ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix")
    if model["type"] != "BPE" or not model.get("ignore_merges"):
        return False
    if any(model.get(option) for option in (*options, "byte_fallback")):
        return False
    made = [model["vocab"].get(left + right) for left, right in model["merges"]]
    if None in made or made != sorted(made):
        return False
    num_possible = sum(
        token[:end] in ranks and token[end:] in ranks
        for token in ranks
        for end in range(1, len(token))
    )
    return num_possible == len(made)
