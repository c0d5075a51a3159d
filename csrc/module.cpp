// The binding: pointers, strides and shapes in, the name of what ran out. kernels/cpp.py is its only caller; it has
// checked every argument, and keeps the tensors alive during the call.
#include <nanobind/nanobind.h>
#include <nanobind/stl/array.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <array>
#include <stdexcept>
#include <string>

#include "changes.hpp"
#include "edge_scores.hpp"
#include "factored.hpp"
#include "receiver_grads.hpp"

namespace nb = nanobind;

namespace {

using namespace eapcore;

// Address, then strides in elements of all dimensions but the innermost.
using Address4 = std::array<std::int64_t, 4>;

Isa isa_named(const std::string& wanted) {
  for (const Isa isa : isas()) {
    if (wanted == name(isa)) return isa;
  }
  throw std::invalid_argument("this machine has no instruction set " + wanted);
}

Reduce reduce_named(const std::string& reduce) {
  return reduce == "all" ? Reduce::all : reduce == "pair" ? Reduce::pair : Reduce::position;
}

template <class T>
T* pointer(std::int64_t address) {
  return reinterpret_cast<T*>(static_cast<std::intptr_t>(address));
}

// The memory that kernels/cpp.py makes when it is called with so many bytes, which keeps it as long as the op runs. Only
// before the op starts its threads.
Allocate allocate_by(const nb::callable& allocate) {
  return [&allocate](std::int64_t bytes) {
    const nb::gil_scoped_acquire acquire;
    return pointer<void>(nb::cast<std::int64_t>(allocate(bytes)));
  };
}

// What run(allocate) would allocate; it returns before it reads or writes anything.
template <class Run>
std::int64_t bytes_of(const Run& run) {
  std::int64_t asked = 0;
  const nb::gil_scoped_release release;
  run([&asked](std::int64_t bytes) -> void* {
    asked = bytes;
    return nullptr;
  });
  return asked;
}

template <class T>
Tensor4<T> tensor4(const Address4& at) {
  return {pointer<const T>(at[0]), at[1], at[2], at[3]};
}

// Address, 1 for bfloat16 and 0 for float32, then strides. The binding's arrays have a fixed length: unused strides are 0.
using Typed = std::array<std::int64_t, 6>;

Source source(const Typed& at) {
  return {pointer<const void>(at[0]), at[1] == 1 ? Kind::bfloat16 : Kind::float32};
}

// Strides: those of B and T are the last two before any unused.
TokenRows token_rows(const Typed& at, std::size_t stride_b) { return {source(at), at[stride_b], at[stride_b + 1]}; }

// Strides: head (or channel), k, d.
void append_heads(const Typed& at, std::int64_t heads, std::vector<Weight>& weights) {
  for (std::int64_t head = 0; head < heads; ++head) weights.push_back({source(at), head * at[2], at[3], at[4]});
}

// x_hat's address, kind and strides of B and T, then the addresses of rstd and gamma.
NormSource norm_source(const Typed& at, bool centred) {
  return {{source(at), at[2], at[3]}, pointer<const float>(at[4]), pointer<const float>(at[5]), centred};
}

template <class Source, class Out>
void run_edge_scores(Isa isa, const Address4& delta, const Address4& grads, const std::array<std::int64_t, 5>& sizes,
                     std::int64_t mask, Reduce reduce, std::int64_t rows, std::int64_t n_rows, int threads,
                     std::int64_t scores, const Allocate& allocate) {
  edge_scores<Source, Out>(isa, tensor4<Source>(delta), tensor4<Source>(grads), sizes[0], sizes[1], sizes[2], sizes[3],
                           sizes[4], pointer<const std::uint8_t>(mask), reduce, pointer<const std::int64_t>(rows), n_rows,
                           threads, pointer<Out>(scores), allocate);
}

auto edge_scores_of(const std::string& dtype) {
  return dtype == "float64"    ? run_edge_scores<double, double>
         : dtype == "float32"  ? run_edge_scores<float, float>
         : dtype == "bfloat16" ? run_edge_scores<bf16, float>
                               : run_edge_scores<half, float>;
}

void py_edge_scores(const std::string& isa_name, const std::string& dtype, const Address4& delta, const Address4& grads,
                    const std::array<std::int64_t, 5>& sizes, std::int64_t mask, const std::string& reduce,
                    std::int64_t rows, std::int64_t n_rows, int threads, std::int64_t scores, const nb::callable& memory) {
  const Isa isa = isa_named(isa_name);
  const Reduce how = reduce_named(reduce);
  const auto run = edge_scores_of(dtype);
  const Allocate allocate = allocate_by(memory);
  const nb::gil_scoped_release release;
  run(isa, delta, grads, sizes, mask, how, rows, n_rows, threads, scores, allocate);
}

std::int64_t py_edge_scores_bytes(const std::string& isa_name, const std::string& dtype,
                                  const std::array<std::int64_t, 5>& sizes, std::int64_t mask, const std::string& reduce,
                                  int threads) {
  const Isa isa = isa_named(isa_name);
  const Address4 packed{0, sizes[2] * sizes[3] * sizes[4], sizes[3] * sizes[4], sizes[4]};
  return bytes_of([&](const Allocate& allocate) {
    edge_scores_of(dtype)(isa, packed, packed, sizes, mask, reduce_named(reduce), 0, -1, threads, 0, allocate);
  });
}

ReceiverGrads sized_receiver_grads(const std::array<std::int64_t, 5>& sizes) {
  ReceiverGrads op{};
  op.channels = sizes[0];
  op.batch = sizes[1];
  op.tokens = sizes[2];
  op.d_head = sizes[3];
  op.d_model = sizes[4];
  return op;
}

void py_receiver_grads(const std::string& isa_name, const Typed& g, const Typed& act, const Typed& weight, const Typed& norm,
                       bool centred, std::int64_t w_gamma, std::int64_t offset, const std::array<std::int64_t, 5>& sizes,
                       int threads, std::int64_t out, bool out_bfloat16, const nb::callable& memory) {
  const Isa isa = isa_named(isa_name);
  ReceiverGrads op = sized_receiver_grads(sizes);
  op.g = token_rows(g, 3);
  op.act = token_rows(act, 3);
  op.g_stride_c = g[2];
  op.act_stride_c = act[2];
  op.weight = {source(weight), 0, weight[3], weight[4]};
  op.weight_stride_c = weight[2];
  op.norm = norm_source(norm, centred);
  op.w_gamma = pointer<const float>(w_gamma);
  op.offset = pointer<const float>(offset);
  const Allocate allocate = allocate_by(memory);
  const nb::gil_scoped_release release;
  if (out_bfloat16) {
    receiver_grads(isa, op, threads, pointer<bf16>(out), allocate);
  } else {
    receiver_grads(isa, op, threads, pointer<float>(out), allocate);
  }
}

std::int64_t py_receiver_grads_bytes(const std::string& isa_name, const std::array<std::int64_t, 5>& sizes, int threads) {
  const Isa isa = isa_named(isa_name);
  return bytes_of([&](const Allocate& allocate) {
    receiver_grads<float>(isa, sized_receiver_grads(sizes), threads, nullptr, allocate);
  });
}

void py_edge_scores_factored(const std::string& isa_name, const Typed& embed, const Typed& dz, const std::vector<Typed>& w_o,
                             const Typed& sender_mlp, const std::vector<Typed>& g, const std::vector<Typed>& act,
                             const std::vector<std::vector<Typed>>& weight,
                             const std::vector<std::vector<std::int64_t>>& group_sizes, const std::vector<Typed>& norms,
                             const std::vector<bool>& centred, std::int64_t w_gamma, std::int64_t offset,
                             const Typed& receiver_mlp, const Typed& logits, const std::array<std::int64_t, 7>& sizes,
                             bool mlps, std::int64_t mask, const std::string& reduce, std::int64_t chunk, int threads,
                             std::int64_t scores, const nb::callable& memory) {
  const Isa isa = isa_named(isa_name);
  const FactoredSizes all{sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5], sizes[6], mlps};
  FactoredSenders senders;
  senders.embed = token_rows(embed, 2);
  senders.dz = token_rows(dz, 3);
  senders.dz_stride_l = dz[2];
  senders.dz_stride_h = dz[5];
  for (const Typed& layer : w_o) append_heads(layer, all.heads, senders.w_o);
  FactoredReceivers receivers;
  for (std::size_t layer = 0; layer < weight.size(); ++layer) {
    receivers.g.push_back({token_rows(g[layer], 3), g[layer][2]});
    receivers.act.push_back({token_rows(act[layer], 3), act[layer][2]});
    for (std::size_t i = 0; i < weight[layer].size(); ++i) {
      append_heads(weight[layer][i], group_sizes[layer][i], receivers.weight);
    }
    receivers.norms.push_back(norm_source(norms[layer], centred[layer]));
  }
  receivers.w_gamma = pointer<const float>(w_gamma);
  receivers.offset = pointer<const float>(offset);
  receivers.logits = token_rows(logits, 2);
  if (mlps) {
    senders.mlp = token_rows(sender_mlp, 3);
    senders.mlp_stride_l = sender_mlp[2];
    receivers.mlp = token_rows(receiver_mlp, 3);
    receivers.mlp_stride_l = receiver_mlp[2];
  }
  const Reduce how = reduce_named(reduce);
  const Allocate allocate = allocate_by(memory);
  const nb::gil_scoped_release release;
  edge_scores_factored(isa, senders, receivers, all, pointer<const std::uint8_t>(mask), how, chunk, threads,
                       pointer<float>(scores), allocate);
}

