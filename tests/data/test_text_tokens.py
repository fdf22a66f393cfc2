"""tiktoken gives what the tokenizer gives, and is used for no tokenizer of another kind."""

import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as limits
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import TikTokenConverter

from finetune.data.text_tokens import MAX_CHARACTERS, TextTokens
from helpers.paths import VOCABULARY
from helpers.vocabulary import RANKS_FILE

NUM_RANKS = 5_000  # of gpt-oss's vocabulary; the beginning of one is a vocabulary too
Change = Callable[[dict[str, Any]], object]


@pytest.fixture(scope="module")
def settings(
    tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerBase
) -> dict[str, Any]:
    """A tokenizer with the first tokens of gpt-oss, and one control token."""
    ranks = tmp_path_factory.mktemp("ranks") / RANKS_FILE
    lines = (VOCABULARY / RANKS_FILE).read_text().splitlines(keepends=True)
    ranks.write_text("".join(lines[:NUM_RANKS]))
    pattern = (VOCABULARY / "pattern").read_text()
    converter = TikTokenConverter(
        vocab_file=str(ranks), pattern=pattern, extra_special_tokens=["<|start|>"]
    )
    return json.loads(converter.converted().to_str())


@pytest.fixture(scope="module")
def encoder(settings: dict[str, Any]) -> TextTokens:
    encoder = TextTokens(json.dumps(settings))
    assert encoder.fast is not None
    return encoder


@limits(max_examples=50, deadline=None)
@given(text=st.text() | st.text("aAeinst \n'.,<|>_/0123\u00e9\u4e2d", max_size=200))
def test_both_encoders_agree(encoder: TextTokens, text: str) -> None:
    assert encoder.encode([text]) == encoder.encode_slowly([text])


def test_texts_of_any_length_come_back_in_their_order(encoder: TextTokens) -> None:
    texts = ["a", " " * 1_000_000, "<|start|>", "b" * (MAX_CHARACTERS + 1), "c"]
    encoded = encoder.encode(texts)
    assert encoded == encoder.encode_slowly(texts)
    assert len(encoded[2]) > 1  # a control token's name is text


@pytest.mark.parametrize(
    "change",
    [
        lambda values: values["model"]["merges"].reverse(),
        lambda values: values["model"]["merges"].pop(),
        lambda values: values["model"].update(ignore_merges=False),
        lambda values: values.update(normalizer={"type": "NFC"}),
        lambda values: values["pre_tokenizer"]["pretokenizers"][0].update(behavior="Removed"),
        lambda values: values["pre_tokenizer"]["pretokenizers"][1].update(add_prefix_space=True),
    ],
    ids=["order", "a merge lacks", "ignore_merges", "normalizer", "split", "prefix space"],
)
def test_another_kind_of_tokenizer_is_used_as_it_is(
    settings: dict[str, Any], change: Change
) -> None:
    changed = json.loads(json.dumps(settings))
    change(changed)
    assert TextTokens(json.dumps(changed)).fast is None
