"""Files as people have them, each with the conversations that it must become."""

import json
from pathlib import Path

import pytest

from finetune.data.dataset import load_conversations
from finetune.data.harmony import to_messages, to_pieces

CASES = Path(__file__).parent / "cases"

GET_WEATHER = "type get_weather = (_: {\n// City\ncity: string,\n}) => any;"
ADD = "type add = (_: {\na: number,\nb: number,\n}) => any;"

# Of each row: what the rendered conversation must contain. The last text is the answer learnt.
EXPECTED = {
    "F01_tools_emptied_datasets5_json_type.parquet": [
        ["type get_weather = (_: {\ncity: string,\n}) => any;", "Hello"],
        [ADD, "Hello"],
    ],
    "F02_messages_json_type.parquet": [["<|channel|>analysis<|message|>H.<|end|>", "Hello"]] * 2,
    "F02b_tools_json_type.parquet": [[GET_WEATHER, "It is cold."], [ADD, "It is cold."]],
    "F13_zip_second_file_dropped.jsonl.zip": [["one"], ["two"]],
    "F13b_folder_ndjson_arrow_skipped": [["one"], ["two"], ["It is cold."]],
    "F13c_folder_trains_on_test": [["train"]],
    "F20_save_to_disk": [["It is cold."]],
    "F22_struct_of_nulls.parquet": [
        ["type get_weather = (_: {\n// City\ncity?: string,\n}) => any;", "Cold."],
        ["type add = (_: {\n// first\na?: number,\n}) => any;", "Cold."],
    ],
}


@pytest.mark.parametrize("name", EXPECTED)
def test_a_case_is_rendered_as_it_was_meant(name: str) -> None:
    rows = load_conversations(str(CASES / name))
    assert len(rows) == len(EXPECTED[name])
    for row, texts in zip(rows, EXPECTED[name], strict=True):
        messages = to_messages(
            json.loads(row["conversation"]), date="2026-01-02", reasoning_effort="medium"
        )
        pieces = to_pieces(messages, "assistant", learn_no_thinking=False)
        rendered = "".join(piece.text for piece in pieces)
        learnt = "".join(piece.text for piece in pieces if piece.in_loss)
        assert all(text in rendered for text in texts)
        assert learnt.endswith(f"{texts[-1]}<|return|>")
    assert load_conversations(str(CASES / name))[:] == rows[:]
