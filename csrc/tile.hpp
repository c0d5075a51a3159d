// The inner loop of the contraction: dot products of up to 4 senders with up to `max_n` receivers, all at once.
//
// Both sides lie with the inner dimension contiguous, so a tile multiplies vectors along it, element by element, and adds
// up the lanes only at the end of a block. No side has to be transposed. With 4 x 6 vector accumulators a step costs 10
// loads for 24 multiply-adds, so that the multipliers and not the loads limit it.
//
// A panel is a group of `n` rows packed as [step][row][lane]: one stream of memory, whatever the strides of the source.
#pragma once

#include <algorithm>
#include <type_traits>

#include "isa.hpp"

namespace eapcore {

constexpr int kMaxM = 4;  // senders in a tile
constexpr int kMaxN = 6;  // receivers in a tile, at most; each instruction set has its own max_n

// One side of a tile: row m's step i begins at rows[m] + i * stride, stride counted in elements.
template <class P>
struct Rows {
  const P* rows[kMaxM];
  std::int64_t stride;
};

// sums[n * kMaxM + m] += Σ a[m] · b[n] over `steps` steps; one cache line at `prefetch` is fetched for each step.
template <class P>
using TileFn = void (*)(const Rows<P>& a, const P* b, std::int64_t steps, double* sums, const char* prefetch);

// One row of a panel: widened, padded with zeros up to a whole step, written with `stride` elements between steps.
template <class P, class Source>
using PackFn = void (*)(const Source* source, std::int64_t count, P* target, std::int64_t stride);

// What an instruction set offers for panels of P.
template <class P>
struct Tiles {
  Isa isa;
  int width;  // elements of P in one step of one row
  int max_n;
  TileFn<P> tile[kMaxM][kMaxN];
};

// The other form of a tile, an outer product: one side's rows lie turned round, a *word* (32 bits: a float or two bf16) of up
// to kLanes rows in a vector's lanes, and up to kMaxOuterRows rows of the other side are broadcast a word at a time. No lanes
// are added up, so that a block may be long, and one load serves a whole row of a tile; what it costs is the turning round.
constexpr int kMaxOuterRows = 12;  // accumulators: enough to hide the multiply-adds' latency, few enough for 16 registers
constexpr std::int64_t kOuterChunk = 4;  // steps that are added up by themselves: sums of many terms lose few bits so
constexpr int kAhead = 4;          // rows that a call fetches for later calls, each one cache line a step

// sums[n * lanes + m] += Σ rows[n] · columns[m] over `steps` steps of `lanes` words; ahead: kAhead addresses.
// rows: [step][row][lane]; columns: [word][lane], 0 in lanes without a row.
template <class P>
using OuterFn = void (*)(const P* rows, const P* columns, std::int64_t steps, double* sums, const char* const* ahead);

template <class P>
struct OuterTiles {
  Isa isa;
  int lanes;
  int width;  // elements of P in one step of one row
  OuterFn<P> tile[kMaxOuterRows];
  // target[word][lane] = rows[lane][word] for `steps` steps of `lanes` words.
  void (*turn)(const P* const* rows, std::int64_t steps, P* target);
};

// Makes rows of a product z · w, with the normalisation's derivative applied where `x_hat` is given:
//   out[row, d] = scale[row] · Σ_k z[row, k] · w[k, d] + shift[row] + slope[row] · x_hat[row, d]
// for the `2 * width` columns d of one slice. out: column vector v of a row lies at out + row * row_stride + v * vec_stride.
struct MakeArgs {
  const float* z;
  std::int64_t z_stride;
  const float* w;  // [depth][2 * width]
  std::int64_t depth;
  const float* x_hat;
  std::int64_t x_stride;
  const float *scale, *shift, *slope;
  float* out;
  std::int64_t row_stride, vec_stride;
};
using MakeFn = void (*)(const MakeArgs& args);

// The two dot products of the closed form, Σ g · w_gamma and Σ g · (act − offset), over `steps` steps.
using DotsFn = void (*)(const float* g, const float* act, const float* w_gamma, const float* offset, std::int64_t steps,
                        float* with_gamma, float* with_act);

constexpr int kMaxMakeRows = 12;
constexpr int kMakeVectors = 2;

struct Maker {
  int width;
  int max_rows;  // 2 vectors of accumulators for each; the rest of the registers hold a slice of w
  MakeFn make[kMaxMakeRows];
  // target[k][d] = gamma[d] · source[d * stride_d + k] for depth k and `columns` d, zeros up to 2 * width columns.
  void (*transpose)(const float* source, std::int64_t stride_d, std::int64_t depth, std::int64_t columns, const float* gamma,
                    float* target);
  DotsFn dots;
  int slice() const { return kMakeVectors * width; }
};

// Bytes of P a row's block may have. A tile's 4 + 6 rows then fit into a 32 KB first-level cache with room to spare, and
// the sum over lanes at a block's end (about 50 cycles) stays near 5 % of the block's 24 multiply-adds a step.
constexpr std::int64_t kBlockBytes = 2560;

// The same where all receivers fit into one tile: senders are read once, straight from memory, whose prefetchers want
// long runs; the receivers' few rows may take the second-level cache.
constexpr std::int64_t kStreamBytes = 16384;

#define EAPCORE_TARGET
namespace portable {
constexpr std::int64_t transpose_block = 4;
// target[k][d] = rows[d][k] for 4 x 4 elements.
static EAPCORE_INLINE void transpose_square(const float* const* rows, float* target, std::int64_t target_stride) {
  for (std::int64_t k = 0; k < 4; ++k) {
    for (std::int64_t d = 0; d < 4; ++d) target[k * target_stride + d] = rows[d][k];
  }
}
#if defined(__GNUC__)
constexpr std::int64_t vector_bytes = 16;
// 16-byte vectors: SSE2 on x86-64, NEON on AArch64.
template <class T>
struct Vec {
  typedef T type __attribute__((vector_size(16)));
  using Element = T;
  static constexpr int width = 16 / sizeof(T);
#if defined(__aarch64__)
  static constexpr int max_n = 4;  // 32 registers
#else
  static constexpr int max_n = 2;  // 16 registers
#endif
  static EAPCORE_INLINE type zero() { return type{}; }
  static EAPCORE_INLINE type load(const T* p) {
    type v;
    std::memcpy(&v, p, sizeof v);
    return v;
  }
  static EAPCORE_INLINE type fma(type a, type b, type c) { return a * b + c; }
  static EAPCORE_INLINE type plus(type a, type b) { return a + b; }
  static EAPCORE_INLINE type broadcast(T x) { return zero() + x; }
  static EAPCORE_INLINE void store(T* p, type v) { std::memcpy(p, &v, sizeof v); }
  static EAPCORE_INLINE type word(const T* p) { return broadcast(*p); }
  static EAPCORE_INLINE void add_lanes(const type* v, double* sums) {
    for (int m = 0; m < kMaxM; ++m) {
      double sum = 0;
      for (int i = 0; i < width; ++i) sum += static_cast<double>(v[m][i]);
      sums[m] += sum;
    }
  }
  static EAPCORE_INLINE void add(type v, double* sums) {
    for (int i = 0; i < width; ++i) sums[i] += static_cast<double>(v[i]);
  }
};
#else
constexpr std::int64_t vector_bytes = 8;
template <class T>
struct Vec {
  static constexpr int width = 8 / sizeof(T);
  struct type {
    T lane[width];
  };
  using Element = T;
  static constexpr int max_n = 2;
  static EAPCORE_INLINE type zero() { return type{}; }
  static EAPCORE_INLINE type load(const T* p) {
    type v;
    std::memcpy(&v, p, sizeof v);
    return v;
  }
  static EAPCORE_INLINE type fma(type a, type b, type c) {
    for (int i = 0; i < width; ++i) c.lane[i] += a.lane[i] * b.lane[i];
    return c;
  }
  static EAPCORE_INLINE type plus(type a, type b) {
    for (int i = 0; i < width; ++i) a.lane[i] += b.lane[i];
    return a;
  }
  static EAPCORE_INLINE type broadcast(T x) {
    type v;
    for (int i = 0; i < width; ++i) v.lane[i] = x;
    return v;
  }
  static EAPCORE_INLINE void store(T* p, type v) { std::memcpy(p, &v, sizeof v); }
  static EAPCORE_INLINE type word(const T* p) { return broadcast(*p); }
  static EAPCORE_INLINE void add_lanes(const type* v, double* sums) {
    for (int m = 0; m < kMaxM; ++m) {
      for (int i = 0; i < width; ++i) sums[m] += static_cast<double>(v[m].lane[i]);
    }
  }
  static EAPCORE_INLINE void add(type v, double* sums) {
    for (int i = 0; i < width; ++i) sums[i] += static_cast<double>(v.lane[i]);
  }
};
#endif
#include "isa_kernels.inl"
}  // namespace portable
#undef EAPCORE_TARGET

#if EAPCORE_X86
#define EAPCORE_TARGET __attribute__((target("avx2,fma")))
namespace avx2 {
constexpr std::int64_t vector_bytes = 32;
constexpr std::int64_t transpose_block = 8;
// target[k][d] = rows[d][k] for 8 x 8 elements.
EAPCORE_TARGET static EAPCORE_INLINE void transpose_square(const float* const* rows, float* target, std::int64_t target_stride) {
  __m256 row[8], pair[8];
  EAPCORE_UNROLL
  for (int i = 0; i < 8; ++i) row[i] = _mm256_loadu_ps(rows[i]);
  EAPCORE_UNROLL
  for (int i = 0; i < 8; i += 2) {
    pair[i] = _mm256_unpacklo_ps(row[i], row[i + 1]);
    pair[i + 1] = _mm256_unpackhi_ps(row[i], row[i + 1]);
  }
  EAPCORE_UNROLL
  for (int i = 0; i < 8; i += 4) {  // row[i + j]: column j of both 4-column halves, rows i to i + 3
    row[i] = _mm256_shuffle_ps(pair[i], pair[i + 2], 0x44);
    row[i + 1] = _mm256_shuffle_ps(pair[i], pair[i + 2], 0xee);
    row[i + 2] = _mm256_shuffle_ps(pair[i + 1], pair[i + 3], 0x44);
    row[i + 3] = _mm256_shuffle_ps(pair[i + 1], pair[i + 3], 0xee);
  }
  EAPCORE_UNROLL
  for (int i = 0; i < 4; ++i) {
    _mm256_storeu_ps(target + i * target_stride, _mm256_permute2f128_ps(row[i], row[i + 4], 0x20));
    _mm256_storeu_ps(target + (i + 4) * target_stride, _mm256_permute2f128_ps(row[i], row[i + 4], 0x31));
  }
}
struct VecF {
  using type = __m256;
  using Element = float;
  static constexpr int width = 8;
  static constexpr int max_n = 3;
  EAPCORE_TARGET static EAPCORE_INLINE type zero() { return _mm256_setzero_ps(); }
  EAPCORE_TARGET static EAPCORE_INLINE type load(const float* p) { return _mm256_loadu_ps(p); }
  EAPCORE_TARGET static EAPCORE_INLINE type fma(type a, type b, type c) { return _mm256_fmadd_ps(a, b, c); }
  EAPCORE_TARGET static EAPCORE_INLINE type broadcast(float x) { return _mm256_set1_ps(x); }
  EAPCORE_TARGET static EAPCORE_INLINE void store(float* p, type v) { _mm256_storeu_ps(p, v); }
  EAPCORE_TARGET static EAPCORE_INLINE void add_lanes(const type* v, double* sums) {
    const __m256 pairs = _mm256_hadd_ps(_mm256_hadd_ps(v[0], v[1]), _mm256_hadd_ps(v[2], v[3]));
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(pairs), _mm256_extractf128_ps(pairs, 1));
    _mm256_storeu_pd(sums, _mm256_add_pd(_mm256_loadu_pd(sums), _mm256_cvtps_pd(four)));
  }
  EAPCORE_TARGET static EAPCORE_INLINE type word(const float* p) { return broadcast(*p); }
  EAPCORE_TARGET static EAPCORE_INLINE type plus(type a, type b) { return _mm256_add_ps(a, b); }
  EAPCORE_TARGET static EAPCORE_INLINE void add(type v, double* sums) {
    const __m256d low = _mm256_cvtps_pd(_mm256_castps256_ps128(v)), high = _mm256_cvtps_pd(_mm256_extractf128_ps(v, 1));
    _mm256_storeu_pd(sums, _mm256_add_pd(_mm256_loadu_pd(sums), low));
    _mm256_storeu_pd(sums + 4, _mm256_add_pd(_mm256_loadu_pd(sums + 4), high));
  }
};
struct VecD {
  using type = __m256d;
  using Element = double;
  static constexpr int width = 4;
  static constexpr int max_n = 3;
  EAPCORE_TARGET static EAPCORE_INLINE type zero() { return _mm256_setzero_pd(); }
  EAPCORE_TARGET static EAPCORE_INLINE type load(const double* p) { return _mm256_loadu_pd(p); }
  EAPCORE_TARGET static EAPCORE_INLINE type fma(type a, type b, type c) { return _mm256_fmadd_pd(a, b, c); }
  EAPCORE_TARGET static EAPCORE_INLINE void add_lanes(const type* v, double* sums) {
    const __m256d low = _mm256_hadd_pd(v[0], v[1]), high = _mm256_hadd_pd(v[2], v[3]);
    const __m256d four =
        _mm256_add_pd(_mm256_permute2f128_pd(low, high, 0x20), _mm256_permute2f128_pd(low, high, 0x31));
    _mm256_storeu_pd(sums, _mm256_add_pd(_mm256_loadu_pd(sums), four));
  }
};
#include "isa_kernels.inl"
}  // namespace avx2
#undef EAPCORE_TARGET

