// The C++ ops against plain loops in double, for every instruction set of this machine: sizes 0 and 1, odd sizes, strides,
// misaligned pointers, token rows, masks, every reduce, 1 to 8 threads, the same bits twice. Every array has exactly the
// size it needs, so that the address sanitizer sees each step beyond it. Exits with 1 after the first failure's line.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>
#include <vector>

#include "../edge_scores.hpp"
#include "../factored.hpp"
#include "../receiver_grads.hpp"

namespace {

using namespace eapcore;

std::mt19937 generator(20231016);

double uniform() { return std::uniform_real_distribution<double>(-1.0, 1.0)(generator); }

void put(double x, double& to) { to = x; }
void put(double x, float& to) { to = static_cast<float>(x); }
void put(double x, bf16& to) { narrow(static_cast<float>(x), to); }
void put(double x, half& to) {  // only values that half holds exactly: multiples of 1/256 below 1
  const auto steps = static_cast<int>(std::lround(x * 256));
  int magnitude = std::abs(steps), exponent = 15;
  if (magnitude == 0) {
    to.bits = 0;
    return;
  }
  double value = magnitude / 256.0;
  while (value < 1.0) value *= 2, --exponent;
  while (value >= 2.0) value /= 2, ++exponent;
  to.bits = static_cast<std::uint16_t>((steps < 0 ? 0x8000 : 0) | (exponent << 10) | static_cast<int>((value - 1) * 1024));
}

// Memory that begins `skew` elements after an allocation's start and ends exactly at its end.
template <class T>
class Array {
 public:
  Array(std::int64_t count, std::int64_t skew) : memory_(static_cast<std::size_t>(count + skew)), skew_(skew) {
    for (T& x : memory_) put(uniform(), x);
  }
  T* data() { return memory_.data() + skew_; }
  const T* data() const { return memory_.data() + skew_; }
  double at(std::int64_t i) const { return static_cast<double>(widen(memory_[static_cast<std::size_t>(i + skew_)])); }

