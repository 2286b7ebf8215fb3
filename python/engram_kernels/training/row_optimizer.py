"""RowOptimizer: SGD, Adagrad or Adam on the rows of a table, of which a step touches few."""
from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, SupportsIndex

import torch
from torch import Tensor

from engram_kernels._checks import expect_choice, expect_int
from engram_kernels.ops.row_update import FLOAT_MAX, MAX_ROW, ROUNDINGS, check_rates, row_update
from engram_kernels.table.row_table import RowTable
from engram_kernels.training.file_rows import FileRows
from engram_kernels.training.optimizer_state import NumSteps, load_state, load_state_dict, save_state
from engram_kernels.training.trained_table import expect_trainable, is_computed, note

_EPS = {"adam": 1e-8, "adagrad": 1e-10, "sgd": 0.0}
_FIRST = {"f32": torch.float32, "bf16": torch.bfloat16}
_PIECE_BYTES = 64 << 20


class RowOptimizer(torch.optim.Optimizer):
    """An optimizer of the rows of one table, in place: each step updates the rows that it is given, and no other.

    The gradients of a row are summed in float32 in the order of the positions, and the row is updated once. Rows and moments
    come out the same bits for any number of threads, on every instruction set, and for any shards of a table (`first_row`).
    A row that a step does not name keeps every bit, and so do its moments: with bias_correction="row" what Adam does to a row
    depends on the row's own gradients alone.

    It is a ``torch.optim.Optimizer`` with one parameter group: learning rate schedulers work on it. There is no weight decay.

    A table in a file is updated in place, its moments in the file `state` beside it, through a journal (``<table>.journal``): a
    process that is killed at any moment leaves files that the next RowOptimizer of them brings to a step's end. While it is open
    no other process can train the table; `close` ends that.

    Ownership: holds the table, and moments beside it. It is neither copied nor pickled: `state_dict` says where it stands.
    Threads: one step at a time. Failure: what is wrong with a step is raised before anything is written.

    Args:
        table: of format f32, bf16, f16, fp8_e4m3_block32, fp8_e4m3_block32_packed, fp8_e4m3_row or int8_group32, in memory and
            not shared, or in one file that `RowTable.create` wrote. Rows of eight bits are decoded, updated in float32 and
            encoded again.
        rule: "adam", "adagrad" or "sgd"; formulas in docs/ops.md, "row_update".
        lr: learning rate.
        betas: of adam; the first is the momentum of sgd with a first moment.
        eps: added to the root of the second moment; None: 1e-8 for adam, 1e-10 for adagrad.
        second_moment: "row": one float32 for each row, of the mean of the squares; "element": one for each element. None: "row",
            and nothing for sgd, which has none.
        first_moment: "f32", "bf16", or None: none is kept. "auto": "f32" for adam, else none.
        bias_correction: of adam: "row": by how many updates the row has had; "step": by how many steps there were.
        rounding: of rows and moments that are not float32: "stochastic": up with the probability of what is cut off, so that
            small updates are not lost; "nearest".
        seed: of stochastic rounding, in [0, 2^63).
        first_row: number of the table's first row in the whole table, where this is a shard of it: `ShardedRows.first_row`.
        state: of a table in a file: the file of its moments, in the order of its rows. It is made where there is none; else it is
            opened, and the optimizer goes on from the step that it is of, with its learning rate.
        journal_bytes: of such a table: how long its journal grows before table and state are brought to the disk.
        durable: of such a table: each step's record is on the disk before the table is written to, so that a loss of power does
            not tear it. False: it survives the end of the process alone.
        nonfinite: what a step with a NaN or infinite gradient does: "raise" a ValueError that names the row, or "skip" all of
            the step, as a gradient scaler does; also where `grad_scale` is not finite. On a GPU "skip" waits for the gradients.

    Attributes:
        table: whose rows are updated.
        num_steps: steps taken.
        skipped_steps: steps that a gradient which was not finite kept from being taken.
        file: what a table in a file is trained through, with `stats` of what was written; or None.
        second, first, steps: tensors of R rows, or None: float32 [R] or [R, D]; float32 or bfloat16 [R, D]; int32 [R], the
            updates that each row has had.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: an option is out of range, the table cannot be written, or `state` is that of another optimizer or table.
        OSError: another process has the table open for training, or a file cannot be opened, made or written; names the file.

    Source: Kingma and Ba, arXiv 1412.6980; torch.optim.SparseAdam and torch.optim.Adagrad, whose results it gives in float32.
    """

    num_steps = NumSteps()

    def __init__(self, table: RowTable, rule: str = "adam", *, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999),
                 eps: float | None = None, second_moment: str | None = None, first_moment: str | None = "auto",
                 bias_correction: str = "row", rounding: str = "stochastic", seed: int = 0, first_row: int = 0,
                 nonfinite: str = "raise", state: str | os.PathLike[str] | None = None, journal_bytes: int = 256 << 20,
                 durable: bool = True):
        op = "RowOptimizer"
        if not isinstance(table, RowTable):
            raise TypeError(f"{op}: table is a {type(table).__name__}, expected a RowTable")
        self.file: FileRows | None = None
        expect_trainable(op, table, state)
        if is_computed(table):
            raise ValueError(f"{op}: table.rows is computed from a parameter, by a parametrization, by pruning or from another "
                             "memory layout, so that an update of it would be lost; expected rows that are the parameter itself")
        expect_choice(op, "rule", rule, tuple(_EPS))
        eps = _EPS[rule] if eps is None else eps
        second_moment = "row" if second_moment is None and rule != "sgd" else second_moment
        first_moment = ("f32" if rule == "adam" else None) if first_moment == "auto" else first_moment
        if second_moment is not None:
            expect_choice(op, "second_moment", second_moment, ("row", "element"))
            if rule == "sgd":
                raise ValueError(f"{op}: second_moment is {second_moment!r}, expected None: sgd has none")
        if first_moment is not None:
            expect_choice(op, "first_moment", first_moment, tuple(_FIRST))
            if rule == "adagrad":
                raise ValueError(f"{op}: first_moment is {first_moment!r}, expected None: adagrad has none")
        expect_choice(op, "bias_correction", bias_correction, ("row", "step"))
        expect_choice(op, "rounding", rounding, ROUNDINGS)
        expect_choice(op, "nonfinite", nonfinite, ("raise", "skip"))
        check_rates(op, lr, betas, eps)
        self.nonfinite, self.skipped_steps = nonfinite, 0
        self._holder: Any = None  # a weak reference to the TrainableRows that holds the table
        self.table, self.rule, self._by_row = table, rule, bias_correction == "row"
        self._rounding, self._seed = rounding, expect_int(op, "seed", seed, 0, 2**63 - 1)
        self._first_row = expect_int(op, "first_row", first_row, 0, MAX_ROW)
        rows, shape = table.rows.detach(), (table.num_rows, table.row_dim)
        self._shapes: dict[str, tuple[torch.dtype, tuple[int, ...]]] = (
            {} if second_moment is None else {"second": (torch.float32, shape if second_moment == "element" else shape[:1])})
        if first_moment is not None:
            self._shapes["first"] = (_FIRST[first_moment], shape)
        rounds = rounding == "stochastic" and (rows.dtype != torch.float32 or first_moment == "bf16")
        if rounds or (rule == "adam" and self._by_row):
            self._shapes["steps"] = (torch.int32, shape[:1])
        kept = {name: torch.zeros(shape, dtype=dtype, device=rows.device) for name, (dtype, shape) in self._shapes.items()
                if table.tier != "file"}
        self.second, self.first, self.steps = (kept.get(name) for name in ("second", "first", "steps"))
        self._settings = {"rule": rule, "second_moment": second_moment, "first_moment": first_moment, "rounding": rounding,
                      "bias_correction": bias_correction, "seed": self._seed, "first_row": self._first_row,
                      "num_rows": table.num_rows, "row_dim": table.row_dim, "row_format": table.row_format}
        super().__init__([table.rows], {"lr": lr, "betas": betas, "eps": eps, "settings": self.settings})
        self.state[table.rows] = {**kept, "num_steps": 0}  # torch.distributed.checkpoint looks here for what a state has
        if state is not None:
            expect_int(op, "journal_bytes", journal_bytes, 0)
            self.file = FileRows(op, self, Path(state), journal_bytes, bool(durable))
        note(self)

    def __repr__(self) -> str:
        group, kind = self.param_groups[0], self._settings
        return (f"RowOptimizer({self.rule}, lr={group['lr']}, {kind['num_rows']} rows of {kind['row_dim']}, "
                f"second_moment={kind['second_moment']!r}, first_moment={kind['first_moment']!r}, num_steps={self.num_steps})")

    @torch.no_grad()
    def step(self, row_ids: Tensor | None = None, grad_rows: Tensor | None = None,  # type: ignore[override]
             grad_scale: float | Tensor = 1.0, *, closure: Callable[[], Any] | None = None) -> Any:
        """Updates the rows that `row_ids` names; returns what `closure` gives.

        Args:
            row_ids: int32 or int64, any shape, contiguous; -1 (no row) or in [0, R). None, with `grad_rows`: the gradient of
                ``table.rows``, which must be sparse (``gather_rows(.., sparse_grad=True)``).
            grad_rows: [*row_ids.shape, D] float32, bfloat16 or float16, contiguous.
            grad_scale: factor on the summed gradients, such as that of clipping by the norm: a number, or one element.
            closure: called before, with gradients on, as those of ``torch.optim`` are; it may also stand first.

        Raises:
            TypeError, ValueError, IndexError: as `row_update`; neither rows nor moments nor steps have changed.
        """
        if callable(row_ids) and not isinstance(row_ids, Tensor):
            row_ids, closure = None, row_ids
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._expect_free("step")
        self.apply(*self._gradients(row_ids, grad_rows), self.rates(), grad_scale)
        return loss

    @property
    def settings(self) -> dict[str, Any]:
        """Rule, options, and shape and format of the table: what a state must have been made with."""
        return dict(self._settings)

    def moment_shapes(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """dtype and shape of each moment that is kept, by name."""
        return dict(self._shapes)

    def moment_pieces(self, name: str) -> Iterator[Tensor]:
        """One moment of all rows, piece by piece."""
        if self.file is not None:
            return self.file.pieces(name)
        moment = getattr(self, name)
        return iter(moment.split(max(_PIECE_BYTES // max(moment[:1].nbytes, 1), 1)))

    def rates(self) -> dict[str, Any]:
        """lr, betas and eps as they are now: what `apply` takes, also later, when a scheduler has gone on."""
        group = self.param_groups[0]
        return {"lr": float(group["lr"]), "betas": tuple(group["betas"]), "eps": group["eps"]}

    @torch.no_grad()
    def apply(self, row_ids: Tensor, grad_rows: Tensor, rates: Mapping[str, Any], grad_scale: float | Tensor = 1.0, *,
              first: Tensor | None = None, then: Callable[[], None] | None = None) -> None:
        """One step at the `rates` that `self.rates()` gave; else as `step`, also where a `TrainableRows` holds the table.

        Rows whose positions `first` (bool [n]; whole rows) names are updated before the others where nothing can go wrong in
        between, and `then` is called when they are; each row comes out as in one go.
        """
        if self.skips(row_ids, grad_rows, grad_scale):
            self.skipped_steps += 1
            return
        if first is None or self.file is not None or not self._cannot_fail(row_ids, grad_rows, grad_scale):
            parts = [row_ids]
        else:
            parts = [torch.where(first, row_ids, -1), torch.where(first, -1, row_ids)]
        for part in parts:
            self._update(part, grad_rows, rates, grad_scale)
            if then is not None and part is parts[0]:
                then()
        self.num_steps += self.file is None  # a file counts its own, which its journal must know first

    def _update(self, row_ids: Tensor, grad_rows: Tensor, rates: Mapping[str, Any], grad_scale: float | Tensor) -> None:
        number = self.num_steps + 1
        if self.file is not None:
            self.file.step(row_ids, grad_rows, rates, grad_scale, number, rule=self.rule, rounding=self._rounding,
                           step=None if self._by_row else number, seed=self._seed, first_row=self._first_row)
            return
        row_update(self.table, row_ids, grad_rows, self.rule, **rates, second=self.second, first=self.first, steps=self.steps,
                   step=None if self._by_row else number, rounding=self._rounding, seed=self._seed, first_row=self._first_row,
                   grad_scale=grad_scale)

    def skips(self, row_ids: Tensor, grad_rows: Tensor, grad_scale: float | Tensor = 1.0) -> bool:
        """Whether `step` skips these: nonfinite is "skip", and the gradient of a row or `grad_scale` is NaN or infinite."""
        return self.nonfinite == "skip" and (not math.isfinite(grad_scale) or
                                             bool((~grad_rows.isfinite().all(-1) & (row_ids != -1)).any()))

    def _cannot_fail(self, row_ids: Tensor, grad_rows: Tensor, grad_scale: float | Tensor) -> bool:
        """Whether all ids are in range, no sum of gradients can leave float32, and every row's count of steps can grow."""
        if not row_ids.numel():
            return False
        least, most = (float(x) for x in grad_rows.aminmax())
        bound = max(-least, most) * row_ids.numel() * max(1.0, abs(float(grad_scale)))
        lowest, highest = (int(x) for x in row_ids.aminmax())
        if not (bound <= FLOAT_MAX / 2 and lowest >= -1 and highest < self.table.num_rows):
            return False
        return self.steps is None or int(self.steps[row_ids.clamp(min=0)].amax()) < 2**31 - 1

    def _expect_free(self, call: str) -> None:
        holder = None if self._holder is None else self._holder()
        if holder is not None and holder._process == os.getpid():
            raise ValueError(f"RowOptimizer.{call}: the optimizer is held by a TrainableRows, whose rows in flight would not "
                             "know of it; use that one's step, or close it first")

    def _settle(self) -> None:
        """Waits for the steps that a `TrainableRows` has not taken yet."""
        holder = None if self._holder is None else self._holder()
        if holder is not None and holder._process == os.getpid():
            holder.flush()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drops the gradient of the parameter that the table has now, and of the one that it had."""
        super().zero_grad(set_to_none)
        self._follow()
        super().zero_grad(set_to_none)

    def _follow(self) -> Tensor:
        """The table's rows as they are now; a parameter that took the place of another is the group's from then on."""
        rows = self.table.rows
        if self.table.row_format != self._settings["row_format"] or is_computed(self.table):
            raise ValueError(f"RowOptimizer: table has {'computed ' if is_computed(self.table) else ''}{self.table.row_format} "
                             f"rows now, and had {self._settings['row_format']} rows that were a parameter; make a new one")
        params = self.param_groups[0]["params"]
        if params[0] is not rows:
            self.state[rows], params[0] = self.state.pop(params[0]), rows
        return rows

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Takes the group of the table, which the constructor adds. ValueError on any other."""
        if getattr(self, "param_groups", None):
            raise ValueError("RowOptimizer: a second parameter group is given; expected one optimizer for each table")
        super().add_param_group(param_group)

    def __reduce_ex__(self, protocol: SupportsIndex) -> Any:
        raise TypeError("RowOptimizer: it is neither copied nor pickled, since its table lies outside of it; save "
                        "state_dict(), and load it into a RowOptimizer of the other table")

    @torch.no_grad()
    def norm(self, row_ids: Tensor | None = None, grad_rows: Tensor | None = None) -> Tensor:
        """The norm of the table's gradient: of each row's summed gradient, all rows together.

        For clipping by the global norm: ``total = torch.sqrt(dense**2 + optimizer.norm(ids, grads)**2)``, then
        ``optimizer.step(ids, grads, grad_scale=min(1, max_norm / total))``.

        Args:
            row_ids: as `step` takes them.
            grad_rows: as `step` takes them.

        Returns:
            float64 [] on the device of the table: the same bits for any number of threads, and as `ShardedRows.norm`. NaN with
            nonfinite="skip" where a gradient is NaN or infinite.

        Raises:
            TypeError, ValueError, IndexError: as `row_update`.
        """
        row_ids, grad_rows = self._gradients(row_ids, grad_rows)
        if self.skips(row_ids, grad_rows):
            return torch.tensor(math.nan, dtype=torch.float64, device=grad_rows.device)
        if self.file is not None:  # rows do not matter, only which ids are equal
            distinct, row_ids = torch.unique(row_ids, return_inverse=True)
            row_ids = row_ids - int(distinct[:1].eq(-1).sum())
            table = RowTable.from_tensor(torch.zeros(max(distinct.numel(), 1), self.table.row_dim), row_format="f32")
        else:
            table = RowTable.from_tensor(self.table.rows.data, self.table.scales, self.table.row_format,
                                         row_dim=self.table.row_dim)  # the version of its rows does not grow
        squares = row_update(table, row_ids, grad_rows, "none", lr=0.0)
        return torch.tensor(math.sqrt(math.fsum(squares.tolist())), dtype=torch.float64, device=squares.device)

    def _gradients(self, row_ids: Tensor | None, grad_rows: Tensor | None) -> tuple[Tensor, Tensor]:
        grad = self._follow().grad
        if row_ids is not None and grad_rows is not None:
            return row_ids, grad_rows
        if row_ids is not None or grad_rows is not None:
            missing = "grad_rows" if grad_rows is None else "row_ids"
            raise ValueError(f"RowOptimizer: {missing} is None, expected row_ids and grad_rows together, or neither")
        if grad is None or grad.layout != torch.sparse_coo:
            raise ValueError(f"RowOptimizer: table.rows.grad is {'None' if grad is None else f'dense ({grad.layout})'}, expected "
                             "a sparse one, as a backward pass through gather_rows(sparse_grad=True) or Engram(sparse_grad=True) "
                             "leaves it; or give row_ids and grad_rows")
        return grad._indices()[0].contiguous(), grad._values().contiguous()

    def state_dict(self) -> dict[str, Any]:  # type: ignore[override]
        """What `load_state_dict` takes to go on with the same bits; shares memory with the moments.

        Returns:
            As those of ``torch.optim``, so that ``torch.distributed.checkpoint.state_dict`` takes it: state, under the number of
            the one parameter: second, first, steps (those that are kept) and num_steps; and param_groups, one, with `settings`.
        """
        self._expect_in_memory("state_dict")
        self._settle()
        group = {**self.param_groups[0], "settings": self.settings, "params": [0]}
        return {"state": {0: {**self.moments(), "num_steps": torch.tensor(self.num_steps)}}, "param_groups": [group]}

    def moments(self) -> dict[str, Tensor]:
        """What is kept of each row, by name: second [R] or [R, D], first [R, D], steps [R]; none of a table in a file."""
        kept = {"second": self.second, "first": self.first, "steps": self.steps}
        return {name: x for name, x in kept.items() if x is not None}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:  # type: ignore[override]
        """Takes over moments, steps and parameter group; the tensors are copied.

        Raises:
            ValueError: it is no state of this class, or that of an optimizer with other settings or of a table of another shape;
                names what differs. Nothing has changed.
        """
        self._expect_in_memory("load_state_dict")
        self._expect_free("load_state_dict")
        load_state_dict(self, state_dict)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the state beside its table: a file that appears whole or not at all.

        It is a safetensors file with the moments in the order of the table's rows. It names the settings of this optimizer, the
        step, the learning rate, and a fingerprint and a checksum of the table as it is now. Save the table in the same step.

        Args:
            path: the file; its directory must exist. A file that is there is replaced.

        Raises:
            TypeError: a value of the parameter group is neither a number nor text, nor a list of these.
            OSError: the directory is missing or read-only, the disk is too full (`CapacityError`), or a write failed; names the
                path and the step. An old file is whole.
        """
        self._settle()
        save_state(self, path)

    def load(self, path: str | os.PathLike[str], *, num_steps: int | None = None) -> None:
        """Goes on from a file that `save` wrote, with the same bits, once the table has the rows of that step.

        Args:
            path: the file.
            num_steps: the step that it must be of; None: any.

        Raises:
            ValueError: it is no whole state file; it is of an optimizer with other settings, of another table, or of another step
                of this table; names what differs. Nothing has changed.
            OSError: it cannot be read. Nothing has changed.
        """
        self._expect_in_memory("load")
        self._expect_free("load")
        load_state(self, path, num_steps)

    def close(self) -> None:
        """Ends training of a table in a file: table and state are on the disk, others may open them. Nothing for one in memory.

        Raises:
            ValueError: a `TrainableRows` holds the table.
            OSError: the last step cannot be written; it is in the journal, which the next optimizer of the table reads.
        """
        if self.file is not None:
            self._expect_free("close")
            self.file.close()

    def __del__(self) -> None:
        if getattr(self, "file", None) is not None:
            self.file.close()  # type: ignore[union-attr]

    def _expect_in_memory(self, call: str) -> None:
        if self.file is not None:
            raise ValueError(f"RowOptimizer.{call}: the state is the file {self.file.state}; save() writes a copy of it, and "
                             "RowOptimizer(.., state=) opens one beside a copy of the table")
