"""Small layers with the published hash, for the tests of the module."""
import torch

from engram_kernels import Engram, EngramSpec, RowTable, TokenMap

H, M, T = 32, 3, 23
CU = torch.tensor([0, 9, 9, 23], dtype=torch.int32)


def make_spec(variant, **overrides):
    """A small model with the published hash: 24 or 16 columns of 32 elements, tables of a few hundred rows."""
    preset = {"deepseek_v41": EngramSpec.deepseek_v41, "demo_v1": EngramSpec.demo_v1}[variant]
    orders = {"deepseek_v41": 3, "demo_v1": 2}[variant]
    return preset(**{**dict(head_dim=32, table_sizes=(20,) * orders, vocab_size=500, num_classes=400, hidden_size=H, branches=M,
                            row_format="f32"), **overrides})


def make_layer(variant, dtype=torch.float32, trained_rows=False, spec=None):
    """A layer, token ids and hidden states, always the same ones."""
    torch.manual_seed(0)
    spec = spec or make_spec(variant)
    rows = torch.randn(spec.layout().num_rows[0], spec.row_dim)
    table = RowTable.from_tensor(torch.nn.Parameter(rows) if trained_rows else rows, row_format="f32")
    layer = Engram(spec, spec.layer_ids[0], table=table, dtype=dtype)
    with torch.no_grad():
        for name in ("w_hidden", "w_key", *(("conv_norm",) if variant == "demo_v1" else ())):
            getattr(layer, name).add_(0.2 * torch.randn(M, H))
    ids = torch.randint(0, 400, (T,), generator=torch.Generator().manual_seed(1), dtype=torch.int32)
    return layer, ids, torch.randn(T, M, H, dtype=dtype)


def token_map_of():
    """A map of the specs above."""
    return TokenMap(torch.arange(500, dtype=torch.int32) % 400, 400, "x")
