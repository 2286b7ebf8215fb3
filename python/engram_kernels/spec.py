"""EngramSpec: everything that tells one conditional memory from another, as data. The rest derives from it."""
from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engram_kernels import counts, presets
from engram_kernels._files import parse_json, shorten, write_atomic
from engram_kernels.layout import Layout, derive_layout
from engram_kernels.row_format import ROW_FORMATS
from engram_kernels.spec_fields import INT32_MAX, check_float, check_hash_fields, check_int, require
from engram_kernels.token_ids import mark_ids

if TYPE_CHECKING:
    from torch import Tensor

HASH_FAMILIES = ("xor_prime", "xor_prime_int32", "xor_splitmix", "polynomial")
BOUNDARIES = ("pad", "eos_reset", "stop")
VARIANTS = ("deepseek_v41", "demo_v1", "qwen4_ple", "longcat", "none")
ZERO_SIGNS = ("copysign", "sign")
AVERAGES = ("mean", "root")


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngramSpec:
    """Descriptor of a conditional memory: hash, boundary rule, tables, row format, gate, convolution.

    Immutable and hashable; equal specs share one layout. Lists are taken for tuples.

    Attributes:
        name: free label.
        hash_family: "xor_prime" (Engram), "xor_prime_int32" (MaxText: multipliers so small that products fit int32),
            "xor_splitmix" (Qwen PLE) or "polynomial" (LongCat).
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
        ignored_token_ids: raw ids that no n-gram contains; with variant "longcat" they keep their word embedding.
            They may lie beyond `vocab_size`.
        zero_is_dead: "polynomial" only: no n-gram contains id 0, and a hash of 0 names no row (LongCat-Next).
        row_format: how a row is stored, one of `ROW_FORMATS`.
        row_stride_bytes: bytes from row to row, "fp8_e4m3_block32_packed" only; None: no padding.
        zero_scale_is_zero: ue8m0 scale byte 0 means 0.0, not 2**-127.
        variant: the module around the lookup: "deepseek_v41", "demo_v1", "qwen4_ple", "longcat" or "none" (no module).
        average: what the "longcat" module divides the sum of the word embedding and C pieces by: "mean" (1 + C) or "root" (the
            square root of 1 + C).
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
    ignored_token_ids: tuple[int, ...] = ()
    zero_is_dead: bool = False
    row_format: str = "bf16"
    row_stride_bytes: int | None = None
    zero_scale_is_zero: bool = False
    variant: str = "none"
    average: str = "mean"
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
        for field, choices in (("hash_family", HASH_FAMILIES), ("boundary", BOUNDARIES), ("row_format", tuple(ROW_FORMATS)),
                               ("variant", VARIANTS), ("zero_sign", ZERO_SIGNS), ("average", AVERAGES)):
            require(self, field, getattr(self, field) in choices, " or ".join(map(repr, choices)))
        for field in ("zero_scale_is_zero", "add_residual", "zero_is_dead"):
            require(self, field, isinstance(getattr(self, field), bool), "True or False")
        for field in ("gate_eps", "gate_clamp", "conv_eps"):
            check_float(self, field)
        check_hash_fields(self)
        self._check_rows_and_module()

    def _check_rows_and_module(self) -> None:
        check_int(self, "head_dim", 1, 2**20)
        with_format, row_format = f"with row_format {self.row_format!r}", ROW_FORMATS[self.row_format]
        multiple = row_format.multiple
        require(self, "head_dim", self.head_dim % multiple == 0, f"a multiple of {multiple} {with_format}")
        if row_format.is_packed:
            check_int(self, "row_stride_bytes", row_format.row_bytes(self.head_dim), INT32_MAX, none=True)
        else:
            require(self, "row_stride_bytes", self.row_stride_bytes is None, f"None {with_format}")
        check_int(self, "hidden_size", 1, 2**24)
        check_int(self, "branches", 1, 64)
        check_int(self, "conv_width", 1, 64, none=True)
        check_int(self, "conv_dilation", 1, 4096, none=self.conv_width is None)
        if self.conv_width is None:
            require(self, "conv_dilation", self.conv_dilation is None, "None where conv_width is None")
        wants_conv = {"deepseek_v41": False, "demo_v1": True, "qwen4_ple": True, "longcat": False}.get(self.variant)
        if wants_conv is not None:
            require(self, "conv_width", (self.conv_width is not None) == wants_conv,
                     f"{'a width' if wants_conv else 'None'} with variant {self.variant!r}")

        require(self, "branches", self.branches == 1 or self.variant != "longcat", "1 with variant 'longcat'")
        require(self, "average", self.average == "mean" or self.variant == "longcat", "'mean' without variant 'longcat'")

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
        return self.row_stride_bytes or ROW_FORMATS[self.row_format].row_bytes(self.head_dim)

    @property
    def num_table_parameters(self) -> int:
        """Elements of all tables: the rows of the true moduli, no padding."""
        return sum(self.layout().num_rows) * self.head_dim

    @property
    def num_module_parameters(self) -> int:
        """Parameters of the modules of all layers: projections, norms, convolution. 0 with variant "none"."""
        return counts.module_parameters(self, self.hidden_size, self.branches)

    @property
    def num_parameters(self) -> int:
        """Parameters of the memory: tables and modules of all layers."""
        return self.num_table_parameters + self.num_module_parameters

    def flops_per_token(self, hidden: int | None = None, branches: int | None = None) -> int:
        """Floating-point operations per token, forward, of the modules of all layers. See `counts.flops_per_token`.

        Args:
            hidden: H; None: the spec's.
            branches: M; None: the spec's.

        Raises:
            ValueError: one of them is no integer that a spec may have.
        """
        other = dataclasses.replace(self, hidden_size=self.hidden_size if hidden is None else hidden,
                                    branches=self.branches if branches is None else branches)
        return counts.flops_per_token(other, other.hidden_size, other.branches)

    def bytes(self, row_format: str | None = None) -> int:
        """Bytes of all tables, scales included.

        Args:
            row_format: one of `ROW_FORMATS`, without padding; None: the spec's own, its padding included.

        Raises:
            ValueError: there is no such format, or it does not take rows of `head_dim` elements.
        """
        spec = self if row_format is None else dataclasses.replace(self, row_format=row_format, row_stride_bytes=None)
        return sum(self.layout().num_rows) * spec.bytes_per_row

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
        return cls(**presets.DEEPSEEK_V41 | overrides)

    @classmethod
    def demo_v1(cls, **overrides: Any) -> EngramSpec:
        """The Engram paper's demo, with the 99,092 classes of today's DeepSeek tokenizer (129,280 ids).

        A tokenizer of another length gives another number of classes and so other multipliers: pass `num_classes`.

        Source: deepseek-ai/Engram `engram_demo_v1.py` (gate_eps is torch's default for a float32 RMSNorm).
        """
        return cls(**presets.DEMO_V1 | overrides)

    @classmethod
    def qwen4_ple(cls, **overrides: Any) -> EngramSpec:
        """Qwen3.8-Flash-Next PLE: raw ids, EOS resets; a table of 320,001,446 rows (320,001,536 as padded in its file).

        Published layer ids count from one, ours from zero. Its module is the demo's without biases, and its norms multiply
        by 1 + w. Its fp8 edition: `row_format="fp8_e4m3_tensor"`.

        Source: huggingface/transformers `models/qwen4_exp/modular_qwen4_exp.py`; Qwen/Qwen3.8-Flash-Next config.json.
        """
        return cls(**presets.QWEN4_PLE | overrides)

    @classmethod
    def longcat(cls, **overrides: Any) -> EngramSpec:
        """LongCat-Flash-Lite n-gram embedding: raw ids, the sum stops at EOS; 122,683,536 rows.

        Published as 12 tables, one per column; here they lie one behind the other as the table of "layer" 0, the input
        embedding. There is no gate: the mean of the projected rows and the word embedding is taken. LongCat-Next adds
        `ignored_token_ids` and `zero_is_dead`; `from_hf_config` reads both.

        Source: LongCat-Flash-Lite config.json and `modeling_longcat_ngram.py` (`NgramEmbedding`), and its port to vLLM.
        """
        return cls(**presets.LONGCAT | overrides)

    @classmethod
    def megatron(cls, layer_numbers: Sequence[int], *, seed: int = 0, **overrides: Any) -> EngramSpec:
        """A memory trained by Megatron Core, whose layer numbers count from one and seed the multipliers as they are.

        A spec with these numbers less one and the same seed would give other multipliers, and every row id would be wrong.
        Here the layers are zero based, as everywhere, and the seed makes up for the difference.

        Args:
            layer_numbers: Megatron's, each at least 1, in the order in which its moduli were handed out.
            seed: Megatron's `engram_seed`.
            overrides: fields that replace those of `demo_v1`, such as `table_sizes`, `hidden_size` or `branches` (1 where
                Megatron ran a single stream).

        Raises:
            ValueError: a layer number is no integer of at least 1; and what the spec refuses.

        Source: NVIDIA/Megatron-LM pull requests 3689 and 7231, Engram.
        """
        return cls(**presets.megatron(layer_numbers, seed) | overrides)

    @classmethod
    def from_hf_config(cls, config: Any, **overrides: Any) -> EngramSpec:
        """The spec of a model, from its configuration: DeepSeek-V4.1, Engram demo, Qwen4Exp or LongCat field names.

        Fields of the hash must be there (or have a published default); others keep the preset's value. The class of the
        pad is in no configuration: where it does not follow from the numbers, pass `pad_class=int(token_map.map[pad])`.

        Args:
            config: dict, object with attributes, path of a config.json or of its directory; `text_config` comes first.
            overrides: fields of the spec that replace what was read.

        Raises:
            ValueError: no n-gram memory in it; a field of it is missing, contradicted, invalid or not understood;
                `engram_num_embeddings` is not what the other fields give.
            OSError: the file cannot be read.
        """
        fields, declared = presets.read_hf_config(config, overrides)
        spec = cls(**fields)
        if declared is not None and declared != spec.layout().num_rows:
            raise ValueError(f"EngramSpec: engram_num_embeddings is {shorten(repr(list(declared)))}, but the other fields give "
                             f"{list(spec.layout().num_rows)} rows for layers {list(spec.layer_ids)}")
        return spec

    def dead_mask(self, token_ids: Tensor, dead_mask: Tensor | None = None) -> Tensor | None:
        """Which tokens no n-gram contains: `ignored_token_ids`, id 0 with `zero_is_dead`, and those of a given mask.

        What `ngram_hash` takes as `dead_mask`; in its `history` such a token is -2. No host synchronization.

        Args:
            token_ids: integers of any shape.
            dead_mask: bool of the same shape, True where a token is dead for another reason; None: nowhere.

        Returns:
            bool of the shape of `token_ids`; `dead_mask` itself, also None, where the spec knows no dead ids.
        """
        return mark_ids(token_ids, (*self.ignored_token_ids, 0) if self.zero_is_dead else self.ignored_token_ids, dead_mask)

    def without_absent(self, row_ids: Tensor, offsets: Tensor, dead: Tensor | None) -> Tensor:
        """Row ids of the hash as a module reads them: -1 where `longcat` has no row, which is at dead tokens and, with
        `zero_is_dead`, where the hash of a column is 0. The ids themselves with any other variant. No host synchronization.

        Args:
            row_ids: [L, T, C], as `ngram_hash` gives them.
            offsets: [L, C], `Layout.offsets` of the same layers.
            dead: [T] bool, as `dead_mask` gives it; None: no token is dead.
        """
        if self.variant != "longcat":
            return row_ids
        if self.zero_is_dead:
            row_ids = row_ids.masked_fill(row_ids == offsets[:, None], -1)
        return row_ids if dead is None else row_ids.masked_fill(dead[:, None], -1)

    def is_ignored(self, token_ids: Tensor) -> Tensor | None:
        """bool of the shape of `token_ids`, True at `ignored_token_ids`; None where there are none."""
        return mark_ids(token_ids, self.ignored_token_ids)

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """The spec as JSON text, every field named; also written to `path`, atomically, when given."""
        text = json.dumps(dataclasses.asdict(self), indent=2) + "\n"
        if path is not None:
            write_atomic("EngramSpec.to_json", path, text.encode())
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
        try:
            data = parse_json(str(source) if is_text else Path(source).read_bytes())
        except ValueError as error:
            raise ValueError(f"EngramSpec: {where} is not JSON: {shorten(str(error))}") from error
        if not isinstance(data, dict):
            raise ValueError(f"EngramSpec: {where} holds a {type(data).__name__}, expected an object")
        fields = {f.name: f.default is dataclasses.MISSING for f in dataclasses.fields(cls)}  # name -> required
        if unknown := sorted(set(data) - set(fields)):
            raise ValueError(f"EngramSpec: unknown field {shorten(', '.join(unknown))} in {where}")
        if missing := [name for name, required in fields.items() if required and name not in data]:
            raise ValueError(f"EngramSpec: missing field {', '.join(missing)} in {where}")
        return cls(**data)
