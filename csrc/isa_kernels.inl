// Included once for each instruction set, inside its namespace and with EAPCORE_TARGET set to its function attribute: a
// template cannot take the attribute as a parameter, and intrinsics inline only into functions that carry it.

// The last step is filled up with zeros.
template <class P, class Source>
EAPCORE_TARGET void pack_row(const Source* source, std::int64_t count, P* target, std::int64_t stride) {
  constexpr std::int64_t width = vector_bytes / static_cast<std::int64_t>(sizeof(P));
  std::int64_t i = 0;
  for (; i + width <= count; i += width, target += stride) {
    if constexpr (std::is_same_v<P, Source>) {
      std::memcpy(target, source + i, sizeof(P) * width);
    } else {
      for (std::int64_t lane = 0; lane < width; ++lane) target[lane] = widen(source[i + lane]);
    }
  }
  if (i == count) return;
  for (std::int64_t lane = 0; lane < width; ++lane, ++i) {
    if constexpr (std::is_same_v<P, Source>) {
      target[lane] = i < count ? source[i] : P{};
    } else {
      target[lane] = i < count ? widen(source[i]) : P{};
    }
  }
}

template <class V, int M, int N>
EAPCORE_TARGET void tile(const Rows<typename V::Element>& a, const typename V::Element* b, std::int64_t steps, double* sums,
                         const char* prefetch) {
  typename V::type acc[N][kMaxM];
  EAPCORE_UNROLL
  for (int n = 0; n < N; ++n) {
    EAPCORE_UNROLL
    for (int m = 0; m < kMaxM; ++m) acc[n][m] = V::zero();
  }
  std::int64_t at = 0;
  for (std::int64_t step = 0; step < steps; ++step) {
    decltype(V::load(b)) row[M];
    EAPCORE_UNROLL
    for (int m = 0; m < M; ++m) row[m] = V::load(a.rows[m] + at);
    EAPCORE_UNROLL
    for (int n = 0; n < N; ++n) {
      const auto receiver = V::load(b + n * V::width);
      EAPCORE_UNROLL
      for (int m = 0; m < M; ++m) acc[n][m] = V::fma(row[m], receiver, acc[n][m]);
    }
    if constexpr (N <= 2) {
      // So little work for each load that the senders' own rows are fetched well ahead; past their end it does no harm.
      EAPCORE_UNROLL
      for (int m = 0; m < M; ++m) EAPCORE_PREFETCH(a.rows[m] + at + 32 * a.stride);
    } else {
      EAPCORE_PREFETCH(prefetch);
      prefetch += 64;
    }
    at += a.stride;
    b += N * V::width;
  }
  EAPCORE_UNROLL
  for (int n = 0; n < N; ++n) V::add_lanes(acc[n], sums + n * kMaxM);
}

template <class V, int M>
void fill_tiles(Tiles<typename V::Element>& table) {
  table.tile[M - 1][0] = tile<V, M, 1>;
  table.tile[M - 1][1] = tile<V, M, 2>;
  if constexpr (V::max_n > 2) table.tile[M - 1][2] = tile<V, M, 3>;
  if constexpr (V::max_n > 3) table.tile[M - 1][3] = tile<V, M, 4>;
  if constexpr (V::max_n > 4) {
    table.tile[M - 1][4] = tile<V, M, 5>;
    table.tile[M - 1][5] = tile<V, M, 6>;
  }
}

template <class V>
Tiles<typename V::Element> make_tiles(Isa isa) {
  Tiles<typename V::Element> table{isa, V::width, V::max_n, {}};
  fill_tiles<V, 1>(table);
  fill_tiles<V, 2>(table);
  fill_tiles<V, 3>(table);
  fill_tiles<V, 4>(table);
  return table;
}

template <class V, int N>
EAPCORE_TARGET void outer_tile(const typename V::Element* rows, const typename V::Element* columns, std::int64_t steps,
                               double* sums, const char* const* ahead) {
  constexpr int lanes = vector_bytes / 4, word = V::width / lanes;
  static_assert(lanes % kAhead == 0);
  typename V::type total[N];
  EAPCORE_UNROLL
  for (int n = 0; n < N; ++n) total[n] = V::zero();
  EAPCORE_UNROLL
  for (int i = 0; i < N * lanes; i += 8) EAPCORE_PREFETCH_SUM(sums + i);
  std::int64_t step = 0;
  while (step < steps) {
    typename V::type acc[N];
    EAPCORE_UNROLL
    for (int n = 0; n < N; ++n) acc[n] = V::zero();
    for (const std::int64_t end = step + std::min(steps - step, kOuterChunk); step < end; ++step) {
      for (int fetched = 0; fetched < kAhead; ++fetched) {
        EAPCORE_UNROLL
        for (int i = 0; i < lanes / kAhead; ++i) {
          const auto column = V::load(columns + i * V::width);
          EAPCORE_UNROLL
          for (int n = 0; n < N; ++n) acc[n] = V::fma(V::word(rows + n * V::width + i * word), column, acc[n]);
        }
        columns += lanes / kAhead * V::width;
        rows += lanes / kAhead * word;
        EAPCORE_PREFETCH_ONCE(ahead[fetched] + step * 64);
      }
      rows += (N - 1) * V::width;
    }
    EAPCORE_UNROLL
    for (int n = 0; n < N; ++n) total[n] = V::plus(total[n], acc[n]);
  }
  EAPCORE_UNROLL
  for (int n = 0; n < N; ++n) V::add(total[n], sums + n * lanes);
}