 private:
  std::vector<T> memory_;
  std::int64_t skew_;
};

int checks = 0;

void expect(bool good, const std::string& what) {
  ++checks;
  if (good) return;
  std::printf("FAILED: %s\n", what.c_str());
  std::exit(1);
}

template <class T>
double tolerance() {
  return std::is_same_v<T, double> ? 1e-13 : 2e-6;
}

// scores against expected values, relative to the size of what was added up.
template <class Out>
void expect_close(const std::vector<Out>& scores, const std::vector<double>& expected, const std::vector<double>& size,
                  double bound, const std::string& what) {
  for (std::size_t i = 0; i < expected.size(); ++i) {
    const double error = std::abs(static_cast<double>(scores[i]) - expected[i]);
    if (size[i] == 0) {
      expect(scores[i] == Out{0}, what + ": not exactly 0 at " + std::to_string(i));
    } else {
      expect(error <= bound * size[i], what + ": error " + std::to_string(error / size[i]) + " at " + std::to_string(i));
    }
  }
}

struct Shape {
  std::int64_t senders, receivers, batch, tokens, d_model;
};

template <class T>
void test_edge_scores(Isa isa, const char* type, const Shape& shape, std::int64_t skew, int padding, double edge_share = 0.4) {
  using Out = std::conditional_t<std::is_same_v<T, double>, double, float>;
  const auto [S, R, B, Tk, D] = shape;
  // Outer strides with gaps; the order of B and T in memory is swapped for the receivers.
  const std::int64_t row = D + padding;
  const std::int64_t each = std::max<std::int64_t>(B * Tk * row, 0) + padding;
  const auto extent = [&](std::int64_t n) { return n * B * Tk * D == 0 ? 0 : (n - 1) * each + (B * Tk - 1) * row + D; };
  const Array<T> delta(extent(S), skew), grads(extent(R), skew);
  const Tensor4<T> left{delta.data(), each, Tk * row, row}, right{grads.data(), each, row, B * row};
  std::vector<std::uint8_t> mask(static_cast<std::size_t>(S * R));
  for (auto& edge : mask) edge = uniform() < 2 * edge_share - 1;
  std::vector<std::int64_t> rows;
  for (std::int64_t i = 0; i < B * Tk; ++i) {
    if (uniform() < 0.3) rows.push_back(i);
  }
  std::shuffle(rows.begin(), rows.end(), generator);

  for (const Reduce reduce : {Reduce::all, Reduce::pair, Reduce::position}) {
    for (int variant = 0; variant < 4; ++variant) {
      const std::uint8_t* edges = variant % 2 == 1 ? mask.data() : nullptr;
      const bool some_rows = variant / 2 == 1;
      const auto groups = static_cast<std::size_t>(reduce == Reduce::all ? 1 : reduce == Reduce::pair ? B : Tk);
      std::vector<double> expected(groups * mask.size()), size(expected.size());
      for (std::int64_t b = 0; b < B; ++b) {
        for (std::int64_t t = 0; t < Tk; ++t) {
          if (some_rows && std::find(rows.begin(), rows.end(), b * Tk + t) == rows.end()) continue;
          const std::int64_t group = reduce == Reduce::all ? 0 : reduce == Reduce::pair ? b : t;
          for (std::int64_t s = 0; s < S; ++s) {
            for (std::int64_t r = 0; r < R; ++r) {
              if (edges != nullptr && edges[s * R + r] == 0) continue;
              const auto at = static_cast<std::size_t>((group * S + s) * R + r);
              for (std::int64_t d = 0; d < D; ++d) {
                const double product = delta.at(s * each + (b * Tk + t) * row + d) * grads.at(r * each + (t * B + b) * row + d);
                expected[at] += product;
                size[at] += std::abs(product);
              }
            }
          }
        }
      }
      for (const int threads : {1, 2, 3, 8}) {
        const std::string what = std::string("edge_scores ") + name(isa) + " " + type + " " + std::to_string(S) + "x" +
                                 std::to_string(R) + "x" + std::to_string(B) + "x" + std::to_string(Tk) + "x" +
                                 std::to_string(D) + " variant " + std::to_string(variant) + " threads " +
                                 std::to_string(threads);
        std::vector<Out> scores(expected.size(), Out{-7}), again(expected.size(), Out{-8});
        for (auto* target : {&scores, &again}) {
          edge_scores<T, Out>(isa, left, right, S, R, B, Tk, D, edges, reduce, rows.data(),
                              some_rows ? static_cast<std::int64_t>(rows.size()) : -1, threads, target->data());
        }
        expect_close(scores, expected, size, tolerance<T>(), what);
        expect(scores.empty() || std::memcmp(scores.data(), again.data(), scores.size() * sizeof(Out)) == 0,
               what + ": other bits the second time");
      }
    }
  }
}

template <class T>
Source source_of(const T* data) {
  return {data, std::is_same_v<T, bf16> ? Kind::bfloat16 : Kind::float32};
}

// One layer's channels with a normalisation, and the same receivers' gradients made in double from the definition.
template <class T>
struct Layer {
  std::int64_t channels, batch, tokens, d_head, d_model;
  bool normed, centred, turned;  // turned: the weight lies as [C, K, D]
  Array<T> g, act, weight, x_hat;
  Array<float> rstd, gamma, w_gamma, offset;

