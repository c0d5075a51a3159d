// The contraction's outer loops: which blocks, which tiles, which thread, and the fixed order of every sum.
// What both forms of the contraction share (edges, plan, threads), then the form that multiplies along the inner dimension;
// outer.hpp has the other one.
//
// The inner dimension goes by in blocks. For each block the receivers are packed a group at a time (it stays in the
// second-level cache), and each tile of senders is packed or read in place once and meets every receiver of the group
// while it lies in the first-level cache. A tile without an edge is neither packed nor multiplied.
//
// Sums: float32 (float64 for double) over the lanes' steps inside one block, then double over blocks, in their order;
// then over the ranges of blocks that threads took, in their order. The bits depend on shapes and thread count alone.
#pragma once

#include <algorithm>
#include <numeric>
#include <utility>
#include <vector>

#if defined(_OPENMP)
#include <omp.h>
#endif

#include "meeting.hpp"
#include "tile.hpp"

namespace eapcore {

constexpr std::int64_t kGroupBytes = 192 * 1024;                   // packed receivers that stay in a second-level cache
constexpr std::int64_t kPanelBytes = std::int64_t{8} << 20;        // packed senders kept for the next receivers' group
constexpr std::int64_t kPartialsBytes = std::int64_t{256} << 20;   // partial sums of threads that share a result
constexpr std::int64_t kProductsPerThread = std::int64_t{1} << 18; // less work than this is not worth another thread

enum class Reduce { all, pair, position };

struct Range {
  std::int64_t begin, end;
  std::int64_t size() const { return end - begin; }
};

// Tiles of at most `limit` rows, as even as can be: 37 receivers become 5 + 5 + 5 + 5 + 5 + 6 + 6, not 6 × 6 + 1.
inline std::vector<Range> even_tiles(std::int64_t rows, std::int64_t limit) {
  const std::int64_t count = (rows + limit - 1) / limit;
  std::vector<Range> tiles;
  for (std::int64_t i = 0; i < count; ++i) tiles.push_back({rows * i / count, rows * (i + 1) / count});
  return tiles;
}

// The senders and receivers that have an edge, cut into tiles, and the pairs of tiles that have one.
class Edges {
 public:
  // mask: [S, R] of 0 and 1, or null for all pairs. A tile has at most max_m senders and max_n receivers. turned: what is
  // called senders here are the caller's receivers and the other way round, of a mask and scores that stay as they lie.
  Edges(const std::uint8_t* mask, std::int64_t n_senders, std::int64_t n_receivers, int max_n, int max_m = kMaxM,
        bool turned = false)
      : max_m(max_m), tile_sums(max_m * max_n), mask_(mask), n_senders_(n_senders), n_receivers_(n_receivers),
        stride_s_(turned ? 1 : n_receivers), stride_r_(turned ? n_senders : 1) {
    std::vector<std::uint8_t> used(static_cast<std::size_t>(n_receivers), mask == nullptr);
    for (std::int64_t s = 0; s < n_senders; ++s) {
      bool any = mask == nullptr && n_receivers > 0;
      for (std::int64_t r = 0; mask != nullptr && r < n_receivers; ++r) {
        const std::uint8_t edge = mask[at(s, r)];
        n_edges += edge;
        any = any || edge != 0;
        used[static_cast<std::size_t>(r)] |= edge;
      }
      if (any) senders.push_back(s);
    }
    if (mask == nullptr) n_edges = n_senders * n_receivers;
    for (std::int64_t r = 0; r < n_receivers && !senders.empty(); ++r) {
      if (used[static_cast<std::size_t>(r)] != 0) receivers.push_back(r);
    }
    sender_tiles = even_tiles(static_cast<std::int64_t>(senders.size()), max_m);
    receiver_tiles = even_tiles(static_cast<std::int64_t>(receivers.size()), max_n);
    has_.assign(sender_tiles.size() * receiver_tiles.size(), mask == nullptr);
    for (std::size_t i = 0; mask != nullptr && i < sender_tiles.size(); ++i) {
      for (std::size_t j = 0; j < receiver_tiles.size(); ++j) has_[i * receiver_tiles.size() + j] = any_edge(i, j);
    }
    active_tiles = std::count(has_.begin(), has_.end(), std::uint8_t{1});
  }

