"""What a row should look like, for the errors that refuse one."""

from finetune.data.values import Row

__all__ = ["EXAMPLE", "Row"]

EXAMPLE = (
    '{"messages": [{"role": "user", "content": "2+2?"}, '
    '{"role": "assistant", "thinking": "Easy.", "content": "4"}]}'
)
