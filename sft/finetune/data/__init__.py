"""Conversations in, tokens with labels out.

In: what --dataset_name says (files, folders, URLs, hub names). Out: a Dataset with `input_ids` and
`labels` (-100 = not in the loss), each row one conversation in OpenAI's harmony format.

options.DataArguments         the flags
dataset.load_datasets         everything: read, render, tokenise, leave out what does not fit
sources, conversations        rows of any file or hub dataset; their shapes, turned into one
harmony.Encoder, to_messages  that one shape as harmony's messages, pieces and tokens
harmony_parser.ChannelReader  tokens read back: channels, and whether a turn is valid
"""
