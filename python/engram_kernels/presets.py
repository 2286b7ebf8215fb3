"""The published memories: their specs, and the readers of their Hugging Face configurations."""
import itertools
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from engram_kernels._files import shorten
from engram_kernels.config_fields import ConfigFields

_DEEPSEEK_CLASSES = 99_092  # of the 129,280 token ids of the DeepSeek V4 tokenizer

DEEPSEEK_V41: dict[str, Any] = dict(
    name="deepseek_v41", hash_family="xor_prime", boundary="pad", vocab_size=129_280, pad_token_id=2,
    num_classes=_DEEPSEEK_CLASSES, pad_class=2, max_order=4, heads=8, head_dim=256, layer_ids=(1, 14), seed=0,
    table_sizes=(16_000_000,) * 3, row_format="fp8_e4m3_block32", variant="deepseek_v41", zero_sign="copysign",
    add_residual=True, gate_eps=1e-20, gate_clamp=1e-6, hidden_size=5120, branches=4)

DEMO_V1: dict[str, Any] = dict(
    name="demo_v1", hash_family="xor_prime", boundary="pad", vocab_size=129_280, pad_token_id=2,
    num_classes=_DEEPSEEK_CLASSES, pad_class=2, max_order=3, heads=8, head_dim=64, layer_ids=(1, 15), seed=0,
    table_sizes=(646_400,) * 2, row_format="f32", variant="demo_v1", zero_sign="sign", add_residual=False,
    gate_eps=2.0**-23, gate_clamp=1e-6, conv_width=4, conv_dilation=3, conv_eps=1e-5, hidden_size=1024,
    branches=4)

QWEN4_PLE: dict[str, Any] = dict(
    name="qwen4_ple", hash_family="xor_splitmix", boundary="eos_reset", vocab_size=248_320,
    pad_token_id=248_044, eos_token_id=248_044, max_order=3, heads=8, head_dim=160, layer_ids=(1,),
    table_sizes=(20_000_000,) * 2, seed=1234, row_format="bf16", variant="qwen4_ple", zero_sign="sign",
    add_residual=False, gate_eps=1e-6, gate_clamp=1e-6, conv_width=4, conv_dilation=3, conv_eps=1e-6,
    hidden_size=2560, branches=4)

LONGCAT: dict[str, Any] = dict(
    name="longcat", hash_family="polynomial", boundary="stop", vocab_size=131_072, pad_token_id=0,
    eos_token_id=2, max_order=4, heads=4, head_dim=256, layer_ids=(0,),
    table_sizes=(78 * 131_072,) * 3, row_format="bf16", variant="longcat", hidden_size=3072, branches=1)

_SEEDS = 2**62  # as far as a spec takes them
LAYER_SEED_STEP = 10007  # between the seeds of two layers, in every xor family

# a configuration's field that says something of an n-gram memory, whichever family it belongs to
_MEMORY_FIELD = re.compile(r"(engram|ple|oe|emb)_|.*ngram|.*n_gram|special_token_scope|.*ignored_token_ids|text_vocab_\w+|"
                           r"vocab_size_text")
# what these say of the checkpoint's files changes no row id
_OF_FILES = frozenset({"make_ngram_vocab_size_divisible_by", "split_ngram_parts"})
_PLE_ROW_FORMATS = {"float32": "f32", "bfloat16": "bf16", "bf16": "bf16", "float16": "f16", "float8_e4m3fn": "fp8_e4m3_tensor",
                    "fp8": "fp8_e4m3_tensor", "nvfp4": "nvfp4"}


