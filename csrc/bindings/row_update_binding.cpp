// torch binding of row_update: tensors in, params out. No arithmetic here.
#include "bindings/tensors.h"
#include "kernels/row_update/row_update.h"

namespace engram_kernels {
namespace {

constexpr const char* kOp = "row_update";

UpdateRule rule_of(const std::string& rule) {
  if (rule == "none") return UpdateRule::kNone;
  if (rule == "sgd") return UpdateRule::kSgd;
  if (rule == "adagrad") return UpdateRule::kAdagrad;
  EK_CHECK(rule == "adam", kOp << ": rule is '" << rule << "', expected 'adam', 'adagrad', 'sgd' or 'none'");
  return UpdateRule::kAdam;
}

template <class T>
T* mutable_or_null(const std::optional<Tensor>& x) {
  return x.has_value() ? static_cast<T*>(x->mutable_data_ptr()) : nullptr;
}

void set_moments(RowUpdateParams& p, const std::optional<Tensor>& second, const std::optional<Tensor>& first,
                 const std::optional<Tensor>& steps) {
  if (second.has_value()) {
    expect_dtype(kOp, "second", *second, {ScalarType::Float});
    p.second_per_row = second->dim() == 1;
    p.second_per_row ? expect_shape(kOp, "second", *second, {p.table.num_rows}, 1)
                     : expect_shape(kOp, "second", *second, {p.table.num_rows, p.table.row_dim}, 2);
  }
  if (first.has_value()) {
    expect_dtype(kOp, "first", *first, {ScalarType::Float, ScalarType::BFloat16});
    expect_shape(kOp, "first", *first, {p.table.num_rows, p.table.row_dim}, 2);
    p.first_dtype = float_dtype(kOp, "first", *first);
  }
  if (steps.has_value()) {
    expect_dtype(kOp, "steps", *steps, {ScalarType::Int});
    expect_shape(kOp, "steps", *steps, {p.table.num_rows}, 1);
  }
  p.second = mutable_or_null<float>(second);
  p.first = mutable_or_null<std::byte>(first);
  p.steps = mutable_or_null<int32_t>(steps);
}

// Every tensor that is written lies apart from every other one.
void expect_all_apart(NamedTensors written, NamedTensors read) {
  for (const auto* a = written.begin(); a != written.end(); ++a) {
    if (a->second == nullptr) continue;
    for (const auto* b = a + 1; b != written.end(); ++b) {
      if (b->second != nullptr) expect_apart(kOp, b->first, *b->second, *a->second);
    }
    expect_apart_from(kOp, *a->second, read);
  }
}

// Checks the data and updates the rows; on a GPU what is wrong with the data is counted instead of raised.
void run(RowUpdateParams& p, const Tensor& weight, const Tensor& row_ids) {
#ifdef EK_WITH_CUDA
  const CudaLaunch launch(kOp, weight);
  const auto [ids, positions] = sorted_ids(row_ids);
  const Tensor refused = torch::stable::new_zeros(weight, {1}, ScalarType::Int);
  const Tensor sizes = launch.scratch(has_own_sizes(p) ? p.row_ids.count * static_cast<int64_t>(sizeof(float)) : 0);
  p.row_ids.data = ids.const_data_ptr();
  p.positions = positions.const_data_ptr<int64_t>();
  p.refused = static_cast<uint32_t*>(refused.mutable_data_ptr());
  p.sizes = static_cast<float*>(sizes.mutable_data_ptr());
  p.error_count = launch.error_count();
  row_update_cuda(p, launch.stream());
#else
  (void)weight;
  check_row_ids_of(kOp, row_ids, p.row_ids, p.table.num_rows);
  const RowOrder order(p.row_ids, p.table.num_rows, torch_threads());
  GradientFault fault;
  find_gradient_fault_cpu(p, order, torch_threads(), fault);
  throw_fault(p, fault);
  row_update_cpu(p, order, torch_threads());
#endif
}

// What one call takes beside its numbers.
struct Given {
  const Tensor& weight;
  const std::optional<Tensor>& scales;
  const Tensor& row_ids;
  const Tensor& grad_rows;
  const std::optional<Tensor>&second, &first, &steps;
  const Tensor& out;
};

// All of them on one device, what is written apart from all else.
void expect_places(const Given& g) {
  expect_one_device(kOp, {{"weight", &g.weight},
                          {"scales", or_null(g.scales)},
                          {"row_ids", &g.row_ids},
                          {"grad_rows", &g.grad_rows},
                          {"second", or_null(g.second)},
                          {"first", or_null(g.first)},
                          {"steps", or_null(g.steps)},
                          {"out", &g.out}});
  expect_all_apart({{"weight", &g.weight},
                    {"scales", or_null(g.scales)},
                    {"second", or_null(g.second)},
                    {"first", or_null(g.first)},
                    {"steps", or_null(g.steps)},
                    {"out", &g.out}},
                   {{"row_ids", &g.row_ids}, {"grad_rows", &g.grad_rows}});
}

void update_into(const Given& g, const std::string& row_format, int64_t row_dim, bool zero_scale_is_zero, const std::string& rule,
                 double lr, double beta1, double beta2, double eps, double grad_scale, int64_t step, bool stochastic,
                 int64_t seed, int64_t first_row, const int64_t* row_names) {
  expect_places(g);
  const Tensor &row_ids = g.row_ids, &grad_rows = g.grad_rows;
  RowUpdateParams p{};
  p.row_ids = row_ids_of(kOp, row_ids);
  p.grad_dtype = float_dtype(kOp, "grad_rows", grad_rows);
  bool ok = grad_rows.dim() == row_ids.dim() + 1 && grad_rows.is_contiguous() && grad_rows.size(row_ids.dim()) == row_dim;
  for (int64_t d = 0; ok && d < row_ids.dim(); ++d) ok = grad_rows.size(d) == row_ids.size(d);
  EK_CHECK(ok, kOp << ": grad_rows has shape " << shape_text(grad_rows) << ", expected the shape of row_ids and " << row_dim
                   << ", contiguous");
  EK_CHECK(row_dim >= 1 && row_dim <= (1 << 24), kOp << ": rows have " << row_dim << " elements, expected 1.." << (1 << 24));
  p.table = row_source_of(kOp, g.weight, g.scales, row_format, row_dim, zero_scale_is_zero, 1.0);
  expect_dtype(kOp, "out", g.out, {ScalarType::Float});
  expect_shape(kOp, "out", g.out, {p.row_ids.count}, 1);
  p.rule = rule_of(rule);
  p.lr = lr;
  p.beta1 = beta1;
  p.beta2 = beta2;
  p.eps = eps;
  p.grad_scale = grad_scale;
  p.step = step;
  p.stochastic = stochastic;
  EK_CHECK(seed >= 0, kOp << ": seed is " << seed << ", expected at least 0");
  p.seed = static_cast<uint64_t>(seed);
  p.first_row = first_row;
  p.row_names = row_names;
  p.grad = static_cast<const std::byte*>(grad_rows.const_data_ptr());
  set_moments(p, g.second, g.first, g.steps);
  check_params(p);
  p.table.rows = static_cast<const std::byte*>(g.weight.mutable_data_ptr());
  p.table.scales = mutable_or_null<std::byte>(g.scales);
  p.squares = static_cast<float*>(g.out.mutable_data_ptr());
  run(p, g.weight, row_ids);
}

void row_update_out(const Tensor& weight, std::optional<Tensor> scales, const Tensor& row_ids, const Tensor& grad_rows,
                    std::optional<Tensor> second, std::optional<Tensor> first, std::optional<Tensor> steps,
                    std::string row_format, int64_t row_dim, bool zero_scale_is_zero, std::string rule, double lr, double beta1,
                    double beta2, double eps, double grad_scale, int64_t step, bool stochastic, int64_t seed, int64_t first_row,
                    const Tensor& out) {
  update_into({weight, scales, row_ids, grad_rows, second, first, steps, out}, row_format, row_dim, zero_scale_is_zero, rule, lr,
              beta1, beta2, eps, grad_scale, step, stochastic, seed, first_row, nullptr);
}

#ifndef EK_WITH_CUDA
// Rows of `weight` are called row_names[..], which a table in a file needs: of it, weight holds those of one step.
Tensor row_update_named(const Tensor& weight, std::optional<Tensor> scales, const Tensor& row_ids, const Tensor& grad_rows,
                        const Tensor& row_names, std::optional<Tensor> second, std::optional<Tensor> first,
                        std::optional<Tensor> steps, std::string row_format, int64_t row_dim, bool zero_scale_is_zero,
                        std::string rule, double lr, double beta1, double beta2, double eps, double grad_scale, int64_t step,
                        bool stochastic, int64_t seed) {
  Tensor out = torch::stable::new_empty(weight, {row_ids.numel()}, ScalarType::Float);
  expect_dtype(kOp, "row_names", row_names, {ScalarType::Long});
  expect_shape(kOp, "row_names", row_names, {weight.size(0)}, 1);
  update_into({weight, scales, row_ids, grad_rows, second, first, steps, out}, row_format, row_dim, zero_scale_is_zero, rule, lr,
              beta1, beta2, eps, grad_scale, step, stochastic, seed, 0, row_names.const_data_ptr<int64_t>());
  return out;
}
#endif

Tensor row_update(const Tensor& weight, std::optional<Tensor> scales, const Tensor& row_ids, const Tensor& grad_rows,
                  std::optional<Tensor> second, std::optional<Tensor> first, std::optional<Tensor> steps, std::string row_format,
                  int64_t row_dim, bool zero_scale_is_zero, std::string rule, double lr, double beta1, double beta2, double eps,
                  double grad_scale, int64_t step, bool stochastic, int64_t seed, int64_t first_row) {
  Tensor out = new_output(weight, {row_ids.numel()}, ScalarType::Float);
  row_update_out(weight, scales, row_ids, grad_rows, second, first, steps, row_format, row_dim, zero_scale_is_zero, rule, lr,
                 beta1, beta2, eps, grad_scale, step, stochastic, seed, first_row, out);
  return out;
}

}  // namespace
}  // namespace engram_kernels

STABLE_TORCH_LIBRARY_IMPL(engram_kernels, EK_DISPATCH_KEY, m) {
  m.impl("row_update", TORCH_BOX(&engram_kernels::row_update));
  m.impl("row_update.out", TORCH_BOX(&engram_kernels::row_update_out));
#ifndef EK_WITH_CUDA
  m.impl("row_update_named", TORCH_BOX(&engram_kernels::row_update_named));
#endif
}
