"""Small layers with the published hash, for the tests of the module."""
import math

import torch
import torch.nn.functional as F

from engram_kernels import Engram, EngramSpec, RowTable, TokenMap

VARIANTS = ("deepseek_v41", "demo_v1", "qwen4_ple")
H, M, T = 32, 3, 23
CU = torch.tensor([0, 9, 9, 23], dtype=torch.int32)


def make_spec(variant, **overrides):
    """A small model with the published hash: 24 or 16 columns of 32 elements, tables of a few hundred rows."""
    preset, orders = getattr(EngramSpec, variant), 3 if variant == "deepseek_v41" else 2
    ids = dict(layer_ids=(1, 15), pad_token_id=9, eos_token_id=9) if variant == "qwen4_ple" else dict(num_classes=400)
    return preset(**{**dict(head_dim=32, table_sizes=(20,) * orders, vocab_size=500, hidden_size=H, branches=M, row_format="f32"),
                     **ids, **overrides})


def make_layer(variant, dtype=torch.float32, trained_rows=False, spec=None):
    """A layer, token ids and hidden states, always the same ones."""
    torch.manual_seed(0)
    spec = spec or make_spec(variant)
    rows = torch.randn(spec.layout().num_rows[0], spec.row_dim)
    table = RowTable.from_tensor(torch.nn.Parameter(rows) if trained_rows else rows, row_format="f32")
    layer = Engram(spec, spec.layer_ids[0], table=table, dtype=dtype)
    with torch.no_grad():
        for name in ("w_hidden", "w_key", *(("conv_norm",) if spec.conv_width else ())):
            getattr(layer, name).add_(0.2 * torch.randn(M, H))
        if variant == "qwen4_ple":
            layer.conv_weight.uniform_(-0.5, 0.5)
    ids = torch.randint(0, 400, (T,), generator=torch.Generator().manual_seed(1), dtype=torch.int32)
    return layer, ids, torch.randn(T, M, H, dtype=dtype)


def restated(layer, hidden, rows):
    """The published forward, branch by branch; nothing of ours but the parameters."""
    spec, e, h = layer.spec, rows.double().flatten(1), hidden.double()
    weight = layer.wkv.weight.double()
    bias = torch.zeros(weight.shape[0], dtype=torch.float64) if layer.wkv.bias is None else layer.wkv.bias.double()
    projected = [F.linear(e, weight[m * H:(m + 1) * H], bias[m * H:(m + 1) * H]) for m in range(M + 1)]
    outs, centre = [], 1 if spec.variant == "qwen4_ple" else 0
    for m in range(M):
        key = F.rms_norm(projected[m], (H,), centre + layer.w_key[m].double(), spec.gate_eps)
        query = F.rms_norm(h[:, m], (H,), centre + layer.w_hidden[m].double(), spec.gate_eps)
        x = (key * query).sum(-1) / math.sqrt(H)
        score = torch.sigmoid(x.abs().clamp_min(1e-6).sqrt() * x.sign())[:, None]
        outs.append(score * projected[M])
    out = torch.stack(outs, dim=1)
    if spec.variant == "deepseek_v41":
        return h + out
    conv_norm = centre + layer.conv_norm.double()
    normed = torch.stack([F.rms_norm(out[:, m], (H,), conv_norm[m], spec.conv_eps) for m in range(M)], dim=1)
    pieces = []
    for begin, end in zip(CU[:-1].tolist(), CU[1:].tolist(), strict=True):
        line = F.pad(normed[begin:end].flatten(1).T, ((spec.conv_width - 1) * spec.conv_dilation, 0))
        pieces.append(F.conv1d(line, layer.conv_weight.double().view(M * H, 1, -1), dilation=spec.conv_dilation, groups=M * H).T
                      if end > begin else line.T[:0])
    return out + F.silu(torch.cat(pieces).view(T, M, H))


def token_map_of():
    """A map of the specs above."""
    return TokenMap(torch.arange(500, dtype=torch.int32) % 400, 400, "x")
