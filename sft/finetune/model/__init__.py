"""gpt-oss as it is trained here: its weights, attention, experts and LoRA.

In: a hub name or a folder in the published layout. Out: a GptOssForCausalLM whose frozen experts
stay in MXFP4, or a model on the meta device whose weights each FSDP2 rank reads by itself.

loading.load_model, load_tokenizer, load_config
weights.BaseWeights             the published checkpoint's tensors, read by rows
attention.choose_attention      the fastest implementation that equals eager on this machine
experts.use_grouped_lora        LoRA on experts beside their frozen weights
mxfp4.Mxfp4Weight               a frozen stack of experts, unpacked while it is used
lora.lora_config, flops.flops_per_token
"""