  bool has(std::int64_t sender_tile, std::int64_t receiver_tile) const {
    return has_[static_cast<std::size_t>(sender_tile) * receiver_tiles.size() + static_cast<std::size_t>(receiver_tile)];
  }
  bool edge(std::int64_t sender, std::int64_t receiver) const {
    return mask_ == nullptr || mask_[at(sender, receiver)] != 0;
  }
  // Where a pair lies in the mask and in the scores.
  std::int64_t at(std::int64_t sender, std::int64_t receiver) const { return sender * stride_s_ + receiver * stride_r_; }
  std::int64_t n_senders() const { return n_senders_; }
  std::int64_t n_receivers() const { return n_receivers_; }

  std::vector<std::int64_t> senders, receivers;  // rising
  std::vector<Range> sender_tiles, receiver_tiles;
  std::int64_t n_edges = 0, active_tiles = 0;
  std::int64_t max_m, tile_sums;  // the sum of a tile's sender m and receiver n is number n * max_m + m of tile_sums

 private:
  std::uint8_t any_edge(std::size_t i, std::size_t j) const {
    for (std::int64_t s = sender_tiles[i].begin; s < sender_tiles[i].end; ++s) {
      for (std::int64_t r = receiver_tiles[j].begin; r < receiver_tiles[j].end; ++r) {
        if (edge(senders[static_cast<std::size_t>(s)], receivers[static_cast<std::size_t>(r)])) return 1;
      }
    }
    return 0;
  }

