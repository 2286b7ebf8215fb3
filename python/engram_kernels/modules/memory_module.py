"""What every memory module has: its table, its token map, and the constants of its hash on the device of its parameters."""
from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeAlias, TypeVar

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from engram_kernels import _modes
from engram_kernels._checks import FLOAT_DTYPES
from engram_kernels._files import one_maker, shorten
from engram_kernels.layout import Layout
from engram_kernels.modules.module_table import AnyTable, ModuleTable, as_table
from engram_kernels.modules.published import assign_published
from engram_kernels.modules.published_model import OF_FOLDER, PublishedModel
from engram_kernels.ops.gather_rows import gather_rows
from engram_kernels.ops.ngram_hash import ngram_hash
from engram_kernels.row_format import FLOAT_FORMATS
from engram_kernels.sharding.sharded_rows import ShardedRows
from engram_kernels.spec import EngramSpec
from engram_kernels.table.host_memory import TableLayout, new_in_host_memory
from engram_kernels.table.row_table import RowTable
from engram_kernels.token_map import TokenMap
from engram_kernels.training.trainable_rows import TrainableRows

# examples/train_text.py learns faster from it than from 1, the deviation of an nn.Embedding
ROW_STD = 0.02
_ROWS_AT_ONCE = 1 << 16
TrainTable: TypeAlias = bool | str | os.PathLike[str]
_Module = TypeVar("_Module", bound="MemoryModule")


