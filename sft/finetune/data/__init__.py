"""Conversations in, tokens with labels out.

In: what --dataset_name lists (files, folders, URLs, hub datasets). Out: a Dataset with `input_ids`
and `labels` (-100 = not in the loss), each row a conversation in OpenAI's harmony format, or as
much of one as a turn is learnt in.

options.DataArguments         the flags
dataset.load_datasets         all steps: read, render, tokenise, leave out what does not fit
sources                       what --dataset_name lists, and the rows of hub datasets
files, formats                the files of a folder or URL, and the rows of a file
json_rows, arrow_types        the rows of JSON, and of Parquet and Arrow by their types
compression                   packed files, a piece at a time
conversations.read_row        a row of any known shape turned into one shape, and checked
shapes                        which columns make which shape, and the messages in them
messages, content             a message of any known form, and its text or parts
assistant, markup             what the assistant writes; thinking and calls spelt out in text
bare_calls                    what looks like a call in a text, and is none
tools, calls, results         functions, their calls, and which call a result answers
loss_keys                     the keys that say whether a message is trained on
turns                         who speaks after whom
values                        null, blank, JSON in text and text as JSON
harmony.to_messages, Encoder  that shape as harmony's messages, pieces and tokens
turn_samples.split_samples    a sample for each turn whose thinking later prompts lack
harmony_parser.ChannelReader  tokens read back: their channels, and whether a turn is valid
verdict                       what of a dataset is learnt, and what looks wrong, in words
tool_schema.tools_section     tools as the TypeScript that gpt-oss reads
"""
