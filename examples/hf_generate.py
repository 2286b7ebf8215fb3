"""A transformers model that generates with its n-gram table in a file: python examples/hf_generate.py

A small random Qwen4Exp model is saved as its publisher would, and loaded twice: by transformers, and with its PLE layers
replaced by ours, whose rows stay in the files of the checkpoint. Both generate, and must say the same.
"""
import tempfile

import torch
from transformers import Qwen4ExpForCausalLM, Qwen4ExpTextConfig

import engram_kernels as ek

CONFIG = dict(
    vocab_size=1000, hidden_size=128, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=32,
    linear_key_head_dim=16, linear_value_head_dim=16, linear_num_key_heads=2, linear_num_value_heads=4, moe_intermediate_size=64,
    shared_expert_intermediate_size=64, num_experts_per_tok=2, num_experts=4, ple_layer_ids=[2], ngram_vocab_size_base=20_000,
    split_ngram_parts=4, hc_lowrank=16, eos_token_id=3, pad_token_id=0, indexer_n_heads=2, indexer_kv_heads=1,
    indexer_head_dim=32, indexer_budget=64, indexer_compress_ratio=4,
    rope_parameters=dict(rope_type="default", rope_theta=1e4, partial_rotary_factor=0.5, mrope_section=[2, 3, 3]))


def make_checkpoint(folder):
    """Writes a random model as transformers does: the table in parts, with the published names."""
    torch.manual_seed(0)
    model = Qwen4ExpForCausalLM(Qwen4ExpTextConfig(**CONFIG))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.3 if ".ple." in name else 0.1)
    model.to(torch.bfloat16).save_pretrained(folder)


def main():
    """Prints the memory that the model takes, and what it says, with and without the table in it."""
    with tempfile.TemporaryDirectory() as folder:
        make_checkpoint(folder)
        models = {"transformers": Qwen4ExpForCausalLM.from_pretrained(folder),
                  "rows in a file": ek.integrations.transformers.load(Qwen4ExpForCausalLM, folder, table=folder,
                                                                      rounding="published")}
        prompts = torch.tensor([[0, 0, 17, 42, 8], [5, 6, 7, 8, 9]])
        said = {}
        for name, model in models.items():
            said[name] = model.eval().generate(prompts, attention_mask=(prompts != 0).long(), max_new_tokens=20, do_sample=False,
                                               eos_token_id=None)
            size = sum(parameter.nbytes for parameter in model.parameters()) / 2**20
            print(f"{name}: {size:.1f} MiB of parameters, goes on with {said[name][0, 5:].tolist()}")
        assert torch.equal(*said.values()), "the two differ"
        print("the same tokens from both")


if __name__ == "__main__":
    main()
