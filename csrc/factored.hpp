// edge_scores of senders and receivers that are made on the fly: a block is a chunk of token rows times one slice of the
// residual stream's columns, small enough that what is made of it is contracted while it lies in a cache.
#pragma once

#include "contract.hpp"
#include "edge_scores.hpp"
#include "make.hpp"

namespace eapcore {

struct FactoredSenders {
  TokenRows embed;
  TokenRows dz;  // of layer 0, head 0
  std::int64_t dz_stride_l = 0, dz_stride_h = 0;
  std::vector<Weight> w_o;  // [L * H]
  TokenRows mlp;            // of layer 0; source.data is null without MLPs
  std::int64_t mlp_stride_l = 0;
};

// One layer's channels: where channel 0 lies, and how far it is to the next.
struct ChannelTokens {
  TokenRows first;
  std::int64_t stride_c = 0;
};

struct FactoredReceivers {
  std::vector<ChannelTokens> g, act;   // [L]
  std::vector<Weight> weight;          // [L * C]
  std::vector<NormSource> norms;       // [L]
  const float *w_gamma = nullptr, *offset = nullptr;  // [L, C, K], contiguous
  TokenRows mlp;
  std::int64_t mlp_stride_l = 0;
  TokenRows logits;
};

struct FactoredSizes {
  std::int64_t layers, batch, tokens, heads, channels, d_head, d_model;
  bool mlps;
  std::int64_t n_senders() const { return 1 + layers * (heads + (mlps ? 1 : 0)); }
  std::int64_t n_receivers() const { return layers * (channels + (mlps ? 1 : 0)) + 1; }
};

inline TokenRows moved(TokenRows values, std::int64_t offset) {
  values.source.data = values.source.kind == Kind::float32
                           ? static_cast<const void*>(static_cast<const float*>(values.source.data) + offset)
                           : static_cast<const void*>(static_cast<const bf16*>(values.source.data) + offset);
  return values;
}

// Blocks in the order chunk, slice: chunk-major, so that what belongs to a chunk is computed once.
class ChunkLayout {
 public:
  ChunkLayout(std::vector<std::vector<std::int64_t>> rows, std::int64_t d_model, std::int64_t chunk, std::int64_t slice)
      : rows_(std::move(rows)), d_model_(d_model), slice_(slice), slices_((d_model + slice - 1) / slice) {
    for (const auto& list : rows_) {
      const auto chunks = even_tiles(static_cast<std::int64_t>(list.size()), chunk);
      for (const Range& range : chunks) longest_ = std::max(longest_, range.size());
      blocks_.push_back(static_cast<std::int64_t>(chunks.size()) * slices_);
      inner_ += static_cast<std::int64_t>(list.size()) * d_model;
      chunks_.push_back(chunks);
    }
  }
  const std::vector<std::int64_t>& blocks() const { return blocks_; }
  std::int64_t block_size() const { return std::max<std::int64_t>(longest_, 1) * slice_; }
  // As even as the dense blocks are long, in whole token rows.
  std::int64_t part_size() const {
    const std::int64_t rows = std::max<std::int64_t>(1, kBlockBytes / static_cast<std::int64_t>(sizeof(float)) / slice_);
    const std::int64_t longest = std::max<std::int64_t>(longest_, 1), parts = (longest + rows - 1) / rows;
    return (longest + parts - 1) / parts * slice_;
  }
  std::int64_t inner() const { return inner_; }
  std::int64_t longest() const { return longest_; }
  std::int64_t length(std::int64_t group, std::int64_t block) const { return chunk(group, block).size() * slice_; }
  const Range& chunk(std::int64_t group, std::int64_t block) const {
    return chunks_[static_cast<std::size_t>(group)][static_cast<std::size_t>(block / slices_)];
  }
  const std::int64_t* rows(std::int64_t group, std::int64_t block) const {
    return rows_[static_cast<std::size_t>(group)].data() + chunk(group, block).begin;
  }
  std::int64_t first_column(std::int64_t block) const { return block % slices_ * slice_; }
  std::int64_t columns(std::int64_t block) const { return std::min(slice_, d_model_ - first_column(block)); }

