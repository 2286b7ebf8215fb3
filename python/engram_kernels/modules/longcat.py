"""LongcatEmbedding: LongCat's input embedding, the average of a word embedding and of projected n-gram rows."""
from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engram_kernels._checks import FLOAT_DTYPES, expect_tensor
from engram_kernels.modules.memory_module import MemoryModule, TrainTable, autocast_dtype
from engram_kernels.modules.module_table import AnyTable
from engram_kernels.modules.published import ROUNDINGS, assign_published
from engram_kernels.spec import EngramSpec


class LongcatEmbedding(MemoryModule):
    """The embedding of a LongCat model: ``x = (word[t] + sum over columns c of P_c row_c) / (1 + C)``.

    Column ``(order - 2) * heads + head`` is the published embedder of that number. A token's n-grams end at EOS and at the
    sequence start. A token of ``spec.ignored_token_ids``, or one that `dead_mask` names, is in no n-gram and keeps its word
    embedding as it is. ``spec.average == "root"`` divides by the square root of 1 + C.

    Parameters, which are the names in the state dict: `word_embeddings` (Embedding, [V, H]) and `post_proj` (Linear without bias,
    C*D -> H: the published projections side by side, so that one product does what C do). A table made of an ``nn.Parameter`` is
    registered as `rows` and trained. Everything else that `Engram` says of tables, devices and frameworks holds here too.

    Args:
        spec: the descriptor; its `variant` must be "longcat".
        layer_id: which of ``spec.layer_ids``; None: the first.
        hidden_size: H; None: the spec's.
        num_embeddings: V of the word embedding; None: the spec's vocabulary. 0: no word embedding, `forward` gets `word`.
        table: the rows; None: only prefetched `rows` can be passed to `forward`. May be set later.
        dtype: of the parameters and activations: float32, bfloat16 or float16.
        device: of the parameters.
        rounding: "once": one product over all columns; its sum with the word embedding is divided in float32 and rounded once.
            "published": C products, each added in the dtype, as the published code does; slower, and equal to it.
        train_table: the module makes its own table [R, D] of `dtype`, as that of `Engram`: True: on `device`, the parameter
            `rows`; "host" or a path: in host memory or in a file, for a `TrainableRows`.
        sparse_grad: the gradient of `rows` is sparse, as of `Engram`; None: True with `train_table`, else False.

    Raises:
        TypeError: `spec` is no EngramSpec, `table` no RowTable, ShardedRows or TrainableRows, `train_table` no bool, str or path,
            or `sparse_grad` no bool.
        ValueError: the spec has another variant or no such layer, the table does not belong to it or is given with `train_table`,
            the file of `train_table` holds another table, `dtype` is no dtype of parameters, or `rounding` is neither word.

    Source: docs/ops.md, "The module"; LongCat-Flash-Lite and LongCat-Next `modeling_longcat_ngram.py` (`NgramEmbedding`);
    vllm-project/vllm `models/longcat_flash_ngram.py`.
    """

    op = "LongcatEmbedding"
    variants = ("longcat",)

    def __init__(self, spec: EngramSpec, layer_id: int | None = None, hidden_size: int | None = None, *,
                 num_embeddings: int | None = None, table: AnyTable | None = None,
                 dtype: torch.dtype = torch.bfloat16, device: torch.device | str | None = None, rounding: str = "once",
                 train_table: TrainTable = False, sparse_grad: bool | None = None):
        first = spec.layer_ids[0] if isinstance(spec, EngramSpec) and layer_id is None else layer_id
        super().__init__(spec, first, table, None)  # type: ignore[arg-type]  # a None is refused as no layer
        if rounding not in ROUNDINGS:
            raise ValueError(f"{self.op}: rounding is {rounding!r}, expected {' or '.join(map(repr, ROUNDINGS))}")
        if dtype not in FLOAT_DTYPES:
            raise ValueError(f"{self.op}: dtype is {dtype!r}, expected torch.float32, torch.bfloat16 or torch.float16")
        self.rounding, self.sparse_grad = rounding, self.checked_sparse_grad(train_table, sparse_grad)
        self.hidden_size = spec.hidden_size if hidden_size is None else hidden_size
        words = spec.vocab_size if num_embeddings is None else num_embeddings
        self.word_embeddings = nn.Embedding(words, self.hidden_size, dtype=dtype, device=device) if words else None
        self.post_proj = nn.Linear(spec.num_columns * spec.row_dim, self.hidden_size, bias=False, dtype=dtype, device=device)
        if train_table:
            self.table = self.made_table(train_table, dtype, device)
        self._place_constants()

    def device_of_parameters(self) -> torch.device | None:
        """Where the parameters are; None: there are none yet."""
        projection = getattr(self, "post_proj", None)
        found = None if projection is None else next(iter((*projection.parameters(), *projection.buffers())), None)
        return None if found is None else found.device

    def extra_repr(self) -> str:
        """What `repr` shows of the module itself."""
        return (f"spec={self.spec.name!r}, layer_id={self.layer_id}, hidden_size={self.hidden_size}, "
                f"table={'trained rows' if self._trains_rows else self._table}, rounding={self.rounding!r}")

    def hash(self, token_ids: Tensor, cu_seqlens: Tensor, history: Tensor | None = None, dead_mask: Tensor | None = None, *,
             backend: str = "auto") -> Tensor:
        """The rows that `forward` reads, for a prefetcher: row ids, -1 where there is no row.

        Args:
            token_ids: [T] int32 or int64, sequences packed back to back.
            cu_seqlens: [B+1] int32.
            history: [B, N-1], as `ngram_hash` takes it; an ignored token is -2 there.
            dead_mask: [T] bool, True where a token is in no n-gram, beside those that the spec ignores.
            backend: of the hash.

        Returns:
            [T, C] int32.

        Raises:
            TypeError, ValueError, IndexError: as `ngram_hash`.
        """
        dead = self._dead(token_ids, dead_mask)
        row_ids = self._hash(token_ids, token_ids, cu_seqlens, history, dead, backend)
        return self.spec.without_absent(row_ids[None], self._constants_on(token_ids)[0].offsets, dead)[0]

    def forward(self, token_ids: Tensor, cu_seqlens: Tensor | None = None, *, word: Tensor | None = None,
                row_ids: Tensor | None = None, rows: Tensor | None = None, history: Tensor | None = None,
                dead_mask: Tensor | None = None, backend: str = "auto") -> Tensor:
        """The embeddings that the decoder starts from.

        Args:
            token_ids: [T] int32 or int64, sequences packed back to back.
            cu_seqlens: [B+1] int32; needed unless `row_ids` or `rows` are given.
            word: [T, H] word embeddings; None: those of `word_embeddings`.
            row_ids: [T, C] rows of the table, as `hash` gives them.
            rows: [T, C, D] or [T, C*D] of the dtype of the word embeddings (or autocast's), gathered before, as by
                `RowPrefetcher` from what `hash` gave.
            history: [B, N-1], as `ngram_hash` takes it, where the tokens are hashed here. None: every sequence starts here.
            dead_mask: [T] bool, True = the token is in no n-gram and keeps its word embedding; what its rows hold reaches no
                gradient.
            backend: of every op.

        Returns:
            [T, H] in the dtype of the word embeddings.

        Raises:
            TypeError: an argument is no tensor.
            ValueError: two sources of rows, what is needed is missing, an argument that would not be used, or a wrong shape,
                dtype or device; and what the ops raise.

        Source: docs/ops.md, "The module".
        """
        expect_tensor(self.op, "token_ids", token_ids, (torch.int32, torch.int64), ("T",))
        if row_ids is not None and rows is not None:
            raise ValueError(f"{self.op}: row_ids and rows are both given, expected at most one of them")
        if history is not None and not (row_ids is None and rows is None):
            raise ValueError(f"{self.op}: history is given, but the tokens are not hashed here")
        dead, words = self._dead(token_ids, dead_mask), self._words(token_ids, word)
        if rows is None:
            given = "token_ids" if row_ids is None else "row_ids"
            if row_ids is None:
                row_ids = self.hash(token_ids, cu_seqlens, history, dead_mask, backend=backend)  # type: ignore[arg-type]
            rows = self._gather(given, row_ids, self._row_dtype(words), backend)
        rows = self._flat(rows, words)
        if dead is not None:
            rows = rows.masked_fill(dead[:, None], 0)  # its gradient is 0, but 0 * NaN in that of post_proj is not
        out = self._average(words, rows)
        plain = self.spec.is_ignored(token_ids)
        if dead_mask is not None:
            plain = dead_mask if plain is None else plain | dead_mask
        return out if plain is None else torch.where(plain[:, None], words, out)

    def _average(self, words: Tensor, rows: Tensor) -> Tensor:
        count = 1 + self.spec.num_columns
        divisor = count if self.spec.average == "mean" else math.sqrt(count)
        if self.rounding == "once":
            return ((words.float() + self.post_proj(rows).float()) / divisor).to(words.dtype)
        dim, weight = self.spec.row_dim, self.post_proj.weight
        for column in range(self.spec.num_columns):
            part = slice(column * dim, (column + 1) * dim)
            words = words + F.linear(rows[:, part], weight[:, part].contiguous())
        return words / divisor

    def _dead(self, token_ids: Tensor, dead_mask: Tensor | None) -> Tensor | None:
        if dead_mask is not None:
            expect_tensor(self.op, "dead_mask", dead_mask, (torch.bool,), token_ids.shape[:1], token_ids.device, dense_dims=1)
        return self.spec.dead_mask(token_ids, dead_mask)

    def _words(self, token_ids: Tensor, word: Tensor | None) -> Tensor:
        if word is None:
            if self.word_embeddings is None:
                raise ValueError(f"{self.op}: word is None, but the module was made without word embeddings (num_embeddings=0)")
            word = self.word_embeddings(token_ids)
        expect_tensor(self.op, "word", word, FLOAT_DTYPES, (token_ids.shape[0], self.hidden_size), token_ids.device)
        return word

    def _flat(self, rows: Tensor, words: Tensor) -> Tensor:
        columns, row_dim = self.spec.num_columns, self.spec.row_dim
        flat = isinstance(rows, Tensor) and rows.dim() == 2
        shape = (words.shape[0], columns * row_dim) if flat else (words.shape[0], columns, row_dim)
        expect_tensor(self.op, "rows", rows, tuple({words.dtype, self._row_dtype(words)}), shape, words.device)
        return rows if flat else rows.flatten(1)

    def _row_dtype(self, words: Tensor) -> torch.dtype:
        """What rows are gathered in: the dtype that autocast would bring them to, where it does; else that of the words."""
        return autocast_dtype(words) or words.dtype

    def load_published(self, weights: Mapping[str, Tensor], prefix: str = "") -> None:
        """Copies the word embedding and the projections out of a published checkpoint's tensors.

        Args:
            weights: name -> tensor: `embed_tokens.weight` or `ngram_embeddings.word_embeddings.weight`, and
                `ngram_embeddings.post_projs.{i}.weight`. The rows are not loaded: open `ngram_embeddings.embedders.{}.weight`
                as a `RowTable`.
            prefix: what the names begin with, such as "model.".

        Raises:
            KeyError: a tensor is missing; nothing is written.
            ValueError: a tensor has the wrong shape or is no float tensor; nothing is written.
        """
        assign_published(self, weights, prefix)