  const std::uint8_t* mask_;
  std::int64_t n_senders_, n_receivers_, stride_s_, stride_r_;
  std::vector<std::uint8_t> has_;
};

// One piece of work: blocks of one group (one [S, R] of the result) for a range of sender tiles.
struct Task {
  std::int64_t group;
  Range blocks;
  Range sender_tiles;
  std::int64_t partial;  // which buffer of partial sums it owns; -1: it alone makes its part of the result
};

struct Plan {
  int threads = 1;
  std::int64_t splits = 1;  // tasks that share one part of the result
  std::vector<Task> tasks;
  std::int64_t most_sender_tiles() const {
    std::int64_t most = 0;
    for (const Task& task : tasks) most = std::max(most, task.sender_tiles.size());
    return most;
  }
};

// Cuts the work so that `threads` are evenly busy: along the blocks as long as the partial sums stay small, else along
// the senders (evenly by their number of tiles with an edge).
inline Plan plan_tasks(const Edges& edges, const std::vector<std::int64_t>& blocks_of_group, std::int64_t products,
                       int threads) {
  Plan plan;
  const auto groups = static_cast<std::int64_t>(blocks_of_group.size());
  const auto sender_tiles = static_cast<std::int64_t>(edges.sender_tiles.size());
  const auto receiver_tiles = static_cast<std::int64_t>(edges.receiver_tiles.size());
  if (groups == 0 || edges.active_tiles == 0) return plan;
  const std::int64_t useful = std::max<std::int64_t>(1, products / kProductsPerThread);
  plan.threads = static_cast<int>(std::min<std::int64_t>(std::max(threads, 1), useful));

  const std::int64_t fewest = *std::min_element(blocks_of_group.begin(), blocks_of_group.end());
  const std::int64_t partial_bytes = groups * sender_tiles * receiver_tiles * edges.tile_sums * 8;
  double best = 0;
  for (std::int64_t splits = 1; splits <= plan.threads && splits <= std::max<std::int64_t>(fewest, 1); ++splits) {
    if (splits > 1 && splits * partial_bytes > kPartialsBytes) break;
    const std::int64_t tasks = groups * splits;
    const std::int64_t rounds = (tasks + plan.threads - 1) / plan.threads;
    const double busy = static_cast<double>(tasks) / static_cast<double>(rounds * plan.threads);
    if (busy <= best) continue;
    best = busy;
    plan.splits = splits;
    if (busy > 0.9) break;
  }
  const std::int64_t tasks = groups * plan.splits;
  const std::int64_t parts =
      std::min<std::int64_t>(sender_tiles, tasks >= plan.threads ? 1 : (plan.threads + tasks - 1) / tasks);

  std::vector<Range> sender_ranges;
  std::int64_t begin = 0, seen = 0;
  for (std::int64_t tile = 0; tile < sender_tiles; ++tile) {
    for (std::int64_t j = 0; j < receiver_tiles; ++j) seen += edges.has(tile, j);
    const auto done = static_cast<std::int64_t>(sender_ranges.size()) + 1;
    if (tile + 1 == sender_tiles || (done < parts && seen * parts >= edges.active_tiles * done)) {
      sender_ranges.push_back({begin, tile + 1});
      begin = tile + 1;
    }
  }
  std::int64_t partial = 0;
  for (std::int64_t group = 0; group < groups; ++group) {
    const std::int64_t blocks = blocks_of_group[static_cast<std::size_t>(group)];
    for (std::int64_t split = 0; split < plan.splits; ++split) {
      const Range range{blocks * split / plan.splits, blocks * (split + 1) / plan.splits};
      for (const Range& senders : sender_ranges) plan.tasks.push_back({group, range, senders, plan.splits > 1 ? partial : -1});
      ++partial;
    }
  }
  return plan;
}

// Writes sums [tile][receiver][sender] of one range of sender tiles to scores [S, R]; parts are added in their order.
template <class Out>
void write_scores(const Edges& edges, Range sender_tiles, const double* sums, std::int64_t part_stride, std::int64_t parts,
                  Out* scores) {
  const auto receiver_tiles = static_cast<std::int64_t>(edges.receiver_tiles.size());
  for (std::int64_t i = sender_tiles.begin; i < sender_tiles.end; ++i) {
    const Range senders = edges.sender_tiles[static_cast<std::size_t>(i)];
    for (std::int64_t j = 0; j < receiver_tiles; ++j) {
      if (!edges.has(i, j)) continue;
      const Range receivers = edges.receiver_tiles[static_cast<std::size_t>(j)];
      const double* tile = sums + ((i - sender_tiles.begin) * receiver_tiles + j) * edges.tile_sums;
      for (std::int64_t m = 0; m < senders.size(); ++m) {
        const std::int64_t sender = edges.senders[static_cast<std::size_t>(senders.begin + m)];
        for (std::int64_t n = 0; n < receivers.size(); ++n) {
          const std::int64_t receiver = edges.receivers[static_cast<std::size_t>(receivers.begin + n)];
          if (!edges.edge(sender, receiver)) continue;
          const double* at = tile + n * edges.max_m + m;
          double sum = *at;
          for (std::int64_t part = 1; part < parts; ++part) sum += at[part * part_stride];
          scores[edges.at(sender, receiver)] = static_cast<Out>(sum);
        }
      }
    }
  }
}

// What one thread works with. The packed receivers have two buffers: while one is multiplied, the other is filled.
template <class P, class Senders, class Receivers>
struct Worker {
  Senders senders;      // opened at the block that is multiplied
  Receivers receivers;  // opened at the block that is packed
  P *panel, *groups[2];
  std::vector<std::uint8_t> packed;  // which tiles of the panel are
};

// A pass multiplies one group of receivers with one panel of senders in one block.
struct Pass {
  std::int64_t block;
  Range senders, receivers;  // tiles
};

inline std::vector<Pass> plan_passes(const Task& task, std::int64_t receiver_tiles, std::int64_t panel_tiles,
                                     std::int64_t group_tiles) {
  std::vector<Pass> passes;
  const auto groups = even_tiles(receiver_tiles, group_tiles);
  for (std::int64_t block = task.blocks.begin; block < task.blocks.end; ++block) {
    for (std::int64_t first = task.sender_tiles.begin; first < task.sender_tiles.end; first += panel_tiles) {
      const Range senders{first, std::min(first + panel_tiles, task.sender_tiles.end)};
      for (const Range& receivers : groups) passes.push_back({block, senders, receivers});
    }
  }
  return passes;
}

// Packs one side's tiles of the next pass bit by bit between the tiles of the present one. Few rows are on their way from
// memory at a time: rows often lie a multiple of a large power of two apart, so that many of them would evict each other.
// side: opened at the block that is packed; pack(i) packs tile i.
template <class Side, class Pack>
class Packing {
 public:
  Packing(const std::vector<Range>& tiles, const std::vector<std::int64_t>& rows, const Side& side, Range range, Pack pack)
      : tiles_(tiles), rows_(rows), side_(side), pack_(pack), at_(range.begin), tiles_end_(range.end) {
    if (range.size() > 0) {
      begin_ = fetched_ = tile(range.begin).begin;
      end_ = tile(range.end - 1).end;
    }
  }
  // Packs the tiles that have been fetched; rows are due to be fetched evenly, up to the end of `step` of `steps`.
  void begin_step(std::int64_t step, std::int64_t steps) {
    while (at_ < tiles_end_ && tile(at_).end <= fetched_) pack_(at_++);
    due_ = begin_ + (end_ - begin_) * (step + 1) / steps;
  }
  // Where the next row lies that is due to be fetched; null if none is.
  const char* fetch() { return fetched_ < due_ ? side_.address(rows_[static_cast<std::size_t>(fetched_++)]) : nullptr; }
  void finish() {
    while (at_ < tiles_end_) pack_(at_++);
  }