def read_hf_config(config: Any, overrides: dict[str, Any]) -> tuple[dict[str, Any], tuple[int, ...] | None]:
    """The fields of the spec that a configuration describes, and the rows of each table where it states them.

    Args:
        config: dict, object with attributes, path of a config.json or of its directory; `text_config` comes first.
        overrides: fields of the spec that replace what was read.

    Raises:
        ValueError: no n-gram memory in it; a field is missing, of the wrong type, contradicted, or not understood.
        OSError: the file cannot be read.
    """
    get = _MemoryFields(config, "EngramSpec")
    found = [family for family in _FAMILIES if get(*family[0]) not in (None, [], ())]
    if not found:
        raise ValueError("EngramSpec: the configuration has no n-gram memory: none of "
                         f"{', '.join(name for marks, _, _ in _FAMILIES for name in marks)} is set")
    if len(found) > 1:  # the fields of one would be passed over in silence
        raise ValueError("EngramSpec: the configuration has the fields of more than one memory: "
                         f"{', '.join(name for marks, _, _ in found for name in marks if get(name) is not None)}")
    _, preset, read = found[0]
    shared = dict(vocab_size=get.integer_if_set("vocab_size"), branches=get.integer_if_set("hc_mult", "hc_count"),
                  hidden_size=get.integer_if_set("hidden_size"))
    fields = preset | {k: v for k, v in (shared | read(get)).items() if v is not None} | overrides
    declared = None if get("engram_num_embeddings") is None else get.integers("engram_num_embeddings")
    if preset is DEEPSEEK_V41 or preset is DEMO_V1:
        fields["pad_class"] = overrides["pad_class"] if "pad_class" in overrides else _known_pad_class(fields)
    get.refuse_unread()
    return fields, declared


def family_of(config: Any) -> str:
    """The name of the preset that a configuration belongs to. Arguments and errors: `read_hf_config`, as far as that goes."""
    get = _MemoryFields(config, "EngramSpec")
    found = [preset["name"] for marks, preset, _ in _FAMILIES if get(*marks) not in (None, [], ())]
    if len(found) != 1:
        read_hf_config(config, {})  # says what is wrong
    return str(found[0])


class _MemoryFields(ConfigFields):
    """Refuses a configuration that contradicts itself, and knows which fields were asked for."""

    def __init__(self, config: Any, reader: str):
        super().__init__(config, reader)
        self._read: set[str] = set()

    def found(self, *names: str) -> list[tuple[str, Any]]:
        self._read.update(names)
        found = super().found(*names)
        if any(v != first for (_, first), (_, v) in itertools.pairwise(found)):
            raise ValueError("EngramSpec: the configuration contradicts itself: "
                             + shorten(", ".join(f"{name} is {v!r}" for name, v in found)))
        return found

    def _set(self) -> Iterator[str]:
        for part in self.parts:
            for name, value in (part if isinstance(part, Mapping) else getattr(part, "__dict__", {})).items():
                if isinstance(name, str) and value is not None:
                    yield name

    def refuse_unread(self) -> None:
        """Raises ValueError where a field that belongs to an n-gram memory is set and no reader asked for it."""
        unread = sorted({name for name in self._set() if _MEMORY_FIELD.match(name)} - self._read - _OF_FILES)
        if unread:
            raise ValueError(f"EngramSpec: the configuration sets {shorten(', '.join(unread))}, which this reader does not "
                             "understand; where it changes neither the hash nor the rows, leave it out of the configuration")


def _known_pad_class(fields: dict[str, Any]) -> int | None:
    """Class of the pad where it follows from the numbers, classes being numbered as first seen."""
    pad, num_classes = fields["pad_token_id"], fields["num_classes"]
    if num_classes is None:
        return None
    if pad == 0 or num_classes == fields["vocab_size"] or (pad, num_classes) == (2, _DEEPSEEK_CLASSES):
        return pad
    raise ValueError(f"EngramSpec: pad_class is not in the configuration (pad {shorten(repr(pad))}, {shorten(repr(num_classes))} "
                     "classes), expected as an argument: pad_class=int(token_map.map[pad])")


def _repeat(size: int, order: int) -> tuple[int, ...]:
    return (size,) * min(order - 1, 8)  # an absurd order is refused later, but not multiplied out


def _number(get: ConfigFields, *names: str) -> float | None:
    value = get(*names)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if value is not None and (not is_number or not 0 <= value <= sys.float_info.max):
        raise get.wrong(names, "a finite number >= 0")
    return value


