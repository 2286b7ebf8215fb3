// torch binding of ngram_hash: tensors in, NgramHashParams out. No arithmetic here.
#include "bindings/tensors.h"
#include "kernels/ngram_hash/ngram_hash.h"

namespace engram_kernels {
namespace {

constexpr const char* kOp = "ngram_hash";

void run(const Tensor& token_ids, const Tensor& cu_seqlens, const Tensor& moduli, const Tensor& offsets,
         const Tensor& multipliers, const std::optional<Tensor>& token_map, const std::optional<Tensor>& history,
         const std::optional<Tensor>& dead_mask, int64_t num_ids, int64_t boundary_id, int64_t eos_id, const Tensor& out) {
  expect_one_device(kOp, {{"token_ids", &token_ids},
                          {"cu_seqlens", &cu_seqlens},
                          {"moduli", &moduli},
                          {"offsets", &offsets},
                          {"multipliers", &multipliers},
                          {"token_map", or_null(token_map)},
                          {"history", or_null(history)},
                          {"dead_mask", or_null(dead_mask)},
                          {"out", &out}});
  NgramHashParams p{};
  p.num_tokens = token_ids.numel();
  p.num_sequences = cu_seqlens.numel() - 1;
  p.per_column = multipliers.dim() == 3;
  EK_CHECK(moduli.dim() == 2 && (multipliers.dim() == 2 || p.per_column), kOp << ": moduli and multipliers disagree");
  p.num_layers = static_cast<int>(moduli.size(0));
  p.max_order = static_cast<int>(multipliers.size(multipliers.dim() - 1));
  EK_CHECK(p.max_order >= 2 && p.max_order <= kMaxOrder && moduli.dim() == 2 && moduli.size(1) % (p.max_order - 1) == 0,
           kOp << ": moduli and multipliers disagree");
  p.heads = static_cast<int>(moduli.size(1)) / (p.max_order - 1);
  expect_dtype(kOp, "token_ids", token_ids, {ScalarType::Int, ScalarType::Long});
  expect_shape(kOp, "token_ids", token_ids, {kAnySize}, 0);
  expect_dtype(kOp, "cu_seqlens", cu_seqlens, {ScalarType::Int});
  expect_shape(kOp, "cu_seqlens", cu_seqlens, {kAnySize}, 1);
  EK_CHECK(p.num_sequences >= 0, kOp << ": cu_seqlens is empty");
  for (const auto& [name, x] : {std::pair{"moduli", &moduli}, std::pair{"offsets", &offsets}}) {
    expect_dtype(kOp, name, *x, {ScalarType::Long});
    expect_shape(kOp, name, *x, {p.num_layers, p.columns()}, 2);
  }
  expect_dtype(kOp, "multipliers", multipliers, {ScalarType::Long});
  if (p.per_column) {
    expect_shape(kOp, "multipliers", multipliers, {p.num_layers, p.columns(), p.max_order}, 3);
  } else {
    expect_shape(kOp, "multipliers", multipliers, {p.num_layers, p.max_order}, 2);
  }
  if (token_map.has_value()) {
    expect_dtype(kOp, "token_map", *token_map, {ScalarType::Int});
    expect_shape(kOp, "token_map", *token_map, {kAnySize}, 1);
  }
  if (history.has_value()) {
    expect_dtype(kOp, "history", *history, {token_ids.scalar_type()});
    expect_shape(kOp, "history", *history, {p.num_sequences, p.max_order - 1}, 2);
  }
  if (dead_mask.has_value()) {
    expect_dtype(kOp, "dead_mask", *dead_mask, {ScalarType::Bool});
    expect_shape(kOp, "dead_mask", *dead_mask, {p.num_tokens}, 1);
  }
  expect_dtype(kOp, "out", out, {ScalarType::Int});
  expect_shape(kOp, "out", out, {p.num_layers, p.num_tokens, p.columns()}, 3);
  p.token_ids = token_ids.const_data_ptr();
  p.token_stride = token_ids.stride(0);
  p.ids_are_int64 = token_ids.scalar_type() == ScalarType::Long;
  p.history = data_or_null<void>(history);
  p.dead_mask = data_or_null<uint8_t>(dead_mask);
  p.token_map = data_or_null<int32_t>(token_map);
  p.cu_seqlens = cu_seqlens.const_data_ptr<int32_t>();
  p.multipliers = multipliers.const_data_ptr<int64_t>();
  p.moduli = moduli.const_data_ptr<int64_t>();
  p.offsets = offsets.const_data_ptr<int64_t>();
  p.row_ids = out.mutable_data_ptr<int32_t>();
  p.num_ids = num_ids;
  p.vocab_size = token_map.has_value() ? token_map->numel() : num_ids;
  p.boundary_id = boundary_id;
  p.eos_id = eos_id;
#ifdef EK_WITH_CUDA
  const CudaLaunch launch(kOp, token_ids);
  p.error_count = launch.error_count();
  ngram_hash_cuda(p, launch.stream());
#else
  check_params(p);
  check_host_data(p);
  ngram_hash_cpu(p, torch_threads());
#endif
}

Tensor ngram_hash(const Tensor& token_ids, const Tensor& cu_seqlens, const Tensor& moduli, const Tensor& offsets,
                  const Tensor& multipliers, std::optional<Tensor> token_map, std::optional<Tensor> history,
                  std::optional<Tensor> dead_mask, int64_t num_ids, int64_t boundary_id, int64_t eos_id) {
  Tensor out = torch::stable::new_empty(token_ids, {moduli.size(0), token_ids.numel(), moduli.size(1)}, ScalarType::Int);
  run(token_ids, cu_seqlens, moduli, offsets, multipliers, token_map, history, dead_mask, num_ids, boundary_id, eos_id, out);
  return out;
}

void ngram_hash_out(const Tensor& token_ids, const Tensor& cu_seqlens, const Tensor& moduli, const Tensor& offsets,
                    const Tensor& multipliers, std::optional<Tensor> token_map, std::optional<Tensor> history,
                    std::optional<Tensor> dead_mask, int64_t num_ids, int64_t boundary_id, int64_t eos_id, const Tensor& out) {
  expect_apart_from(kOp, out,
                    {{"token_ids", &token_ids},
                     {"cu_seqlens", &cu_seqlens},
                     {"moduli", &moduli},
                     {"offsets", &offsets},
                     {"multipliers", &multipliers},
                     {"token_map", or_null(token_map)},
                     {"history", or_null(history)},
                     {"dead_mask", or_null(dead_mask)}});
  run(token_ids, cu_seqlens, moduli, offsets, multipliers, token_map, history, dead_mask, num_ids, boundary_id, eos_id, out);
}

}  // namespace
}  // namespace engram_kernels

STABLE_TORCH_LIBRARY_IMPL(engram_kernels, EK_DISPATCH_KEY, m) {
  m.impl("ngram_hash", TORCH_BOX(&engram_kernels::ngram_hash));
  m.impl("ngram_hash.out", TORCH_BOX(&engram_kernels::ngram_hash_out));
}
