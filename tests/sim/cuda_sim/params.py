"""The params structs of csrc/kernels as ctypes; `Device.run` compares their sizes with the C++ ones."""
from ctypes import Structure, c_bool, c_double, c_float, c_int, c_int64, c_uint64, c_void_p

import torch

from engram_kernels import row_format


class NgramHashParams(Structure):
    _fields_ = [(name, c_void_p) for name in ("token_ids", "history", "committed", "state_indices", "rejected", "dead_mask",
                                              "cu_seqlens", "token_map", "multipliers", "moduli", "offsets", "reciprocals",
                                              "row_ids")] + [
        (name, c_int64) for name in ("num_tokens", "token_stride", "num_sequences", "num_histories", "history_width",
                                     "history_stride", "index_stride", "rejected_stride", "vocab_size", "num_ids",
                                     "boundary_id", "eos_id")] + [
        ("num_layers", c_int), ("max_order", c_int), ("heads", c_int), ("ids_are_int64", c_bool), ("per_column", c_bool),
        ("indices_are_int64", c_bool), ("rejected_are_int64", c_bool), ("error_count", c_void_p)]


ROW_FORMATS = tuple(row_format.ROW_FORMATS)  # in the order of the C++ enum: the place of a name is its value there
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class RowSource(Structure):
    _fields_ = [("rows", c_void_p), ("scales", c_void_p), ("num_rows", c_int64), ("row_stride_bytes", c_int64),
                ("scale_stride_bytes", c_int64), ("row_dim", c_int), ("format", c_int), ("zero_scale_is_zero", c_bool),
                ("table_scale", c_float)]


class RowIds(Structure):
    _fields_ = [("data", c_void_p), ("count", c_int64), ("are_int64", c_bool)]


class GatherRowsParams(Structure):
    _fields_ = [("source", RowSource), ("row_ids", RowIds), ("out", c_void_p), ("out_dtype", c_int), ("as_stored", c_bool),
                ("max_blocks", c_int), ("error_count", c_void_p)]


class GatherRowsBwdParams(Structure):
    _fields_ = [("grad", c_void_p), ("row_ids", RowIds), ("grad_rows", c_void_p), ("num_rows", c_int64), ("row_dim", c_int),
                ("grad_dtype", c_int), ("out_dtype", c_int), ("positions", c_void_p)]


class GateOptions(Structure):
    _fields_ = [("eps", c_float), ("clamp", c_float), ("sign_at_zero", c_bool), ("add_residual", c_bool)]


class BranchRows(Structure):
    _fields_ = [("data", c_void_p), ("token_stride", c_int64), ("branch_stride", c_int64)]


class GateWeights(Structure):
    _fields_ = [("w_hidden", c_void_p), ("w_key", c_void_p), ("dtype", c_int)]


class GateParams(Structure):
    _fields_ = [("hidden", BranchRows), ("key", BranchRows), ("value", c_void_p), ("weights", GateWeights), ("mask", c_void_p),
                ("out", BranchRows), ("value_stride", c_int64), ("num_tokens", c_int64), ("branches", c_int64),
                ("hidden_size", c_int64), ("dtype", c_int), ("options", GateOptions)]


class GateBwdParams(Structure):
    _fields_ = [("forward", GateParams), ("grad_out", BranchRows), ("grad_hidden", BranchRows), ("grad_key", BranchRows)] + [
        (name, c_void_p) for name in ("grad_value", "grad_w_hidden", "grad_w_key", "scratch")]


class GatherGateParams(Structure):
    _fields_ = [("hidden", BranchRows), ("table", RowSource), ("row_ids", c_void_p), ("weights", GateWeights), ("mask", c_void_p),
                ("out", BranchRows)] + [
        (name, c_int64) for name in ("num_tokens", "branches", "hidden_size", "columns", "id_token_stride",
                                     "id_column_stride")] + [
        ("dtype", c_int), ("ids_are_int64", c_bool), ("options", GateOptions), ("error_count", c_void_p)]


class GatherGateBwdParams(Structure):
    _fields_ = [("forward", GatherGateParams), ("grad_out", BranchRows), ("grad_hidden", BranchRows)] + [
        (name, c_void_p) for name in ("grad_rows", "grad_w_hidden", "grad_w_key", "scratch")]


class ShortConvParams(Structure):
    _fields_ = [(name, c_void_p) for name in ("x", "weight", "norm_weight", "cu_seqlens", "positions", "state_indices", "state",
                                              "state_ends", "out")] + [
        (name, c_int64) for name in ("num_tokens", "num_sequences", "x_token_stride", "x_branch_stride", "position_stride",
                                     "index_stride", "state_ring_stride", "num_rings", "slots", "branches", "hidden_size")] + [
        ("width", c_int), ("dilation", c_int), ("eps", c_float), ("dtype", c_int), ("weight_dtype", c_int),
        ("positions_are_64", c_bool), ("error_count", c_void_p)]


class ShortConvBwdParams(Structure):
    _fields_ = [("forward", ShortConvParams), ("grad_out", c_void_p), ("grad_token_stride", c_int64),
                ("grad_branch_stride", c_int64), ("grad_x", c_void_p), ("grad_weight", c_void_p), ("grad_norm_weight", c_void_p),
                ("scratch", c_void_p)]


class RowUpdateParams(Structure):
    _fields_ = [("table", RowSource), ("row_ids", RowIds), ("grad", c_void_p), ("grad_dtype", c_int), ("second", c_void_p),
                ("second_per_row", c_bool),
                ("first", c_void_p), ("first_dtype", c_int), ("steps", c_void_p), ("squares", c_void_p), ("rule", c_int)] + [
        (name, c_double) for name in ("lr", "beta1", "beta2", "eps", "grad_scale")] + [
        ("step", c_int64), ("stochastic", c_bool), ("seed", c_uint64), ("first_row", c_int64)] + [
        (name, c_void_p) for name in ("row_names", "positions", "refused", "sizes", "error_count")]


class PlaceRowsParams(Structure):
    _fields_ = [("rows", c_void_p), ("scales", c_void_p), ("row_bytes", c_int64), ("scale_bytes", c_int64), ("num_rows", c_int64),
                ("places", c_void_p), ("count", c_int64), ("max_blocks", c_int)]
