// CPU kernel of short_conv, backward. With dz the gradient of z, s = sigmoid(z) and
// xh = x * rsqrt(mean(x^2) + eps):
//   dz[t] = grad_out[t] * s * (1 + z * (1 - s))
//   dn[t] = sum over j of weight[j] * dz[t + back(j)]              within the sequence
//   grad_x[t] = grad_out[t] + rsqrt(..) * (dn * w - xh * mean(dn * w * xh))     w: norm_weight
//   grad_weight[j] = sum over t of dz[t] * xh[t - back(j)] * w
//   grad_norm_weight = sum over t of dn[t] * xh[t]
//
// The tokens are split into at most kGroups groups; a task is a group of one branch:
//   1. the group walks its sequences from their ends, so that dz of the tokens within reach lies in a ring of
//      S + 1 rows;
//   2. when all tasks are done, their sums are added in order and the weights' gradients are written.
// The forward pass saves nothing. The groups depend on the number of tokens alone, so the bits are the same
// at any number of threads. Extra memory: kGroups * branches * (width + 1) rows of floats, and one ring per
// thread.
#include "common/cu_seqlens.h"
#include "kernels/short_conv/short_conv_cpu.h"

namespace engram_kernels::EK_ISA {
namespace {

constexpr int64_t kGroups = 16;

EK_LANE int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }

template <class T>
class GroupBackward {
 public:
  GroupBackward(const ShortConvBwdParams& p, int64_t branch, float* sums)
      : b_(p),
        p_(p.forward),
        branch_(branch),
        size_(padded_lanes(p_.hidden_size)),
        slots_(min_of(p_.reach() + 1, p_.num_tokens)),
        sums_(sums),
        weights_(p_),
        taps_of_token_(p_, branch),
        dz_(slots_ * size_),
        dxh_(size_) {
    with_weight_dtype<T>(p_, [&](auto* tag) { weights_.template load_branch<std::remove_pointer_t<decltype(tag)>>(p_, branch); });
  }

  void run(int64_t first, int64_t last) {
    int64_t b = sequence_of(p_.cu_seqlens, p_.num_sequences, first);
    for (int64_t begin = first; begin < last;) {
      while (p_.cu_seqlens[b + 1] <= begin) ++b;
      const int64_t end = min_of(last, p_.cu_seqlens[b + 1]);
      const int64_t visible_end = min_of(end + p_.reach(), p_.cu_seqlens[b + 1]);
      for (int64_t t = visible_end - 1; t >= begin; --t) {
        Tap<T> taps[kMaxTaps];
        taps_of_token_.of(b, t, taps);
        make_dz(t, taps);
        if (t < end) token(t, visible_end, taps);
      }
      begin = end;
    }
  }

 private:
  float* dz_row(int64_t t) const { return dz_.data() + t % slots_ * size_; }
  const T* grad_out(int64_t t) const {
    return static_cast<const T*>(b_.grad_out) + t * b_.grad_token_stride + branch_ * b_.grad_branch_stride;
  }

  void make_dz(int64_t t, const Tap<T>* taps) {
    float* dz = dz_row(t);
    const F32 one = splat(1.0F);
    for (int64_t i = 0; i < p_.hidden_size; i += kLanes) {
      const F32 z = convolve_lanes(p_, weights_, taps, i, p_.hidden_size - i);
      const F32 s = sigmoid(z);
      const F32 slope = mul(s, fma(z, sub(one, s), one));
      store(dz + i, mul(load_upto(grad_out(t) + i, p_.hidden_size - i), slope));
    }
  }