std::int64_t py_edge_scores_factored_bytes(const std::string& isa_name, const std::array<std::int64_t, 7>& sizes, bool mlps,
                                           std::int64_t mask, const std::string& reduce, std::int64_t chunk, int threads) {
  const Isa isa = isa_named(isa_name);
  const FactoredSizes all{sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5], sizes[6], mlps};
  return bytes_of([&](const Allocate& allocate) {
    edge_scores_factored(isa, {}, {}, all, pointer<const std::uint8_t>(mask), reduce_named(reduce), chunk, threads, nullptr,
                         allocate);
  });
}

// raw: its address, then strides of B, T and S. sides: the addresses of rstd, moved, known, normed, values, earlier and mean.
// sizes: B, T, S, N, H.
template <class T>
void run_pattern_changes(Isa isa, const Address4& raw, const std::array<std::int64_t, 7>& sides,
                         const std::array<std::int64_t, 5>& sizes, bool of_keys, int threads, std::int64_t out,
                         const Allocate& allocate) {
  const auto [batch, tokens, senders, others, heads] = sizes;
  std::vector<Changes<T>> pairs;
  for (std::int64_t b = 0; b < batch; ++b) {
    const auto at = [b](std::int64_t address, std::int64_t count) {
      return address == 0 ? nullptr : pointer<const T>(address) + b * count;
    };
    const std::int64_t side = tokens * others * heads;
    pairs.push_back({pointer<const T>(raw[0]) + b * raw[1], raw[2], raw[3], at(sides[0], tokens * senders),
                     at(sides[1], tokens * senders), at(sides[2], side), at(sides[3], side), at(sides[4], side),
                     at(sides[5], others * heads), at(sides[6], others * heads), tokens, senders, others, heads});
  }
  pattern_changes<T>(isa, pairs, of_keys, threads, pointer<T>(out), allocate);
}

