// Checks of ngram_hash on host memory: constants and token data. Compiled once, for the plainest instruction set.
#include <algorithm>
#include <utility>
#include <vector>

#include "common/cu_seqlens.h"
#include "kernels/ngram_hash/ngram_hash.h"

namespace engram_kernels {

void check_sizes(const NgramHashParams& p) {
  EK_CHECK(p.max_order >= 2 && p.max_order <= kMaxOrder,
           "ngram_hash: max_order is " << p.max_order << ", expected 2.." << kMaxOrder);
  EK_CHECK(p.heads >= 1 && p.num_layers >= 1, "ngram_hash: heads is " << p.heads << " and layers " << p.num_layers);
  EK_CHECK(p.num_ids >= 1 && p.num_ids <= int64_t{1} << 31, "ngram_hash: num_ids is " << p.num_ids << ", expected 1..2^31");
  EK_CHECK(p.boundary_id >= 0 && p.boundary_id < p.num_ids,
           "ngram_hash: boundary_id is " << p.boundary_id << ", expected [0, " << p.num_ids << ")");
}

void check_params(const NgramHashParams& p) {
  check_sizes(p);
  const int64_t limit = int64_t{1} << 31;
  for (int64_t i = 0; i < int64_t{p.num_layers} * p.columns(); ++i) {
    EK_CHECK(p.moduli[i] >= 1 && p.moduli[i] < limit && p.offsets[i] >= 0 && p.offsets[i] <= limit - p.moduli[i],
             "ngram_hash: column " << i << " has modulus " << p.moduli[i] << " and offset " << p.offsets[i]
                                   << "; row ids must fit int32");
    const auto modulus = static_cast<uint64_t>(p.moduli[i]), reciprocal = static_cast<uint64_t>(p.reciprocals[i]);
    EK_CHECK(mul_high(reciprocal, modulus) == 0 && ~uint64_t{0} - reciprocal * modulus < modulus,
             "ngram_hash: column " << i << " has modulus " << modulus << " and reciprocal " << reciprocal
                                   << ", expected floor((2^64 - 1) / modulus)");
    if (!p.per_column) continue;
    unsigned __int128 largest = 0;
    for (int s = 0; s < p.max_order; ++s) {
      const int64_t multiplier = p.multipliers[i * p.max_order + s];
      EK_CHECK(multiplier >= 0,
               "ngram_hash: multiplier " << s << " of column " << i << " is " << multiplier << ", expected >= 0");
      largest += static_cast<unsigned __int128>(multiplier) * static_cast<uint64_t>(p.num_ids - 1);
    }
    EK_CHECK(largest >> 63 == 0, "ngram_hash: the sum of column " << i << " can pass 2^63");
  }
}

namespace {

// Throws if two sequences with tokens have one row: which of them it would be the history of is anybody's guess.
void check_rows_differ(const NgramHashParams& p) {
  bool increase = true;  // as a scheduler has them, mostly
  for (int64_t b = 1; b < p.num_sequences; ++b) increase = increase && p.index(b - 1) < p.index(b);
  if (increase) return;
  std::vector<std::pair<int64_t, int64_t>> users;  // (row, sequence)
  users.reserve(static_cast<size_t>(p.num_sequences));
  for (int64_t b = 0; b < p.num_sequences; ++b) {
    if (p.index(b) != kSkipped) users.emplace_back(p.index(b), b);
  }
  std::sort(users.begin(), users.end());
  for (size_t i = 1; i < users.size(); ++i) {
    EK_CHECK(users[i].first != users[i - 1].first,
             "ngram_hash: state_indices[" << users[i - 1].second << "] and state_indices[" << users[i].second << "] are both "
                                          << users[i].first << ", expected a history for each sequence");
  }
}

void check_rows(const NgramHashParams& p) {
  for (int64_t b = 0; b < p.num_sequences; ++b) {
    const int64_t row = p.index(b), dropped = p.num_rejected(b);
    EK_CHECK_INDEX(row >= kSkipped && row < p.num_histories, "ngram_hash: state_indices[" << b << "] is " << row
                                                                                          << ", expected [0, " << p.num_histories
                                                                                          << ") or -1 (skip the sequence)");
    if (row == kSkipped) continue;
    EK_CHECK(dropped >= 0 && dropped <= p.spare(), "ngram_hash: rejected[" << b << "] is " << dropped << ", expected [0, "
                                                                           << p.spare()
                                                                           << "], the columns of history beyond max_order - 1");
  }
  if (p.state_indices != nullptr) check_rows_differ(p);
}

void check_token_ids(const NgramHashParams& p, int64_t begin, int64_t end) {
  for (int64_t t = begin; t < end; ++t) {
    if (p.dead(t)) continue;
    const int64_t id = p.token_id(t);
    EK_CHECK_INDEX(id >= 0 && id < p.vocab_size, "ngram_hash: token_ids[" << t << "] is " << id << ", expected [0, "
                                                                          << p.vocab_size
                                                                          << "); unresolved placeholders must not be hashed");
  }
}

}  // namespace

void check_host_data(const NgramHashParams& p) {
  check_cu_seqlens("ngram_hash", p.cu_seqlens, p.num_sequences, p.num_tokens);
  if (p.state_indices != nullptr || p.rejected != nullptr) check_rows(p);
  if (p.state_indices == nullptr) {
    check_token_ids(p, 0, p.num_tokens);
  } else {
    for (int64_t b = 0; b < p.num_sequences; ++b) {
      if (p.index(b) != kSkipped) check_token_ids(p, p.cu_seqlens[b], p.cu_seqlens[b + 1]);
    }
  }
  if (p.history == nullptr) return;
  for (int64_t b = 0; b < p.num_sequences; ++b) {
    const int64_t row = p.history_row(b), first = p.num_rejected(b) - 1;
    for (int back = 1; row != kSkipped && back < p.max_order; ++back) {
      const int64_t id = p.history_id(b, back);
      EK_CHECK_INDEX(id >= kDeadToken && id < p.vocab_size, "ngram_hash: history[" << row << ", " << first + back << "] is " << id
                                                                                   << ", expected [0, " << p.vocab_size
                                                                                   << "), -1 (before the start) or -2 (dead)");
      EK_CHECK_INDEX(id == kBeforeStart || back == 1 || p.history_id(b, back - 1) != kBeforeStart,
                     "ngram_hash: history[" << row << ", " << first + back << "] is " << id << ", older than a -1 (before the"
                                            << " start), expected -1; unresolved placeholders must not be hashed");
    }
  }
}

}  // namespace engram_kernels
