// What senders change in attention patterns: the products of their differences with what scores read become, without a
// tensor of patterns, the change of the patterns' sum with given values.
//
// Up to kLanes senders go together, one in each lane of a vector, so that every sum over a pattern is one over vectors,
// whatever the numbers of heads and positions. The scores of one position fit into a first-level cache.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "isa.hpp"
#include "meeting.hpp"

namespace eapcore {

struct Span {  // of positions
  std::int64_t begin, end;
  std::int64_t size() const { return end - begin; }
};

template <class T>
constexpr int kLanes = 64 / static_cast<int>(sizeof(T));

// One pair's: raw [T, S, N·H] by strides, what a sender adds to the scores of position t with the others n, without σ;
// rstd, moved [T, S]: 1/σ_s and σ/σ_s − 1, or null; known, normed, values [T, N, H]: the scores, −∞ where one does not see
// the other, the part of them that the norm divides, and what patterns are summed with. earlier, mean [N, H] or null: of
// queries n the log of the sum of exp(score) of the keys before, and the mean of their values.
template <class T>
struct Changes {
  const T* raw;
  std::int64_t stride_t, stride_s;
  const T *rstd, *moved, *known, *normed, *values, *earlier, *mean;
  std::int64_t tokens, senders, others, heads;
};

// The senders of a block; none stands for one that changes nothing.
struct Lanes {
  std::int64_t first, count;
};

template <class T>
struct ChangesKernels {
  void (*query_means)(const Changes<T>& op, const Lanes& lanes, const Span* seen, T* scores, T* means);
  void (*key_sums)(const Changes<T>& op, const Lanes& lanes, const Span* seen, T* scores, T* most, T* sums, T* totals);
  T (*rstd_of_sum)(const T* x, const T* delta, std::int64_t size, T eps, bool centred);
};

// exp(x) to about 1 in the last place: x = n ln 2 + f, |f| ≤ ln 2 / 2, and a Taylor polynomial of f. Adding and taking away
// `round` leaves the nearest whole number n, whose bits are the low ones of the sum. No branch, so that loops vectorise.
EAPCORE_INLINE float exponential(float x) {
  constexpr float round = 12582912.0f;
  const float bounded = x < -87.0f ? -87.0f : x > 88.0f ? 88.0f : x, sum = bounded * 1.44269504f + round, n = sum - round;
  const float f = (bounded - n * 0.693145752f) - n * 1.42860682e-6f;
  float y = 1.98412698e-4f * f + 1.38888889e-3f;
  y = (y * f + 8.33333333e-3f) * f + 4.16666667e-2f;
  y = ((y * f + 0.166666667f) * f + 0.5f) * f + 1.0f;
  y = y * f + 1.0f;
  const std::uint32_t power = (bit_cast<std::uint32_t>(sum) - bit_cast<std::uint32_t>(round) + 127u) << 23;
  y *= bit_cast<float>(power);
  return x < -87.0f ? 0.0f : x > 88.0f ? std::numeric_limits<float>::infinity() : y;
}
EAPCORE_INLINE double exponential(double x) {
  constexpr double round = 6755399441055744.0;
  const double bounded = x < -708.0 ? -708.0 : x > 709.0 ? 709.0 : x, sum = bounded * 1.4426950408889634 + round;
  const double n = sum - round, f = (bounded - n * 0.6931471803691238) - n * 1.9082149292705877e-10;
  double y = (1.0 / 6227020800 * f + 1.0 / 479001600) * f + 1.0 / 39916800;
  y = ((y * f + 1.0 / 3628800) * f + 1.0 / 362880) * f + 1.0 / 40320;
  y = ((y * f + 1.0 / 5040) * f + 1.0 / 720) * f + 1.0 / 120;
  y = ((y * f + 1.0 / 24) * f + 1.0 / 6) * f + 0.5;
  y = (y * f + 1.0) * f + 1.0;
  const std::uint64_t power = (bit_cast<std::uint64_t>(sum) - bit_cast<std::uint64_t>(round) + 1023u) << 52;
  y *= bit_cast<double>(power);
  return x < -708.0 ? 0.0 : x > 709.0 ? std::numeric_limits<double>::infinity() : y;
}

#define EAPCORE_TARGET
namespace portable {
#include "changes_kernels.inl"
}  // namespace portable
#undef EAPCORE_TARGET
#if EAPCORE_X86
#define EAPCORE_TARGET __attribute__((target("avx2,fma")))
namespace avx2 {
#include "changes_kernels.inl"
}  // namespace avx2
#undef EAPCORE_TARGET
#define EAPCORE_TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma")))
namespace avx512 {
#include "changes_kernels.inl"
}  // namespace avx512
#undef EAPCORE_TARGET
#endif

template <class T>
ChangesKernels<T> changes_kernels(Isa isa) {
#if EAPCORE_X86
  if (isa >= Isa::avx512) return avx512::changes_kernels<T>();
  if (isa == Isa::avx2) return avx2::changes_kernels<T>();
#endif
  static_cast<void>(isa);
  return portable::changes_kernels<T>();
}

// What one thread works with.
template <class T>
struct ChangesWorker {
  T *scores, *most, *sums, *totals, *base;
  std::vector<Span> seen;
};

// out [B, T, S, H], of queries that change: Σ_n (pattern′ − pattern) values; [B, 1, S, H] of keys that change, summed over t
// and n. pairs: of each pair.
template <class T>
void pattern_changes(Isa isa, const std::vector<Changes<T>>& pairs, bool of_keys, int threads, T* out,
                     const Allocate& allocate) {
  if (pairs.empty() || pairs[0].senders * pairs[0].heads * pairs[0].tokens == 0) return;
  constexpr std::int64_t width = kLanes<T>;
  const ChangesKernels<T> kernels = changes_kernels<T>(isa);
  const std::int64_t batch = static_cast<std::int64_t>(pairs.size()), tokens = pairs[0].tokens, others = pairs[0].others;
  const std::int64_t heads = pairs[0].heads, senders = pairs[0].senders, blocks = (senders + width - 1) / width;
  const std::int64_t parts = std::min<std::int64_t>(blocks, (std::max(threads, 1) + batch - 1) / batch), tasks = batch * parts;
  const int team = static_cast<int>(std::min<std::int64_t>(std::max(threads, 1), tasks));
  const std::int64_t rows = of_keys ? others * heads : tokens * heads, of_one = others * heads;
  auto workers = in_workspace(allocate, [&](Workspace& workspace) {
    std::vector<ChangesWorker<T>> made;
    for (int i = 0; i < team; ++i) {
      const std::int64_t of_keys_alone = of_keys ? rows * width : 0;
      made.push_back({workspace.take<T>(of_one * width), workspace.take<T>(of_keys_alone), workspace.take<T>(of_keys_alone),
                      workspace.take<T>(rows * width), workspace.take<T>(rows),
                      std::vector<Span>(static_cast<std::size_t>(tokens))});
    }
    return made;
  });
  if (!workers) return;

  const auto run = [&](ChangesWorker<T>& worker, std::int64_t task) {
    const std::int64_t pair = task / parts, part = task % parts, kept = of_keys ? 1 : tokens;
    const Changes<T>& op = pairs[static_cast<std::size_t>(pair)];
    T* to = out + pair * kept * senders * heads;
    for (std::int64_t t = 0; t < tokens; ++t) {  // all heads see the same
      const auto hidden = [&](std::int64_t n) { return op.known[(t * others + n) * heads] == -std::numeric_limits<T>::infinity(); };
      Span& span = worker.seen[static_cast<std::size_t>(t)];
      span = {0, others};
      while (span.begin < span.end && hidden(span.begin)) ++span.begin;
      while (span.begin < span.end && hidden(span.end - 1)) --span.end;
    }
    const Span* seen = worker.seen.data();
    // What a sender without a difference has is taken away, so that it scores 0.
    const auto means = [&](const Lanes& lanes) {
      if (!of_keys) return kernels.query_means(op, lanes, seen, worker.scores, worker.totals);
      kernels.key_sums(op, lanes, seen, worker.scores, worker.most, worker.sums, worker.totals);
      for (std::int64_t i = 0; i < rows * width; ++i) worker.totals[i] /= worker.sums[i];
    };
    means({0, 0});
    for (std::int64_t i = 0; i < rows; ++i) worker.base[i] = worker.totals[i * width];
    for (std::int64_t block = blocks * part / parts; block < blocks * (part + 1) / parts; ++block) {
      const Lanes lanes{block * width, std::min(width, senders - block * width)};
      means(lanes);
      for (std::int64_t lane = 0; lane < lanes.count; ++lane) {
        T* mine = to + (lanes.first + lane) * heads;
        for (std::int64_t i = 0; !of_keys && i < rows; ++i) {
          mine[i / heads * senders * heads + i % heads] = worker.totals[i * width + lane] - worker.base[i];
        }
        for (std::int64_t h = 0; of_keys && h < heads; ++h) {
          T sum = 0;
          for (std::int64_t i = h; i < rows; i += heads) sum += worker.totals[i * width + lane] - worker.base[i];
          mine[h] = sum;
        }
      }
    }
  };
  in_team(team, tasks, [&](std::size_t thread, std::int64_t task) { run((*workers)[thread], task); });
}

// Rows of x [B, T, D] and delta [S, B, T, D], D innermost and contiguous.
template <class T>
struct Moved {
  const T *x, *delta;
  std::int64_t x_stride_b, x_stride_t, delta_stride_s, delta_stride_b, delta_stride_t;
  std::int64_t batch, tokens, senders, width;
};

// out [B, T, S]: 1/σ of x + delta.
template <class T>
void moved_rstd(Isa isa, const Moved<T>& op, double eps, bool centred, int threads, T* out) {
  const std::int64_t rows = op.batch * op.tokens;
  const int team = static_cast<int>(std::clamp<std::int64_t>(threads, 1, std::max<std::int64_t>(rows, 1)));
  const auto rstd = changes_kernels<T>(isa).rstd_of_sum;
  in_team(team, rows, [&](std::size_t, std::int64_t row) {
    const std::int64_t b = row / op.tokens, t = row % op.tokens;
    const T *x = op.x + b * op.x_stride_b + t * op.x_stride_t, *delta = op.delta + b * op.delta_stride_b + t * op.delta_stride_t;
    for (std::int64_t s = 0; s < op.senders; ++s) {
      out[row * op.senders + s] = rstd(x, delta + s * op.delta_stride_s, op.width, static_cast<T>(eps), centred);
    }
  });
}

}  // namespace eapcore
