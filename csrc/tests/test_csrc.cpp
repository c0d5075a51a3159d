// The C++ ops against plain loops in double, for every instruction set of this machine: sizes 0 and 1, odd sizes, rows with
// gaps between them, misaligned pointers, token rows, masks, every reduce, 1 to 8 threads, the same bits twice. Every array
// has exactly the size it needs, so that the address sanitizer sees each step beyond it. Exits with 1 after the first
// failure's line. With an argument it is brief, for a sanitizer: fewer numbers of threads, each call once.
#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <new>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "../changes.hpp"
#include "../edge_scores.hpp"
#include "../factored.hpp"
#include "../meeting.hpp"
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

// What a sanitizer sees shows in one call with some numbers of threads; the same bits twice are asked of the plain build.
bool brief = false;

std::vector<int> numbers_of_threads() { return brief ? std::vector{1, 2, 4, 7} : std::vector{1, 2, 3, 4, 5, 6, 7, 8}; }

int checks = 0;

void fail(const std::string& what) {
  std::printf("FAILED: %s\n", what.c_str());
  std::exit(1);
}

void expect(bool good, const std::string& what) {
  ++checks;
  if (!good) fail(what);
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
    ++checks;
    if (size[i] == 0 ? scores[i] != Out{0} : !(error <= bound * size[i])) {  // the text is made where it is needed
      fail(what + (size[i] == 0 ? ": not exactly 0" : ": error " + std::to_string(error / size[i])) + " at " + std::to_string(i));
    }
  }
}

template <class Out, class Call>
void expect_the_same_again(const std::vector<Out>& found, const Call& call, const std::string& what) {
  if (brief) return;
  std::vector<Out> again(found.size());
  call(again.data());
  expect(found.empty() || std::memcmp(found.data(), again.data(), found.size() * sizeof(Out)) == 0, what + ": other bits");
}

// How [N, B, T, inner] lies in memory: gaps of `padding` elements between rows and between the N; turned: T outside of B.
struct Grid {
  std::int64_t n, batch, tokens, inner, stride_n, stride_b, stride_t;

  Grid(std::int64_t n, std::int64_t batch, std::int64_t tokens, std::int64_t inner, std::int64_t padding, bool turned)
      : n(n), batch(batch), tokens(tokens), inner(inner), stride_n(batch * tokens * (inner + padding) + padding),
        stride_b((turned ? 1 : tokens) * (inner + padding)), stride_t((turned ? batch : 1) * (inner + padding)) {}
  std::int64_t at(std::int64_t i, std::int64_t row, std::int64_t k) const {
    return i * stride_n + row / tokens * stride_b + row % tokens * stride_t + k;
  }
  std::int64_t extent() const {
    if (n * batch * tokens * inner == 0) return 0;
    return (n - 1) * stride_n + (batch - 1) * stride_b + (tokens - 1) * stride_t + inner;
  }
};

// How [N, depth, D] lies: rows of D with gaps of `padding` elements or, turned, rows of depth.
struct Matrices {
  std::int64_t n, depth, d_model, stride_k, stride_d, stride_n;

  Matrices(std::int64_t n, std::int64_t depth, std::int64_t d_model, std::int64_t padding, bool turned)
      : n(n), depth(depth), d_model(d_model), stride_k(turned ? 1 : d_model + padding),
        stride_d(turned ? depth + padding : 1),
        stride_n((turned ? d_model : depth) * (turned ? stride_d : stride_k) + padding) {}
  std::int64_t at(std::int64_t i, std::int64_t k, std::int64_t d) const { return i * stride_n + k * stride_k + d * stride_d; }
  std::int64_t extent() const { return n * depth * d_model == 0 ? 0 : at(n - 1, depth - 1, d_model - 1) + 1; }
};

struct Shape {
  std::int64_t senders, receivers, batch, tokens, d_model;
};

