"""transformers' Qwen4Exp as it is and with this library's PLE layers: a forward of 1 and 512 tokens, and the memory to load it.

The rest of the model is small, so that PLE is a part of it that shows; both contenders run it.
"""
import functools
import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file
from transformers import Qwen4ExpForCausalLM, Qwen4ExpTextConfig

from engram_kernels.integrations.transformers import attach
from harness import measure

CONFIG = dict(
    vocab_size=1000, hidden_size=512, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, head_dim=64,
    linear_key_head_dim=32, linear_value_head_dim=32, linear_num_key_heads=4, linear_num_value_heads=4, moe_intermediate_size=64,
    shared_expert_intermediate_size=64, num_experts_per_tok=2, num_experts=4, ple_layer_ids=[1], ngram_vocab_size_base=150_000,
    split_ngram_parts=4, hc_lowrank=32, eos_token_id=3, pad_token_id=0, layer_types=["linear_attention"])
TABLE_BYTES = 16 * 150_000 * 32 * 2  # 16 heads of rows of 32 bfloat16 values: 146 MiB
GROUP = "transformers Qwen4Exp, 1 layer with PLE (4x512, bf16), forward of {} token(s)"
# prints how far the process's memory rose while the model was loaded and said something
LOAD = """
import json, sys, torch
import engram_kernels as ek
from transformers import Qwen4ExpForCausalLM
def peak():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) * 1024
before = peak()
if sys.argv[2] == "transformers":
    model = Qwen4ExpForCausalLM.from_pretrained(sys.argv[1])
else:
    table = ek.RowTable.open(sys.argv[1] + "/rows.safetensors", tensor="rows", row_format="bf16")
    model = ek.integrations.transformers.load(Qwen4ExpForCausalLM, sys.argv[1], table=table)
with torch.no_grad():
    model(torch.arange(4, 36)[None], use_cache=False)
print(json.dumps(peak() - before))
"""


@functools.cache
def make(contender):
    """A model of random weights, always the same ones."""
    torch.manual_seed(0)
    model = Qwen4ExpForCausalLM(Qwen4ExpTextConfig(**CONFIG)).to(torch.bfloat16).eval()
    return attach(model) if contender == "engram_kernels" else model


@pytest.mark.parametrize("tokens", [1, 512])
@pytest.mark.parametrize("contender", ["engram_kernels", "transformers"])
def test_forward(benchmark, contender, tokens):
    model, ids = make(contender), torch.randint(4, 1000, (1, tokens), generator=torch.Generator().manual_seed(0))

    def run():
        with torch.no_grad():
            return model(ids, use_cache=False).logits

    role = "ours" if contender == "engram_kernels" else "peer"
    measure(benchmark, run, group=GROUP.format(tokens), contender=contender, role=role, units=tokens, unit="token")


def test_peak_memory_is_lower_by_the_table(tmp_path):
    """To load the model and run it: at least 0.9 of the table's bytes are never taken."""
    model = make("transformers")
    model.save_pretrained(tmp_path)
    save_file({"rows": model.model.layers[0].ple.ple_embedding.ngram_embedding.weight}, tmp_path / "rows.safetensors")
    rise = {name: json.loads(subprocess.run([sys.executable, "-c", LOAD, tmp_path, name], check=True, capture_output=True,
                                            text=True).stdout) for name in ("transformers", "engram_kernels")}
    print({name: f"{count / 2**20:.0f} MiB" for name, count in rise.items()}, f"table {TABLE_BYTES / 2**20:.0f} MiB")
    assert rise["transformers"] - rise["engram_kernels"] > 0.9 * TABLE_BYTES