class MemoryModule(nn.Module):
    """Base of `Engram` and `LongcatEmbedding`; not used by itself.

    Args:
        spec: the descriptor.
        layer_id: which of ``spec.layer_ids``.
        table: the layer's rows (a `ShardedRows` or `TrainableRows` stays outside of the module's parameters and state), or
            None.
        token_map: compression of token ids, or None.

    Raises:
        TypeError: `spec` is no EngramSpec, `table` no RowTable, ShardedRows or TrainableRows, `token_map` no TokenMap.
        ValueError: the spec has another variant or no such layer, or table or token map do not belong to it.
    """

    op: ClassVar[str]  # what errors begin with
    variants: ClassVar[tuple[str, ...]]
    sparse_grad = False  # of the rows, where they are trained
    unused_tensors: tuple[str, ...] = ()  # of a checkpoint: those of this layer that were not read

    def __init__(self, spec: EngramSpec, layer_id: int, table: AnyTable | None, token_map: TokenMap | None):
        super().__init__()
        if not isinstance(spec, EngramSpec):
            raise TypeError(f"{self.op}: spec is a {type(spec).__name__}, expected an EngramSpec")
        if spec.variant not in self.variants:
            raise ValueError(f"{self.op}: spec {spec.name} has variant {spec.variant!r}, expected "
                             f"{' or '.join(map(repr, self.variants))}")
        if layer_id not in spec.layer_ids:
            raise ValueError(f"{self.op}: layer_id is {layer_id!r}, expected one of {list(spec.layer_ids)}")
        self.spec, self.layer_id = spec, layer_id
        self._layout = spec.layout().of_layer(layer_id)
        self._elsewhere: dict[torch.device, tuple[Layout, TokenMap | None]] = {}
        self._table: AnyTable | None = None
        self._trains_rows = False
        self.table, self.token_map = as_table(self.op, table), token_map  # a Module would be registered, past the property

    @classmethod
    def from_checkpoint(cls: type[_Module], source: str | os.PathLike[str], layer: int | None = None, *,
                        token_map: TokenMap | str | None = OF_FOLDER, dtype: torch.dtype | None = None,
                        device: torch.device | str | None = None, rounding: str = "once",
                        ranks: str | Sequence[str] | None = None, overrides: Mapping[str, Any] | None = None,
                        **table_options: Any) -> _Module:
        """A memory layer of a published model, from the folder of its checkpoint.

        Reads config.json, finds the tensors by model.safetensors.index.json (or by the headers of the files), compares shapes,
        rows and the checkpoint's own multipliers, sizes and offsets with what the configuration gives, dequantizes projections,
        and copies norms. The table is opened in place: no row is read. Tensors of the layer that were not read are in
        `unused_tensors`, and a warning names them.

        Args:
            source: the folder, its index, or one safetensors file beside a config.json.
            layer: a decoder layer with a memory, zero based; None: the only one.
            token_map: "folder": made from the folder's tokenizer.json where the model compresses token ids; a TokenMap; None:
                token ids are classes already.
            dtype: of the parameters; None: as they are stored, bfloat16 where they are quantized.
            device: of the parameters.
            rounding: as the module takes it.
            ranks: the files of ranks in the folder, over which the rows are split: their name with one {} for the number, or a
                list of names; None: model{}-mpN.safetensors, as convert.py writes them, where the folder has such and no index.
            overrides: fields of the spec that replace what config.json says.
            table_options: of `RowTable.open`: queue_depth, cache_bytes, io, zero_scale_is_zero.

        Returns:
            The module, with its table and its token map.

        Raises:
            OSError: a file cannot be read.
            ValueError: a tensor, a shard or config.json is missing, or something contradicts the configuration; says what, with
                the numbers. `engram-kernels check` lists all of it.

        Source: the published checkpoints; docs/models.md names the tensors.
        """
        model = PublishedModel(source, token_map, ranks, **(overrides or {}))
        if model.spec.variant not in cls.variants:
            raise ValueError(f"{cls.op}: {source} is a model of variant {model.spec.variant!r}, expected "
                             f"{' or '.join(map(repr, cls.variants))}")
        return cls.from_model(model, layer, dtype, device, rounding, table_options)

    @classmethod
    def from_model(cls: type[_Module], model: PublishedModel, layer: int | None, dtype: torch.dtype | None,
                   device: torch.device | str | None, rounding: str, table_options: Mapping[str, Any]) -> _Module:
        """Makes the layer from a model that was looked at already. Arguments and errors are those of `from_checkpoint`."""
        found, spec, table = model.open_layer(cls.op, layer, table_options)
        more: dict[str, Any] = model.module_options(found) | ({} if rounding == "once" else {"rounding": rounding})
        more |= {"dtype": dtype or model.stored_dtype(found), "device": device}
        module = cls(spec, found.layer_id, table=table, **more)
        assign_published(module, model.checkpoint, found.prefix, model.weight_block)
        module.unused_tensors = found.unused
        if found.unused:
            warnings.warn(f"{cls.op}: {model.source} has tensors of this layer that are not used: "
                          f"{shorten(', '.join(found.unused))}", stacklevel=3)
        return module

    def checked_sparse_grad(self, train_table: TrainTable, sparse_grad: bool | None) -> bool:
        """What `sparse_grad` is with these arguments. TypeError or ValueError where one is wrong."""
        if not isinstance(train_table, bool | str | os.PathLike) or not isinstance(sparse_grad, bool | None):
            raise TypeError(f"{self.op}: train_table is {train_table!r} and sparse_grad {sparse_grad!r}, expected True or False, "
                            "for train_table also 'host' or the path of a file")
        if not isinstance(train_table, bool) and train_table != "host" and Path(train_table).suffix != ".safetensors":
            raise ValueError(f"{self.op}: train_table is {train_table!r}, expected True, 'host' or the path of a .safetensors "
                             "file")
        if sparse_grad is not None and not isinstance(train_table, bool):
            raise ValueError(f"{self.op}: sparse_grad is {sparse_grad} and train_table {train_table!r}, expected None: rows that "
                             "are no parameter get their gradients through a TrainableRows")
        return train_table is True if sparse_grad is None else sparse_grad

    def made_table(self, train_table: Literal[True] | str | os.PathLike[str], dtype: torch.dtype,
                   device: torch.device | str | None) -> RowTable:
        """A table of this layer's size, normally distributed with a deviation of 0.02, where `train_table` says."""
        if self._table is not None or self._trains_rows:
            raise ValueError(f"{self.op}: table and train_table are given, expected one of them: with train_table the module "
                             "makes its own")
        num_rows, row_dim = self.layout.num_rows[0], self.spec.row_dim
        row_format = next(name for name, stored in FLOAT_FORMATS.items() if stored == dtype)
        if train_table is True:
            rows = nn.Parameter(torch.empty(num_rows, row_dim, dtype=dtype, device=device))
            return RowTable.from_tensor(nn.init.normal_(rows, std=ROW_STD), row_format=row_format)
        if train_table == "host":
            layout = TableLayout.of(row_format, num_rows, row_dim, row_dim)
            kept, _, memory = new_in_host_memory(self.op, f"a table of {num_rows} rows", layout)
            nn.init.normal_(kept, std=ROW_STD)
            return RowTable(kept, None, row_format, row_dim, _memory=memory, tier="host")
        path = Path(train_table)
        if not path.exists():
            with one_maker(self.op, path):
                if not path.exists():  # piece by piece: it may be larger than memory
                    sizes = (min(_ROWS_AT_ONCE, num_rows - first) for first in range(0, num_rows, _ROWS_AT_ONCE))
                    pieces = (torch.empty(n, row_dim, dtype=dtype, device="cpu").normal_(std=ROW_STD) for n in sizes)
                    return RowTable.create(path, pieces, row_format=row_format, num_rows=num_rows, row_dim=row_dim)
        table = RowTable.open(path)
        if (table.num_rows, table.row_dim, table.row_format) != (num_rows, row_dim, row_format):
            raise ValueError(f"{self.op}: {path} has {table.num_rows} rows of {table.row_dim} in {table.row_format}, layer "
                             f"{self.layer_id} with dtype {dtype} trains {num_rows} of {row_dim} in {row_format}")
        return table

    def device_of_parameters(self) -> torch.device | None:
        """Where the parameters are; None: there are none yet."""
        raise NotImplementedError(f"{type(self).__name__}.device_of_parameters: each module says where its own are")

    def _current_table(self) -> AnyTable | None:
        return ModuleTable(self) if self._trains_rows else self._table

    @property
    def table(self) -> AnyTable | None:
        """The rows: the table that was given or, where they are trained, one that reads the parameter `rows` when it is used."""
        return self._current_table()

    @table.setter
    def table(self, table: AnyTable | None) -> None:
        table = as_table(self.op, table)
        if table is not None and table.row_dim != self.spec.row_dim:
            raise ValueError(f"{self.op}: the table has rows of {table.row_dim}, spec {self.spec.name} has rows of "
                             f"{self.spec.row_dim}")
        if table is not None and table.num_rows < self.layout.num_rows[0]:
            raise ValueError(f"{self.op}: the table has {table.num_rows} rows, layer {self.layer_id} needs "
                             f"{self.layout.num_rows[0]}")
        parameter = table.rows if isinstance(table, RowTable) and isinstance(table.rows, nn.Parameter) else None
        if parameter is not None or self._trains_rows:
            self.register_parameter("rows", parameter)
        self._table, self._trains_rows = (table, False) if parameter is None else (None, True)

    @property
    def token_map(self) -> TokenMap | None:
        """Compression of token ids, on the device of the parameters; None: token ids are canonical."""
        return self._map

    @token_map.setter
    def token_map(self, token_map: TokenMap | None) -> None:
        if token_map is not None:
            if not isinstance(token_map, TokenMap):
                raise TypeError(f"{self.op}: token_map is a {type(token_map).__name__}, expected a TokenMap")
            if token_map.num_classes != self.layout.num_ids:
                raise ValueError(f"{self.op}: token_map has {token_map.num_classes} classes, spec {self.spec.name} has "
                                 f"{self.layout.num_ids}")
            pad_class = token_map.class_of(self.spec.pad_token_id)
            if pad_class not in (None, self.spec.canonical_pad):
                raise ValueError(f"{self.op}: token_map puts the pad in class {pad_class}, spec {self.spec.name} in "
                                 f"{self.spec.canonical_pad}")
        self._given_map = self._map = token_map
        self._elsewhere.clear()
        if self.device_of_parameters() is not None:
            self._place_constants()

    @property
    def layout(self) -> Layout:
        """Constants of this layer's hash, on the device of the parameters."""
        return self._layout

    def _hash(self, hidden: Tensor, token_ids: Tensor, cu_seqlens: Tensor | None, history: Tensor | None,
              dead_mask: Tensor | None, backend: str) -> Tensor:
        if cu_seqlens is None:
            raise ValueError(f"{self.op}: cu_seqlens is None, but hashing needs it")
        layout, token_map = self._constants_on(hidden)
        return ngram_hash(token_ids, cu_seqlens, layout, token_map, history, dead_mask, backend=backend)[0]

    def _gather(self, given: str, row_ids: Tensor, dtype: torch.dtype, backend: str) -> Tensor:
        table = self.table
        if table is None:
            raise ValueError(f"{self.op}: {given} needs a table, and the module was made without one")
        if isinstance(table, ShardedRows | TrainableRows):
            return table.gather(row_ids, dtype, backend=backend)
        return gather_rows(table.snapshot() if isinstance(table, ModuleTable) else table, row_ids, dtype, backend=backend,
                           sparse_grad=self.sparse_grad)

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        self._place_constants()
        return self

    def _place_constants(self) -> None:
        """Puts layout and token map on the device of the parameters, if it has data; a framework may have put none there."""
        device = self.device_of_parameters()
        assert device is not None
        if not (_modes.is_on(self._layout.moduli, device) and _modes.fake_mode_of(self._layout.moduli) is _modes.fake_mode()):
            self._layout, self._map = self._make_constants(device)

    def _constants_on(self, like: Tensor) -> tuple[Layout, TokenMap | None]:
        """Layout and token map for an op on `like`: where offloading, `DataParallel` or a fake tensor computes elsewhere, too."""
        device = like.device
        if is_compiling():
            return self._layout.to(device), None if self._map is None else self._map.to(device)
        mode = _modes.fake_mode_of(like)
        if mode is not _modes.fake_mode_of(self._layout.moduli):
            if mode is None:
                return self._make_constants(device)
            with mode:
                return self._make_constants(device, mode)
        if self._layout.moduli.device == device:
            return self._layout, self._map
        if device not in self._elsewhere:
            self._elsewhere[device] = self._make_constants(device)
        return self._elsewhere[device]

    def _make_constants(self, device: torch.device, mode: Any = None) -> tuple[Layout, TokenMap | None]:
        """Derived and given anew: what the module holds may be on the meta device, or fake."""
        mode = mode or _modes.fake_mode()
        with torch.inference_mode(False):
            token_map = self._given_map
            if token_map is not None and mode is not None and _modes.fake_mode_of(token_map.map) is None:
                token_map = token_map.with_map(mode.from_tensor(token_map.map))
            return (self.spec.layout().of_layer(self.layer_id).to(device), None if token_map is None else token_map.to(device))

    def __getstate__(self) -> dict[str, Any]:
        """What pickle and deepcopy take: not what `_constants_on` keeps."""
        return {**self.__dict__, "_elsewhere": {}}


def autocast_dtype(hidden: Tensor) -> torch.dtype | None:
    """The dtype of autocast on the device of `hidden`; None: it is off there."""
    device = hidden.device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return None
    dtype = torch.get_autocast_dtype(device)
    return dtype if dtype in FLOAT_DTYPES else None