def _split(name: str, total: int, parts: int) -> int:
    if parts < 1 or total % parts:
        raise ValueError(f"EngramSpec: {name} is {shorten(repr(total))}, expected a multiple of the {parts} columns or heads")
    return total // parts


def _read_v41(get: ConfigFields) -> dict[str, Any]:
    order = get.integer("engram_max_ngram_size")
    return dict(layer_ids=get.integers("engram_layer_ids"), max_order=order, heads=get.integer("engram_n_heads"),
                head_dim=get.integer("engram_head_dim"), table_sizes=_repeat(get.integer("engram_vocab_size"), order),
                num_classes=get.integer("engram_compressed_vocab_size"), gate_eps=_number(get, "rms_norm_eps", "norm_eps"),
                hidden_size=get.integer_if_set("hidden_size", "dim"),
                pad_token_id=get.integer("engram_pad_id", "engram_pad_token_id", low=0))


def _read_demo(get: ConfigFields) -> dict[str, Any]:
    order, heads = get.integer("max_ngram_size"), get.integer("n_head_per_ngram")
    return dict(layer_ids=get.integers("layer_ids"), max_order=order, heads=heads, table_sizes=get.integers("engram_vocab_size"),
                head_dim=_split("n_embed_per_ngram", get.integer("n_embed_per_ngram"), heads),
                pad_token_id=get.integer("pad_id", low=0), seed=get.integer("seed", low=0, high=_SEEDS),
                conv_width=get.integer_if_set("kernel_size"), conv_dilation=order)


def _read_qwen4(get: ConfigFields) -> dict[str, Any]:
    order, heads = get.integer("ngram_size", default=3), get.integer("heads_per_ngram", default=8)
    eos = get.required("eos_token_id")
    if isinstance(eos, list | tuple) and not eos:
        raise get.wrong(("eos_token_id",), "a token id or several")
    eos = get.integers("eos_token_id")[0] if isinstance(eos, list | tuple) else get.integer("eos_token_id", low=0)
    eps, dtype = _number(get, "rms_norm_eps"), get("ple_embedding_dtype")
    if dtype is not None and str(dtype).removeprefix("torch.") not in _PLE_ROW_FORMATS:
        raise get.wrong(("ple_embedding_dtype",), f"one of {', '.join(_PLE_ROW_FORMATS)}: there is no row format for others")
    width = get.integer("hidden_size" if get("ple_embed_dim") in (None, 0) else "ple_embed_dim")
    return dict(layer_ids=[i - 1 for i in sorted(set(get.integers("ple_layer_ids")))], max_order=order, heads=heads,
                head_dim=_split("ple_embed_dim", width, (order - 1) * heads),
                seed=get.integer("seed", default=1234, low=0, high=_SEEDS), pad_token_id=eos, eos_token_id=eos,
                table_sizes=_repeat(get.integer("ngram_vocab_size_base", default=20_000_000), order),
                conv_width=get.integer("ple_conv_kernel_size", default=4), conv_dilation=order, gate_eps=eps,
                conv_eps=eps, row_format=None if dtype is None else _PLE_ROW_FORMATS[str(dtype).removeprefix("torch.")])


def _read_longcat(get: ConfigFields) -> dict[str, Any]:
    order, heads = get.integer("emb_neighbor_num", "oe_neighbor_num"), get.integer("emb_split_num", "oe_split_num")
    get.required("ngram_vocab_size_ratio", "oe_vocab_size_ratio")
    ratio = _number(get, "ngram_vocab_size_ratio", "oe_vocab_size_ratio") or 0.0
    if (fixed := get("ngram_fix_normalize_factor")) not in (True, False, None):
        raise get.wrong(("ngram_fix_normalize_factor",), "True or False")
    special = _read_special_tokens(get)
    rows = ratio * special.get("vocab_size", get.integer("vocab_size"))
    if not 1 <= rows < 2**31:
        raise get.wrong(("ngram_vocab_size_ratio", "oe_vocab_size_ratio"), "a ratio that makes 1 to 2^31 - 1 rows")
    return dict(max_order=order, heads=heads, table_sizes=_repeat(int(rows), order),
                eos_token_id=get.integer("eos_token_id", low=0),
                head_dim=_split("hidden_size", get.integer("hidden_size"), heads * (order - 1)),
                average="root" if fixed else "mean") | special


