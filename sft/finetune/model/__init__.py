"""gpt-oss for training: its weights, attention, experts and LoRA.

In: a hub name or a folder in the published layout. Out: a GptOssForCausalLM whose frozen experts
stay in MXFP4, or a model on the meta device, of which each FSDP2 rank then reads its own rows.

loading.load_model, load_tokenizer, load_config
weights.WeightSource            weights by name, read by rows; BaseWeights is the published model
weights.fill, shard_and_fill    give a model its weights; on all ranks in full, or in shards
attention.choose_attention      the fastest implementation that equals eager on this machine
experts.register_experts        grouped GEMMs for the experts, as an implementation of transformers
experts.use_grouped_lora        LoRA on experts beside their frozen weights
norms.use_fused_norms           RMSNorm as one kernel
rotary.use_fused_rotary         rotary embedding as one kernel
mxfp4.Mxfp4Weight               a frozen stack of experts, unpacked while it is used (kernels.py,
                                fused_unpacking.py)
expert_probe.check_experts      whether the experts' kernels are right on this GPU
unpacking_probe.choose_unpacking  the faster way to multiply with that stack on this GPU
quantize.quantize, requantize   bf16 back to MXFP4
lora.lora_config                what LoRA adapts
lora_linear.use_low_rank_linears  LoRA on linear layers, added by the product itself
flops.flops_per_token           for MFU
"""
