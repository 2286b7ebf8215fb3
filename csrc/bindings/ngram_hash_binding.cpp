// torch binding of ngram_hash: tensors in, NgramHashParams out. No arithmetic here.
#include <array>

#include "bindings/tensors.h"
#include "kernels/ngram_hash/ngram_hash.h"

namespace engram_kernels {
namespace {

constexpr const char* kOp = "ngram_hash";

// What the op and its form that commits share; no history yet.
NgramHashParams make_params(const Tensor& token_ids, const Tensor& cu_seqlens, const Tensor& moduli, const Tensor& offsets,
                            const Tensor& multipliers, const Tensor& reciprocals, const std::optional<Tensor>& token_map,
                            const std::optional<Tensor>& dead_mask, int64_t num_ids, int64_t boundary_id, int64_t eos_id,
                            const Tensor& out) {
  expect_one_device(kOp, {{"token_ids", &token_ids},
                          {"cu_seqlens", &cu_seqlens},
                          {"moduli", &moduli},
                          {"offsets", &offsets},
                          {"multipliers", &multipliers},
                          {"reciprocals", &reciprocals},
                          {"token_map", or_null(token_map)},
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
  for (const auto& [name, x] :
       {std::pair{"moduli", &moduli}, std::pair{"offsets", &offsets}, std::pair{"reciprocals", &reciprocals}}) {
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
  if (dead_mask.has_value()) {
    expect_dtype(kOp, "dead_mask", *dead_mask, {ScalarType::Bool});
    expect_shape(kOp, "dead_mask", *dead_mask, {p.num_tokens}, 1);
  }
  expect_dtype(kOp, "out", out, {ScalarType::Int});
  expect_shape(kOp, "out", out, {p.num_layers, p.num_tokens, p.columns()}, 3);
  p.token_ids = token_ids.const_data_ptr();
  p.token_stride = token_ids.stride(0);
  p.ids_are_int64 = token_ids.scalar_type() == ScalarType::Long;
  p.dead_mask = data_or_null<uint8_t>(dead_mask);
  p.token_map = data_or_null<int32_t>(token_map);
  p.cu_seqlens = cu_seqlens.const_data_ptr<int32_t>();
  p.multipliers = multipliers.const_data_ptr<int64_t>();
  p.moduli = moduli.const_data_ptr<int64_t>();
  p.offsets = offsets.const_data_ptr<int64_t>();
  p.reciprocals = reciprocals.const_data_ptr<int64_t>();
  p.row_ids = out.mutable_data_ptr<int32_t>();
  p.num_ids = num_ids;
  p.vocab_size = token_map.has_value() ? token_map->numel() : num_ids;
  p.boundary_id = boundary_id;
  p.eos_id = eos_id;
  return p;
}

void run(NgramHashParams p, const Tensor& token_ids) {
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

void hash_into(const Tensor& out, const Tensor& token_ids, const Tensor& cu_seqlens, const Tensor& moduli, const Tensor& offsets,
               const Tensor& multipliers, const Tensor& reciprocals, const std::optional<Tensor>& token_map,
               const std::optional<Tensor>& history, const std::optional<Tensor>& dead_mask, int64_t num_ids, int64_t boundary_id,
               int64_t eos_id) {
  NgramHashParams p = make_params(token_ids, cu_seqlens, moduli, offsets, multipliers, reciprocals, token_map, dead_mask, num_ids,
                                  boundary_id, eos_id, out);
  if (history.has_value()) {
    expect_one_device(kOp, {{"token_ids", &token_ids}, {"history", &*history}});
    expect_dtype(kOp, "history", *history, {token_ids.scalar_type()});
    expect_shape(kOp, "history", *history, {p.num_sequences, p.max_order - 1}, 2);
    p.history = history->const_data_ptr();
    p.num_histories = p.num_sequences;
    p.history_width = p.history_stride = p.max_order - 1;
  }
  run(p, token_ids);
}

void ngram_hash_out(const Tensor& token_ids, const Tensor& cu_seqlens, const Tensor& moduli, const Tensor& offsets,
                    const Tensor& multipliers, const Tensor& reciprocals, std::optional<Tensor> token_map,
                    std::optional<Tensor> history, std::optional<Tensor> dead_mask, int64_t num_ids, int64_t boundary_id,
                    int64_t eos_id, const Tensor& out) {
  expect_apart_from(kOp, out,
                    {{"token_ids", &token_ids},
                     {"cu_seqlens", &cu_seqlens},
                     {"moduli", &moduli},
                     {"offsets", &offsets},
                     {"multipliers", &multipliers},
                     {"reciprocals", &reciprocals},
                     {"token_map", or_null(token_map)},
                     {"history", or_null(history)},
                     {"dead_mask", or_null(dead_mask)}});
  hash_into(out, token_ids, cu_seqlens, moduli, offsets, multipliers, reciprocals, token_map, history, dead_mask, num_ids,
            boundary_id, eos_id);
}

Tensor new_row_ids(const Tensor& token_ids, const Tensor& moduli) {
  expect_shape(kOp, "moduli", moduli, {kAnySize, kAnySize}, 2);
  return new_output(token_ids, {moduli.size(0), token_ids.numel(), moduli.size(1)}, ScalarType::Int);
}

Tensor ngram_hash(const Tensor& token_ids, const Tensor& cu_seqlens, const Tensor& moduli, const Tensor& offsets,
                  const Tensor& multipliers, const Tensor& reciprocals, std::optional<Tensor> token_map,
                  std::optional<Tensor> history, std::optional<Tensor> dead_mask, int64_t num_ids, int64_t boundary_id,
                  int64_t eos_id) {
  Tensor out = new_row_ids(token_ids, moduli);
  hash_into(out, token_ids, cu_seqlens, moduli, offsets, multipliers, reciprocals, token_map, history, dead_mask, num_ids,
            boundary_id, eos_id);
  return out;
}

// The pool of histories, which row of it each sequence has, and what is dropped of it.
void set_state(NgramHashParams* p, const Tensor& token_ids, const Tensor& history, const std::optional<Tensor>& state_indices,
               const std::optional<Tensor>& rejected) {
  expect_one_device(kOp, {{"token_ids", &token_ids},
                          {"history", &history},
                          {"state_indices", or_null(state_indices)},
                          {"rejected", or_null(rejected)}});
  expect_dtype(kOp, "history", history, {token_ids.scalar_type()});
  expect_shape(kOp, "history", history, {state_indices.has_value() ? kAnySize : p->num_sequences, kAnySize}, 1);
  p->num_histories = history.size(0);
  p->history_width = history.size(1);
  p->history_stride = history.stride(0);
  EK_CHECK(p->spare() >= 0, kOp << ": history has " << p->history_width << " columns, expected at least " << p->max_order - 1
                                << ", max_order - 1");
  EK_CHECK(p->num_histories <= 1 || p->history_stride >= p->history_width, kOp << ": the rows of history share memory");
  p->history = p->committed = history.mutable_data_ptr();
  if (state_indices.has_value()) {
    expect_dtype(kOp, "state_indices", *state_indices, {ScalarType::Int, ScalarType::Long});
    expect_shape(kOp, "state_indices", *state_indices, {p->num_sequences}, 0);
    p->state_indices = state_indices->const_data_ptr();
    p->index_stride = state_indices->stride(0);
    p->indices_are_int64 = state_indices->scalar_type() == ScalarType::Long;
  }
  if (rejected.has_value()) {
    expect_dtype(kOp, "rejected", *rejected, {ScalarType::Int, ScalarType::Long});
    expect_shape(kOp, "rejected", *rejected, {p->num_sequences}, 0);
    p->rejected = rejected->const_data_ptr();
    p->rejected_stride = rejected->stride(0);
    p->rejected_are_int64 = rejected->scalar_type() == ScalarType::Long;
  }
}

// Where the inputs lie that `make_params` found to be dense.
std::array<std::pair<const char*, ByteRange>, 7> dense_ranges(const NgramHashParams& p) {
  const auto range = [](const auto* data, int64_t count) {
    const uintptr_t begin = reinterpret_cast<uintptr_t>(data);
    return ByteRange{begin, data == nullptr ? begin : begin + static_cast<uintptr_t>(count) * sizeof *data};
  };
  const int64_t columns = int64_t{p.num_layers} * p.columns();
  return {{{"cu_seqlens", range(p.cu_seqlens, p.num_sequences + 1)},
           {"moduli", range(p.moduli, columns)},
           {"offsets", range(p.offsets, columns)},
           {"multipliers", range(p.multipliers, (p.per_column ? columns : p.num_layers) * p.max_order)},
           {"reciprocals", range(p.reciprocals, columns)},
           {"token_map", range(p.token_map, p.vocab_size)},
           {"dead_mask", range(p.dead_mask, p.num_tokens)}}};
}

void hash_and_commit(const Tensor& out, const Tensor& token_ids, const Tensor& cu_seqlens, const Tensor& moduli,
                     const Tensor& offsets, const Tensor& multipliers, const Tensor& reciprocals, const Tensor& history,
                     const std::optional<Tensor>& token_map, const std::optional<Tensor>& dead_mask,
                     const std::optional<Tensor>& state_indices, const std::optional<Tensor>& rejected, int64_t num_ids,
                     int64_t boundary_id, int64_t eos_id) {
  NgramHashParams p = make_params(token_ids, cu_seqlens, moduli, offsets, multipliers, reciprocals, token_map, dead_mask, num_ids,
                                  boundary_id, eos_id, out);
  set_state(&p, token_ids, history, state_indices, rejected);
  const ByteRange updated = byte_range(history);
  for (const auto& [name, x] : {std::pair{"token_ids", &token_ids}, std::pair{"state_indices", or_null(state_indices)},
                                std::pair{"rejected", or_null(rejected)}}) {
    if (x != nullptr) expect_apart(kOp, name, *x, updated);
  }
  for (const auto& [name, range] : dense_ranges(p)) expect_apart(kOp, name, range, updated);
  run(p, token_ids);
}

void ngram_hash_update_out(const Tensor& token_ids, const Tensor& cu_seqlens, const Tensor& moduli, const Tensor& offsets,
                           const Tensor& multipliers, const Tensor& reciprocals, const Tensor& history,
                           std::optional<Tensor> token_map, std::optional<Tensor> dead_mask, std::optional<Tensor> state_indices,
                           std::optional<Tensor> rejected, int64_t num_ids, int64_t boundary_id, int64_t eos_id,
                           const Tensor& out) {
  expect_apart_from(kOp, out,
                    {{"token_ids", &token_ids},
                     {"cu_seqlens", &cu_seqlens},
                     {"moduli", &moduli},
                     {"offsets", &offsets},
                     {"multipliers", &multipliers},
                     {"reciprocals", &reciprocals},
                     {"history", &history},
                     {"token_map", or_null(token_map)},
                     {"dead_mask", or_null(dead_mask)},
                     {"state_indices", or_null(state_indices)},
                     {"rejected", or_null(rejected)}});
  hash_and_commit(out, token_ids, cu_seqlens, moduli, offsets, multipliers, reciprocals, history, token_map, dead_mask,
                  state_indices, rejected, num_ids, boundary_id, eos_id);
}

Tensor ngram_hash_update(const Tensor& token_ids, const Tensor& cu_seqlens, const Tensor& moduli, const Tensor& offsets,
                         const Tensor& multipliers, const Tensor& reciprocals, const Tensor& history,
                         std::optional<Tensor> token_map, std::optional<Tensor> dead_mask, std::optional<Tensor> state_indices,
                         std::optional<Tensor> rejected, int64_t num_ids, int64_t boundary_id, int64_t eos_id) {
  Tensor out = new_row_ids(token_ids, moduli);
  hash_and_commit(out, token_ids, cu_seqlens, moduli, offsets, multipliers, reciprocals, history, token_map, dead_mask,
                  state_indices, rejected, num_ids, boundary_id, eos_id);
  return out;
}

}  // namespace
}  // namespace engram_kernels

STABLE_TORCH_LIBRARY_IMPL(engram_kernels, EK_DISPATCH_KEY, m) {
  m.impl("ngram_hash", TORCH_BOX(&engram_kernels::ngram_hash));
  m.impl("ngram_hash.out", TORCH_BOX(&engram_kernels::ngram_hash_out));
  m.impl("ngram_hash_update", TORCH_BOX(&engram_kernels::ngram_hash_update));
  m.impl("ngram_hash_update.out", TORCH_BOX(&engram_kernels::ngram_hash_update_out));
}
