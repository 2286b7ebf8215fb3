"""engram_kernels: conditional memory for language models. Public names only; everything else is private."""
from engram_kernels import backends, integrations
from engram_kernels.allocation.budget import budget
from engram_kernels.backends import check_errors
from engram_kernels.layout import Layout
from engram_kernels.modules.engram import Engram
from engram_kernels.modules.from_checkpoint import from_checkpoint
from engram_kernels.modules.longcat import LongcatEmbedding
from engram_kernels.modules.memory_state import MemoryState
from engram_kernels.modules.param_groups import param_groups
from engram_kernels.ops.engram_forward import engram_forward
from engram_kernels.ops.gate import gate
from engram_kernels.ops.gather_gate import gather_gate
from engram_kernels.ops.gather_rows import gather_rows
from engram_kernels.ops.ngram_hash import ngram_hash, ngram_hash_and_commit
from engram_kernels.ops.row_update import row_update
from engram_kernels.ops.short_conv import short_conv
from engram_kernels.prefetch.memory_prefetcher import MemoryPrefetcher
from engram_kernels.prefetch.row_prefetcher import RowPrefetcher
from engram_kernels.sharding.sharded_rows import ShardedRows
from engram_kernels.spec import EngramSpec
from engram_kernels.table.mooncake_rows import store_rows
from engram_kernels.table.ray_rows import serve_rows
from engram_kernels.table.row_table import RowTable
from engram_kernels.token_map import TokenMap
from engram_kernels.training.row_optimizer import RowOptimizer
from engram_kernels.training.trainable_rows import TrainableRows

__all__ = ["Engram", "EngramSpec", "Layout", "LongcatEmbedding", "MemoryPrefetcher", "MemoryState", "RowOptimizer",
           "RowPrefetcher", "RowTable", "ShardedRows", "TokenMap", "TrainableRows", "backends", "budget", "check_errors",
           "engram_forward", "from_checkpoint", "gate", "gather_gate", "gather_rows", "integrations", "ngram_hash",
           "ngram_hash_and_commit", "param_groups", "row_update", "serve_rows", "short_conv", "store_rows"]
