"""What a row of a dataset becomes, in the words in which tests state it."""

from typing import Any

from finetune.data.conversations import BadRow, read_row
from finetune.data.harmony import to_messages, to_pieces

TOOLS = """<|start|>developer<|message|># Tools

## functions

namespace functions {

// Weather now.
type get_weather = (_: {
// City
city: string,
}) => any;

} // namespace functions<|end|>"""


def rendered(row: dict[str, Any]) -> str:
    """The text behind the system message, what is in the loss between guillemets; or the refusal.

    The headers that skip thinking count as learnt here (--learn_no_thinking), so that they are seen
    too. TOOLS is written as TOOLS.
    """
    try:
        conversation, _ = read_row(row)
    except BadRow as error:
        return f"refused: {'; '.join(error.args)}"
    messages = to_messages(conversation, date="2026-01-02", reasoning_effort="medium")
    pieces = to_pieces(messages, learn_no_thinking=True)
    text = "".join(f"«{piece.text}»" if piece.in_loss else piece.text for piece in pieces)
    _, _, behind_system = text.replace("»«", "").partition("<|end|>")
    return behind_system.replace(TOOLS, "TOOLS")
