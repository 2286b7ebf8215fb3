"""A mixture-of-experts model as the split needs it: its experts, its other parameters, its shape. Read from a configuration."""
from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from engram_kernels._files import shorten
from engram_kernels.allocation.expert_layers import expert_width, num_expert_layers, shared_width
from engram_kernels.allocation.number import ASSUMED, COMPUTED, GIVEN, Number
from engram_kernels.config_fields import ConfigFields
from engram_kernels.spec import EngramSpec

# model types whose attention is counted below, parameter by parameter
COUNTED = ("deepseek", "deepseek_v2", "deepseek_v3", "kimi_k2", "mixtral", "qwen2_moe", "qwen3_moe")
EXPERT_FIELDS = ("n_routed_experts", "num_experts", "num_local_experts")
_MOST = 1 << 53
_MOST_LAYERS = 100_000  # as a spec has them


class InputError(ValueError):
    """A file that was given does not say what is needed of it."""


@dataclasses.dataclass(frozen=True)
class MoeModel:
    """The model at the split it was configured with.

    Attributes:
        name: model type, or "given totals".
        experts_field: the configuration's name for the number of routed experts; None: there is no configuration.
        hidden_size, num_layers, branches, vocab_size, pad_token_id: its shape; branches are hyper-connection streams.
        experts: routed experts per MoE layer as configured.
        top_k: of them, those that a token takes.
        expert_parameters: of one routed expert, summed over the MoE layers.
        router_parameters: that one routed expert adds to the routers of all MoE layers; active for each token.
        total, active: parameters, its own memory left out.
        lookups: of `active`, parameters that no product reads: the token embedding, unless it is the head's matrix too.
        embeddings: of `total`, parameters of token embedding and head.
        shared_width, shared_width_parameters: columns of the shared expert, and parameters of one of them in all MoE layers;
            0 where there is none.
        weight_bytes: bytes of one expert parameter at inference.
        memory: the memory that the configuration has already; None: it has none.
        inputs: every input that is shown, by name.
    """
    name: str
    experts_field: str | None
    hidden_size: int
    num_layers: int
    branches: int
    vocab_size: int
    pad_token_id: int
    experts: int
    top_k: int
    expert_parameters: float
    router_parameters: int
    total: float
    active: float
    lookups: int
    embeddings: int
    shared_width: int
    shared_width_parameters: int
    weight_bytes: float
    memory: EngramSpec | None
    inputs: dict[str, Number]


def model_of_totals(total: float, active: float, *, experts: int | None = None, top_k: int | None = None,
                    hidden_size: int | None = None, num_layers: int | None = None, branches: int | None = None,
                    vocab_size: int | None = None) -> MoeModel:
    """A model of which only the parameter counts are known; its shape, where it is not given, is that of the paper's 27B.

    Raises:
        ValueError: a number makes no sense; names it and the nearest that does.
    """
    _check_totals(total, active)
    inputs = {"total parameters": Number(total, "parameters", GIVEN, "--total"),
              "active parameters": Number(active, "parameters", GIVEN, "--active")}

    def shape(name: str, option: str, value: int | None, default: int) -> int:
        if value is not None and value < 1:
            raise ValueError(f"budget: {option} is {value}, expected at least 1")
        source = option if value is not None else "default: the paper's 27B, arXiv 2601.07372"
        inputs[name] = Number(default if value is None else value, "1", ASSUMED if value is None else GIVEN, source)
        return default if value is None else value

    experts = shape("routed experts", "--experts", experts, 72)
    top_k = shape("experts per token", "--top-k", top_k, 6)
    hidden_size = shape("hidden size", "--hidden", hidden_size, 2560)
    num_layers = shape("layers", "--num-layers", num_layers, 30)
    branches = shape("branches", "--branches", branches, 4)
    vocab_size = shape("vocabulary", "--vocab", vocab_size, 129_280)
    if top_k >= experts:
        raise ValueError(f"budget: a token takes --top-k {top_k} of --experts {experts}: none of them is sparse; "
                         f"nearest --top-k: {experts - 1}")
    one = (total - active) / (experts - top_k)
    inputs["parameters of one routed expert, all layers"] = Number(
        one, "parameters", COMPUTED, "(total - active) / (routed experts - experts per token)")
    return MoeModel(
        name="given totals", experts_field=None, hidden_size=hidden_size, num_layers=num_layers, branches=branches,
        vocab_size=vocab_size, pad_token_id=0, experts=experts, top_k=top_k, expert_parameters=one, router_parameters=0,
        total=total, active=active, lookups=0, embeddings=0, shared_width=0, shared_width_parameters=0, weight_bytes=2,
        memory=None, inputs=inputs)


