// Element types, working memory, and the instruction sets between which the ops choose at run time.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <optional>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

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

// Where an op's working memory comes from: asked once in a call for so many bytes, it returns a block that begins on a cache
// line and lasts until the op returns, or null, at which the op returns at once: so its bytes are asked for.
using Allocate = std::function<void*(std::int64_t bytes)>;

#if defined(__SANITIZE_ADDRESS__)
constexpr std::int64_t kGuardBytes = 64;  // behind each part, where the sanitizer lets nobody read or write
#else
constexpr std::int64_t kGuardBytes = 0;
#endif

// One such block, handed out in parts on cache-line boundaries that are not initialised; without a block it counts them.
class Workspace {
 public:
  explicit Workspace(void* block = nullptr) : block_(static_cast<char*>(block)) {}

  template <class T>
  T* take(std::int64_t count) {
    const std::int64_t wanted = count * static_cast<std::int64_t>(sizeof(T)), taken = (wanted + 63) / 64 * 64 + kGuardBytes;
    char* part = block_ == nullptr ? nullptr : block_ + bytes_;
    bytes_ += taken;
#if defined(__SANITIZE_ADDRESS__)
    if (part != nullptr) {
      ASAN_UNPOISON_MEMORY_REGION(part, static_cast<std::size_t>(wanted));
      ASAN_POISON_MEMORY_REGION(part + wanted, static_cast<std::size_t>(taken - wanted));
    }
#endif
    return reinterpret_cast<T*>(part);
  }
  std::int64_t bytes() const { return bytes_; }

 private:
  char* block_;
  std::int64_t bytes_ = 0;
};

// What set_up(workspace) returns, which takes its parts from there: run once to count them, and once to have them. Nothing
// where there is no block.
template <class SetUp>
auto in_workspace(const Allocate& allocate, const SetUp& set_up) {
  Workspace counted;
  std::optional<decltype(set_up(counted))> made = set_up(counted);
  void* block = allocate(counted.bytes());
  if (block == nullptr) {
    made.reset();
  } else {
    Workspace workspace(block);
    made.emplace(set_up(workspace));
  }
  return made;
}

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
