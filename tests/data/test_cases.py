# ruff: noqa: E501
"""Rows of public datasets become the text and the loss that their authors mean, or are refused.

Each file of cases/ is compared with what is expected of each of its rows: the text behind the system
message, with what is in the loss between guillemets; or the words in which the row is refused. The
headers that skip thinking count as learnt here (--learn_no_thinking), so that they are seen too.
"""

import json
from pathlib import Path

import pytest

from helpers.rendered import rendered

FOLDER = Path(__file__).parent / "cases"
CASES = {
    "F03_loss_false_trained.jsonl": [
        "<|start|>user<|message|>Weather in Oslo?<|end|><|start|>assistant<|channel|>final<|message|>WRONG ANSWER<|end|><|start|>user<|message|>No.<|end|><|start|>assistant«<|channel|>final<|message|>RIGHT<|return|>»"
    ],
    "F03b_loss_false_sharegpt.jsonl": [
        "<|start|>user<|message|>Q<|end|><|start|>assistant<|channel|>final<|message|>WRONG ANSWER<|end|><|start|>user<|message|>No.<|end|><|start|>assistant«<|channel|>final<|message|>RIGHT<|return|>»"
    ],
    "F04_tool_result_object.jsonl": [
        'TOOLS<|start|>user<|message|>Weather in Oslo?<|end|><|start|>assistant«<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>{"city": "Oslo"}<|call|>»<|start|>functions.get_weather<|channel|>commentary to=assistant<|message|>{"temp": -3}<|end|><|start|>assistant«<|channel|>final<|message|>It is cold.<|return|>»'
    ],
    "F05_empty_user.jsonl": ["refused: messages[0] has empty `content`"],
    "F05b_empty_system.jsonl": [
        "<|start|>user<|message|>Weather in Oslo?<|end|><|start|>assistant«<|channel|>analysis<|message|>N.<|end|><|start|>assistant<|channel|>final<|message|>It is cold.<|return|>»"
    ],
    "F06_completion_json.jsonl": [
        '<|start|>user<|message|>Extract name and age: Ann is 30.<|end|><|start|>assistant«<|channel|>final<|message|>{"name": "Ann", "age": 30}<|return|>»'
    ],
    "F06b_prompt_json.jsonl": [
        '<|start|>user<|message|>[{"id": 1, "name": "Ann"}, {"id": 2, "name": "Bo"}]<|end|><|start|>assistant«<|channel|>final<|message|>Two people.<|return|>»'
    ],
    "F07_harmony_tags_in_content.jsonl": [
        "<|start|>user<|message|>Weather in Oslo?<|end|><|start|>assistant«<|channel|>analysis<|message|>Oslo is north.<|end|><|start|>assistant<|channel|>final<|message|>It is cold.<|return|>»"
    ],
    "F07b_think_tags.jsonl": [
        "<|start|>user<|message|>Weather in Oslo?<|end|><|start|>assistant«<|channel|>analysis<|message|>Oslo is north.<|end|><|start|>assistant<|channel|>final<|message|>It is cold.<|return|>»"
    ],
    "F07c_tool_call_tags.jsonl": [
        '<|start|>developer<|message|># Instructions\n\nYou call functions.\n\n# Tools\n\n## functions\n\nnamespace functions {\n\n// Weather now.\ntype get_weather = (_: {\n// City\ncity: string,\n}) => any;\n\n} // namespace functions<|end|><|start|>user<|message|>Weather?<|end|><|start|>assistant«<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>{"city": "Oslo"}<|call|>»'
    ],
    "F08_alpaca_history.jsonl": [
        "<|start|>user<|message|>Weather in Oslo?<|end|><|start|>assistant«<|channel|>final<|message|>Cold.<|end|>»<|start|>user<|message|>And in Rome?<|end|><|start|>assistant«<|channel|>final<|message|>Warm.<|return|>»"
    ],
    "F08b_function_call.jsonl": [
        'TOOLS<|start|>user<|message|>Weather in Oslo?<|end|><|start|>assistant«<|channel|>commentary<|message|>Let me look.<|end|><|start|>assistant<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>{"city": "Oslo"}<|call|>»'
    ],
    "F08c_functions_column.jsonl": [
        'TOOLS<|start|>user<|message|>Weather in Oslo?<|end|><|start|>assistant«<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>{"city": "Oslo"}<|call|>»<|start|>functions.get_weather<|channel|>commentary to=assistant<|message|>-3<|end|><|start|>assistant«<|channel|>final<|message|>It is cold.<|return|>»'
    ],
    "F08e_system_prompt.jsonl": [
        "<|start|>developer<|message|># Instructions\n\nTalk like a pirate.<|end|><|start|>user<|message|>Hi<|end|><|start|>assistant«<|channel|>final<|message|>Hello<|return|>»"
    ],
    "F08f_images.jsonl": ["refused: `images`: gpt-oss reads text only"],
    "F09_nulls_in_exported_jsonl.jsonl": [
        'TOOLS<|start|>user<|message|>Weather in Oslo?<|end|><|start|>assistant«<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>{"city": "Oslo"}<|call|>»<|start|>functions.get_weather<|channel|>commentary to=assistant<|message|>-3<|end|><|start|>assistant«<|channel|>final<|message|>It is cold.<|return|>»',
        '<|start|>developer<|message|># Tools\n\n## functions\n\nnamespace functions {\n\n// Adds.\ntype add = (_: {\na: number,\nb: number,\n}) => any;\n\n} // namespace functions<|end|><|start|>user<|message|>2+3?<|end|><|start|>assistant«<|channel|>commentary to=functions.add <|constrain|>json<|message|>{"a": 2, "b": 3}<|call|>»<|start|>functions.add<|channel|>commentary to=assistant<|message|>5<|end|><|start|>assistant«<|channel|>final<|message|>5<|return|>»',
    ],
    "F10_input_schema.jsonl": [
        "TOOLS<|start|>user<|message|>Weather in Oslo?<|end|><|start|>assistant«<|channel|>final<|message|>It is cold.<|return|>»",
        "TOOLS<|start|>user<|message|>Weather in Oslo?<|end|><|start|>assistant«<|channel|>final<|message|>It is cold.<|return|>»",
    ],
    "F11_blank_preamble.jsonl": [
        'TOOLS<|start|>user<|message|>Weather in Oslo?<|end|><|start|>assistant«<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>{"city": "Oslo"}<|call|>»<|start|>functions.get_weather<|channel|>commentary to=assistant<|message|>-3<|end|><|start|>assistant«<|channel|>final<|message|>It is cold.<|return|>»'
    ],
    "F14_keyerror_messages_object.jsonl": [
        "<|start|>user<|message|>Hi<|end|><|start|>assistant«<|channel|>final<|message|>Hello<|return|>»"
    ],
    "F15_text_then_call.jsonl": [
        'TOOLS<|start|>user<|message|>Weather in Oslo?<|end|><|start|>assistant«<|channel|>commentary<|message|>Let me check.<|end|><|start|>assistant<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>{"city": "Oslo"}<|call|>»<|start|>functions.get_weather<|channel|>commentary to=assistant<|message|>-3<|end|><|start|>assistant«<|channel|>final<|message|>Cold.<|return|>»'
    ],
    "F15c_harmony_native.jsonl": [
        "<|start|>user<|message|>Weather in Oslo?<|end|><|start|>assistant«<|channel|>analysis<|message|>Oslo is north.<|end|><|start|>assistant<|channel|>final<|message|>It is cold.<|return|>»"
    ],
    "F16_legacy_function_call.jsonl": [
        'TOOLS<|start|>user<|message|>Weather in Oslo?<|end|><|start|>assistant«<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>{"city": "Oslo"}<|call|>»<|start|>functions.get_weather<|channel|>commentary to=assistant<|message|>-3<|end|><|start|>assistant«<|channel|>final<|message|>It is cold.<|return|>»'
    ],
    "F17_tools_empty_string.jsonl": [
        "<|start|>user<|message|>Hi<|end|><|start|>assistant«<|channel|>final<|message|>Hello<|return|>»"
    ],
    "F18_leading_newlines.jsonl": [
        "<|start|>user<|message|>Weather in Oslo?<|end|><|start|>assistant«<|channel|>final<|message|>Cold.<|return|>»"
    ],
    "F19_oasst_as_text.jsonl": [
        "refused: it is one message of a conversation (`text` with `role` or `parent_id`): make each conversation one row of `messages`",
        "refused: it is one message of a conversation (`text` with `role` or `parent_id`): make each conversation one row of `messages`",
    ],
    "F21_reasoning_part_in_final.jsonl": [
        "<|start|>user<|message|>Weather in Oslo?<|end|><|start|>assistant«<|channel|>analysis<|message|>Oslo is north.<|end|><|start|>assistant<|channel|>final<|message|>It is cold.<|return|>»"
    ],
    "F23_arguments_no_json.jsonl": [
        "refused: messages[1].tool_calls[0] has `arguments` that are not JSON: 'city=Oslo'",
        '<|start|>user<|message|>Weather in Oslo?<|end|><|start|>assistant«<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>{"city": "Oslo"}<|call|>»<|start|>functions.get_weather<|channel|>commentary to=assistant<|message|>-3<|end|><|start|>assistant«<|channel|>final<|message|>It is cold.<|return|>»',
        "<|start|>user<|message|>Weather in Oslo?<|end|><|start|>assistant«<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>{}<|call|>»<|start|>functions.get_weather<|channel|>commentary to=assistant<|message|>-3<|end|><|start|>assistant«<|channel|>final<|message|>It is cold.<|return|>»",
    ],
}


@pytest.mark.parametrize("name", CASES)
def test_a_row_becomes_what_its_author_means_or_is_refused(name: str) -> None:
    lines = (FOLDER / name).read_text().splitlines()
    assert [rendered(json.loads(line)) for line in lines] == CASES[name]