def _check_totals(total: float, active: float) -> None:
    for option, value in (("--total", total), ("--active", active)):
        if not 1 <= value <= _MOST:  # nan, too
            raise ValueError(f"budget: {option} is {value:g}, expected a number of parameters from 1 to {_MOST:g}")
    if active >= total:
        raise ValueError(f"budget: --active {active:g} is not below --total {total:g}, so nothing is sparse; the nearest that "
                         f"works is below {total:g}")


def model_of_config(config: Any, total: float | None = None, active: float | None = None,
                    branches: int | None = None) -> MoeModel:
    """The model that a configuration describes, in the field names of DeepSeek, Qwen MoE or Mixtral.

    Args:
        config: dict, object with attributes, path of a config.json or of its directory; `text_config` comes first.
        total, active: published parameter counts, instead of counting; the memory of the configuration is in them.
        branches: hyper-connection streams; None: `hc_mult` of the configuration, else 1.

    Raises:
        ValueError: no routed experts in it, a field is missing or makes no sense, or its attention is not counted here.
        OSError: the file cannot be read.
    """
    get = ConfigFields(config, "budget", InputError)
    field = next((name for name in EXPERT_FIELDS if get(name) is not None), None)
    kind = str(get("model_type") or "unknown")
    if field is None:
        raise InputError(f"budget: the configuration (model_type {shorten(repr(kind))}) has no routed experts: none of "
                         f"{', '.join(EXPERT_FIELDS)} is set; the nearest that works: a config of {', '.join(COUNTED)}, or "
                         "--total and --active")
    inputs: dict[str, Number] = {}
    experts = get.integer(field)
    top_k = get.integer("num_experts_per_tok", "num_experts_per_token")
    hidden, vocab = get.integer("hidden_size"), get.integer("vocab_size", high=2**31 - 1)
    layers = get.integer("num_hidden_layers", high=_MOST_LAYERS)
    if top_k >= experts:
        raise InputError(f"budget: num_experts_per_tok is {top_k} of {experts} experts, so nothing is sparse; the nearest that "
                         f"works is {experts - 1}")
    width = expert_width(get, kind, field)
    moe_layers = num_expert_layers(get, kind, layers)
    shared = shared_width(get, kind, width)
    one = moe_layers * 3 * hidden * width
    router = moe_layers * (hidden + (1 if get("topk_method") == "noaux_tc" else 0))
    memory = _memory_of(config, get)
    is_tied = bool(get("tie_word_embeddings"))
    embeddings = vocab * hidden * (1 if is_tied else 2)
    own = 0 if memory is None else memory.num_parameters
    whole: float
    now: float
    if total is None or active is None:
        if total is not None or active is not None:
            raise ValueError("budget: one of --total and --active is given, expected both or neither beside a configuration")
        whole = _counted(get, kind, layers, moe_layers, hidden, shared) + embeddings + experts * (one + router)
        now = whole - (experts - top_k) * one
        what = "counted from the configuration, attention, norms, router and embeddings included"
        sources = (COMPUTED, what), (COMPUTED, f"{what}; idle routed experts left out")
    else:
        _check_totals(total, active)
        whole, now = total - own, active - _active_of(memory)
        sources = (GIVEN, "--total"), (GIVEN, "--active")
        if now <= 0 or whole <= (experts - top_k) * one:
            raise ValueError(f"budget: --total {total:g} and --active {active:g} leave no room for {experts - top_k} idle "
                             f"experts of {one:,} parameters; the nearest --total that works is above "
                             f"{(experts - top_k) * one + own:g}")
    inputs["total parameters"] = Number(whole + own, "parameters", *sources[0])
    inputs["active parameters"] = Number(now + _active_of(memory), "parameters", *sources[1])
    for name, value in (("hidden size", hidden), ("layers", layers), ("MoE layers", moe_layers), ("routed experts", experts),
                        ("experts per token", top_k), ("width of a routed expert", width),
                        ("width of the shared expert", shared)):
        inputs[name] = Number(value, "1", GIVEN, "configuration")
    inputs["parameters of one routed expert, all layers"] = Number(one, "parameters", COMPUTED, "MoE layers * 3 * hidden * width")
    streams = branches if branches is not None else get.integer("hc_mult", "hc_count", default=0)
    inputs["branches"] = Number(streams or 1, "1", GIVEN if streams else ASSUMED, "--branches" if branches is not None else
                                "configuration" if streams else "default: the configuration names no hyper-connections")
    weight_bytes = _weight_bytes(get)
    inputs["bytes of an expert parameter"] = weight_bytes
    pad = next((v for v in (get("pad_token_id"), get("eos_token_id")) if isinstance(v, int) and 0 <= v < vocab), 0)
    return MoeModel(
        name=kind, experts_field=field, hidden_size=hidden, num_layers=layers, branches=int(streams or 1), vocab_size=vocab,
        pad_token_id=pad, experts=experts, top_k=top_k, expert_parameters=one, router_parameters=router, total=whole, active=now,
        embeddings=embeddings,
        lookups=0 if is_tied else vocab * hidden, shared_width=shared, shared_width_parameters=moe_layers * 3 * hidden,
        weight_bytes=weight_bytes.value, memory=memory, inputs=inputs)