#define EAPCORE_TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma")))
namespace avx512 {
constexpr std::int64_t vector_bytes = 64;
using avx2::transpose_block;
using avx2::transpose_square;
// The shuffles are written with a zeroing mask of ones, which compiles to the plain instruction: gcc's plain intrinsics
// start from an "undefined" register and warn about it (gcc bug 105593).
// The sums over the 16 lanes of each of four vectors.
EAPCORE_TARGET static EAPCORE_INLINE __m128 lane_sums(const __m512* v) {
  const __m512 ab = _mm512_add_ps(_mm512_maskz_unpacklo_ps(0xffff, v[0], v[1]), _mm512_maskz_unpackhi_ps(0xffff, v[0], v[1]));
  const __m512 cd = _mm512_add_ps(_mm512_maskz_unpacklo_ps(0xffff, v[2], v[3]), _mm512_maskz_unpackhi_ps(0xffff, v[2], v[3]));
  const __m512 abcd = _mm512_add_ps(_mm512_castpd_ps(_mm512_maskz_unpacklo_pd(0xff, _mm512_castps_pd(ab), _mm512_castps_pd(cd))),
                                    _mm512_castpd_ps(_mm512_maskz_unpackhi_pd(0xff, _mm512_castps_pd(ab), _mm512_castps_pd(cd))));
  const __m256 two = _mm256_add_ps(_mm512_maskz_extractf32x8_ps(0xff, abcd, 0), _mm512_maskz_extractf32x8_ps(0xff, abcd, 1));
  return _mm_add_ps(_mm256_castps256_ps128(two), _mm256_extractf128_ps(two, 1));
}
// sums[i] += v[i] for 16 lanes.
EAPCORE_TARGET static EAPCORE_INLINE void add_vector(__m512 v, double* sums) {
  const __m512d low = _mm512_maskz_cvtps_pd(0xff, _mm512_maskz_extractf32x8_ps(0xff, v, 0));
  const __m512d high = _mm512_maskz_cvtps_pd(0xff, _mm512_maskz_extractf32x8_ps(0xff, v, 1));
  _mm512_storeu_pd(sums, _mm512_add_pd(_mm512_loadu_pd(sums), low));
  _mm512_storeu_pd(sums + 8, _mm512_add_pd(_mm512_loadu_pd(sums + 8), high));
}
struct VecF {
  using type = __m512;
  using Element = float;
  static constexpr int width = 16;
  static constexpr int max_n = 6;
  EAPCORE_TARGET static EAPCORE_INLINE type zero() { return _mm512_setzero_ps(); }
  EAPCORE_TARGET static EAPCORE_INLINE type load(const float* p) { return _mm512_loadu_ps(p); }
  EAPCORE_TARGET static EAPCORE_INLINE type fma(type a, type b, type c) { return _mm512_fmadd_ps(a, b, c); }
  EAPCORE_TARGET static EAPCORE_INLINE type broadcast(float x) { return _mm512_set1_ps(x); }
  EAPCORE_TARGET static EAPCORE_INLINE void store(float* p, type v) { _mm512_storeu_ps(p, v); }
  EAPCORE_TARGET static EAPCORE_INLINE void add_lanes(const type* v, double* sums) {
    _mm256_storeu_pd(sums, _mm256_add_pd(_mm256_loadu_pd(sums), _mm256_cvtps_pd(lane_sums(v))));
  }
  EAPCORE_TARGET static EAPCORE_INLINE type word(const float* p) { return broadcast(*p); }
  EAPCORE_TARGET static EAPCORE_INLINE type plus(type a, type b) { return _mm512_add_ps(a, b); }
  EAPCORE_TARGET static EAPCORE_INLINE void add(type v, double* sums) { add_vector(v, sums); }
};
struct VecD {
  using type = __m512d;
  using Element = double;
  static constexpr int width = 8;
  static constexpr int max_n = 6;
  EAPCORE_TARGET static EAPCORE_INLINE type zero() { return _mm512_setzero_pd(); }
  EAPCORE_TARGET static EAPCORE_INLINE type load(const double* p) { return _mm512_loadu_pd(p); }
  EAPCORE_TARGET static EAPCORE_INLINE type fma(type a, type b, type c) { return _mm512_fmadd_pd(a, b, c); }
  EAPCORE_TARGET static EAPCORE_INLINE void add_lanes(const type* v, double* sums) {
    const __m512d ab = _mm512_add_pd(_mm512_maskz_unpacklo_pd(0xff, v[0], v[1]), _mm512_maskz_unpackhi_pd(0xff, v[0], v[1]));
    const __m512d cd = _mm512_add_pd(_mm512_maskz_unpacklo_pd(0xff, v[2], v[3]), _mm512_maskz_unpackhi_pd(0xff, v[2], v[3]));
    const __m256d low = _mm256_add_pd(_mm512_maskz_extractf64x4_pd(0xf, ab, 0), _mm512_maskz_extractf64x4_pd(0xf, ab, 1));
    const __m256d high = _mm256_add_pd(_mm512_maskz_extractf64x4_pd(0xf, cd, 0), _mm512_maskz_extractf64x4_pd(0xf, cd, 1));
    const __m256d four =
        _mm256_add_pd(_mm256_permute2f128_pd(low, high, 0x20), _mm256_permute2f128_pd(low, high, 0x31));
    _mm256_storeu_pd(sums, _mm256_add_pd(_mm256_loadu_pd(sums), four));
  }
};
#include "isa_kernels.inl"
}  // namespace avx512
#undef EAPCORE_TARGET

