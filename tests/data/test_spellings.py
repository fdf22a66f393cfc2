"""A conversation is rendered the same, whatever the shape of the row that holds it."""

from typing import Any

import pytest
from hypothesis import given, settings
from openai_harmony import HarmonyEncoding
from transformers import PreTrainedTokenizerBase

from finetune.data.conversations import to_conversation
from finetune.data.harmony import Encoder, to_messages, to_pieces
from helpers.harmony_reference import DATE, reference
from helpers.harmony_strategies import SLOW, plain_conversations
from helpers.row_spellings import SPELLINGS


@pytest.fixture(scope="module")
def encoder(tokenizer: PreTrainedTokenizerBase) -> Encoder:
    return Encoder(tokenizer)


@settings(SLOW, max_examples=60)
@given(conversation=plain_conversations())
def test_every_shape_is_rendered_as_vllms_renderer_renders_the_conversation(
    encoder: Encoder, vllms: HarmonyEncoding, conversation: dict[str, Any]
) -> None:
    beginning = {**conversation, "messages": conversation["messages"][:2]}  # all that xLAM holds
    whole = vllms.decode_utf8(reference(vllms, conversation))
    for name, spell in SPELLINGS.items():
        row = spell(conversation)
        if row is not None:
            messages = to_messages(to_conversation(row), date=DATE, reasoning_effort="medium")
            (input_ids,), _ = encoder.encode([to_pieces(messages)])
            is_whole = name != "xLAM"
            expected = whole if is_whole else vllms.decode_utf8(reference(vllms, beginning))
            assert vllms.decode_utf8(input_ids) == expected, name
