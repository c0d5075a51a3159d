// Included once for each instruction set, as isa_kernels.inl is. A lane is a sender.

// scores[(n - begin) * H + h][lane]: what position t of each lane's sender scores with the others from begin to end.
template <class T>
EAPCORE_TARGET void lane_scores(const Changes<T>& op, const Lanes& lanes, std::int64_t t, Span others, T* scores) {
  constexpr int width = kLanes<T>;
  const std::int64_t count = others.size() * op.heads, at = (t * op.others + others.begin) * op.heads;
  const T *known = op.known + at, *normed = op.normed + at;
  if (lanes.count == 0) {  // a sender that changes nothing
    for (std::int64_t i = 0; i < count; ++i) {
      for (int lane = 0; lane < width; ++lane) scores[i * width + lane] = known[i];
    }
    return;
  }
  T rstd[width], moved[width];
  for (int lane = 0; lane < width; ++lane) {
    const std::int64_t sender = lanes.first + std::min<std::int64_t>(lane, lanes.count - 1);
    const T* raw = op.raw + t * op.stride_t + sender * op.stride_s + others.begin * op.heads;
    for (std::int64_t i = 0; i < count; ++i) scores[i * width + lane] = raw[i];
    rstd[lane] = op.rstd == nullptr ? T{1} : op.rstd[t * op.senders + sender];
    moved[lane] = op.rstd == nullptr ? T{0} : op.moved[t * op.senders + sender];
  }
  for (std::int64_t i = 0; i < count; ++i) {
    T* score = scores + i * width;
    const T here = known[i], part = normed[i];
    for (int lane = 0; lane < width; ++lane) score[lane] = here + (score[lane] * rstd[lane] + moved[lane] * part);
  }
}

// means[t][h][lane]: the mean of values over the pattern of query t, whose keys are the others.
template <class T>
EAPCORE_TARGET void query_means(const Changes<T>& op, const Lanes& lanes, const Span* seen, T* scores, T* means) {
  constexpr int width = kLanes<T>;
  const std::int64_t heads = op.heads;
  for (std::int64_t t = 0; t < op.tokens; ++t) {
    lane_scores(op, lanes, t, seen[t], scores);
    const T* values = op.values + (t * op.others + seen[t].begin) * heads;
    for (std::int64_t h = 0; h < heads; ++h) {
      T most[width], sum[width], total[width];
      for (int lane = 0; lane < width; ++lane) {
        most[lane] = -std::numeric_limits<T>::infinity();
        sum[lane] = total[lane] = 0;
      }
      for (std::int64_t n = 0; n < seen[t].size(); ++n) {
        const T* score = scores + (n * heads + h) * width;
        for (int lane = 0; lane < width; ++lane) most[lane] = score[lane] > most[lane] ? score[lane] : most[lane];
      }
      for (std::int64_t n = 0; n < seen[t].size(); ++n) {
        const T* score = scores + (n * heads + h) * width;
        const T value = values[n * heads + h];
        for (int lane = 0; lane < width; ++lane) {
          const T weight = exponential(score[lane] - most[lane]);
          sum[lane] += weight;
          total[lane] += weight * value;
        }
      }
      for (int lane = 0; lane < width; ++lane) means[(t * heads + h) * width + lane] = total[lane] / sum[lane];
    }
  }
}

// most, sums, totals [n][h][lane]: of query n, one of the others, the largest score, the sum of exp(score − largest), and
// that with values, over the positions t and the keys before.
template <class T>
EAPCORE_TARGET void key_sums(const Changes<T>& op, const Lanes& lanes, const Span* seen, T* scores, T* most, T* sums,
                             T* totals) {
  constexpr int width = kLanes<T>;
  const std::int64_t all = op.others * op.heads;
  for (std::int64_t i = 0; i < all; ++i) {
    const T earlier = op.earlier == nullptr ? -std::numeric_limits<T>::infinity() : op.earlier[i];
    for (int lane = 0; lane < width; ++lane) most[i * width + lane] = earlier;
  }
  for (std::int64_t t = 0; t < op.tokens; ++t) {
    lane_scores(op, lanes, t, seen[t], scores);
    T* largest = most + seen[t].begin * op.heads * width;
    for (std::int64_t i = 0; i < seen[t].size() * op.heads * width; ++i) {
      largest[i] = scores[i] > largest[i] ? scores[i] : largest[i];
    }
  }
  for (std::int64_t i = 0; i < all; ++i) {
    for (int lane = 0; lane < width; ++lane) {
      const std::int64_t at = i * width + lane;
      sums[at] = op.earlier == nullptr ? T{0} : exponential(op.earlier[i] - most[at]);
      totals[at] = op.earlier == nullptr ? T{0} : sums[at] * op.mean[i];
    }
  }
  for (std::int64_t t = 0; t < op.tokens; ++t) {
    lane_scores(op, lanes, t, seen[t], scores);
    const std::int64_t first = seen[t].begin * op.heads;
    const T* values = op.values + t * all + first;
    for (std::int64_t i = 0; i < seen[t].size() * op.heads; ++i) {
      const T* score = scores + i * width;
      const std::int64_t at = (first + i) * width;
      const T value = values[i];
      for (int lane = 0; lane < width; ++lane) {
        const T weight = exponential(score[lane] - most[at + lane]);
        sums[at + lane] += weight;
        totals[at + lane] += weight * value;
      }
    }
  }
}

// 1/σ of x + delta, σ² the mean of their squares, less that of their mean where it is centred, and eps.
template <class T>
EAPCORE_TARGET T rstd_of_sum(const T* x, const T* delta, std::int64_t size, T eps, bool centred) {
  constexpr int width = 2 * kLanes<T>;
  T mean = 0, lanes[width];
  for (int pass = centred ? 0 : 1; pass < 2; ++pass) {
    std::fill(lanes, lanes + width, T{0});
    std::int64_t i = 0;
    for (; i + width <= size; i += width) {
      for (int lane = 0; lane < width; ++lane) {
        const T y = x[i + lane] + delta[i + lane] - mean;
        lanes[lane] += pass == 0 ? y : y * y;
      }
    }
    for (int lane = 0; i < size; ++i, ++lane) {
      const T y = x[i] + delta[i] - mean;
      lanes[lane] += pass == 0 ? y : y * y;
    }
    for (int half = width / 2; half > 0; half /= 2) {
      for (int lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
    }
    if (pass == 0) mean = lanes[0] / static_cast<T>(size);
  }
  return 1 / std::sqrt(lanes[0] / static_cast<T>(size) + eps);
}

template <class T>
ChangesKernels<T> changes_kernels() {
  return {query_means<T>, key_sums<T>, rstd_of_sum<T>};
}