void py_pattern_changes(const std::string& isa_name, const std::string& dtype, const Address4& raw,
                        const std::array<std::int64_t, 7>& sides, const std::array<std::int64_t, 5>& sizes, bool of_keys,
                        int threads, std::int64_t out, const nb::callable& memory) {
  const Isa isa = isa_named(isa_name);
  const Allocate allocate = allocate_by(memory);
  const nb::gil_scoped_release release;
  const auto run = dtype == "float64" ? run_pattern_changes<double> : run_pattern_changes<float>;
  run(isa, raw, sides, sizes, of_keys, threads, out, allocate);
}

// x: its address, then strides of B and T; delta: its address, then strides of S, B and T. sizes: B, T, S, D.
template <class T>
void run_moved_rstd(Isa isa, const std::array<std::int64_t, 3>& x, const Address4& delta,
                    const std::array<std::int64_t, 4>& sizes, double eps, bool centred, int threads, std::int64_t out) {
  const Moved<T> op{pointer<const T>(x[0]), pointer<const T>(delta[0]), x[1], x[2], delta[1], delta[2], delta[3],
                    sizes[0], sizes[1], sizes[2], sizes[3]};
  moved_rstd<T>(isa, op, eps, centred, threads, pointer<T>(out));
}

void py_moved_rstd(const std::string& isa_name, const std::string& dtype, const std::array<std::int64_t, 3>& x,
                   const Address4& delta, const std::array<std::int64_t, 4>& sizes, double eps, bool centred, int threads,
                   std::int64_t out) {
  const Isa isa = isa_named(isa_name);
  const nb::gil_scoped_release release;
  const auto run = dtype == "float64" ? run_moved_rstd<double> : run_moved_rstd<float>;
  run(isa, x, delta, sizes, eps, centred, threads, out);
}

}  // namespace

