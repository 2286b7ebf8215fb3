// Checks of row_update on sizes, options and data. Compiled once, for the plainest instruction set.
#include <cmath>
#include <limits>

#include "kernels/row_update/row_update.h"

namespace engram_kernels {
namespace {

constexpr const char* kOp = "row_update";
constexpr double kMax = std::numeric_limits<float>::max();
constexpr int64_t kMaxRow = int64_t{1} << 62;

// An infinite or NaN gradient in float32; `element` of a dense array.
float value_at(const std::byte* data, DType dtype, int64_t element) {
  switch (dtype) {
    case DType::kF32:
      return reinterpret_cast<const float*>(data)[element];
    case DType::kBf16:
      return bf16_to_float(reinterpret_cast<const uint16_t*>(data)[element]);
    case DType::kF16:
      return f16_to_float(reinterpret_cast<const uint16_t*>(data)[element]);
  }
  return 0.0F;
}

void check_rate(const char* name, double value, bool below_one) {
  EK_CHECK(value >= 0.0 && value <= kMax && (!below_one || value < 1.0),
           kOp << ": " << name << " is " << value << ", expected "
               << (below_one ? "[0, 1)" : "a finite number of at least 0 that float32 holds"));
}

}  // namespace

void check_params(const RowUpdateParams& p) {
  check_row_source(kOp, p.table);
  EK_CHECK(is_plain(p.table.format) || can_encode(p.table.format),
           kOp << ": row_format is '" << traits_of(p.table.format).name
               << "', expected a float format, or eight bits with scales of each row");
  EK_CHECK(p.row_ids.count >= 0, kOp << ": there are " << p.row_ids.count << " ids");
  check_rate("lr", p.lr, false);
  check_rate("beta1", p.beta1, true);
  check_rate("beta2", p.beta2, true);
  check_rate("eps", p.eps, false);
  EK_CHECK(std::fabs(p.grad_scale) <= kMax,
           kOp << ": grad_scale is " << p.grad_scale << ", expected a number that float32 holds");
  EK_CHECK(p.step >= 0 && p.step <= kMaxRow,
           kOp << ": step is " << p.step << ", expected 1 to " << kMaxRow << ", or 0 for the step of each row");
  EK_CHECK(p.first_row >= 0 && p.first_row <= kMaxRow, kOp << ": first_row is " << p.first_row << ", expected 0 to " << kMaxRow);
  if (p.rule == UpdateRule::kNone || p.table.num_rows == 0) return;
  const bool has_second = p.rule == UpdateRule::kAdam || p.rule == UpdateRule::kAdagrad;
  EK_CHECK((p.second != nullptr) == has_second,
           kOp << ": second " << (has_second ? "is needed" : "has no use") << " in this rule");
  EK_CHECK(p.first == nullptr || p.rule != UpdateRule::kAdagrad, kOp << ": first has no use in this rule");
  const bool rounds = !stores(p.table.format, DType::kF32) || (p.first != nullptr && p.first_dtype != DType::kF32);
  const bool counts = (p.rule == UpdateRule::kAdam && p.step == 0) || (p.stochastic && rounds);
  EK_CHECK(!counts || p.steps != nullptr,
           kOp << ": steps is None, expected the steps of each row: for the bias correction, or to round stochastically");
}

void throw_fault(const RowUpdateParams& p, const GradientFault& fault) {
  const auto shown = [&p](int64_t row) { return p.row_names == nullptr || row < 0 ? row : p.row_names[row]; };
  if (fault.position >= 0) {
    const int64_t begin = fault.position * p.table.row_dim;
    int64_t element = 0;
    while (element + 1 < p.table.row_dim && std::isfinite(value_at(p.grad, p.grad_dtype, begin + element))) ++element;
    EK_THROW_AS(std::invalid_argument, kOp << ": grad_rows[" << fault.position << ", " << element << "], of row "
                                           << shown(p.row_ids[fault.position]) << ", is "
                                           << value_at(p.grad, p.grad_dtype, begin + element) << ", expected a finite number");
  }
  EK_CHECK(fault.row < 0, kOp << ": the gradients of row " << shown(fault.row) << " sum up to more than float32 holds");
  EK_CHECK(fault.spent_row < 0, kOp << ": steps[" << shown(fault.spent_row) << "] is " << p.steps[fault.spent_row]
                                    << ", expected [0, " << INT32_MAX << ")");
}

}  // namespace engram_kernels