  Layer(std::int64_t C, std::int64_t B, std::int64_t Tk, std::int64_t K, std::int64_t D, int kind, bool turned_, std::int64_t skew)
      : channels(C), batch(B), tokens(Tk), d_head(K), d_model(D), normed(kind > 0), centred(kind == 2), turned(turned_),
        g(C * B * Tk * K, skew), act(C * B * Tk * K, skew), weight(C * D * K, skew), x_hat(B * Tk * D, skew),
        rstd(B * Tk, skew), gamma(D, skew), w_gamma(C * K, skew), offset(C * K, skew) {
    for (std::int64_t i = 0; i < B * Tk; ++i) rstd.data()[i] = 1.0f + std::abs(rstd.data()[i]);
  }
  double w(std::int64_t c, std::int64_t d, std::int64_t k) const {
    return weight.at(turned ? (c * d_head + k) * d_model + d : (c * d_model + d) * d_head + k);
  }
  Weight weight_of(std::int64_t c) const {
    return {source_of(weight.data()), c * d_head * d_model, turned ? d_model : 1, turned ? 1 : d_head};
  }
  NormSource norm() const {
    if (!normed) return {};
    return {{source_of(x_hat.data()), tokens * d_model, d_model}, rstd.data(), gamma.data(), centred};
  }
  // w_gamma and offset are free here: the closed form is checked with the values it is given.
  double made(std::int64_t c, std::int64_t row, std::int64_t d) const {
    double dn = 0, c1 = 0, c2 = 0;
    for (std::int64_t k = 0; k < d_head; ++k) {
      const std::int64_t at = (c * batch * tokens + row) * d_head + k;
      dn += g.at(at) * w(c, d, k);
      c1 += g.at(at) * w_gamma.at(c * d_head + k);
      c2 += g.at(at) * (act.at(at) - offset.at(c * d_head + k));
    }
    if (!normed) return dn;
    const auto width = static_cast<double>(d_model);
    return rstd.at(row) * (gamma.at(d) * dn - (centred ? c1 / width : 0) - c2 / width * x_hat.at(row * d_model + d));
  }
};

template <class T>
void test_receiver_grads(Isa isa, const char* type, std::int64_t C, std::int64_t B, std::int64_t Tk, std::int64_t K, std::int64_t D,
                         std::int64_t skew) {
  for (int kind = 0; kind < 3; ++kind) {
    const Layer<T> layer(C, B, Tk, K, D, kind, (K + D + kind) % 2 == 0, skew);
    ReceiverGrads op{C, B, Tk, K, D, {source_of(layer.g.data()), Tk * K, K}, {source_of(layer.act.data()), Tk * K, K},
                     B * Tk * K, B * Tk * K, layer.weight_of(0), D * K, layer.norm(), layer.w_gamma.data(),
                     layer.offset.data()};
    for (const int threads : {1, 3, 8}) {
      std::vector<T> out(static_cast<std::size_t>(C * B * Tk * D)), again(out.size());
      receiver_grads(isa, op, threads, out.data());
      receiver_grads(isa, op, threads, again.data());
      const std::string what = std::string("receiver_grads ") + name(isa) + " " + type + " K " + std::to_string(K) + " D " +
                               std::to_string(D) + " kind " + std::to_string(kind);
      for (std::int64_t c = 0; c < C; ++c) {
        for (std::int64_t row = 0; row < B * Tk; ++row) {
          for (std::int64_t d = 0; d < D; ++d) {
            const double expected = layer.made(c, row, d);
            const auto got = static_cast<double>(widen(out[static_cast<std::size_t>((c * B * Tk + row) * D + d)]));
            const double rounding = std::is_same_v<T, bf16> ? 0.0040 : 0.0;  // half a unit in the last of 8 bits
            expect(std::abs(got - expected) <= rounding * std::abs(expected) + 1e-5 * (1 + static_cast<double>(K)), what);
          }
        }
      }
      expect(out.empty() || std::memcmp(out.data(), again.data(), out.size() * sizeof(T)) == 0, what + ": other bits");
    }
  }
}

template <class T>
void test_factored(Isa isa, const char* type, std::int64_t L, std::int64_t B, std::int64_t Tk, std::int64_t H, std::int64_t K,
                   std::int64_t D, bool mlps, std::int64_t skew) {
  const std::int64_t C = 2 * H + 1, rows = B * Tk;
  const Array<T> embed(rows * D, skew), logits(rows * D, skew), sender_mlp(L * rows * D, skew), receiver_mlp(L * rows * D, skew);
  const Array<T> dz(L * rows * H * K, skew), w_o(L * H * K * D, skew), g(L * C * rows * K, skew), act(L * C * rows * K, skew);
  const Array<float> w_gamma(L * C * K, skew), offset(L * C * K, skew);
  std::vector<Layer<T>> layers;
  for (std::int64_t l = 0; l < L; ++l) {
    layers.emplace_back(C, B, Tk, K, D, static_cast<int>(l % 3), l % 2 == 1, skew);
    for (std::int64_t i = 0; i < C * rows * K; ++i) {
      layers.back().g.data()[i] = g.data()[l * C * rows * K + i];
      layers.back().act.data()[i] = act.data()[l * C * rows * K + i];
    }
    for (std::int64_t i = 0; i < C * K; ++i) {
      layers.back().w_gamma.data()[i] = w_gamma.data()[l * C * K + i];
      layers.back().offset.data()[i] = offset.data()[l * C * K + i];
    }
  }
  const FactoredSizes sizes{L, B, Tk, H, C, K, D, mlps};
  FactoredSenders senders;
  senders.embed = {source_of(embed.data()), Tk * D, D};
  senders.dz = {source_of(dz.data()), Tk * H * K, H * K};
  senders.dz_stride_l = rows * H * K;
  senders.dz_stride_h = K;
  for (std::int64_t i = 0; i < L * H; ++i) senders.w_o.push_back({source_of(w_o.data()), i * K * D, D, 1});
  FactoredReceivers receivers;
  for (std::int64_t l = 0; l < L; ++l) {
    receivers.g.push_back({{source_of(g.data() + l * C * rows * K), Tk * K, K}, rows * K});
    receivers.act.push_back({{source_of(act.data() + l * C * rows * K), Tk * K, K}, rows * K});
  }
  for (const Layer<T>& layer : layers) {
    for (std::int64_t c = 0; c < C; ++c) receivers.weight.push_back(layer.weight_of(c));
    receivers.norms.push_back(layer.norm());
  }
  receivers.w_gamma = w_gamma.data();
  receivers.offset = offset.data();
  receivers.logits = {source_of(logits.data()), Tk * D, D};
  if (mlps) {
    senders.mlp = {source_of(sender_mlp.data()), Tk * D, D};
    receivers.mlp = {source_of(receiver_mlp.data()), Tk * D, D};
    senders.mlp_stride_l = receivers.mlp_stride_l = rows * D;
  }
  const std::int64_t S = sizes.n_senders(), R = sizes.n_receivers();
  std::vector<double> left(static_cast<std::size_t>(S * rows * D)), right(static_cast<std::size_t>(R * rows * D));
  for (std::int64_t row = 0; row < rows; ++row) {
    for (std::int64_t d = 0; d < D; ++d) {
      const auto at = [&](std::int64_t i) { return static_cast<std::size_t>((i * rows + row) * D + d); };
      std::int64_t s = 0, r = 0;
      left[at(s++)] = embed.at(row * D + d);
      for (std::int64_t l = 0; l < L; ++l) {
        for (std::int64_t h = 0; h < H; ++h) {
          double sum = 0;
          for (std::int64_t k = 0; k < K; ++k) {
            sum += dz.at(((l * rows + row) * H + h) * K + k) * w_o.at(((l * H + h) * K + k) * D + d);
          }
          left[at(s++)] = sum;
        }
        for (std::int64_t c = 0; c < C; ++c) right[at(r++)] = layers[static_cast<std::size_t>(l)].made(c, row, d);
        if (mlps) {
          left[at(s++)] = sender_mlp.at((l * rows + row) * D + d);
          right[at(r++)] = receiver_mlp.at((l * rows + row) * D + d);
        }
      }
      right[at(r)] = logits.at(row * D + d);
    }
  }
  std::vector<std::uint8_t> mask(static_cast<std::size_t>(S * R));
  for (auto& edge : mask) edge = uniform() < 0.2;
  for (const Reduce reduce : {Reduce::all, Reduce::pair, Reduce::position}) {
    for (const std::uint8_t* edges : {static_cast<const std::uint8_t*>(nullptr), static_cast<const std::uint8_t*>(mask.data())}) {
      const std::int64_t groups = reduce == Reduce::all ? 1 : reduce == Reduce::pair ? B : Tk;
      std::vector<double> expected(static_cast<std::size_t>(groups) * mask.size()), size(expected.size());
      for (std::int64_t row = 0; row < rows; ++row) {
        const std::int64_t group = reduce == Reduce::all ? 0 : reduce == Reduce::pair ? row / Tk : row % Tk;
        for (std::int64_t s = 0; s < S; ++s) {
          for (std::int64_t r = 0; r < R; ++r) {
            if (edges != nullptr && edges[s * R + r] == 0) continue;
            const auto at = static_cast<std::size_t>((group * S + s) * R + r);
            for (std::int64_t d = 0; d < D; ++d) {
              const double product = left[static_cast<std::size_t>((s * rows + row) * D + d)] *
                                     right[static_cast<std::size_t>((r * rows + row) * D + d)];
              expected[at] += product;
              size[at] += std::abs(product) + 1e-3;  // a made factor near 0 is itself a sum of larger terms
            }
          }
        }
      }
      for (const std::int64_t chunk : {1, 7, 100}) {
        for (const int threads : {1, 4}) {
          std::vector<float> scores(expected.size(), -7.0f), again(expected.size(), -8.0f);
          for (auto* target : {&scores, &again}) {
            edge_scores_factored(isa, senders, receivers, sizes, edges, reduce, chunk, threads, target->data());
          }
          const std::string what = std::string("edge_scores_factored ") + name(isa) + " " + type + " chunk " + std::to_string(chunk);
          expect_close(scores, expected, size, 1e-5, what);
          expect(scores.empty() || std::memcmp(scores.data(), again.data(), scores.size() * sizeof(float)) == 0,
                 what + ": other bits the second time");
        }
      }
    }
  }
}

template <class T>
void test_all_edge_scores(Isa isa, const char* type) {
  const Shape shapes[] = {{0, 3, 2, 2, 5},  {3, 0, 2, 2, 5},  {3, 2, 0, 2, 5},   {3, 2, 2, 0, 5},   {3, 2, 2, 2, 0},  {1, 1, 1, 1, 1},
                          {5, 1, 2, 17, 3}, {1, 9, 3, 1, 31}, {13, 7, 2, 5, 33}, {9, 26, 1, 2, 700}, {2, 2, 1, 3, 2900}};
  for (const Shape& shape : shapes) {
    test_edge_scores<T>(isa, type, shape, 0, 0);
    test_edge_scores<T>(isa, type, shape, 1, 3);
  }
  // Enough work that several threads share it, enough receivers for several groups.
  test_edge_scores<T>(isa, type, {9, 85, 2, 2, 700}, 3, 1);
}

// Many senders and receivers: outer products, with the senders and with the receivers turned round.
template <class T>
void test_outer_edge_scores(Isa isa, const char* type) {
  using P = std::conditional_t<std::is_same_v<T, bf16>, bf16, float>;
  const int lanes = outer_tiles<P>(isa).lanes;
  const Shape shapes[] = {{64, 104, 1, 2, 430}, {104, 64, 1, 2, 430}};
  for (const Shape& shape : shapes) {
    const bool turned = columns_are_receivers(shape.senders, shape.receivers, lanes);
    expect(turned == (shape.receivers == 64), "the side to turn round");
    for (const double share : {1.0, 0.4}) {  // a sparse mask is left to the other form
      std::vector<std::uint8_t> mask(64 * 104);
      for (auto& edge : mask) edge = uniform() < 2 * share - 1;
      expect(outer_pays(Edges(mask.data(), 64, 104, kMaxOuterRows, lanes, turned)) == (share == 1.0), "the form");
    }
    test_edge_scores<T>(isa, type, shape, 1, 3, 0.97);
  }
}

}  // namespace

