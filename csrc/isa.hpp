// Element types, aligned scratch memory, and the instruction sets between which the ops choose at run time.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <new>
#include <vector>

#if defined(__x86_64__) && defined(__GNUC__)
#define EAPCORE_X86 1
#include <immintrin.h>
#else
#define EAPCORE_X86 0
#endif

#if defined(__clang__)
#define EAPCORE_UNROLL _Pragma("unroll")
#elif defined(__GNUC__)
#define EAPCORE_UNROLL _Pragma("GCC unroll 32")
#else
#define EAPCORE_UNROLL
#endif

#if defined(__GNUC__)
#define EAPCORE_INLINE inline __attribute__((always_inline))
#define EAPCORE_PREFETCH(address) __builtin_prefetch(address, 0, 2)
#define EAPCORE_PREFETCH_ONCE(address) __builtin_prefetch(address, 0, 0)  // for what is read once
#define EAPCORE_PREFETCH_SUM(address) __builtin_prefetch(address, 1, 3)
#else
#define EAPCORE_INLINE inline
#define EAPCORE_PREFETCH(address) static_cast<void>(address)
#define EAPCORE_PREFETCH_ONCE(address) static_cast<void>(address)
#define EAPCORE_PREFETCH_SUM(address) static_cast<void>(address)
#endif

namespace eapcore {

struct bf16 {
  std::uint16_t bits;
};
struct half {
  std::uint16_t bits;
};

template <class To, class From>
EAPCORE_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

EAPCORE_INLINE double widen(double x) { return x; }
EAPCORE_INLINE float widen(float x) { return x; }
EAPCORE_INLINE float widen(bf16 x) { return bit_cast<float>(static_cast<std::uint32_t>(x.bits) << 16); }
EAPCORE_INLINE float widen(half x) {
  // The exponent's bias goes from 15 to 127 by a multiplication with 2^112, which is exact and right for subnormals too.
  // Infinity and NaN have the exponent 31, which must become 255 instead. No branch, so that loops over it vectorise.
  const std::uint32_t magnitude = x.bits & 0x7fffu;
  const std::uint32_t scaled = bit_cast<std::uint32_t>(bit_cast<float>(magnitude << 13) * 0x1p112f);
  const std::uint32_t special = magnitude >= 0x7c00u ? 0x7f800000u : 0u;
  return bit_cast<float>(scaled | special | (static_cast<std::uint32_t>(x.bits & 0x8000u) << 16));
}

EAPCORE_INLINE void narrow(float x, float& to) { to = x; }
EAPCORE_INLINE void narrow(float x, bf16& to) {  // round to nearest, ties to even; NaN stays NaN
  const std::uint32_t bits = bit_cast<std::uint32_t>(x);
  const std::uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
  to.bits = static_cast<std::uint16_t>(nan ? (bits >> 16) | 0x40u : rounded);
}

// Scratch memory on cache-line boundaries, not initialised.
template <class T>
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(std::int64_t count) { reserve(count); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  Buffer(Buffer&& other) noexcept : data_(other.data_), count_(other.count_) {
    other.data_ = nullptr;
    other.count_ = 0;
  }
  Buffer& operator=(Buffer&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(count_, other.count_);
    return *this;
  }
  ~Buffer() { release(); }

  void reserve(std::int64_t count) {  // what it held is lost when it grows
    if (count <= count_) return;
    release();
    data_ = static_cast<T*>(::operator new(static_cast<std::size_t>(count) * sizeof(T), std::align_val_t{64}));
    count_ = count;
  }
  T* data() { return data_; }

 private:
  void release() {
    if (data_ != nullptr) ::operator delete(data_, std::align_val_t{64});
    data_ = nullptr;
    count_ = 0;
  }
  T* data_ = nullptr;
  std::int64_t count_ = 0;
};

// In rising order: a machine that has one has all before it.
enum class Isa { portable, avx2, avx512, avx512bf16 };

inline const char* name(Isa isa) {
  switch (isa) {
    case Isa::avx512bf16: return "avx512bf16";
    case Isa::avx512: return "avx512";
    case Isa::avx2: return "avx2";
    default: return "portable";
  }
}

inline Isa best_isa() {
#if EAPCORE_X86
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (avx512 && __builtin_cpu_supports("avx512bf16")) return Isa::avx512bf16;
  if (avx512) return Isa::avx512;
  if (avx2) return Isa::avx2;
#endif
  return Isa::portable;
}

// The instruction sets that this machine has, best first.
inline std::vector<Isa> isas() {
  std::vector<Isa> all;
  for (int i = static_cast<int>(best_isa()); i >= 0; --i) all.push_back(static_cast<Isa>(i));
  return all;
}

}  // namespace eapcore
