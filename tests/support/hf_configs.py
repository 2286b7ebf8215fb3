"""Configurations in the field names of Hugging Face models, one of each family."""
V41_CONFIG = {
    "model_type": "deepseek_v41", "pad_token_id": 2, "eos_token_id": 1,
    "text_config": {
        "vocab_size": 129280, "hidden_size": 5120, "hc_mult": 4, "rms_norm_eps": 1e-20, "engram_layer_ids": [1, 14],
        "engram_num_embeddings": [384006168, 384016682], "engram_max_ngram_size": 4, "engram_vocab_size": 16000000,
        "engram_n_heads": 8, "engram_head_dim": 256, "engram_pad_token_id": 2, "engram_compressed_vocab_size": 99092}}
DEMO_CONFIG = {"engram_vocab_size": [646400, 646400], "max_ngram_size": 3, "n_embed_per_ngram": 512,
               "n_head_per_ngram": 8, "layer_ids": [1, 15], "pad_id": 2, "seed": 0, "kernel_size": 4,
               "hidden_size": 1024, "hc_mult": 4}
QWEN4_CONFIG = {"text_config": {
    "vocab_size": 248320, "hidden_size": 2560, "hc_count": 4, "eos_token_id": 248044, "ple_layer_ids": [2],
    "ple_embed_dim": 2560, "ple_conv_kernel_size": 4, "ngram_size": 3, "heads_per_ngram": 8, "rms_norm_eps": 1e-6,
    "ngram_vocab_size_base": 20000000, "pad_token_id": None, "seed": None}}
LONGCAT_CONFIG = {"vocab_size": 131072, "hidden_size": 3072, "eos_token_id": 2, "ngram_vocab_size_ratio": 78,
                  "emb_neighbor_num": 4, "emb_split_num": 4, "rms_norm_eps": 1e-5}
