"""One op: its schema, fakes and derivative, and the one way in which a call reaches a backend."""
import operator
import re
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.compiler import is_compiling

from engram_kernels import _transforms, backends
from engram_kernels._checks import are_transforms_active, expect_apart, expect_one_device, no_second_derivative
from engram_kernels._library import COMPILE_ERROR, LIB
from engram_kernels.table.row_table import RowTable
from engram_kernels.triton_runtime.dispatch import libraries_of, register_autograd, stem

is_grad_enabled, is_inference_mode_enabled = torch.is_grad_enabled, torch.is_inference_mode_enabled
increment_version = torch._C._increment_version
below_autograd = torch._C._AutoDispatchBelowAutograd

_COMPILED_FIRST = frozenset() if COMPILE_ERROR else frozenset({"auto", "cpu"})
_DTYPE_NUMBERS = {torch.float16: 5, torch.float32: 6, torch.bfloat16: 15}  # of c10::ScalarType, part of torch's stable ABI
_LARGE_BYTES = 4 << 20  # kLargeOutputBytes of csrc/common/output_pool.h


class Op:
    """Schema `<name>(arguments) -> Tensor` with an `out` overload, fakes, backends and, with `derive`, a derivative.

    A call on the CPU runs the compiled op at once: its binding checks all that `check` does, and at the size of a decode step
    checking twice costs as much as the work. Only when it raises does `check` look for better words; if it finds none, the
    op's own error goes on. The op never runs twice. On every other way, `check` comes first.
    """

    def __init__(self, name: str, arguments: str, *, empty: Callable[..., Tensor], reference: Callable[..., Tensor],
                 check: Callable[..., None], check_data: Callable[..., None] | None = None,
                 differentiable: Sequence[str] = (), in_place: str | None = None, writes: Sequence[str] = ()):
        """Defines the op and registers its backends.

        Args:
            name: op name. `<op>_update` is the form of the public function `<op>` that writes a state.
            arguments: of the schema, each "Type name" or "Type name=default"; with a derivative, tensors come first. Those called
                rows, scales and row_ids are a table's.
            empty: the output for these arguments, uninitialised: also what the fake returns.
            reference: computes the output from them.
            check: takes the arguments as a tuple, `out` and the table where there is one; raises TypeError or ValueError.
            check_data: raises where the data is wrong, for the backends whose kernels do not look.
            differentiable: names of the arguments that may require grad.
            in_place: name of the argument that `out` may be.
            writes: names of the arguments that the op writes, besides `out`. Such an op has no derivative: an input that
                requires grad is an error.
        """
        self.name, self.public_name, self.arguments = name, stem(name), arguments
        self.names = tuple(argument.split("=")[0].split()[-1] for argument in arguments.split(", "))
        self.num_tensors = sum(argument.startswith("Tensor") for argument in arguments.split(", "))
        self._empty, self._compute, self._check, self._check_data = empty, reference, check, check_data
        self._differentiable = tuple(self.names.index(x) for x in differentiable)
        self._writes = tuple(self.names.index(x) for x in writes)
        self._only_write = self._writes[0] if len(self._writes) == 1 else None
        self._written_of = operator.itemgetter(*self._writes) if len(self._writes) > 1 else None
        self._in_place = in_place
        self._rows = self.names.index("rows") if "rows" in self.names else None
        LIB.define(f"{name}({arguments}) -> Tensor")
        LIB.define(f"{name}.out({arguments}, *, Tensor(out!) out) -> ()")
        torch.library.register_fake(f"engram_kernels::{name}", self._fake, lib=LIB)
        torch.library.register_fake(f"engram_kernels::{name}.out", self._fake_out, lib=LIB)
        packet = getattr(torch.ops.engram_kernels, name)
        self._default, self._out = packet.default, packet.out
        # what the overloads call, for half a microsecond less
        self._eager_default, self._eager_out = packet.default._op, packet.out._op
        self._dtype_at = self.names.index("out_dtype") if "out_dtype" in self.names else None
        if writes and differentiable:
            for namespace, library in libraries_of(name, LIB).items():
                twin = getattr(getattr(torch.ops, namespace), name)
                library.impl(name, self._without_derivative(twin.default), "Autograd")
                library.impl(f"{name}.out", self._without_derivative(twin.out), "Autograd")
        backends.register_op(name, self.reference, self.compiled, check_data=check_data)

    def call(self, backend: str, args: tuple[Any, ...], out: Tensor | None = None, table: RowTable | None = None) -> Tensor:
        """The output for `args`, from `backend`; `out` when given. `table`: whose rows are among `args`."""
        if (backend in _COMPILED_FIRST and getattr(args[0], "is_cpu", False) and (table is None or table.in_memory)
                and not is_compiling()):
            try:
                return self._run(args, out)
            except Exception:
                self.check(args, out, table)
                raise
        return self.selected(backend, args, out, table)(out)

    def selected(self, backend: str, args: tuple[Any, ...], out: Tensor | None,
                 table: RowTable | None = None) -> Callable[..., Tensor]:
        """Checks, chooses a backend and reads the rows of a table outside memory: a function of `out` that is ready to run."""
        self.check(args, out, table)
        like = args[2] if self._rows == 0 else args[0]  # the ids say where rows are gathered
        run = backends.select(self.name, like.device, backend)
        if table is not None and not table.in_memory:
            args = self._staged(args, table)
        return lambda out: run(*args, out=out)

    def check(self, args: tuple[Any, ...], out: Tensor | None, table: RowTable | None = None) -> None:
        """Raises TypeError or ValueError where an argument is wrong, whatever the backend."""
        self._check(args, out, *(() if table is None else (table,)))
        written = [(name, x) for name, x in (("out", out), *((self.names[i], args[i]) for i in self._writes)) if x is not None]
        if not written:
            return
        if self._wants_grad((*args, out)):
            raise ValueError(f"{self.public_name}: {written[0][0]} cannot be given while an input requires grad; leave it "
                             "away or use torch.no_grad()")
        for written_name, target in written:
            for name, x in zip(self.names, args, strict=False):
                if isinstance(x, Tensor) and name != written_name:
                    expect_apart(self.public_name, name, x, target, name == self._in_place, written_name)

    def compiled(self, *args: Any, out: Tensor | None = None) -> Tensor:
        """Runs the compiled op, on the CPU or a GPU, or its fake."""
        if not is_compiling():
            return self._run(args, out)
        if out is None:
            return self._default(*args)
        self._out(*args, out=out)
        return out

    def _run(self, args: tuple[Any, ...], out: Tensor | None) -> Tensor:
        # every line here counts: a decode step's rows take less time than the call around them
        if forward_ad._current_level >= 0:
            raise NotImplementedError(f"{self.public_name}: the compiled op has no forward-mode derivative; use "
                                      "backend='reference'")
        if out is None and are_transforms_active():  # of torch.func, which take no `out` that is made here
            return _transforms.call(self._default, *args)
        if is_grad_enabled():
            for index in self._differentiable:
                if args[index].requires_grad:
                    return self._differentiated(args, out)
            for index in self._writes:
                if (x := args[index]) is not None and x.requires_grad:
                    return self._differentiated(args, out)
            if out is not None and out.requires_grad:
                return self._differentiated(args, out)
        written, inference, large = out, is_inference_mode_enabled(), False
        if out is None and self._differentiable and not inference:
            # the Python layer of autograd, which torch.library puts before the op, costs more than the rows of a decode step
            out = self._empty(*args)
            # to the op a large output is worth memory that was written before; what a mode or subclass makes may have none
            if type(out) is Tensor and out.is_cpu and out.nbytes >= _LARGE_BYTES and out.data_ptr():
                out, large = None, True
        if self._dtype_at is not None:  # torch's parser takes a microsecond for a dtype, and none for its number
            args = (*args[:self._dtype_at], _DTYPE_NUMBERS[args[self._dtype_at]], *args[self._dtype_at + 1:])
        if large:
            with below_autograd():
                out = self._eager_default(*args)
        elif out is None:
            out = self._eager_default(*args)
        elif self._writes and self._differentiable and not inference:
            with below_autograd():  # where `_without_derivative` is, which costs as much as the rest of the way
                self._eager_out(*args, out=out)
        else:
            self._eager_out(*args, out=out)
        # autograd does not know of the writes: a backward pass that saved one of these must raise
        if written is None and self._only_write is not None:
            increment_version((args[self._only_write],))
        elif self._written_of is not None:
            increment_version([x for x in (written, *self._written_of(args)) if x is not None])
        elif written is not None:
            increment_version((written,))
        return out

    def reference(self, *args: Any, out: Tensor | None = None) -> Tensor:
        """Checks the data and runs the reference."""
        if self._check_data is not None:
            self._check_data(*args)
        result = self._compute(*args)
        return result if out is None else out.copy_(result)

    def derive(self, returns: str, fake: Callable[..., Any], *, finish: Callable[..., Any] | None = None,
               costly: Sequence[str] = ()) -> None:
        """Defines `<name>_bwd(Tensor grad_out, arguments, bool needs_<costly>..) -> returns`, the derivative of the op.

        Args:
            returns: of the schema: one gradient per differentiable argument, in their order.
            fake: the gradients for grad_out and the arguments.
            finish: takes the namespace of the ops, ctx and the gradients; returns them changed. None: they are as they should be.
            costly: names of differentiable arguments whose gradient is computed only where it is needed; else it is any tensor.
        """
        bwd = f"{self.name}_bwd"
        needs = "".join(f", bool needs_{name}" for name in costly)
        arguments = re.sub("=[^,]+", "", self.arguments) if needs else self.arguments  # no default before one that has none
        LIB.define(f"{bwd}(Tensor grad_out, {arguments}{needs}) -> {returns}")
        torch.library.register_fake(f"engram_kernels::{bwd}", fake, lib=LIB)

        def setup_context(ctx, inputs, output):
            ctx.save_for_backward(*inputs[:self.num_tensors])
            ctx.options = inputs[self.num_tensors:]

        def backward(ops, ctx, grad_out):
            if grad_out.stride(-1) != 1:  # as from .sum(), whose gradient is one element with strides 0
                grad_out = grad_out.contiguous()
            needed = [ctx.needs_input_grad[self.names.index(name)] for name in costly]
            grads = getattr(ops, bwd).default(grad_out, *ctx.saved_tensors, *ctx.options, *needed)
            grads = grads if finish is None else finish(ops, ctx, *grads)
            result = [None] * len(self.names)
            for index, grad in zip(self._differentiable, grads, strict=True):
                result[index] = grad if ctx.needs_input_grad[index] else None
            return tuple(result)

        register_autograd(self.name, backward, setup_context, LIB)
        register_autograd(bwd, no_second_derivative(self.name), None, LIB)

    def _differentiated(self, args: tuple[Any, ...], out: Tensor | None) -> Tensor:
        if out is not None or self._writes:
            raise ValueError(f"{self.public_name}: the op writes, and an input requires grad")  # `check` has better words
        return self._default(*args)

    def _without_derivative(self, overload: Any) -> Callable[..., Any]:
        """A kernel for autograd's place in the dispatch, where nothing would refuse an op that writes its arguments."""
        def kernel(*args: Any, **kwargs: Any) -> Any:
            if self._wants_grad((*args, *kwargs.values())):
                raise RuntimeError(f"{self.name}: an input requires grad, but the op has no derivative; use torch.no_grad()")
            with below_autograd():
                return overload(*args, **kwargs)
        return kernel

    def _wants_grad(self, tensors: tuple[Any, ...]) -> bool:
        return torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in tensors)

    def _staged(self, args: tuple[Any, ...], table: RowTable) -> tuple[Any, ...]:
        """`args` with the rows of a file in memory, and ids into them."""
        assert self._rows is not None
        row_ids = args[self._rows + 2]
        if "mask" in self.names and (mask := args[self.names.index("mask")]) is not None:
            row_ids = row_ids.masked_fill(mask[:, None], -1)  # rows of masked tokens are not read
        staged, row_ids = table.stage(row_ids.contiguous())
        return (*args[:self._rows], staged.rows, staged.scales, row_ids, *args[self._rows + 3:])

    def _fake(self, *args: Any) -> Tensor:
        tensors = [x for x in args if isinstance(x, Tensor)]
        if self._rows is not None and args[self._rows].is_cpu and args[2 if self._rows == 0 else 0].is_cuda:
            tensors = [x for x in tensors if x is not args[self._rows] and x is not args[self._rows + 1]]  # pinned host memory
        expect_one_device(self.public_name, *tensors)
        return self._empty(*args)

    def _fake_out(self, *args: Any, out: Tensor) -> None:
        expect_one_device(self.public_name, self._fake(*args), out)


def refuse_table(op: str, table: object) -> NoReturn:
    """Raises TypeError: `table` is no RowTable."""
    raise TypeError(f"{op}: table must be a RowTable, got {type(table).__name__}"
                    + ("; RowTable.from_tensor makes one of a tensor" if isinstance(table, Tensor) else ""))
