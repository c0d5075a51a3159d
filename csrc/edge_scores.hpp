// scores[s, r] = Σ over token rows of ⟨delta[s, row], grads[r, row]⟩ for explicit tensors of any outer strides.
#pragma once

#include <array>

#include "outer.hpp"

namespace eapcore {

// [rows, B, T, D] with the innermost dimension contiguous; strides in elements.
template <class T>
struct Tensor4 {
  const T* data;
  std::int64_t stride_row, stride_b, stride_t;
};

// The token rows (b, t) that each part of the result sums over: one list for "all", B for "pair", T for "position".
// n_rows < 0: every row.
inline std::vector<std::vector<std::int64_t>> group_rows(Reduce reduce, std::int64_t batch, std::int64_t tokens,
                                                         const std::int64_t* rows, std::int64_t n_rows) {
  const std::int64_t groups = reduce == Reduce::all ? 1 : reduce == Reduce::pair ? batch : tokens;
  std::vector<std::vector<std::int64_t>> lists(static_cast<std::size_t>(groups));
  const bool every = n_rows < 0;
  const std::int64_t count = every ? batch * tokens : n_rows;
  for (std::int64_t i = 0; i < count; ++i) {
    const std::int64_t row = every ? i : rows[i];
    const std::int64_t group = reduce == Reduce::all ? 0 : reduce == Reduce::pair ? row / tokens : row % tokens;
    lists[static_cast<std::size_t>(group)].push_back(row);
  }
  return lists;
}

// The inner elements of each group cut into blocks of one length (the last may be shorter); as many for each thread.
class DenseLayout {
 public:
  DenseLayout(const std::vector<std::vector<std::int64_t>>& rows, std::int64_t d_model, std::int64_t block_size, int width,
              int threads = 1)
      : block_size_(width) {
    for (const auto& list : rows) {
      const std::int64_t length = static_cast<std::int64_t>(list.size()) * d_model;
      std::int64_t count = (length + block_size - 1) / block_size;
      if (threads > 1 && count > threads) count = (count + threads - 1) / threads * threads;
      const std::int64_t size = count == 0 ? width : ((length + count - 1) / count + width - 1) / width * width;
      lengths_.push_back(length);
      sizes_.push_back(size);
      blocks_.push_back((length + size - 1) / size);
      block_size_ = std::max(block_size_, size);
      inner_ += length;
    }
  }
  const std::vector<std::int64_t>& blocks() const { return blocks_; }
  std::int64_t block_size() const { return block_size_; }
  std::int64_t part_size() const { return block_size_; }
  std::int64_t inner() const { return inner_; }
  Range range(std::int64_t group, std::int64_t block) const {
    const std::int64_t size = sizes_[static_cast<std::size_t>(group)];
    return {block * size, std::min((block + 1) * size, lengths_[static_cast<std::size_t>(group)])};
  }
  std::int64_t length(std::int64_t group, std::int64_t block) const { return range(group, block).size(); }

 private:
  std::vector<std::int64_t> lengths_, sizes_, blocks_;
  std::int64_t block_size_, inner_ = 0;
};

// Inner elements from `begin` on lie at `offset` (from a row's start) on, up to the next segment's begin.
struct Segment {
  std::int64_t begin, offset;
};

template <class T>
std::vector<std::vector<Segment>> segments(const Tensor4<T>& tensor, const std::vector<std::vector<std::int64_t>>& rows,
                                           std::int64_t tokens, std::int64_t d_model) {
  std::vector<std::vector<Segment>> groups;
  for (const auto& list : rows) {
    std::vector<Segment> group;
    for (std::size_t i = 0; i < list.size(); ++i) {
      const std::int64_t begin = static_cast<std::int64_t>(i) * d_model;
      const std::int64_t offset = list[i] / tokens * tensor.stride_b + list[i] % tokens * tensor.stride_t;
      if (group.empty() || offset - group.back().offset != begin - group.back().begin) group.push_back({begin, offset});
    }
    groups.push_back(std::move(group));
  }
  return groups;
}

template <class P, class Source>
class DenseSide {
 public:
  DenseSide(const Tensor4<Source>& tensor, const std::vector<std::vector<Segment>>& groups, const DenseLayout& layout,
            PackFn<P, Source> pack_row, int width)
      : tensor_(tensor), groups_(&groups), layout_(&layout), pack_row_(pack_row), width_(width) {}