 private:
  std::vector<std::vector<std::int64_t>> rows_;
  std::vector<std::vector<Range>> chunks_;
  std::vector<std::int64_t> blocks_;
  std::int64_t d_model_, slice_, slices_, longest_ = 0, inner_ = 0;
};

// What both sides need of the block that is open. A row of a panel is [token row][slice], so that the two vectors of a
// token row are steps 2 · row and 2 · row + 1.
class MadeSide {
 public:
  MadeSide(const FactoredSizes& sizes, const ChunkLayout& layout, const Maker& maker, const Reader& reader)
      : sizes_(&sizes), layout_(&layout), maker_(&maker), reader_(&reader), slicer_(maker, reader, sizes.d_head),
        channel_rows_(maker, reader, sizes.d_head, sizes.d_model, sizes.tokens) {}

  void take(Workspace& workspace) {
    slicer_.take(workspace);
    channel_rows_.take(workspace);
    weight_ = workspace.take<float>(sizes_->d_head * maker_->slice());
    z_ = workspace.take<float>(layout_->longest() * channel_rows_.stride());
  }

  bool in_place() const { return false; }
  const float* row(std::int64_t) const { return nullptr; }
  const char* address(std::int64_t) const { return nullptr; }

 protected:
  void open_block(std::int64_t group, std::int64_t block) {
    rows_ = layout_->rows(group, block);
    count_ = layout_->chunk(group, block).size();
    first_ = layout_->first_column(block);
    columns_ = layout_->columns(block);
  }

  void read_explicit(const TokenRows& values, float* target, std::int64_t stride) const {
    for (std::int64_t i = 0; i < count_; ++i) {
      float* row = target + i * kMakeVectors * stride;
      if (columns_ <= maker_->width) std::fill(row + stride, row + stride + maker_->width, 0.0f);
      reader_->read(values.source, values.offset(rows_[i], sizes_->tokens) + first_, columns_, row, stride);
    }
  }

  const FactoredSizes* sizes_;
  const ChunkLayout* layout_;
  const Maker* maker_;
  const Reader* reader_;
  WeightSlicer slicer_;
  ChannelRows channel_rows_;
  float *weight_ = nullptr, *z_ = nullptr;
  const std::int64_t* rows_ = nullptr;
  std::int64_t count_ = 0, first_ = 0, columns_ = 0;
};

class SenderSide : public MadeSide {
 public:
  SenderSide(const FactoredSenders& senders, const FactoredSizes& sizes, const ChunkLayout& layout, const Maker& maker,
             const Reader& reader)
      : MadeSide(sizes, layout, maker, reader), senders_(&senders) {}

  void open(std::int64_t group, std::int64_t block) { open_block(group, block); }

  void pack(const std::int64_t* rows, std::int64_t count, float* target) {
    const std::int64_t stride = count * maker_->width;
    for (std::int64_t i = 0; i < count; ++i) pack_one(rows[i], target + i * maker_->width, stride);
  }

 private:
  void pack_one(std::int64_t sender, float* target, std::int64_t stride) {
    if (sender == 0) return read_explicit(senders_->embed, target, stride);
    const std::int64_t per_layer = sizes_->heads + (sizes_->mlps ? 1 : 0);
    const std::int64_t layer = (sender - 1) / per_layer, head = (sender - 1) % per_layer;
    if (head == sizes_->heads) return read_explicit(moved(senders_->mlp, layer * senders_->mlp_stride_l), target, stride);
    slicer_.slice(senders_->w_o[static_cast<std::size_t>(layer * sizes_->heads + head)], first_, columns_, nullptr,
                  weight_);
    channel_rows_.read(moved(senders_->dz, layer * senders_->dz_stride_l + head * senders_->dz_stride_h), rows_, count_,
                       z_);
    make_all(*maker_, {z_, channel_rows_.stride(), weight_, sizes_->d_head, nullptr, 0, nullptr, nullptr, nullptr,
                       target, kMakeVectors * stride, stride},
             count_);
  }

  const FactoredSenders* senders_;
};

class ReceiverSide : public MadeSide {
 public:
  ReceiverSide(const FactoredReceivers& receivers, const FactoredSizes& sizes, const ChunkLayout& layout, const Maker& maker,
               const Reader& reader)
      : MadeSide(sizes, layout, maker, reader), receivers_(&receivers),
        known_(static_cast<std::size_t>(sizes.layers * sizes.channels)) {}

  void take(Workspace& workspace) {
    MadeSide::take(workspace);
    x_hat_ = workspace.take<float>(layout_->longest() * maker_->slice());
    factors_ = workspace.take<float>(sizes_->layers * sizes_->channels * 3 * layout_->longest());
  }