#define EAPCORE_TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma")))
namespace avx512bf16 {
constexpr std::int64_t vector_bytes = 64;
using avx2::transpose_block;
using avx2::transpose_square;
// vdpbf16ps: two products a lane, added in float32. It treats subnormal inputs (below 1.2e-38) as zero.
struct VecB {
  using type = __m512;
  using Element = bf16;
  static constexpr int width = 32;
  static constexpr int max_n = 6;
  EAPCORE_TARGET static EAPCORE_INLINE type zero() { return _mm512_setzero_ps(); }
  EAPCORE_TARGET static EAPCORE_INLINE __m512i load(const bf16* p) { return _mm512_loadu_si512(p); }
  EAPCORE_TARGET static EAPCORE_INLINE type fma(__m512i a, __m512i b, type c) {
    return _mm512_dpbf16_ps(c, (__m512bh)a, (__m512bh)b);
  }
  EAPCORE_TARGET static EAPCORE_INLINE void add_lanes(const type* v, double* sums) {
    _mm256_storeu_pd(sums, _mm256_add_pd(_mm256_loadu_pd(sums), _mm256_cvtps_pd(avx512::lane_sums(v))));
  }
  EAPCORE_TARGET static EAPCORE_INLINE __m512i word(const bf16* p) {
    int pair;
    std::memcpy(&pair, p, sizeof pair);
    return _mm512_set1_epi32(pair);
  }
  EAPCORE_TARGET static EAPCORE_INLINE type plus(type a, type b) { return _mm512_add_ps(a, b); }
  EAPCORE_TARGET static EAPCORE_INLINE void add(type v, double* sums) { avx512::add_vector(v, sums); }
};
#include "isa_kernels.inl"
}  // namespace avx512bf16
#undef EAPCORE_TARGET
#endif

