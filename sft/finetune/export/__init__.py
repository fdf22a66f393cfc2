"""A run turned into what serves: an adapter, merged bf16 weights, or MXFP4.

In: a run's folder and the base model. Out: a folder that transformers, PEFT and vLLM load, a card
that says how faithful it is, an upload to the hub.

source.find_run_weights         what a run has trained, one tensor at a time
merge.MergedWeights             LoRA added to the base's weights, some rows at a time
shards.write_weights            weights as sharded safetensors, resumable
fidelity.measure_fidelity       the artifact, loaded again, beside the trained model
card.write_card, hub.push
"""