// Working memory of exactly the bytes that a call asks for, behind which a sanitizer finds every access.
struct Memory {
  std::unique_ptr<char, void (*)(char*)> block{nullptr, [](char* p) { ::operator delete(p, std::align_val_t{64}); }};
  Allocate from() {
    return [this](std::int64_t bytes) -> void* {
      block.reset(static_cast<char*>(::operator new(static_cast<std::size_t>(bytes), std::align_val_t{64})));
      return block.get();
    };
  }
};

template <class T>
void test_edge_scores(Isa isa, const char* type, const Shape& shape, std::int64_t skew, int padding, double edge_share = 0.4) {
  using Out = std::conditional_t<std::is_same_v<T, double>, double, float>;
  const std::int64_t S = shape.senders, R = shape.receivers, B = shape.batch, Tk = shape.tokens, D = shape.d_model;
  const Grid grid_s(S, B, Tk, D, padding, false), grid_r(R, B, Tk, D, padding, true);
  const Array<T> delta(grid_s.extent(), skew), grads(grid_r.extent(), skew);
  const Tensor4<T> left{delta.data(), grid_s.stride_n, grid_s.stride_b, grid_s.stride_t};
  const Tensor4<T> right{grads.data(), grid_r.stride_n, grid_r.stride_b, grid_r.stride_t};
  std::vector<std::uint8_t> mask(static_cast<std::size_t>(S * R));
  for (auto& edge : mask) edge = uniform() < 2 * edge_share - 1;
  std::vector<std::int64_t> rows;
  for (std::int64_t i = 0; i < B * Tk; ++i) {
    if (uniform() < 0.3) rows.push_back(i);
  }
  std::shuffle(rows.begin(), rows.end(), generator);

  // For each token row the scores, and the sums of their products' sizes.
  std::vector<double> row_scores(static_cast<std::size_t>(B * Tk * S * R)), row_sizes(row_scores.size());
  for (std::int64_t i = 0; i < B * Tk * S * R; ++i) {
    const std::int64_t token_row = i / (S * R), s = i / R % S, r = i % R;
    for (std::int64_t d = 0; d < D; ++d) {
      const double product = delta.at(grid_s.at(s, token_row, d)) * grads.at(grid_r.at(r, token_row, d));
      row_scores[static_cast<std::size_t>(i)] += product;
      row_sizes[static_cast<std::size_t>(i)] += std::abs(product);
    }
  }

  for (const Reduce reduce : {Reduce::all, Reduce::pair, Reduce::position}) {
    for (int variant = 0; variant < 4; ++variant) {
      const std::uint8_t* edges = variant % 2 == 1 ? mask.data() : nullptr;
      const bool some_rows = variant / 2 == 1;
      const auto groups = static_cast<std::size_t>(reduce == Reduce::all ? 1 : reduce == Reduce::pair ? B : Tk);
      std::vector<double> expected(groups * mask.size()), size(expected.size());
      for (std::int64_t i = 0; i < B * Tk * S * R; ++i) {
        const std::int64_t token_row = i / (S * R), pair = i % (S * R);
        if (some_rows && std::find(rows.begin(), rows.end(), token_row) == rows.end()) continue;
        if (edges != nullptr && edges[pair] == 0) continue;
        const std::int64_t group = reduce == Reduce::all ? 0 : reduce == Reduce::pair ? token_row / Tk : token_row % Tk;
        expected[static_cast<std::size_t>(group * S * R + pair)] += row_scores[static_cast<std::size_t>(i)];
        size[static_cast<std::size_t>(group * S * R + pair)] += row_sizes[static_cast<std::size_t>(i)];
      }
      for (const int threads : numbers_of_threads()) {
        const std::string what = std::string("edge_scores ") + name(isa) + " " + type + " " + std::to_string(S) + "x" +
                                 std::to_string(R) + "x" + std::to_string(B) + "x" + std::to_string(Tk) + "x" +
                                 std::to_string(D) + " variant " + std::to_string(variant) + " threads " +
                                 std::to_string(threads);
        std::vector<Out> scores(expected.size(), Out{-7});
        const auto call = [&](Out* out) {
          edge_scores<T, Out>(isa, left, right, S, R, B, Tk, D, edges, reduce, rows.data(),
                              some_rows ? static_cast<std::int64_t>(rows.size()) : -1, threads, out, Memory().from());
        };
        call(scores.data());
        expect_close(scores, expected, size, tolerance<T>(), what);
        expect_the_same_again(scores, call, what);
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
  bool normed, centred;
  Grid of_g, of_act, of_x_hat;  // unlike each other where B and T are
  Matrices of_weight;
  Array<T> g, act, weight, x_hat;
  Array<float> rstd, gamma, w_gamma, offset;

  Layer(std::int64_t C, std::int64_t B, std::int64_t Tk, std::int64_t K, std::int64_t D, int kind, bool turned, std::int64_t skew,
        std::int64_t padding)
      : channels(C), batch(B), tokens(Tk), d_head(K), d_model(D), normed(kind > 0), centred(kind == 2),
        of_g(C, B, Tk, K, padding, false), of_act(C, B, Tk, K, 2 * padding, true), of_x_hat(1, B, Tk, D, padding, padding > 0),
        of_weight(C, K, D, padding, turned), g(of_g.extent(), skew), act(of_act.extent(), skew),
        weight(of_weight.extent(), skew), x_hat(of_x_hat.extent(), skew), rstd(B * Tk, skew), gamma(D, skew),
        w_gamma(C * K, skew), offset(C * K, skew) {
    for (std::int64_t i = 0; i < B * Tk; ++i) rstd.data()[i] = 1.0f + std::abs(rstd.data()[i]);
  }
  Weight weight_of(std::int64_t c) const {
    return {source_of(weight.data()), c * of_weight.stride_n, of_weight.stride_k, of_weight.stride_d};
  }
  TokenRows first_g() const { return {source_of(g.data()), of_g.stride_b, of_g.stride_t}; }
  TokenRows first_act() const { return {source_of(act.data()), of_act.stride_b, of_act.stride_t}; }
  NormSource norm() const {
    if (!normed) return {};
    return {{source_of(x_hat.data()), of_x_hat.stride_b, of_x_hat.stride_t}, rstd.data(), gamma.data(), centred};
  }
  // w_gamma and offset are free here: the closed form is checked with the values it is given.
  double made(std::int64_t c, std::int64_t row, std::int64_t d) const {
    double dn = 0, c1 = 0, c2 = 0;
    for (std::int64_t k = 0; k < d_head; ++k) {
      const double gradient = g.at(of_g.at(c, row, k));
      dn += gradient * weight.at(of_weight.at(c, k, d));
      c1 += gradient * w_gamma.at(c * d_head + k);
      c2 += gradient * (act.at(of_act.at(c, row, k)) - offset.at(c * d_head + k));
    }
    if (!normed) return dn;
    const auto width = static_cast<double>(d_model);
    return rstd.at(row) * (gamma.at(d) * dn - (centred ? c1 / width : 0) - c2 / width * x_hat.at(of_x_hat.at(0, row, d)));
  }
};

template <class T>
void test_receiver_grads(Isa isa, const char* type, std::int64_t C, std::int64_t B, std::int64_t Tk, std::int64_t K, std::int64_t D,
                         std::int64_t skew, std::int64_t padding) {
  for (int kind = 0; kind < 3; ++kind) {
    const Layer<T> layer(C, B, Tk, K, D, kind, (K + D + kind) % 2 == 0, skew, padding);
    const ReceiverGrads op{C, B, Tk, K, D, layer.first_g(), layer.first_act(), layer.of_g.stride_n, layer.of_act.stride_n,
                           layer.weight_of(0), layer.of_weight.stride_n, layer.norm(), layer.w_gamma.data(),
                           layer.offset.data()};
    std::vector<double> expected;
    for (std::int64_t i = 0; i < C * B * Tk * D; ++i) {
      expected.push_back(layer.made(i / (B * Tk * D), i / D % (B * Tk), i % D));
    }
    const std::string what = std::string("receiver_grads ") + name(isa) + " " + type + " K " + std::to_string(K) + " D " +
                             std::to_string(D) + " kind " + std::to_string(kind) + " padding " + std::to_string(padding);
    for (const int threads : numbers_of_threads()) {
      std::vector<T> out(expected.size());
      const auto call = [&](T* made) { receiver_grads(isa, op, threads, made, Memory().from()); };
      call(out.data());
      for (std::size_t i = 0; i < expected.size(); ++i) {
        const auto got = static_cast<double>(widen(out[i]));
        const double rounding = std::is_same_v<T, bf16> ? 0.0040 : 0.0;  // half a unit in the last of 8 bits
        expect(std::abs(got - expected[i]) <= rounding * std::abs(expected[i]) + 1e-5 * (1 + static_cast<double>(K)), what);
      }
      expect_the_same_again(out, call, what);
    }
  }
}

template <class T>
void test_factored(Isa isa, const char* type, std::int64_t L, std::int64_t B, std::int64_t Tk, std::int64_t H, std::int64_t C,
                   std::int64_t K, std::int64_t D, bool mlps, std::int64_t skew, std::int64_t padding) {
  const std::int64_t rows = B * Tk;
  const Grid stream(1, B, Tk, D, padding, false), turned(1, B, Tk, D, padding, true), of_mlp(L, B, Tk, D, padding, false);
  const std::int64_t heads = std::max<std::int64_t>(H * (K + padding) - padding, 0);  // gaps between heads too
  const Grid of_dz(L, B, Tk, heads, padding, padding > 0);
  const Matrices of_w_o(L * H, K, D, padding, padding > 0);
  const Array<T> embed(stream.extent(), skew), logits(turned.extent(), skew), sender_mlp(of_mlp.extent(), skew),
      receiver_mlp(of_mlp.extent(), skew), dz(of_dz.extent(), skew), w_o(of_w_o.extent(), skew);
  const Array<float> w_gamma(L * C * K, skew), offset(L * C * K, skew);
  std::vector<Layer<T>> layers;
  for (std::int64_t l = 0; l < L; ++l) {
    layers.emplace_back(C, B, Tk, K, D, static_cast<int>(l % 3), l % 2 == 1, skew, padding);
    for (std::int64_t i = 0; i < C * K; ++i) {
      layers.back().w_gamma.data()[i] = w_gamma.data()[l * C * K + i];
      layers.back().offset.data()[i] = offset.data()[l * C * K + i];
    }
  }
  const FactoredSizes sizes{L, B, Tk, H, C, K, D, mlps};
  FactoredSenders senders;
  senders.embed = {source_of(embed.data()), stream.stride_b, stream.stride_t};
  senders.dz = {source_of(dz.data()), of_dz.stride_b, of_dz.stride_t};
  senders.dz_stride_l = of_dz.stride_n;
  senders.dz_stride_h = K + padding;
  for (std::int64_t i = 0; i < L * H; ++i) {
    senders.w_o.push_back({source_of(w_o.data()), i * of_w_o.stride_n, of_w_o.stride_k, of_w_o.stride_d});
  }
  FactoredReceivers receivers;
  for (const Layer<T>& layer : layers) {
    receivers.g.push_back({layer.first_g(), layer.of_g.stride_n});
    receivers.act.push_back({layer.first_act(), layer.of_act.stride_n});
    for (std::int64_t c = 0; c < C; ++c) receivers.weight.push_back(layer.weight_of(c));
    receivers.norms.push_back(layer.norm());
  }
  receivers.w_gamma = w_gamma.data();
  receivers.offset = offset.data();
  receivers.logits = {source_of(logits.data()), turned.stride_b, turned.stride_t};
  if (mlps) {
    senders.mlp = {source_of(sender_mlp.data()), of_mlp.stride_b, of_mlp.stride_t};
    receivers.mlp = {source_of(receiver_mlp.data()), of_mlp.stride_b, of_mlp.stride_t};
    senders.mlp_stride_l = receivers.mlp_stride_l = of_mlp.stride_n;
  }
  const std::int64_t S = sizes.n_senders(), R = sizes.n_receivers();
  std::vector<double> left(static_cast<std::size_t>(S * rows * D)), right(static_cast<std::size_t>(R * rows * D));
  for (std::int64_t row = 0; row < rows; ++row) {
    for (std::int64_t d = 0; d < D; ++d) {
      const auto at = [&](std::int64_t i) { return static_cast<std::size_t>((i * rows + row) * D + d); };
      std::int64_t s = 0, r = 0;
      left[at(s++)] = embed.at(stream.at(0, row, d));
      for (std::int64_t l = 0; l < L; ++l) {
        for (std::int64_t h = 0; h < H; ++h) {
          double sum = 0;
          for (std::int64_t k = 0; k < K; ++k) {
            sum += dz.at(of_dz.at(l, row, h * (K + padding) + k)) * w_o.at(of_w_o.at(l * H + h, k, d));
          }
          left[at(s++)] = sum;
        }
        for (std::int64_t c = 0; c < C; ++c) right[at(r++)] = layers[static_cast<std::size_t>(l)].made(c, row, d);
        if (mlps) {
          left[at(s++)] = sender_mlp.at(of_mlp.at(l, row, d));
          right[at(r++)] = receiver_mlp.at(of_mlp.at(l, row, d));
        }
      }
      right[at(r)] = logits.at(turned.at(0, row, d));
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
      for (const int threads : numbers_of_threads()) {
        for (const std::int64_t chunk : {1, 7, 100}) {
          if (chunk == 1 && threads % 3 != 1) continue;
          std::vector<float> scores(expected.size(), -7.0f);
          const auto call = [&](float* out) {
            edge_scores_factored(isa, senders, receivers, sizes, edges, reduce, chunk, threads, out, Memory().from());
          };
          call(scores.data());
          const std::string what = std::string("edge_scores_factored ") + name(isa) + " " + type + " chunk " +
                                   std::to_string(chunk) + " threads " + std::to_string(threads) + " padding " +
                                   std::to_string(padding);
          expect_close(scores, expected, size, 1e-5, what);
          expect_the_same_again(scores, call, what);
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

// Each size of the made ops in turn 0 and 1, beside small odd ones.
template <class T>
void test_sizes_of_zero_and_one(Isa isa, const char* type) {
  for (std::size_t which = 0; which < 7; ++which) {
    for (const std::int64_t size : {0, 1}) {
      std::array<std::int64_t, 7> sizes{2, 2, 3, 2, 5, 3, 9};  // L, B, T, H, C, K, D
      sizes[which] = size;
      const auto [L, B, Tk, H, C, K, D] = sizes;
      test_factored<T>(isa, type, L, B, Tk, H, C, K, D, size == 0, 1, 1);
      test_receiver_grads<T>(isa, type, C, B, Tk, K, D, 1, 1);
    }
  }
  test_factored<T>(isa, type, 1, 1, 1, 1, 1, 1, 1, false, 0, 0);
  test_receiver_grads<T>(isa, type, 1, 1, 1, 1, 1, 0, 0);
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

// Patterns whose query t sees the keys up to itself, or whose key t is seen by the queries from itself on, with and without
// keys before, and a norm's statistics.
template <class T>
void test_pattern_changes(Isa isa, const char* type, std::int64_t B, std::int64_t Tk, std::int64_t S, std::int64_t N,
                          std::int64_t H, bool of_keys, bool more) {
  const std::int64_t side = B * Tk * N * H, kept = of_keys ? 1 : Tk, gap = 3;
  const Array<T> raw(B * Tk * S * (N * H + gap), 1), normed(side, 1), values(side, 0), earlier(B * N * H, 1), mean(B * N * H, 0);
  Array<T> known(side, 1), rstd(B * Tk * S, 0), moved(B * Tk * S, 1);
  for (std::int64_t i = 0; i < side; ++i) {
    const std::int64_t t = i / (N * H) % Tk, n = i / H % N;
    if (of_keys ? t > n : n > t) known.data()[i] = -std::numeric_limits<T>::infinity();
  }
  for (std::int64_t i = 0; i < B * Tk * S; i += S) moved.data()[i] = 0, rstd.data()[i] = 0;  // sender 0 changes nothing
  const bool past = more && of_keys;
  std::vector<Changes<T>> pairs;
  for (std::int64_t b = 0; b < B; ++b) {
    const std::int64_t at = b * Tk * N * H, row = b * Tk * S;
    pairs.push_back({raw.data() + row * (N * H + gap), S * (N * H + gap), N * H + gap, more ? rstd.data() + row : nullptr,
                     more ? moved.data() + row : nullptr, known.data() + at, normed.data() + at, values.data() + at,
                     past ? earlier.data() + b * N * H : nullptr, past ? mean.data() + b * N * H : nullptr, Tk, S, N, H});
  }
  std::vector<double> expected(static_cast<std::size_t>(B * kept * S * H)), size(expected.size(), 30.0 + static_cast<double>(N));
  for (std::int64_t b = 0; b < B; ++b) {
    for (std::int64_t s = 0; s < S; ++s) {
      for (std::int64_t h = 0; h < H; ++h) {
        const auto score = [&](std::int64_t t, std::int64_t n, bool after) {
          const std::int64_t i = ((b * Tk + t) * N + n) * H + h, row = (b * Tk + t) * S + s;
          const double added = raw.at(row * (N * H + gap) + n * H + h);
          return known.at(i) + (!after ? 0 : more ? rstd.at(row) * added + moved.at(row) * normed.at(i) : added);
        };
        for (std::int64_t query = 0; query < (of_keys ? N : Tk); ++query) {
          double sums[2] = {}, means[2] = {};
          for (const int after : {0, 1}) {
            const double before = past ? std::exp(earlier.at((b * N + query) * H + h)) : 0;
            sums[after] = before;
            means[after] = before * (past ? mean.at((b * N + query) * H + h) : 0);
            for (std::int64_t key = 0; key < (of_keys ? Tk : N); ++key) {
              const std::int64_t t = of_keys ? key : query, n = of_keys ? query : key;
              const double weight = std::exp(score(t, n, after == 1));
              sums[after] += weight;
              means[after] += weight * values.at(((b * Tk + t) * N + n) * H + h);
            }
          }
          const std::int64_t row = b * kept + (of_keys ? 0 : query);
          expected[static_cast<std::size_t>((row * S + s) * H + h)] += means[1] / sums[1] - means[0] / sums[0];
        }
        for (std::int64_t t = 0; s == 0 && more && t < kept; ++t) size[static_cast<std::size_t>((b * kept + t) * S * H + h)] = 0;
      }
    }
  }
  const std::string what = std::string("pattern_changes ") + type + " " + name(isa) + (of_keys ? " of keys" : " of queries") +
                           " S=" + std::to_string(S) + " H=" + std::to_string(H);
  for (const int threads : numbers_of_threads()) {
    const auto call = [&](T* out) {
      Memory memory;
      pattern_changes<T>(isa, pairs, of_keys, threads, out, memory.from());
    };
    std::vector<T> found(expected.size());
    call(found.data());
    expect_close(found, expected, size, tolerance<T>(), what);
    expect_the_same_again(found, call, what);
  }
}

template <class T>
void test_all_pattern_changes(Isa isa, const char* type) {
  for (const bool more : {false, true}) {
    test_pattern_changes<T>(isa, type, 2, 3, 19, 5, 3, false, more);
    test_pattern_changes<T>(isa, type, 1, 4, 2, 6, 5, true, more);
    test_pattern_changes<T>(isa, type, 2, 3, 9, 3, 1, true, more);
  }
  test_pattern_changes<T>(isa, type, 1, 1, 1, 1, 1, false, false);
  test_pattern_changes<T>(isa, type, 1, 2, 0, 2, 1, true, false);
  for (const std::int64_t D : {1, 7, 37, 64}) {
    const Array<T> x(6 * (D + 1), 1), delta(3 * 6 * (D + 2), 0);
    const Moved<T> op{x.data(), delta.data(), 3 * (D + 1), D + 1, 6 * (D + 2), 3 * (D + 2), D + 2, 2, 3, 3, D};
    for (const bool centred : {false, true}) {
      std::vector<T> found(18);
      moved_rstd<T>(isa, op, 1e-3, centred, 2, found.data());
      for (std::int64_t row = 0; row < 6; ++row) {
        for (std::int64_t s = 0; s < 3; ++s) {
          double sum = 0, squares = 0;
          for (std::int64_t d = 0; d < D; ++d) {
            const double y = x.at(row * (D + 1) + d) + delta.at((s * 6 + row) * (D + 2) + d);
            sum += y, squares += y * y;
          }
          const double mean = centred ? sum / static_cast<double>(D) : 0;
          const double expected = 1 / std::sqrt(squares / static_cast<double>(D) - mean * mean + 1e-3);
          const auto got = static_cast<double>(found[static_cast<std::size_t>(row * 3 + s)]);
          expect(std::abs(got / expected - 1) < tolerance<T>() * 10, "moved_rstd " + std::to_string(D));
        }
      }
    }
  }
}

// Threads that hurry from one meeting to the next; one of them is late by more than the others look before they sleep.
void test_meetings() {
#if defined(_OPENMP)
  for (const int team : {2, 3}) {
    Meeting meeting;
    std::atomic<int> came{0};
    std::atomic<bool> early{false};
#pragma omp parallel num_threads(team)
    {
      const int threads = omp_get_num_threads();
      for (int round = 0; round < 300; ++round) {
        if (omp_get_thread_num() == round % threads) std::this_thread::sleep_for(std::chrono::microseconds(200));
        came.fetch_add(1);
        meeting.wait();
        if (came.load() < threads * (round + 1)) early = true;
        meeting.wait();
      }
    }
    expect(!early, "a meeting of " + std::to_string(team));
  }
#endif
}

}  // namespace

int main(int count, char**) {
  brief = count > 1;
  test_meetings();
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
    test_all_pattern_changes<float>(isa, "float32");
    test_all_pattern_changes<double>(isa, "float64");
    test_sizes_of_zero_and_one<float>(isa, "float32");
    test_sizes_of_zero_and_one<bf16>(isa, "bfloat16");
    for (const std::int64_t skew : {0, 1}) {
      const std::int64_t padding = 3 * skew;
      test_receiver_grads<float>(isa, "float32", 2, 2, 3, 8, 64, skew, padding);
      test_receiver_grads<float>(isa, "float32", 3, 1, 17, 5, 33, skew, padding);
      test_receiver_grads<float>(isa, "float32", 1, 1, 300, 8, 8, skew, padding);
      test_receiver_grads<bf16>(isa, "bfloat16", 2, 2, 3, 8, 64, skew, padding);
      test_receiver_grads<bf16>(isa, "bfloat16", 3, 1, 17, 5, 33, skew, padding);
      test_factored<float>(isa, "float32", 3, 2, 5, 2, 5, 8, 40, true, skew, padding);
      test_factored<float>(isa, "float32", 1, 3, 17, 1, 3, 5, 33, false, skew, padding);
      test_factored<bf16>(isa, "bfloat16", 3, 2, 5, 2, 5, 8, 40, true, skew, padding);
    }
    std::printf("%s: good\n", name(isa));
  }
  std::printf("%d checks passed\n", checks);
}