inline Maker maker(Isa isa) {
#if EAPCORE_X86
  if (isa >= Isa::avx512) return avx512::make_maker<avx512::VecF, 12>();
  if (isa == Isa::avx2) return avx2::make_maker<avx2::VecF, 6>();
#endif
  static_cast<void>(isa);
  return portable::make_maker<portable::Vec<float>, 4>();
}

// The tiles for panels of P that `isa` runs, and the function that packs rows of Source into them.
template <class P>
Tiles<P> tiles(Isa isa);

template <>
inline Tiles<float> tiles<float>(Isa isa) {
#if EAPCORE_X86
  if (isa >= Isa::avx512) return avx512::make_tiles<avx512::VecF>(Isa::avx512);
  if (isa == Isa::avx2) return avx2::make_tiles<avx2::VecF>(Isa::avx2);
#endif
  static_cast<void>(isa);
  return portable::make_tiles<portable::Vec<float>>(Isa::portable);
}

template <>
inline Tiles<double> tiles<double>(Isa isa) {
#if EAPCORE_X86
  if (isa >= Isa::avx512) return avx512::make_tiles<avx512::VecD>(Isa::avx512);
  if (isa == Isa::avx2) return avx2::make_tiles<avx2::VecD>(Isa::avx2);
#endif
  static_cast<void>(isa);
  return portable::make_tiles<portable::Vec<double>>(Isa::portable);
}

