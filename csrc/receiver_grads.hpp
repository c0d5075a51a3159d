// The gradients of all channels' receivers from those of their q, k or v: one product for each channel with the
// normalisation's derivative applied before the result is stored.
#pragma once

#include "make.hpp"
#include "meeting.hpp"

namespace eapcore {

constexpr std::int64_t kRowsPerPart = 96;  // enough rows to pay for turning a channel's weight round

struct ReceiverGrads {
  std::int64_t channels, batch, tokens, d_head, d_model;
  TokenRows g, act;  // of channel 0
  std::int64_t g_stride_c, act_stride_c;
  Weight weight;  // of channel 0
  std::int64_t weight_stride_c;
  NormSource norm;
  const float *w_gamma, *offset;  // [C, K], contiguous
};

// What one thread works with.
struct GradsWorker {
  float *weight, *g, *x_hat, *made, *factors;
  WeightSlicer slicer;
  ChannelRows channel_rows;
  std::vector<std::int64_t> rows;
};

// out: [C, B, T, D], contiguous.
template <class Out>
void receiver_grads(Isa isa, const ReceiverGrads& op, int threads, Out* out, const Allocate& allocate) {
  const Maker maker = eapcore::maker(isa);
  const Reader reader(isa);
  const std::int64_t rows = op.batch * op.tokens, slice = maker.slice();
  if (op.channels == 0 || rows == 0 || op.d_model == 0) return;
  const std::int64_t slices = (op.d_model + slice - 1) / slice;
  const bool normed = op.norm.x_hat.source.data != nullptr;
  // float32 rows at one distance from each other are read where they lie.
  const TokenRows& x_hat = op.norm.x_hat;
  const bool in_place = normed && x_hat.source.kind == Kind::float32 &&
                        (op.batch == 1 || x_hat.stride_b == op.tokens * x_hat.stride_t);
  // Parts of the rows only as far as the channels do not keep all threads busy.
  const std::int64_t parts = std::max<std::int64_t>(
      1, std::min<std::int64_t>(rows / kRowsPerPart, (2 * threads + op.channels - 1) / op.channels));
  const std::int64_t tasks = op.channels * parts;
  const int team = static_cast<int>(std::min<std::int64_t>(std::max(threads, 1), tasks));

  const std::int64_t depth_row = round_up(op.d_head, maker.width);
  auto workers = in_workspace(allocate, [&](Workspace& workspace) {
    std::vector<GradsWorker> made;
    for (int i = 0; i < team; ++i) {
      made.push_back({workspace.take<float>(slices * op.d_head * slice), workspace.take<float>(kMaxMakeRows * depth_row),
                      workspace.take<float>(kMaxMakeRows * slice), workspace.take<float>(kMaxMakeRows * slice),
                      workspace.take<float>(3 * kMaxMakeRows), WeightSlicer(maker, reader, op.d_head),
                      ChannelRows(maker, reader, op.d_head, op.d_model, op.tokens),
                      std::vector<std::int64_t>(kMaxMakeRows)});
      made.back().slicer.take(workspace);
      made.back().channel_rows.take(workspace);
    }
    return made;
  });
  if (!workers) return;

  const auto run = [&](GradsWorker& worker, std::int64_t task) {
    const std::int64_t channel = task / parts, part = task % parts;
    const std::int64_t part_begin = rows * part / parts, part_end = rows * (part + 1) / parts;
    Weight weight = op.weight;
    weight.offset += channel * op.weight_stride_c;
    for (std::int64_t i = 0; i < slices; ++i) {
      worker.slicer.slice(weight, i * slice, std::min(slice, op.d_model - i * slice), op.norm.gamma,
                          worker.weight + i * op.d_head * slice);
    }
    const auto channel_of = [&](TokenRows values, std::int64_t stride_c) {
      values.source.data = values.source.kind == Kind::float32
                               ? static_cast<const void*>(static_cast<const float*>(values.source.data) + channel * stride_c)
                               : static_cast<const void*>(static_cast<const bf16*>(values.source.data) + channel * stride_c);
      return values;
    };
    const TokenRows g = channel_of(op.g, op.g_stride_c), act = channel_of(op.act, op.act_stride_c);
    const std::int64_t groups = (part_end - part_begin + maker.max_rows - 1) / maker.max_rows;
    for (std::int64_t group = 0; group < groups; ++group) {
      const std::int64_t begin = part_begin + (part_end - part_begin) * group / groups;
      const std::int64_t count = part_begin + (part_end - part_begin) * (group + 1) / groups - begin;
      for (std::int64_t i = 0; i < count; ++i) worker.rows[static_cast<std::size_t>(i)] = begin + i;
      worker.channel_rows.read(g, worker.rows.data(), count, worker.g);
      float *scale = worker.factors, *shift = scale + kMaxMakeRows, *slope = shift + kMaxMakeRows;
      if (normed) {
        worker.channel_rows.coefficients(worker.g, act, op.norm, op.w_gamma + channel * op.d_head,
                                         op.offset + channel * op.d_head, worker.rows.data(), count, scale, shift, slope);
      }
      for (std::int64_t i = 0; i < slices; ++i) {
        const std::int64_t first = i * slice, columns = std::min(slice, op.d_model - first);
        if (normed && !(in_place && columns == slice)) {
          if (columns < slice) std::fill(worker.x_hat, worker.x_hat + count * slice, 0.0f);
          for (std::int64_t row = 0; row < count; ++row) {
            reader.read(x_hat.source, x_hat.offset(begin + row, op.tokens) + first, columns,
                        worker.x_hat + row * slice, maker.width);
          }
        }
        Out* target = out + (channel * rows + begin) * op.d_model + first;
        MakeArgs args{worker.g, depth_row, worker.weight + i * op.d_head * slice, op.d_head,
                      normed ? worker.x_hat : nullptr, slice, scale, shift, slope, worker.made, slice,
                      maker.width};
        if (in_place && columns == slice) {
          args.x_hat = static_cast<const float*>(x_hat.source.data) + x_hat.offset(begin, op.tokens) + first;
          args.x_stride = x_hat.stride_t;
        }
        if constexpr (std::is_same_v<Out, float>) {
          if (columns == slice) {
            args.out = target;
            args.row_stride = op.d_model;
            maker.make[count - 1](args);
            continue;
          }
        }
        maker.make[count - 1](args);
        for (std::int64_t row = 0; row < count; ++row) {
          const float* made = worker.made + row * slice;
          for (std::int64_t d = 0; d < columns; ++d) narrow(made[d], target[row * op.d_model + d]);
        }
      }
    }
  };
  in_team(team, tasks, [&](std::size_t thread, std::int64_t task) { run((*workers)[thread], task); });
}

}  // namespace eapcore
