// Making rows from their factors, one slice of the residual stream's columns at a time: a head's sender z · W_O, and the
// receiver's gradient behind a head's q, k or v,
//
//     ∂metric/∂v = rstd · (γ∘(W g) − c1 − c2 · x̂)      c1 = ⟨g, Wᵀγ⟩ / D      c2 = ⟨g, a − b − Wᵀβ⟩ / D
//
// so that both reductions over the residual stream are dot products over d_head. Everything is float32 inside.
#pragma once

#include <algorithm>
#include <vector>

#include "tile.hpp"

namespace eapcore {

enum class Kind { float32, bfloat16 };

// Memory of one of the two kinds; offsets and strides in elements.
struct Source {
  const void* data = nullptr;
  Kind kind = Kind::float32;
};

// Reads runs of elements as float32.
class Reader {
 public:
  explicit Reader(Isa isa) : float32_(packer<float, float>(isa)), bfloat16_(packer<float, bf16>(isa)) {}
  // A whole number of steps is written, filled up with zeros; `stride` elements between steps.
  void read(const Source& source, std::int64_t offset, std::int64_t count, float* target, std::int64_t stride) const {
    if (source.kind == Kind::float32) {
      float32_(static_cast<const float*>(source.data) + offset, count, target, stride);
    } else {
      bfloat16_(static_cast<const bf16*>(source.data) + offset, count, target, stride);
    }
  }

 private:
  PackFn<float, float> float32_;
  PackFn<float, bf16> bfloat16_;
};

inline std::int64_t round_up(std::int64_t count, std::int64_t step) { return (count + step - 1) / step * step; }

// [B, T, inner], the innermost dimension contiguous; strides in elements.
struct TokenRows {
  Source source;
  std::int64_t stride_b = 0, stride_t = 0;
  std::int64_t offset(std::int64_t row, std::int64_t tokens) const { return row / tokens * stride_b + row % tokens * stride_t; }
};

// One head's [depth, D] matrix; one of its two strides is 1.
struct Weight {
  Source source;
  std::int64_t offset = 0, stride_k = 0, stride_d = 0;
};

// The normalisation in front of receivers; x_hat.source.data is null without one.
struct NormSource {
  TokenRows x_hat;
  const float* rstd = nullptr;  // [B, T], contiguous
  const float* gamma = nullptr;  // [D], or null for ones
  bool centred = false;          // LayerNorm: c1 counts
};

// Puts columns [first, first + columns) of a weight into target [depth][slice], multiplied by gamma, zeros behind them.
class WeightSlicer {
 public:
  WeightSlicer(const Maker& maker, const Reader& reader, std::int64_t depth)
      : maker_(&maker), reader_(&reader), depth_(depth), row_(round_up(depth, maker.width)) {}

  void take(Workspace& workspace) { widened_ = workspace.take<float>(maker_->slice() * row_); }

  void slice(const Weight& weight, std::int64_t first, std::int64_t columns, const float* gamma, float* target) {
    const std::int64_t slice = maker_->slice();
    if (gamma != nullptr) gamma += first;
    if (weight.stride_d == 1) {
      if (columns < slice) std::fill(target, target + depth_ * slice, 0.0f);
      for (std::int64_t k = 0; k < depth_; ++k) {
        float* row = target + k * slice;
        reader_->read(weight.source, weight.offset + k * weight.stride_k + first, columns, row, maker_->width);
        for (std::int64_t d = 0; gamma != nullptr && d < columns; ++d) row[d] *= gamma[d];
      }
    } else if (weight.source.kind == Kind::float32) {
      const auto* source = static_cast<const float*>(weight.source.data) + weight.offset + first * weight.stride_d;
      maker_->transpose(source, weight.stride_d, depth_, columns, gamma, target);
    } else {
      for (std::int64_t d = 0; d < columns; ++d) {
        reader_->read(weight.source, weight.offset + (first + d) * weight.stride_d, depth_, widened_ + d * row_,
                      maker_->width);
      }
      maker_->transpose(widened_, row_, depth_, columns, gamma, target);
    }
  }

 private:
  const Maker* maker_;
  const Reader* reader_;
  std::int64_t depth_, row_;
  float* widened_ = nullptr;  // [slice][row_], columns of a half-precision weight
};

// scale, shift and slope of MakeArgs for rows of one receiver channel, and its g as float32 rows.
class ChannelRows {
 public:
  ChannelRows(const Maker& maker, const Reader& reader, std::int64_t depth, std::int64_t d_model, std::int64_t tokens)
      : maker_(&maker), reader_(&reader), depth_(depth), row_(round_up(depth, maker.width)), d_model_(d_model),
        tokens_(tokens) {}

  void take(Workspace& workspace) { scratch_ = workspace.take<float>(3 * row_); }

  std::int64_t stride() const { return row_; }

  // g: [count][stride()] of the token rows.
  void read(const TokenRows& values, const std::int64_t* rows, std::int64_t count, float* g) const {
    for (std::int64_t i = 0; i < count; ++i) {
      reader_->read(values.source, values.offset(rows[i], tokens_), depth_, g + i * row_, maker_->width);
    }
  }

  void coefficients(const float* g, const TokenRows& act, const NormSource& norm, const float* w_gamma, const float* offset,
                    const std::int64_t* rows, std::int64_t count, float* scale, float* shift, float* slope) {
    float* padded_gamma = scratch_;
    float* padded_offset = padded_gamma + row_;
    float* padded_act = padded_offset + row_;
    std::fill(padded_gamma, padded_act, 0.0f);
    if (norm.centred) std::copy(w_gamma, w_gamma + depth_, padded_gamma);
    std::copy(offset, offset + depth_, padded_offset);
    for (std::int64_t i = 0; i < count; ++i) {
      reader_->read(act.source, act.offset(rows[i], tokens_), depth_, padded_act, maker_->width);
      float c1 = 0, c2 = 0;
      maker_->dots(g + i * row_, padded_act, padded_gamma, padded_offset, row_ / maker_->width, &c1, &c2);
      const float rstd = norm.rstd[rows[i]];
      scale[i] = rstd;
      shift[i] = -rstd * (c1 / static_cast<float>(d_model_));
      slope[i] = -rstd * (c2 / static_cast<float>(d_model_));
    }
  }

 private:
  const Maker* maker_;
  const Reader* reader_;
  std::int64_t depth_, row_, d_model_, tokens_;
  float* scratch_ = nullptr;
};

// Calls the maker for all rows, as even groups of at most max_rows.
inline void make_all(const Maker& maker, MakeArgs args, std::int64_t rows) {
  const std::int64_t groups = (rows + maker.max_rows - 1) / maker.max_rows;
  const MakeArgs all = args;
  for (std::int64_t i = 0; i < groups; ++i) {
    const std::int64_t begin = rows * i / groups, end = rows * (i + 1) / groups;
    args.z = all.z + begin * all.z_stride;
    args.out = all.out + begin * all.row_stride;
    if (all.x_hat != nullptr) {
      args.x_hat = all.x_hat + begin * all.x_stride;
      args.scale = all.scale + begin;
      args.shift = all.shift + begin;
      args.slope = all.slope + begin;
    }
    maker.make[end - begin - 1](args);
  }
}

}  // namespace eapcore