  void take(Workspace& workspace) {
    const bool pieces = std::any_of(groups_->begin(), groups_->end(), [](const auto& group) { return group.size() > 1; });
    if (pieces) gathered_ = workspace.take<Source>(layout_->block_size());
  }
  void take_columns(const OuterTiles<P>& tiles, Workspace& workspace) {
    take(workspace);
    runs_ = workspace.take<P>(tiles.lanes * layout_->block_size());
  }

  void open(std::int64_t group, std::int64_t block) {
    const std::vector<Segment>& segments = (*groups_)[static_cast<std::size_t>(group)];
    const Range range = layout_->range(group, block);
    pieces_.clear();
    auto at = std::upper_bound(segments.begin(), segments.end(), range.begin,
                               [](std::int64_t begin, const Segment& segment) { return begin < segment.begin; });
    for (std::int64_t begin = range.begin; begin < range.end; ++at) {
      const std::int64_t end = at == segments.end() ? range.end : std::min(at->begin, range.end);
      pieces_.push_back({(at - 1)->offset + begin - (at - 1)->begin, end - begin});
      begin = end;
    }
    length_ = range.size();
  }

  bool in_place() const { return std::is_same_v<P, Source> && pieces_.size() == 1 && length_ % width_ == 0; }

  const P* row(std::int64_t i) const {
    if constexpr (std::is_same_v<P, Source>) {
      return tensor_.data + i * tensor_.stride_row + pieces_[0].offset;
    } else {
      static_cast<void>(i);
      return nullptr;
    }
  }

  const char* address(std::int64_t i) const {
    return reinterpret_cast<const char*>(tensor_.data + i * tensor_.stride_row + pieces_[0].offset);
  }

  // Up to `lanes` rows turned round: [word][lane], zeros in lanes that have no row.
  void pack_columns(const OuterTiles<P>& tiles, const std::int64_t* rows, std::int64_t count, P* target) {
    const std::int64_t steps = (length_ + width_ - 1) / width_, whole = steps * width_;
    std::array<const P*, kMaxLanes> lanes;
    for (std::int64_t i = 0; i < tiles.lanes; ++i) {
      P* run = runs_ + i * whole;
      if (i >= count) {
        std::fill(run, run + whole, P{});
      } else if (!in_place()) {
        pack(rows + i, 1, run);
      }
      lanes[static_cast<std::size_t>(i)] = i < count && in_place() ? row(rows[i]) : run;
    }
    tiles.turn(lanes.data(), steps, target);
  }

  void pack(const std::int64_t* rows, std::int64_t count, P* target) {
    for (std::int64_t i = 0; i < count; ++i) {
      const Source* source = tensor_.data + rows[i] * tensor_.stride_row;
      if (pieces_.size() == 1) {
        source += pieces_[0].offset;
      } else {
        Source* to = gathered_;
        for (const Piece& piece : pieces_) to = std::copy(source + piece.offset, source + piece.offset + piece.length, to);
        source = gathered_;
      }
      pack_row_(source, length_, target + i * width_, count * width_);
    }
  }

