"""The params structs of csrc/kernels as ctypes; `Device.run` compares their sizes with the C++ ones."""
from ctypes import Structure, c_bool, c_int, c_int64, c_void_p


class NgramHashParams(Structure):
    _fields_ = [(name, c_void_p) for name in ("token_ids", "history", "dead_mask", "cu_seqlens", "token_map", "multipliers",
                                              "moduli", "offsets", "row_ids")] + [
        (name, c_int64) for name in ("num_tokens", "token_stride", "num_sequences", "vocab_size", "num_ids", "boundary_id",
                                     "eos_id")] + [
        ("num_layers", c_int), ("max_order", c_int), ("heads", c_int), ("ids_are_int64", c_bool), ("per_column", c_bool),
        ("error_count", c_void_p)]