template <class V>
EAPCORE_TARGET void turn(const typename V::Element* const* rows, std::int64_t steps, typename V::Element* target) {
  constexpr int lanes = vector_bytes / 4, word = V::width / lanes;
  static_assert(lanes % transpose_block == 0);
  for (std::int64_t step = 0; step < steps; ++step, target += lanes * V::width) {
    for (int lane = 0; lane < lanes; lane += transpose_block) {
      for (int i = 0; i < lanes; i += transpose_block) {
        const float* square[transpose_block];
        for (int j = 0; j < transpose_block; ++j) {
          square[j] = reinterpret_cast<const float*>(rows[lane + j] + step * V::width + i * word);
        }
        transpose_square(square, reinterpret_cast<float*>(target) + i * lanes + lane, lanes);
      }
    }
  }
}

template <class V, int N = kMaxOuterRows>
void fill_outer_tiles(OuterTiles<typename V::Element>& table) {
  table.tile[N - 1] = outer_tile<V, N>;
  if constexpr (N > 1) fill_outer_tiles<V, N - 1>(table);
}

template <class V>
OuterTiles<typename V::Element> make_outer_tiles(Isa isa) {
  OuterTiles<typename V::Element> table{isa, vector_bytes / 4, V::width, {}, turn<V>};
  fill_outer_tiles<V>(table);
  return table;
}

template <class V, int R, bool Norm>
EAPCORE_TARGET void make_rows(const MakeArgs& args) {
  typename V::type acc[R][kMakeVectors];
  EAPCORE_UNROLL
  for (int r = 0; r < R; ++r) {
    EAPCORE_UNROLL
    for (int v = 0; v < kMakeVectors; ++v) acc[r][v] = V::zero();
  }
  const float* w = args.w;
  for (std::int64_t k = 0; k < args.depth; ++k) {
    typename V::type column[kMakeVectors];
    EAPCORE_UNROLL
    for (int v = 0; v < kMakeVectors; ++v) column[v] = V::load(w + v * V::width);
    EAPCORE_UNROLL
    for (int r = 0; r < R; ++r) {
      const auto z = V::broadcast(args.z[r * args.z_stride + k]);
      EAPCORE_UNROLL
      for (int v = 0; v < kMakeVectors; ++v) acc[r][v] = V::fma(z, column[v], acc[r][v]);
    }
    w += kMakeVectors * V::width;
  }
  EAPCORE_UNROLL
  for (int r = 0; r < R; ++r) {
    EAPCORE_UNROLL
    for (int v = 0; v < kMakeVectors; ++v) {
      typename V::type result = acc[r][v];
      if constexpr (Norm) {
        const auto x_hat = V::load(args.x_hat + r * args.x_stride + v * V::width);
        const auto correction = V::fma(V::broadcast(args.slope[r]), x_hat, V::broadcast(args.shift[r]));
        result = V::fma(V::broadcast(args.scale[r]), result, correction);
      }
      V::store(args.out + r * args.row_stride + v * args.vec_stride, result);
    }
  }
}

template <class V, int R>
void make_either(const MakeArgs& args) {
  args.x_hat == nullptr ? make_rows<V, R, false>(args) : make_rows<V, R, true>(args);
}

template <int Columns>
EAPCORE_TARGET void transpose_slice(const float* source, std::int64_t stride_d, std::int64_t depth, std::int64_t columns,
                                    const float* gamma, float* target) {
  if (columns == Columns && depth % transpose_block == 0) {
    for (std::int64_t k = 0; k < depth; k += transpose_block) {
      for (std::int64_t d = 0; d < Columns; d += transpose_block) {
        const float* rows[transpose_block];
        for (std::int64_t i = 0; i < transpose_block; ++i) rows[i] = source + (d + i) * stride_d + k;
        transpose_square(rows, target + k * Columns + d, Columns);
      }
    }
    for (std::int64_t k = 0; gamma != nullptr && k < depth; ++k) {
      for (int d = 0; d < Columns; ++d) target[k * Columns + d] *= gamma[d];
    }
    return;
  }
  for (std::int64_t k = 0; k < depth; ++k) {
    for (std::int64_t d = 0; d < Columns; ++d) {
      target[k * Columns + d] = d < columns ? source[d * stride_d + k] * (gamma == nullptr ? 1.0f : gamma[d]) : 0.0f;
    }
  }
}

template <class V>
EAPCORE_TARGET void dots(const float* g, const float* act, const float* w_gamma, const float* offset, std::int64_t steps,
                         float* with_gamma, float* with_act) {
  auto gamma_sum = V::zero(), act_sum = V::zero(), offset_sum = V::zero();
  for (std::int64_t i = 0; i < steps * V::width; i += V::width) {
    const auto row = V::load(g + i);
    gamma_sum = V::fma(row, V::load(w_gamma + i), gamma_sum);
    act_sum = V::fma(row, V::load(act + i), act_sum);
    offset_sum = V::fma(row, V::load(offset + i), offset_sum);
  }
  const typename V::type lanes[kMaxM] = {gamma_sum, act_sum, offset_sum, V::zero()};
  double sums[kMaxM] = {};
  V::add_lanes(lanes, sums);
  *with_gamma = static_cast<float>(sums[0]);
  *with_act = static_cast<float>(sums[1] - sums[2]);
}

template <class V, int Rows, int R = Rows>
void fill_maker(Maker& table) {
  table.make[R - 1] = make_either<V, R>;
  if constexpr (R > 1) fill_maker<V, Rows, R - 1>(table);
}

template <class V, int Rows>
Maker make_maker() {
  Maker table{V::width, Rows, {}, transpose_slice<kMakeVectors * V::width>, dots<V>};
  fill_maker<V, Rows>(table);
  return table;
}