int main() {
  for (std::uint32_t bits = 0; bits < 0x10000u; ++bits) {  // every half, against its definition
    const half x{static_cast<std::uint16_t>(bits)};
    const int exponent = static_cast<int>(bits >> 10) & 31, fraction = static_cast<int>(bits & 1023u);
    const double sign = (bits & 0x8000u) != 0 ? -1 : 1;
    const auto got = static_cast<double>(widen(x));
    if (exponent == 31) {
      expect(fraction != 0 ? std::isnan(got) : std::isinf(got) && got * sign > 0, "half " + std::to_string(bits));
    } else {
      const double value = exponent == 0 ? std::ldexp(fraction, -24) : std::ldexp(1024 + fraction, exponent - 25);
      expect(got == sign * value, "half " + std::to_string(bits));
    }
  }
  for (const Isa isa : isas()) {
    test_all_edge_scores<double>(isa, "float64");
    test_all_edge_scores<float>(isa, "float32");
    test_all_edge_scores<bf16>(isa, "bfloat16");
    test_all_edge_scores<half>(isa, "float16");
    test_outer_edge_scores<float>(isa, "float32");
    test_outer_edge_scores<half>(isa, "float16");
#if EAPCORE_X86
    if (isa == Isa::avx512bf16) test_outer_edge_scores<bf16>(isa, "bfloat16");
#endif
    for (const std::int64_t skew : {0, 1}) {
      test_receiver_grads<float>(isa, "float32", 2, 2, 3, 8, 64, skew);
      test_receiver_grads<float>(isa, "float32", 3, 1, 17, 5, 33, skew);
      test_receiver_grads<float>(isa, "float32", 1, 1, 1, 1, 1, skew);
      test_receiver_grads<float>(isa, "float32", 1, 1, 300, 8, 8, skew);
      test_receiver_grads<float>(isa, "float32", 0, 1, 1, 1, 1, skew);
      test_receiver_grads<float>(isa, "float32", 1, 0, 3, 4, 4, skew);
      test_receiver_grads<bf16>(isa, "bfloat16", 2, 2, 3, 8, 64, skew);
      test_receiver_grads<bf16>(isa, "bfloat16", 3, 1, 17, 5, 33, skew);
      test_factored<float>(isa, "float32", 3, 2, 5, 2, 8, 40, true, skew);
      test_factored<float>(isa, "float32", 1, 1, 1, 1, 1, 1, false, skew);
      test_factored<float>(isa, "float32", 1, 3, 17, 1, 5, 33, false, skew);
      test_factored<bf16>(isa, "bfloat16", 3, 2, 5, 2, 8, 40, true, skew);
    }
    std::printf("%s: good\n", name(isa));
  }
  std::printf("%d checks passed\n", checks);
}
