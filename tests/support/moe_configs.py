"""Configurations of published mixture-of-experts models (the fields that count), with the parameters in their checkpoints."""
V3_CONFIG = {
    "model_type": "deepseek_v3", "vocab_size": 129280, "hidden_size": 7168, "num_hidden_layers": 61, "intermediate_size": 18432,
    "moe_intermediate_size": 2048, "n_routed_experts": 256, "n_shared_experts": 1, "num_experts_per_tok": 8,
    "first_k_dense_replace": 3, "moe_layer_freq": 1, "topk_method": "noaux_tc", "num_attention_heads": 128,
    "num_key_value_heads": 128, "q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
    "v_head_dim": 128, "attention_bias": False, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}, "eos_token_id": 1}
V2_LITE_CONFIG = {
    "model_type": "deepseek_v2", "vocab_size": 102400, "hidden_size": 2048, "num_hidden_layers": 27, "intermediate_size": 10944,
    "moe_intermediate_size": 1408, "n_routed_experts": 64, "n_shared_experts": 2, "num_experts_per_tok": 6,
    "first_k_dense_replace": 1, "moe_layer_freq": 1, "topk_method": "greedy", "num_attention_heads": 16,
    "num_key_value_heads": 16, "q_lora_rank": None, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
    "v_head_dim": 128, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "eos_token_id": 100001}
QWEN15_MOE_CONFIG = {
    "model_type": "qwen2_moe", "vocab_size": 151936, "hidden_size": 2048, "num_hidden_layers": 24, "intermediate_size": 5632,
    "moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632, "num_experts": 60, "num_experts_per_tok": 4,
    "decoder_sparse_step": 1, "num_attention_heads": 16, "num_key_value_heads": 16, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16", "eos_token_id": 151643}
QWEN3_30B_CONFIG = {
    "model_type": "qwen3_moe", "vocab_size": 151936, "hidden_size": 2048, "num_hidden_layers": 48, "intermediate_size": 6144,
    "moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8, "decoder_sparse_step": 1, "mlp_only_layers": [],
    "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16", "eos_token_id": 151645}
QWEN3_235B_CONFIG = QWEN3_30B_CONFIG | {
    "hidden_size": 4096, "num_hidden_layers": 94, "intermediate_size": 12288, "moe_intermediate_size": 1536,
    "num_attention_heads": 64}
MIXTRAL_CONFIG = {
    "model_type": "mixtral", "vocab_size": 32000, "hidden_size": 4096, "num_hidden_layers": 32, "intermediate_size": 14336,
    "num_local_experts": 8, "num_experts_per_tok": 2, "num_attention_heads": 32, "num_key_value_heads": 8,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "eos_token_id": 2}
# name -> parameters of the published checkpoint, multi-token prediction and quantization scales left out; active by its card, 1e9
PUBLISHED = {
    "V3_CONFIG": (671_026_419_200, 37), "V2_LITE_CONFIG": (15_706_484_224, 2.4), "QWEN15_MOE_CONFIG": (14_315_784_192, 2.7),
    "QWEN3_30B_CONFIG": (30_532_122_624, 3.3), "QWEN3_235B_CONFIG": (235_093_634_560, 22),
    "MIXTRAL_CONFIG": (46_702_792_704, 12.9)}
# arXiv 2601.07372, table 5: MoE-27B, 26.7B parameters, 3.8B active. The paper gives no expert width: 17 experts in 29 layers pay
# for 5.79B of rows, so 1536. The attention is left out, so its counts must be given.
PAPER_27B_CONFIG = {
    "model_type": "deepseek_v3", "vocab_size": 129280, "hidden_size": 2560, "num_hidden_layers": 30, "n_routed_experts": 72,
    "moe_intermediate_size": 1536, "n_shared_experts": 2, "num_experts_per_tok": 6, "first_k_dense_replace": 1, "hc_mult": 4,
    "torch_dtype": "bfloat16", "pad_token_id": 2}
PAPER_40B_MEMORY = {
    "layer_ids": [1, 14], "max_ngram_size": 3, "n_embed_per_ngram": 640, "n_head_per_ngram": 8, "pad_id": 2, "seed": 0,
    "engram_vocab_size": [7_239_680, 7_239_680], "kernel_size": 4}
