"""Conversations in, tokens with labels out.

In: what --dataset_name lists (files, folders, URLs, hub datasets). Out: a Dataset with `input_ids`
and `labels` (-100 = not in the loss), each row one conversation in OpenAI's harmony format.

options.DataArguments         the flags
dataset.load_datasets         all steps: read, render, tokenise, leave out what does not fit
sources                       the rows of files and hub datasets
conversations, checks         rows of any known shape turned into one shape, and checked
harmony.to_messages, Encoder  that shape as harmony's messages, pieces and tokens
harmony_parser.ChannelReader  tokens read back: their channels, and whether a turn is valid
tool_schema.tools_section     tools as the TypeScript that gpt-oss reads
"""