 private:
  struct Piece {
    std::int64_t offset, length;
  };
  Tensor4<Source> tensor_;
  const std::vector<std::vector<Segment>>* groups_;
  const DenseLayout* layout_;
  PackFn<P, Source> pack_row_;
  int width_;
  std::int64_t length_ = 0;
  std::vector<Piece> pieces_;
  Source* gathered_ = nullptr;  // one row of a block in pieces
  P* runs_ = nullptr;           // the rows of a tile of columns before they are turned round
};

// mask: [S, R] of 0 and 1, or null. rows: distinct b·T + t; n_rows < 0 for all. scores: [S, R], [B, S, R] or [T, S, R].
template <class P, class Source, class Out>
void edge_scores_with(Isa isa, const Tensor4<Source>& delta, const Tensor4<Source>& grads, std::int64_t n_senders,
                      std::int64_t n_receivers, std::int64_t batch, std::int64_t tokens, std::int64_t d_model,
                      const std::uint8_t* mask, Reduce reduce, const std::int64_t* rows, std::int64_t n_rows, int threads,
                      Out* scores, const Allocate& allocate) {
  const Tiles<P> table = tiles<P>(isa);
  const PackFn<P, Source> pack_row = packer<P, Source>(table.isa);
  const auto groups = group_rows(reduce, batch, tokens, rows, n_rows);
  const auto delta_segments = segments(delta, groups, tokens, d_model);
  const auto grads_segments = segments(grads, groups, tokens, d_model);
  const auto side = [&](const Tensor4<Source>& tensor, const DenseLayout& layout) {
    return DenseSide<P, Source>(tensor, &tensor == &delta ? delta_segments : grads_segments, layout, pack_row, table.width);
  };
  if constexpr (!std::is_same_v<P, double>) {
    const OuterTiles<P> outer = outer_tiles<P>(isa);
    const bool turned = columns_are_receivers(n_senders, n_receivers, outer.lanes);
    const std::int64_t n_columns = turned ? n_receivers : n_senders, n_others = turned ? n_senders : n_receivers;
    if (outer_pays(n_columns, n_others, outer.lanes)) {
      const Edges edges(mask, n_columns, n_others, kMaxOuterRows, outer.lanes, turned);
      if (outer_pays(edges)) {
        const DenseLayout layout(groups, d_model, kOuterSteps * outer.width, outer.width, threads);
        contract_outer(outer, edges, layout, side(turned ? grads : delta, layout), side(turned ? delta : grads, layout), threads,
                       scores, allocate);
        return;
      }
    }
  }
  const Edges edges(mask, n_senders, n_receivers, table.max_n);
  const std::int64_t block_bytes = edges.receiver_tiles.size() > 1 ? kBlockBytes : kStreamBytes;
  const DenseLayout layout(groups, d_model, block_bytes / static_cast<std::int64_t>(sizeof(P)), table.width, threads);
  contract(table, edges, layout, side(delta, layout), side(grads, layout), threads, scores, allocate);
}

// Chooses the type of the packed panels: the source's own where the instruction set multiplies it, else float32.
template <class Source, class Out>
void edge_scores(Isa isa, const Tensor4<Source>& delta, const Tensor4<Source>& grads, std::int64_t n_senders,
                 std::int64_t n_receivers, std::int64_t batch, std::int64_t tokens, std::int64_t d_model,
                 const std::uint8_t* mask, Reduce reduce, const std::int64_t* rows, std::int64_t n_rows, int threads,
                 Out* scores, const Allocate& allocate) {
  if constexpr (std::is_same_v<Source, double> || std::is_same_v<Source, float>) {
    edge_scores_with<Source>(isa, delta, grads, n_senders, n_receivers, batch, tokens, d_model, mask, reduce, rows, n_rows,
                             threads, scores, allocate);
  } else {
#if EAPCORE_X86
    if constexpr (std::is_same_v<Source, bf16>) {
      if (isa == Isa::avx512bf16) {
        edge_scores_with<bf16>(isa, delta, grads, n_senders, n_receivers, batch, tokens, d_model, mask, reduce, rows, n_rows,
                               threads, scores, allocate);
        return;
      }
    }
#endif
    edge_scores_with<float>(isa, delta, grads, n_senders, n_receivers, batch, tokens, d_model, mask, reduce, rows, n_rows,
                            threads, scores, allocate);
  }
}

}  // namespace eapcore