#if EAPCORE_X86
template <>
inline Tiles<bf16> tiles<bf16>(Isa) {
  return avx512bf16::make_tiles<avx512bf16::VecB>(Isa::avx512bf16);
}
#endif

// The outer-product tiles for panels of P: float, or bf16 where tiles<bf16>() is run.
template <class P>
OuterTiles<P> outer_tiles(Isa isa);

template <>
inline OuterTiles<float> outer_tiles<float>(Isa isa) {
#if EAPCORE_X86
  if (isa >= Isa::avx512) return avx512::make_outer_tiles<avx512::VecF>(Isa::avx512);
  if (isa == Isa::avx2) return avx2::make_outer_tiles<avx2::VecF>(Isa::avx2);
#endif
  static_cast<void>(isa);
  return portable::make_outer_tiles<portable::Vec<float>>(Isa::portable);
}

#if EAPCORE_X86
template <>
inline OuterTiles<bf16> outer_tiles<bf16>(Isa) {
  return avx512bf16::make_outer_tiles<avx512bf16::VecB>(Isa::avx512bf16);
}
#endif

template <class P, class Source>
PackFn<P, Source> packer(Isa isa) {
#if EAPCORE_X86
  if (isa >= Isa::avx512) return avx512::pack_row<P, Source>;
  if (isa == Isa::avx2) return avx2::pack_row<P, Source>;
#endif
  static_cast<void>(isa);
  return portable::pack_row<P, Source>;
}

}  // namespace eapcore