  void token(int64_t t, int64_t visible_end, const Tap<T>* taps) {
    const Tap<T> own = taps[p_.width - 1];
    float* norm_sums = sums_ + p_.width * size_;
    F32 projection = zeros();  // sum of dn * w * xh
    for (int64_t i = 0; i < p_.hidden_size; i += kLanes) {
      const int64_t count = p_.hidden_size - i;
      F32 dn = zeros();
      for (int j = 0; j < p_.width; ++j) {
        const int64_t reader = t + p_.back(j);
        if (reader < visible_end) dn = fma(load(weights_.tap(j) + i), load(dz_row(reader) + i), dn);
        if (taps[j].row == nullptr) continue;
        const F32 xh = mul(load_upto(taps[j].row + i, count), splat(taps[j].rsqrt_mean));
        store(sums_ + j * size_ + i, fma(load(dz_row(t) + i), xh, load(sums_ + j * size_ + i)));
      }
      const F32 xh = mul(load_upto(own.row + i, count), splat(own.rsqrt_mean));
      store(norm_sums + i, fma(dn, xh, load(norm_sums + i)));
      const F32 dxh = mul(dn, load(weights_.norm(p_) + i));
      store(dxh_.data() + i, dxh);
      projection = fma(dxh, xh, projection);
    }
    const F32 mean = splat(sum(projection) / static_cast<float>(p_.hidden_size)), factor = splat(own.rsqrt_mean);
    T* grad_x = static_cast<T*>(b_.grad_x) + (t * p_.branches + branch_) * p_.hidden_size;
    for (int64_t i = 0; i < p_.hidden_size; i += kLanes) {
      const int64_t count = p_.hidden_size - i;
      const F32 xh = mul(load_upto(own.row + i, count), factor);
      const F32 inner = sub(load(dxh_.data() + i), mul(xh, mean));
      store_upto(grad_x + i, fma(factor, inner, load_upto(grad_out(t) + i, count)), count);
    }
  }

  const ShortConvBwdParams& b_;
  const ShortConvParams& p_;
  int64_t branch_, size_, slots_;
  float* sums_;  // [width + 1][padded H]: sums of dz * xh for each tap, then of dn * xh
  BranchWeights weights_;
  Taps<T> taps_of_token_;
  Scratch dz_;   // [min(S + 1, T)][padded H], a ring by token
  Scratch dxh_;  // [padded H]
};

// Adds the groups' sums in order and writes the weights' gradients.
template <class T, class W>
void write_weight_grads(const ShortConvBwdParams& b, const float* sums, int64_t groups, const Parallel& parallel) {
  const ShortConvParams& p = b.forward;
  const int64_t size = padded_lanes(p.hidden_size), stride = (p.width + 1) * size;
  parallel.for_range(p.branches, 1, [&](int64_t begin, int64_t end) {
    const Scratch totals(stride);
    for (int64_t m = begin; m < end; ++m) {
      std::memset(totals.data(), 0, static_cast<size_t>(stride) * sizeof(float));
      for (int64_t g = 0; g < groups; ++g) {
        const float* group = sums + (g * p.branches + m) * stride;
        for (int64_t i = 0; i < stride; i += kLanes) store(totals.data() + i, add(load(totals.data() + i), load(group + i)));
      }
      for (int64_t i = 0; i < p.hidden_size; ++i) {
        const int64_t channel = m * p.hidden_size + i;
        const float norm_weight = to_float(static_cast<const W*>(p.norm_weight)[channel]);
        for (int j = 0; j < p.width; ++j) {
          from_float(totals.data()[j * size + i] * norm_weight, static_cast<W*>(b.grad_weight) + channel * p.width + j);
        }
        from_float(totals.data()[p.width * size + i], static_cast<W*>(b.grad_norm_weight) + channel);
      }
    }
  });
}

template <class T>
void short_conv_bwd_of_type(const ShortConvBwdParams& b, const Parallel& parallel) {
  const ShortConvParams& p = b.forward;
  const int64_t even = ceil_div(p.num_tokens, kGroups), group_tokens = even > kBlockTokens ? even : kBlockTokens;
  const int64_t groups = ceil_div(p.num_tokens, group_tokens), stride = (p.width + 1) * padded_lanes(p.hidden_size);
  const Scratch sums(groups * p.branches * stride);
  parallel.for_range(groups * p.branches, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first = task / p.branches * group_tokens;
      GroupBackward<T>(b, task % p.branches, sums.data() + task * stride).run(first, min_of(first + group_tokens, p.num_tokens));
    }
  });
  with_weight_dtype<T>(
      p, [&](auto* tag) { write_weight_grads<T, std::remove_pointer_t<decltype(tag)>>(b, sums.data(), groups, parallel); });
}

}  // namespace

void short_conv_bwd_cpu(const ShortConvBwdParams& p, const Parallel& parallel) {
  with_dtype(p.forward.dtype, [&](auto* tag) { short_conv_bwd_of_type<std::remove_pointer_t<decltype(tag)>>(p, parallel); });
}

}  // namespace engram_kernels::EK_ISA

EK_DISPATCH_CPU(short_conv_bwd_cpu, (const ShortConvBwdParams& p, const Parallel& parallel), (p, parallel))