def _read_special_tokens(get: ConfigFields) -> dict[str, Any]:
    """Fields of the spec for LongCat-Next's ignored ids, or for the special tokens of the serving engine tokenspeed.

    LongCat-Next (`modeling_longcat_ngram.py`): ignored ids count as 0, 0 and EOS end an n-gram, and a hash of 0 reads no row;
    the hash goes by the text's vocabulary. tokenspeed: ids of `special_token_scope`, "begin:end,..", end an n-gram and keep
    their word embedding, where `ngram_exclude_sp_token` says so.
    """
    excluded, scope = get("ngram_exclude_sp_token"), get("special_token_scope")
    if excluded not in (True, False, None) or (scope is not None and not isinstance(scope, str)):
        raise ValueError(f"EngramSpec: ngram_exclude_sp_token is {shorten(repr(excluded))} and special_token_scope "
                         f"{shorten(repr(scope))}, expected True or False, and ranges such as '0:4,36:55'")
    names = ("oe_ignored_token_ids", "ignored_token_ids")
    ignored = None if get(*names) is None else get.integers(*names)
    text_ids = get.integer_if_set("text_vocab_size", "vocab_size_text")
    get("text_vocab_plus_multimodal_special_token_size")  # the end of the ignored ids, which are named one by one
    if not excluded:
        if ignored is None and text_ids is None:
            return {}
        return dict(ignored_token_ids=ignored or (), zero_is_dead=True) | ({} if text_ids is None else
                                                                                  dict(vocab_size=text_ids))
    if ignored or text_ids is not None:
        raise ValueError("EngramSpec: ngram_exclude_sp_token and oe_ignored_token_ids or text_vocab_size are both set: they are "
                         "rules of different models")
    ids = tuple(i for low, high in _scope(scope) for i in range(low, high))
    if 0 not in ids:
        raise ValueError(f"EngramSpec: special_token_scope is {shorten(repr(scope))}, expected ranges with id 0, which ends an "
                         "n-gram in the published code whether it is special or not")
    return dict(ignored_token_ids=ids)


def _scope(scope: str | None) -> list[tuple[int, int]]:
    """The ranges of `special_token_scope`: (first, behind the last)."""
    ranges = re.fullmatch(r"\d{1,9}:\d{1,9}(,\d{1,9}:\d{1,9})*", scope or "")
    found = [(int(low), int(high)) for low, high in (part.split(":") for part in (scope or "").split(","))] if ranges else []
    if not found or any(high - low > 10**6 for low, high in found):
        raise ValueError(f"EngramSpec: special_token_scope is {shorten(repr(scope))}, expected ranges such as '0:4,36:55'")
    return found


def megatron(layer_numbers: Sequence[int], seed: int) -> dict[str, Any]:
    """The fields of `EngramSpec.megatron`."""
    numbers = list(layer_numbers)
    if any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in numbers):
        raise ValueError(f"EngramSpec: layer_numbers is {shorten(repr(numbers))}, expected integers of at least 1: Megatron "
                         "counts layers from one")
    return DEMO_V1 | dict(name="megatron", layer_ids=tuple(n - 1 for n in numbers), seed=seed + LAYER_SEED_STEP)


# fields that mark a family, its preset, its reader
_FAMILIES: tuple[tuple[tuple[str, ...], dict[str, Any], Callable[..., dict[str, Any]]], ...] = (
    (("engram_layer_ids",), DEEPSEEK_V41, _read_v41), (("n_head_per_ngram",), DEMO_V1, _read_demo),
    (("ple_layer_ids",), QWEN4_PLE, _read_qwen4), (("emb_neighbor_num", "oe_neighbor_num"), LONGCAT, _read_longcat))
