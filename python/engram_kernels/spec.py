"""EngramSpec: everything that tells one conditional memory from another, as data. The rest derives from it."""
from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from engram_kernels.layout import Layout, check_float, check_hash_fields, check_int, derive_layout, require
from engram_kernels.token_map import write_atomic

HASH_FAMILIES = ("xor_prime", "xor_splitmix", "polynomial")
BOUNDARIES = ("pad", "eos_reset", "stop")
ROW_FORMATS = ("f32", "bf16", "f16", "fp8_e4m3_block32", "fp8_e4m3_block32_packed", "fp8_e4m3_tensor", "int8_group32")
VARIANTS = ("deepseek_v41", "demo_v1", "none")
ZERO_SIGNS = ("copysign", "sign")
_BLOCK = 32  # row elements that share a scale
_INT32_MAX = 2**31 - 1
_DEEPSEEK_CLASSES = 99_092  # of the 129,280 token ids of the DeepSeek V4 tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngramSpec:
    """Descriptor of a conditional memory: hash, boundary rule, tables, row format, gate, convolution.

    Immutable and hashable; equal specs share one layout. Lists are taken for tuples.

    Attributes:
        name: free label.
        hash_family: "xor_prime" (Engram), "xor_splitmix" (Qwen PLE) or "polynomial" (LongCat).
        boundary: what a position before the sequence or a dead token, and all older ones, count as: "pad", "eos_reset"
            (EOS; an EOS lookback resets too) or "stop" (no term).
        vocab_size: raw token ids.
        num_classes: classes after token compression; None: raw ids are hashed.
        max_order: longest n-gram, 2..8; orders are 2..max_order.
        heads: hash functions of each order.
        head_dim: elements of one row.
        layer_ids: decoder layers with a table, zero based, in the order in which moduli are handed out.
        table_sizes: base rows per head for order 2, 3, .. max_order.
        seed: of the multipliers.
        pad_token_id: raw token id of the pad.
        pad_class: its class after compression; None where num_classes is.
        eos_token_id: raw id of EOS. "eos_reset" needs it; with "stop" an EOS lookback ends the sum; "pad" has none.
        row_format: how a row is stored, one of `ROW_FORMATS`.
        row_stride_bytes: bytes from row to row, "fp8_e4m3_block32_packed" only; None: no padding.
        zero_scale_is_zero: ue8m0 scale byte 0 means 0.0, not 2**-127.
        variant: the module around the lookup: "deepseek_v41", "demo_v1" or "none" (neither).
        zero_sign: sign of the gate's root at 0: "copysign" or "sign" (0 there).
        add_residual: the gate adds the hidden state.
        gate_eps: added to the mean squares of hidden state and key.
        gate_clamp: lower bound of |x| under the gate's root.
        conv_width: taps of the short convolution; None: there is none.
        conv_dilation: tokens between taps; None without a convolution.
        conv_eps: epsilon of the convolution's RMSNorm.
        hidden_size: H of the model.
        branches: hyper-connection streams, M.
    """
    name: str
    hash_family: str
    boundary: str
    vocab_size: int
    num_classes: int | None = None
    max_order: int
    heads: int
    head_dim: int
    layer_ids: tuple[int, ...]
    table_sizes: tuple[int, ...]
    seed: int = 0
    pad_token_id: int
    pad_class: int | None = None
    eos_token_id: int | None = None
    row_format: str = "bf16"
    row_stride_bytes: int | None = None
    zero_scale_is_zero: bool = False
    variant: str = "none"
    zero_sign: str = "copysign"
    add_residual: bool = True
    gate_eps: float = 1e-6
    gate_clamp: float = 1e-6
    conv_width: int | None = None
    conv_dilation: int | None = None
    conv_eps: float = 1e-5
    hidden_size: int
    branches: int = 1

    def __post_init__(self) -> None:
        require(self, "name", isinstance(self.name, str), "a string")
        for field, choices in (("hash_family", HASH_FAMILIES), ("boundary", BOUNDARIES), ("row_format", ROW_FORMATS),
                               ("variant", VARIANTS), ("zero_sign", ZERO_SIGNS)):
            require(self, field, getattr(self, field) in choices, " or ".join(map(repr, choices)))
        for field in ("zero_scale_is_zero", "add_residual"):
            require(self, field, isinstance(getattr(self, field), bool), "True or False")
        for field in ("gate_eps", "gate_clamp", "conv_eps"):
            check_float(self, field)
        check_hash_fields(self)
        self._check_rows_and_module()

    def _check_rows_and_module(self) -> None:
        check_int(self, "head_dim", 1, 2**20)
        with_format = f"with row_format {self.row_format!r}"
        if self.row_format in ("fp8_e4m3_block32", "fp8_e4m3_block32_packed", "int8_group32"):
            require(self, "head_dim", self.head_dim % _BLOCK == 0, f"a multiple of {_BLOCK} {with_format}")
        if self.row_format == "fp8_e4m3_block32_packed":
            packed = self.head_dim + self.head_dim // _BLOCK
            check_int(self, "row_stride_bytes", packed, _INT32_MAX, none=True)
        else:
            require(self, "row_stride_bytes", self.row_stride_bytes is None, f"None {with_format}")
        check_int(self, "hidden_size", 1, 2**24)
        check_int(self, "branches", 1, 64)
        check_int(self, "conv_width", 1, 64, none=True)
        check_int(self, "conv_dilation", 1, 4096, none=self.conv_width is None)
        if self.conv_width is None:
            require(self, "conv_dilation", self.conv_dilation is None, "None where conv_width is None")
        wants_conv = {"deepseek_v41": False, "demo_v1": True}.get(self.variant)
        if wants_conv is not None:
            require(self, "conv_width", (self.conv_width is not None) == wants_conv,
                     f"{'a width' if wants_conv else 'None'} with variant {self.variant!r}")

    @property
    def num_columns(self) -> int:
        """C, rows that a token reads in one layer."""
        return (self.max_order - 1) * self.heads

    @property
    def rows_per_token(self) -> int:
        """Rows that a token reads in all layers."""
        return self.num_columns * len(self.layer_ids)

    @property
    def row_dim(self) -> int:
        """D, elements of a row: head_dim."""
        return self.head_dim

    @property
    def bytes_per_row(self) -> int:
        """Bytes that a row takes, its scales and padding included."""
        d = self.head_dim
        return {"f32": 4 * d, "bf16": 2 * d, "f16": 2 * d, "fp8_e4m3_block32": d + d // _BLOCK,
                "fp8_e4m3_block32_packed": self.row_stride_bytes or d + d // _BLOCK, "fp8_e4m3_tensor": d,
                "int8_group32": d + d // _BLOCK * 4}[self.row_format]

    @property
    def num_ids(self) -> int:
        """Canonical ids are in [0, num_ids): the classes, or the raw vocabulary."""
        return self.vocab_size if self.num_classes is None else self.num_classes

    @property
    def canonical_pad(self) -> int:
        """Canonical id of the pad."""
        return self.pad_token_id if self.pad_class is None else self.pad_class

    @property
    def canonical_eos(self) -> int:
        """Canonical id of the EOS that blocks a lookback; -1: none does."""
        return -1 if self.eos_token_id is None else self.eos_token_id

    @property
    def boundary_id(self) -> int:
        """Canonical id that a blocked position counts as; 0 with "stop": in the polynomial family 0 is no term."""
        return {"pad": self.canonical_pad, "eos_reset": self.canonical_eos, "stop": 0}[self.boundary]

    def layout(self) -> Layout:
        """Moduli, offsets and multipliers, derived once; ValueError where row ids do not fit int32. See `Layout`."""
        return derive_layout(self)

    @classmethod
    def deepseek_v41(cls, **overrides: Any) -> EngramSpec:
        """DeepSeek-V4.1-Flash; tables of 384,006,168 and 384,016,682 rows.

        Source: its config.json; huggingface/transformers `models/deepseek_v41/modular_deepseek_v41.py` (gate_eps is the
        model's rms_norm_eps; rows and scales are separate tensors).
        """
        return cls(**{**dict(
            name="deepseek_v41", hash_family="xor_prime", boundary="pad", vocab_size=129_280, pad_token_id=2,
            num_classes=_DEEPSEEK_CLASSES, pad_class=2, max_order=4, heads=8, head_dim=256, layer_ids=(1, 14), seed=0,
            table_sizes=(16_000_000,) * 3, row_format="fp8_e4m3_block32", variant="deepseek_v41", zero_sign="copysign",
            add_residual=True, gate_eps=1e-20, gate_clamp=1e-6, hidden_size=5120, branches=4), **overrides})

    @classmethod
    def demo_v1(cls, **overrides: Any) -> EngramSpec:
        """The Engram paper's demo, with the 99,092 classes of today's DeepSeek tokenizer (129,280 ids).

        A tokenizer of another length gives another number of classes and so other multipliers: pass `num_classes`.

        Source: deepseek-ai/Engram `engram_demo_v1.py` (gate_eps is torch's default for a float32 RMSNorm).
        """
        return cls(**{**dict(
            name="demo_v1", hash_family="xor_prime", boundary="pad", vocab_size=129_280, pad_token_id=2,
            num_classes=_DEEPSEEK_CLASSES, pad_class=2, max_order=3, heads=8, head_dim=64, layer_ids=(1, 15), seed=0,
            table_sizes=(646_400,) * 2, row_format="f32", variant="demo_v1", zero_sign="sign", add_residual=False,
            gate_eps=2.0**-23, gate_clamp=1e-6, conv_width=4, conv_dilation=3, conv_eps=1e-5, hidden_size=1024,
            branches=4), **overrides})

    @classmethod
    def qwen4_ple(cls, **overrides: Any) -> EngramSpec:
        """Qwen3.8-Flash-Next PLE: raw ids, EOS resets; a table of 320,001,446 rows (320,001,536 as padded in its file).

        Published layer ids count from one, ours from zero. Its module is the demo's without biases and with norms that
        store w - 1, hence variant "none". Its fp8 edition: `row_format="fp8_e4m3_tensor"`.

        Source: huggingface/transformers `models/qwen4_exp/modular_qwen4_exp.py`; Qwen/Qwen3.8-Flash-Next config.json.
        """
        return cls(**{**dict(
            name="qwen4_ple", hash_family="xor_splitmix", boundary="eos_reset", vocab_size=248_320,
            pad_token_id=248_044, eos_token_id=248_044, max_order=3, heads=8, head_dim=160, layer_ids=(1,),
            table_sizes=(20_000_000,) * 2, seed=1234, row_format="bf16", variant="none", zero_sign="sign",
            add_residual=False, gate_eps=1e-6, gate_clamp=1e-6, conv_width=4, conv_dilation=3, conv_eps=1e-6,
            hidden_size=2560, branches=4), **overrides})

    @classmethod
    def longcat(cls, **overrides: Any) -> EngramSpec:
        """LongCat-Flash-Lite n-gram embedding: raw ids, the sum stops at EOS; 122,683,536 rows.

        Published as 12 tables, one per column; here they lie one behind the other as the table of "layer" 0, the input
        embedding. There is no gate: the mean of the projected rows and the word embedding is taken.

        Source: LongCat-Flash-Lite config.json and `modeling_longcat_ngram.py` (`NgramEmbedding`), and its port to vLLM.
        """
        return cls(**{**dict(
            name="longcat", hash_family="polynomial", boundary="stop", vocab_size=131_072, pad_token_id=0,
            eos_token_id=2, max_order=4, heads=4, head_dim=256, layer_ids=(0,),
            table_sizes=(78 * 131_072,) * 3, row_format="bf16", variant="none", hidden_size=3072,
            branches=1), **overrides})

    @classmethod
    def from_hf_config(cls, config: Any, **overrides: Any) -> EngramSpec:
        """The spec of a model, from its configuration: DeepSeek-V4.1, Engram demo, Qwen4Exp or LongCat field names.

        Fields of the hash must be there (or have a published default); others keep the preset's value. The class of the
        pad is in no configuration: where it does not follow from the numbers, pass `pad_class=int(token_map.map[pad])`.

        Args:
            config: dict, object with attributes, path of a config.json or of its directory; `text_config` comes first.
            overrides: fields of the spec that replace what was read.

        Raises:
            ValueError: no n-gram memory in it; a field missing, contradicted or invalid; `engram_num_embeddings` is not
                what the other fields give.
            OSError: the file cannot be read.
        """
        get = _hf_getter(config)
        found = [family for family in _HF_FAMILIES if get(*family[0], default=None)]
        if not found:
            raise ValueError("EngramSpec: the configuration has no n-gram memory: none of "
                             f"{', '.join(name for marks, _, _ in _HF_FAMILIES for name in marks)} is set")
        _, preset, read = found[0]
        shared = dict(vocab_size=get("vocab_size", default=None), hidden_size=get("hidden_size", default=None),
                      branches=get("hc_mult", "hc_count", default=None))
        try:
            read_fields = shared | read(get)
        except TypeError as error:
            raise ValueError(f"EngramSpec: the configuration has a field of the wrong type: {error}") from error
        fields = {k: v for k, v in read_fields.items() if v is not None} | overrides
        if read in (_read_v41, _read_demo) and "pad_class" not in fields:
            fields["pad_class"] = _known_pad_class(fields)
        spec: EngramSpec = getattr(cls, preset)(**fields)
        declared = get("engram_num_embeddings", default=None)
        if declared is not None and tuple(declared) != spec.layout().num_rows:
            raise ValueError(f"EngramSpec: engram_num_embeddings is {list(declared)}, but the other fields give "
                             f"{list(spec.layout().num_rows)} rows for layers {list(spec.layer_ids)}")
        return spec

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """The spec as JSON text, every field named; also written to `path`, atomically, when given."""
        text = json.dumps(dataclasses.asdict(self), indent=2) + "\n"
        if path is not None:
            write_atomic(path, text.encode())
        return text

    @classmethod
    def from_json(cls, source: str | os.PathLike[str]) -> EngramSpec:
        """The spec that `to_json` wrote: equal to it, field by field.

        Args:
            source: JSON text (starts with a brace) or the path of a file.

        Raises:
            ValueError: no JSON object, a field unknown, missing or invalid; names it.
            OSError: the file cannot be read.
        """
        is_text = isinstance(source, str) and source.lstrip().startswith("{")
        where = "the text" if is_text else os.fspath(source)
        data = _parse_json(str(source) if is_text else Path(source).read_bytes(), where)
        if not isinstance(data, dict):
            raise ValueError(f"EngramSpec: {where} holds a {type(data).__name__}, expected an object")
        fields = {f.name: f.default is dataclasses.MISSING for f in dataclasses.fields(cls)}  # name -> required
        if unknown := sorted(set(data) - set(fields)):
            raise ValueError(f"EngramSpec: unknown field {', '.join(unknown)} in {where}")
        if missing := [name for name, required in fields.items() if required and name not in data]:
            raise ValueError(f"EngramSpec: missing field {', '.join(missing)} in {where}")
        return cls(**data)


def _parse_json(text: str | bytes, where: str) -> Any:
    def without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        if len(set(names)) < len(names):
            raise ValueError(f"it names {next(n for n in names if names.count(n) > 1)!r} twice")
        return dict(pairs)

    try:
        return json.loads(text, object_pairs_hook=without_duplicates)
    except ValueError as error:  # bad syntax, bad UTF-8, a name twice
        raise ValueError(f"EngramSpec: {where} is not JSON: {error}") from error


def _hf_getter(config: Any) -> Callable[..., Any]:
    """Returns get(*names, default): the value of a field under any of its names, from `text_config` first."""
    if isinstance(config, str | os.PathLike):
        path = Path(config, "config.json") if Path(config).is_dir() else Path(config)
        config = _parse_json(path.read_bytes(), str(path))

    def field(part: Any, name: str) -> Any:
        return part.get(name) if isinstance(part, Mapping) else getattr(part, name, None)

    def get(*names: str, default: Any = ...) -> Any:
        parts = (config, field(config, "text_config"))
        found = {name: v for part in parts for name in names if (v := field(part, name)) is not None}
        if any(v != next(iter(found.values())) for v in found.values()):
            raise ValueError("EngramSpec: the configuration contradicts itself: "
                             + ", ".join(f"{name} is {v!r}" for name, v in found.items()))
        if not found and default is ...:
            raise ValueError(f"EngramSpec: the configuration has no field {' or '.join(names)}")
        return next(iter(found.values()), default)

    return get


def _known_pad_class(fields: dict[str, Any]) -> int | None:
    """Class of the pad where it follows from the numbers, classes being numbered as first seen."""
    pad, num_classes = fields["pad_token_id"], fields.get("num_classes", _DEEPSEEK_CLASSES)
    if num_classes is None:
        return None
    if pad == 0 or num_classes == fields.get("vocab_size") or (pad, num_classes) == (2, _DEEPSEEK_CLASSES):
        return pad
    raise ValueError(f"EngramSpec: pad_class is not in the configuration (pad {pad}, {num_classes} classes), expected "
                     "as an argument: pad_class=int(token_map.map[pad])")


def _repeat(size: int, order: int) -> tuple[int, ...]:
    return (size,) * min(order - 1, 8)  # an absurd order is refused later, but not multiplied out


def _split(name: str, total: int, parts: int) -> int:
    if parts < 1 or total % parts:
        raise ValueError(f"EngramSpec: {name} is {total}, expected a multiple of the {parts} columns or heads")
    return total // parts


def _read_v41(get: Callable[..., Any]) -> dict[str, Any]:
    order = get("engram_max_ngram_size")
    return dict(layer_ids=get("engram_layer_ids"), max_order=order, heads=get("engram_n_heads"),
                head_dim=get("engram_head_dim"), table_sizes=_repeat(get("engram_vocab_size"), order),
                num_classes=get("engram_compressed_vocab_size"), gate_eps=get("rms_norm_eps", default=None),
                pad_token_id=get("engram_pad_id", "engram_pad_token_id"))


def _read_demo(get: Callable[..., Any]) -> dict[str, Any]:
    order, heads = get("max_ngram_size"), get("n_head_per_ngram")
    return dict(layer_ids=get("layer_ids"), max_order=order, heads=heads, table_sizes=get("engram_vocab_size"),
                head_dim=_split("n_embed_per_ngram", get("n_embed_per_ngram"), heads), pad_token_id=get("pad_id"),
                seed=get("seed"), conv_width=get("kernel_size", default=None), conv_dilation=order)


def _read_qwen4(get: Callable[..., Any]) -> dict[str, Any]:
    order, heads, eos = get("ngram_size", default=3), get("heads_per_ngram", default=8), get("eos_token_id")
    eos, eps = eos[0] if isinstance(eos, list | tuple) else eos, get("rms_norm_eps", default=None)
    width = get("ple_embed_dim", default=None) or get("hidden_size")
    return dict(layer_ids=[i - 1 for i in sorted(set(get("ple_layer_ids")))], max_order=order, heads=heads,
                head_dim=_split("ple_embed_dim", width, (order - 1) * heads), seed=get("seed", default=1234),
                table_sizes=_repeat(get("ngram_vocab_size_base", default=20_000_000), order), pad_token_id=eos,
                eos_token_id=eos, conv_width=get("ple_conv_kernel_size", default=4), conv_dilation=order, gate_eps=eps,
                conv_eps=eps)


def _read_longcat(get: Callable[..., Any]) -> dict[str, Any]:
    if get("oe_ignored_token_ids", "text_vocab_size", default=None):
        raise ValueError("EngramSpec: oe_ignored_token_ids or text_vocab_size is set (LongCat-Next), expected neither: "
                         "its hash skips token ids, which no field describes")
    order, heads = get("emb_neighbor_num", "oe_neighbor_num"), get("emb_split_num", "oe_split_num")
    base = int(get("ngram_vocab_size_ratio", "oe_vocab_size_ratio") * get("vocab_size"))
    return dict(max_order=order, heads=heads, table_sizes=_repeat(base, order), eos_token_id=get("eos_token_id"),
                head_dim=_split("hidden_size", get("hidden_size"), heads * (order - 1)))


# fields that mark a family, its preset, its reader
_HF_FAMILIES: tuple[tuple[tuple[str, ...], str, Callable[..., dict[str, Any]]], ...] = (
    (("engram_layer_ids",), "deepseek_v41", _read_v41), (("n_head_per_ngram",), "demo_v1", _read_demo),
    (("ple_layer_ids",), "qwen4_ple", _read_qwen4), (("emb_neighbor_num", "oe_neighbor_num"), "longcat", _read_longcat))