def _active_of(memory: EngramSpec | None) -> int:
    """Parameters of a memory that a token uses: its modules and the rows that it reads."""
    return 0 if memory is None else memory.num_module_parameters + memory.rows_per_token * memory.row_dim


def _counted(get: ConfigFields, kind: str, layers: int, moe_layers: int, hidden: int, shared: int) -> int:
    """Parameters beside embeddings, head, routed experts and routers: attention, norms, dense layers, shared experts."""
    extra = [name for name in ("layer_types", "index_topk", "linear_num_value_heads", "compress_ratios") if _is_other(get(name))]
    if kind not in COUNTED or extra:
        why = f" with {', '.join(extra)}" if extra else ""
        raise InputError(f"budget: the attention of model_type {shorten(repr(kind))}{why} is not counted here, only that of "
                         f"{', '.join(COUNTED)}; the nearest that works: pass its published --total and --active beside --config")
    dense = (layers - moe_layers) * 3 * hidden * get.integer("intermediate_size") if moe_layers < layers else 0
    moe = moe_layers * 3 * hidden * shared
    if kind == "qwen2_moe" and shared:
        moe += moe_layers * hidden  # the shared expert's own gate
    attention = _latent_attention(get, hidden) if get("kv_lora_rank") is not None else _attention(get, kind, hidden)
    return layers * (attention + 2 * hidden) + hidden + dense + moe


def _is_other(value: Any) -> bool:
    """Whether a field speaks of another attention; a list of full and sliding attention has the same parameters."""
    if isinstance(value, list | tuple):
        return not all(kind in ("full_attention", "sliding_attention") for kind in value)
    return value is not None


def _latent_attention(get: ConfigFields, hidden: int) -> int:
    """Multi-head latent attention, one layer. Source: transformers `models/deepseek_v3/modeling_deepseek_v3.py`."""
    heads, rope, nope = (get.integer(n) for n in ("num_attention_heads", "qk_rope_head_dim", "qk_nope_head_dim"))
    value, latent = get.integer("v_head_dim"), get.integer("kv_lora_rank")
    out, bias = heads * (nope + rope), bool(get("attention_bias"))
    if get("q_lora_rank") is not None:
        rank = get.integer("q_lora_rank")
        query = hidden * rank + rank + rank * out + (rank if bias else 0)
    else:
        query = hidden * out
    keys = hidden * (latent + rope) + latent + latent * heads * (nope + value) + ((latent + rope) if bias else 0)
    return query + keys + heads * value * hidden + (hidden if bias else 0)


def _attention(get: ConfigFields, kind: str, hidden: int) -> int:
    """Grouped-query attention, one layer. Source: transformers `models/{mixtral,qwen2_moe,qwen3_moe}/modeling_*.py`."""
    heads = get.integer("num_attention_heads")
    groups, dim = get.integer("num_key_value_heads", default=heads), get.integer("head_dim", default=hidden // heads)
    count = hidden * dim * (2 * heads + 2 * groups)
    if kind == "qwen2_moe" and get("qkv_bias") in (None, True):
        count += dim * (heads + 2 * groups)
    if kind == "qwen3_moe":
        count += 2 * dim  # norms of query and key
    if get("attention_bias") and kind != "qwen2_moe":
        count += dim * (heads + 2 * groups) + hidden
    return count


def _weight_bytes(get: ConfigFields) -> Number:
    quantized = get("quantization_config")
    method = quantized.get("quant_method") if isinstance(quantized, Mapping) else None
    if method == "fp8":
        return Number(1, "B", GIVEN, "quantization_config: fp8")
    if method == "mxfp4":
        return Number(4.25 / 8, "B", GIVEN, "quantization_config: mxfp4, a scale per 32")
    dtype = str(get("torch_dtype", "dtype") or "").removeprefix("torch.")
    known = {"bfloat16": 2, "float16": 2, "float32": 4}
    if dtype in known and method is None:
        return Number(known[dtype], "B", GIVEN, f"configuration: {dtype}")
    return Number(2, "B", ASSUMED, "default: bf16")


def _memory_of(config: Any, get: ConfigFields) -> EngramSpec | None:
    """The n-gram memory that the configuration has; None: none of the fields that mark one is set."""
    marks = ("engram_layer_ids", "n_head_per_ngram", "ple_layer_ids", "emb_neighbor_num", "oe_neighbor_num")
    if all(get(name) in (None, [], ()) for name in marks):
        return None
    try:
        return EngramSpec.from_hf_config(config)
    except ValueError as error:
        raise InputError(f"budget: its memory: {str(error).removeprefix('EngramSpec: ')}") from None