// kernels/cpp.py refuses a module of another number: what it passes is addresses and sizes, which no type would check.
// Raise both with every change of a function's arguments or of their meaning.
constexpr int kInterface = 5;

NB_MODULE(_csrc, m) {
  m.attr("interface") = kInterface;
  m.attr("default_chunk") = kDefaultChunk;
  m.doc() = "eapcore's C++ ops for the CPU; eapcore.kernels is their public face";
  m.def("isas", [] {
    std::vector<std::string> names;
    for (const Isa isa : isas()) names.emplace_back(name(isa));
    return names;
  });
  m.def("edge_scores", &py_edge_scores, nb::arg("isa"), nb::arg("dtype"), nb::arg("delta"), nb::arg("grads"),
        nb::arg("sizes"), nb::arg("mask"), nb::arg("reduce"), nb::arg("rows"), nb::arg("n_rows"), nb::arg("threads"),
        nb::arg("scores"), nb::arg("allocate"));
  m.def("edge_scores_bytes", &py_edge_scores_bytes, nb::arg("isa"), nb::arg("dtype"), nb::arg("sizes"), nb::arg("mask"),
        nb::arg("reduce"), nb::arg("threads"));
  m.def("receiver_grads", &py_receiver_grads, nb::arg("isa"), nb::arg("g"), nb::arg("act"), nb::arg("weight"),
        nb::arg("norm"), nb::arg("centred"), nb::arg("w_gamma"), nb::arg("offset"), nb::arg("sizes"), nb::arg("threads"),
        nb::arg("out"), nb::arg("out_bfloat16"), nb::arg("allocate"));
  m.def("receiver_grads_bytes", &py_receiver_grads_bytes, nb::arg("isa"), nb::arg("sizes"), nb::arg("threads"));
  m.def("edge_scores_factored", &py_edge_scores_factored, nb::arg("isa"), nb::arg("embed"), nb::arg("dz"), nb::arg("w_o"),
        nb::arg("sender_mlp"), nb::arg("g"), nb::arg("act"), nb::arg("weight"), nb::arg("group_sizes"), nb::arg("norms"),
        nb::arg("centred"), nb::arg("w_gamma"), nb::arg("offset"), nb::arg("receiver_mlp"), nb::arg("logits"),
        nb::arg("sizes"), nb::arg("mlps"), nb::arg("mask"), nb::arg("reduce"), nb::arg("chunk"), nb::arg("threads"),
        nb::arg("scores"), nb::arg("allocate"));
  m.def("pattern_changes", &py_pattern_changes, nb::arg("isa"), nb::arg("dtype"), nb::arg("raw"), nb::arg("sides"),
        nb::arg("sizes"), nb::arg("of_keys"), nb::arg("threads"), nb::arg("out"), nb::arg("allocate"));
  m.def("moved_rstd", &py_moved_rstd, nb::arg("isa"), nb::arg("dtype"), nb::arg("x"), nb::arg("delta"), nb::arg("sizes"),
        nb::arg("eps"), nb::arg("centred"), nb::arg("threads"), nb::arg("out"));
  m.def("edge_scores_factored_bytes", &py_edge_scores_factored_bytes, nb::arg("isa"), nb::arg("sizes"), nb::arg("mlps"),
        nb::arg("mask"), nb::arg("reduce"), nb::arg("chunk"), nb::arg("threads"));
}