 private:
  const Range& tile(std::int64_t i) const { return tiles_[static_cast<std::size_t>(i)]; }

  const std::vector<Range>& tiles_;
  const std::vector<std::int64_t>& rows_;
  const Side& side_;
  Pack pack_;
  std::int64_t at_, tiles_end_, begin_ = 0, end_ = 0, fetched_ = 0, due_ = 0;
};

// Adds one task's products to sums [sender tile][receiver tile][receiver][sender].
template <class P, class Layout, class Senders, class Receivers>
void run_task(const Tiles<P>& tiles, const Edges& edges, const Layout& layout, const Task& task, std::int64_t panel_tiles,
              std::int64_t group_tiles, Worker<P, Senders, Receivers>& worker, double* sums) {
  const auto receiver_tiles = static_cast<std::int64_t>(edges.receiver_tiles.size());
  const auto n_senders = static_cast<std::int64_t>(edges.senders.size());
  const std::int64_t slot = layout.block_size() * kMaxM;
  const std::int64_t tile_elements = layout.block_size() * tiles.max_n;
  const auto passes = plan_passes(task, receiver_tiles, panel_tiles, group_tiles);

  // Packing of a pass's receivers; behind the last pass there is nothing to pack.
  const auto packing_of = [&](std::size_t index) {
    const bool exists = index < passes.size();
    const Range receivers = exists ? passes[index].receivers : Range{0, 0};
    if (exists) worker.receivers.open(task.group, passes[index].block);
    P* group = worker.groups[index % 2];
    return Packing(edges.receiver_tiles, edges.receivers, worker.receivers, receivers, [&, receivers, group](std::int64_t j) {
      const Range tile = edges.receiver_tiles[static_cast<std::size_t>(j)];
      worker.receivers.pack(edges.receivers.data() + tile.begin, tile.size(), group + (j - receivers.begin) * tile_elements);
    });
  };
  packing_of(0).finish();

  for (std::size_t index = 0; index < passes.size(); ++index) {
    const Pass& pass = passes[index];
    auto packing = packing_of(index + 1);
    const P* group = worker.groups[index % 2];

    worker.senders.open(task.group, pass.block);
    const std::int64_t steps = (layout.length(task.group, pass.block) + tiles.width - 1) / tiles.width;
    const bool first_group = pass.receivers.begin == 0;
    const bool one_group = pass.receivers.size() == receiver_tiles;
    const bool in_place = one_group && worker.senders.in_place();
    // Long blocks are multiplied in parts, so that what a tile reads still fits into the first-level cache.
    const std::int64_t part_steps = layout.part_size() / tiles.width;
    const std::int64_t parts = (steps + part_steps - 1) / part_steps;
    const bool one_slot = one_group && parts == 1;
    if (first_group) std::fill(worker.packed.begin(), worker.packed.end(), std::uint8_t{0});

    for (std::int64_t turn = 0; turn < parts * pass.senders.size(); ++turn) {
      const std::int64_t i = pass.senders.begin + turn % pass.senders.size();
      const std::int64_t from_step = turn / pass.senders.size() * part_steps;
      const std::int64_t n_steps = std::min(part_steps, steps - from_step);
      packing.begin_step(turn, parts * pass.senders.size());
      std::int64_t j = pass.receivers.begin;
      while (j < pass.receivers.end && !edges.has(i, j)) ++j;
      if (j == pass.receivers.end) continue;
      const Range senders = edges.sender_tiles[static_cast<std::size_t>(i)];
      const std::int64_t count = senders.size();
      Rows<P> rows{};
      if (in_place) {
        for (std::int64_t m = 0; m < count; ++m) {
          rows.rows[m] = worker.senders.row(edges.senders[static_cast<std::size_t>(senders.begin + m)]) +
                         from_step * tiles.width;
        }
        rows.stride = tiles.width;
      } else {
        // A packed tile that is used once needs one slot, always in the first-level cache.
        const std::int64_t at = one_slot ? 0 : i - pass.senders.begin;
        P* panel = worker.panel + at * slot;
        if (one_slot || worker.packed[static_cast<std::size_t>(at)] == 0) {
          worker.senders.pack(edges.senders.data() + senders.begin, count, panel);
          worker.packed[static_cast<std::size_t>(at)] = 1;
        }
        rows.stride = count * tiles.width;
        for (std::int64_t m = 0; m < count; ++m) rows.rows[m] = panel + m * tiles.width + from_step * rows.stride;
      }
      // Each call fetches one row that is needed soon: the next tile's senders (once packed they stream from a cache,
      // without help), then receivers of the next pass.
      std::int64_t sender = first_group && from_step == 0 ? senders.end : n_senders;
      const std::int64_t sender_end = std::min(sender + kMaxM, n_senders);
      for (; j < pass.receivers.end; ++j) {
        if (!edges.has(i, j)) continue;
        const char* prefetch = nullptr;
        if (sender < sender_end) {
          prefetch = worker.senders.address(edges.senders[static_cast<std::size_t>(sender++)]);
        } else {
          prefetch = packing.fetch();
        }
        if (prefetch == nullptr) prefetch = reinterpret_cast<const char*>(rows.rows[0]);
        const std::int64_t n = edges.receiver_tiles[static_cast<std::size_t>(j)].size();
        tiles.tile[count - 1][n - 1](
            rows, group + (j - pass.receivers.begin) * tile_elements + from_step * n * tiles.width, n_steps,
            sums + ((i - task.sender_tiles.begin) * receiver_tiles + j) * edges.tile_sums, prefetch);
      }
    }
    packing.finish();
  }
}

// Sums of products: of all tasks where some share a part of the result, else of the task that a thread is at.
struct Sums {
  double* partials = nullptr;
  std::vector<double*> own;  // [threads]
};

inline std::int64_t tile_row_sums(const Edges& edges) {
  return static_cast<std::int64_t>(edges.receiver_tiles.size()) * edges.tile_sums;
}

inline Sums take_sums(const Plan& plan, const Edges& edges, std::int64_t groups, Workspace& workspace) {
  const std::int64_t tile_row = tile_row_sums(edges);
  Sums sums;
  if (plan.splits > 1) {
    sums.partials = workspace.take<double>(groups * plan.splits * static_cast<std::int64_t>(edges.sender_tiles.size()) * tile_row);
  } else {
    for (int i = 0; i < plan.threads; ++i) sums.own.push_back(workspace.take<double>(plan.most_sender_tiles() * tile_row));
  }
  return sums;
}

// Runs the plan's tasks, each on the worker of its thread, and adds up what they made, in a fixed order.
// run_task(worker, task, sums) adds one task's products to sums [sender tile][receiver tile][tile_sums].
template <class Out, class Worker, class RunTask>
void run_plan(const Plan& plan, const Edges& edges, std::int64_t groups, std::vector<Worker>& workers, const Sums& all,
              const RunTask& run_task, Out* scores) {
  const std::int64_t result = edges.n_senders() * edges.n_receivers();
  const auto sender_tiles = static_cast<std::int64_t>(edges.sender_tiles.size());
  const std::int64_t tile_row = tile_row_sums(edges), part_stride = sender_tiles * tile_row;
  const auto run = [&](std::size_t thread, const Task& task) {
    double* sums = task.partial < 0 ? all.own[thread]
                                    : all.partials + task.partial * part_stride + task.sender_tiles.begin * tile_row;
    std::fill(sums, sums + task.sender_tiles.size() * tile_row, 0.0);
    run_task(workers[thread], task, sums);
    if (task.partial < 0) write_scores(edges, task.sender_tiles, sums, 0, 1, scores + task.group * result);
  };

  const auto n_tasks = static_cast<std::int64_t>(plan.tasks.size());
  const auto clear = [&](std::int64_t row) {
    std::fill(scores + row * edges.n_receivers(), scores + (row + 1) * edges.n_receivers(), Out{0});
  };
  const auto combine = [&](std::int64_t group, std::int64_t tile) {
    write_scores(edges, {tile, tile + 1}, all.partials + group * plan.splits * part_stride + tile * tile_row, part_stride,
                 plan.splits, scores + group * result);
  };
  // Threads wait for each other only where that is worth it: a wait costs more than clearing or adding a small result.
  const bool small = groups * result * plan.splits < (std::int64_t{1} << 18);
  const std::int64_t all_rows = groups * edges.n_senders();
  if (small) {
    for (std::int64_t row = 0; row < all_rows; ++row) clear(row);
  }
  const std::int64_t all_tiles = plan.splits == 1 ? 0 : groups * sender_tiles;
  Meeting meeting;
#if defined(_OPENMP)
#pragma omp parallel num_threads(plan.threads)
#endif
  {
#if defined(_OPENMP)
    const auto thread = static_cast<std::size_t>(omp_get_thread_num());
#else
    const std::size_t thread = 0;
#endif
    if (!small) {
#if defined(_OPENMP)
#pragma omp for schedule(static) nowait
#endif
      for (std::int64_t row = 0; row < all_rows; ++row) clear(row);
      meeting.wait();
    }
#if defined(_OPENMP)
#pragma omp for schedule(dynamic, 1) nowait
#endif
    for (std::int64_t i = 0; i < n_tasks; ++i) run(thread, plan.tasks[static_cast<std::size_t>(i)]);
    meeting.wait();
    if (!small) {
#if defined(_OPENMP)
#pragma omp for schedule(static) nowait
#endif
      for (std::int64_t i = 0; i < all_tiles; ++i) combine(i / sender_tiles, i % sender_tiles);
      meeting.wait();
    }
  }
  if (small) {
    for (std::int64_t i = 0; i < all_tiles; ++i) combine(i / sender_tiles, i % sender_tiles);
  }
}

// scores[group, s, r] = Σ over the group's blocks of ⟨sender s, receiver r⟩, 0 where there is no edge.
//
// Senders and Receivers are one side each; every thread works on a copy of its own:
//   take(workspace)                     has its scratch memory from there
//   open(group, block)                  the block that the calls below mean
//   pack(rows, count, target)           rows as [step][row][lane] at target
//   in_place()                          whether row(i) can be read without packing
//   row(i)                              row i's elements of the block (if in_place)
//   address(i)                          where row i's elements of the block begin, to fetch them early; null: nowhere
// Layout: blocks() for each group; length(group, block); block_size(), the longest; part_size(), elements to multiply at
// a time; inner(), elements of all groups.
template <class P, class Out, class Layout, class Senders, class Receivers>
void contract(const Tiles<P>& tiles, const Edges& edges, const Layout& layout, const Senders& senders_side,
              const Receivers& receivers_side, int threads, Out* scores, const Allocate& allocate) {
  const auto receiver_tiles = static_cast<std::int64_t>(edges.receiver_tiles.size());
  const Plan plan = plan_tasks(edges, layout.blocks(), edges.active_tiles * kMaxM * tiles.max_n * layout.inner(), threads);
  const std::int64_t block_size = layout.block_size();
  const std::int64_t group_tiles =
      std::max<std::int64_t>(1, kGroupBytes / static_cast<std::int64_t>(sizeof(P)) / (layout.part_size() * tiles.max_n));
  const std::int64_t panel_tiles =
      std::max<std::int64_t>(1, kPanelBytes / static_cast<std::int64_t>(sizeof(P)) / (block_size * kMaxM));

  const auto groups = static_cast<std::int64_t>(layout.blocks().size());
  const std::int64_t panel = std::min(panel_tiles, plan.most_sender_tiles());
  const std::int64_t group = std::min(group_tiles, receiver_tiles) * tiles.max_n * block_size;
  struct Team {
    std::vector<Worker<P, Senders, Receivers>> workers;
    Sums sums;
  };
  auto team = in_workspace(allocate, [&](Workspace& workspace) {
    Team made{{}, take_sums(plan, edges, groups, workspace)};
    for (int i = 0; i < plan.threads; ++i) {
      made.workers.push_back({senders_side,
                              receivers_side,
                              workspace.take<P>(panel * block_size * kMaxM),
                              {workspace.take<P>(group), workspace.take<P>(group)},
                              std::vector<std::uint8_t>(static_cast<std::size_t>(panel))});
      made.workers.back().senders.take(workspace);
      made.workers.back().receivers.take(workspace);
    }
    return made;
  });
  if (!team) return;
  run_plan(plan, edges, groups, team->workers, team->sums,
           [&](Worker<P, Senders, Receivers>& worker, const Task& task, double* sums) {
             run_task(tiles, edges, layout, task, panel_tiles, group_tiles, worker, sums);
           },
           scores);
}

}  // namespace eapcore
