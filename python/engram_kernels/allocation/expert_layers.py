"""Which layers of a configuration have routed experts, and how wide these are: every family has fields of its own for it."""
from __future__ import annotations

from engram_kernels.config_fields import ConfigFields


def num_expert_layers(get: ConfigFields, kind: str, layers: int) -> int:
    """Layers with routed experts. `mlp_layer_types` and `moe_layers` name them; all other fields that are set must agree.

    Args:
        get: the configuration.
        kind: its model type, for the error.
        layers: decoder layers.

    Raises:
        ValueError: a field is not understood, or no layer is left.

    Source: transformers, `models/*/configuration_*.py`: deepseek_v3 (first_k_dense_replace, moe_layer_freq), qwen3_moe
    (mlp_only_layers, decoder_sparse_step), llama4 (moe_layers, interleave_moe_layer_step), jamba (expert_layer_period and its
    offset), lfm2_moe and afmoe (num_dense_layers), glm4_moe_lite (mlp_layer_types).
    """
    if (kinds := get("mlp_layer_types")) is not None:
        if not isinstance(kinds, list | tuple) or not all(one in ("dense", "sparse") for one in kinds):
            raise get.wrong(("mlp_layer_types",), "a list of 'dense' and 'sparse'")
        sparse = {i for i, one in enumerate(kinds[:layers]) if one == "sparse"}
    elif get("moe_layers") is not None:
        sparse = set(get.integers("moe_layers")) & set(range(layers))
    else:
        sparse = _by_rules(get, layers)
    if not sparse:
        raise get.error(f"{get.reader}: none of the {layers} layers of the configuration ({kind}) has routed experts")
    return len(sparse)


def _by_rules(get: ConfigFields, layers: int) -> set[int]:
    first = max(get.integer(name, default=0, low=0) for name in ("first_k_dense_replace", "num_dense_layers"))
    sparse = set(range(first, layers))
    if get("mlp_only_layers") is not None:
        sparse -= set(get.integers("mlp_only_layers"))
    for name in ("decoder_sparse_step", "interleave_moe_layer_step"):
        step = get.integer(name, default=1)
        sparse = {i for i in sparse if (i + 1) % step == 0}
    if isinstance(is_moe := get("moe_layer_freq"), list | tuple):
        sparse &= {i for i, one in enumerate(is_moe) if one}
    else:
        step = get.integer("moe_layer_freq", default=1)
        sparse = {i for i in sparse if i % step == 0}
    if get("expert_layer_period") is not None:
        period, offset = get.integer("expert_layer_period"), get.integer("expert_layer_offset", low=0)
        sparse = {i for i in sparse if i % period == offset}
    return sparse


def expert_width(get: ConfigFields, kind: str, field: str) -> int:
    """Columns of one routed expert. `intermediate_size` is that only where the family has no other name for it.

    Args:
        get: the configuration.
        kind: its model type.
        field: that names the number of routed experts.

    Raises:
        ValueError: the field is missing, or no integer.
    """
    own = field == "n_routed_experts" or kind.startswith("qwen")  # there intermediate_size is that of the dense layers
    return get.integer("moe_intermediate_size") if own else get.integer("moe_intermediate_size", "intermediate_size")


def shared_width(get: ConfigFields, kind: str, width: int) -> int:
    """Columns of the shared experts of a layer together; 0: there are none.

    Args:
        get: the configuration.
        kind: its model type; Llama-4 has one shared expert that no field names.
        width: of a routed expert.

    Raises:
        ValueError: a field is no integer.
    """
    for name in ("shared_expert_intermediate_size", "shared_intermediate_size"):
        if get(name) is not None:
            return get.integer(name, low=0)
    implied = 1 if kind.startswith("llama4") else 0
    return get.integer("n_shared_experts", "num_shared_experts", default=implied, low=0) * width
