"""A run turned into what serves: an adapter, merged bf16 weights, MXFP4, or GGUF.

In: a run's folder and the base model. Out: a folder that transformers, PEFT and vLLM load, or
llama.cpp and Ollama, with a card that tells how faithful it is; and an upload to the hub.

record.ExportRecord             export.json: which export a folder holds, and what was measured
lock.locked                     one process at a time writes to that folder
source.find_run_weights         the weights that a run has trained, read one tensor at a time
base.open_base                  the base model at the revision that was trained
merge.open_merged               LoRA added to the base's weights, some rows at a time
shards.write_weights            weights as sharded safetensors; resumable
adapter.write_adapter, files    the adapter; tokenizer and config
gguf_model, gguf_adapter        the same as GGUF; gguf_layout says how that differs
samples.conversations_of_run    the conversations that an export is compared on
fidelity.measure_fidelity       the artifact, loaded again, compared with the trained model
served_reference, _client, _verdict, _scaling, _template     does a server answer as trained?
card.write_card, hub.push       the model card (card_usage, card_figures: its parts); the upload
"""