  void open(std::int64_t group, std::int64_t block) {
    const std::int64_t* before = rows_;
    open_block(group, block);
    if (rows_ != before) std::fill(known_.begin(), known_.end(), std::uint8_t{0});
    layer_of_x_hat_ = -1;
  }

  void pack(const std::int64_t* rows, std::int64_t count, float* target) {
    const std::int64_t stride = count * maker_->width;
    for (std::int64_t i = 0; i < count; ++i) pack_one(rows[i], target + i * maker_->width, stride);
  }

 private:
  void pack_one(std::int64_t receiver, float* target, std::int64_t stride) {
    if (receiver + 1 == sizes_->n_receivers()) return read_explicit(receivers_->logits, target, stride);
    const std::int64_t per_layer = sizes_->channels + (sizes_->mlps ? 1 : 0);
    const std::int64_t layer = receiver / per_layer, channel = receiver % per_layer;
    if (channel == sizes_->channels) {
      return read_explicit(moved(receivers_->mlp, layer * receivers_->mlp_stride_l), target, stride);
    }
    const NormSource& norm = receivers_->norms[static_cast<std::size_t>(layer)];
    const bool normed = norm.x_hat.source.data != nullptr;
    const std::int64_t index = layer * sizes_->channels + channel;
    slicer_.slice(receivers_->weight[static_cast<std::size_t>(index)], first_, columns_, norm.gamma, weight_);
    const auto tokens_of = [&](const std::vector<ChannelTokens>& layers) {
      const ChannelTokens& values = layers[static_cast<std::size_t>(layer)];
      return moved(values.first, channel * values.stride_c);
    };
    channel_rows_.read(tokens_of(receivers_->g), rows_, count_, z_);
    const std::int64_t longest = layout_->longest(), slice = maker_->slice();
    float *scale = factors_ + index * 3 * longest, *shift = scale + longest, *slope = shift + longest;
    if (normed && known_[static_cast<std::size_t>(index)] == 0) {  // once for each chunk, not for each slice of it
      channel_rows_.coefficients(
          z_, tokens_of(receivers_->act), norm,
          receivers_->w_gamma + index * sizes_->d_head, receivers_->offset + index * sizes_->d_head, rows_, count_, scale,
          shift, slope);
      known_[static_cast<std::size_t>(index)] = 1;
    }
    if (normed && layer != layer_of_x_hat_) {
      read_explicit(norm.x_hat, x_hat_, maker_->width);
      layer_of_x_hat_ = layer;
    }
    make_all(*maker_, {z_, channel_rows_.stride(), weight_, sizes_->d_head, normed ? x_hat_ : nullptr,
                       slice, scale, shift, slope, target, kMakeVectors * stride, stride},
             count_);
  }

  const FactoredReceivers* receivers_;
  float *x_hat_ = nullptr, *factors_ = nullptr;
  std::vector<std::uint8_t> known_;
  std::int64_t layer_of_x_hat_ = -1;
};

// Token rows in a chunk where the caller does not say. Every weight is read once for each chunk, so that long chunks save
// memory traffic; what is made of one slice, (S + R) · chunk · 128 bytes, should stay in the third-level cache.
constexpr std::int64_t kDefaultChunk = 96;

// mask: [S, R] of 0 and 1, or null. scores: [S, R], [B, S, R] or [T, S, R].
inline void edge_scores_factored(Isa isa, const FactoredSenders& senders, const FactoredReceivers& receivers,
                                 const FactoredSizes& sizes, const std::uint8_t* mask, Reduce reduce, std::int64_t chunk,
                                 int threads, float* scores, const Allocate& allocate) {
  const Tiles<float> table = tiles<float>(isa);
  const Maker maker = eapcore::maker(isa);
  const Reader reader(isa);
  const Edges edges(mask, sizes.n_senders(), sizes.n_receivers(), table.max_n);
  const ChunkLayout layout(group_rows(reduce, sizes.batch, sizes.tokens, nullptr, -1), sizes.d_model, chunk, maker.slice());
  contract(table, edges, layout, SenderSide(senders, sizes, layout, maker, reader),
           ReceiverSide(receivers, sizes, layout, maker, reader), threads, scores, allocate);
}

}  // namespace eapcore
