// The contraction as outer products, for many senders and many receivers: one side's rows are packed turned round, as the
// lanes of vectors ("columns"; called senders here, whichever side they are), the other's are broadcast word by word.
//
// tile.hpp's form adds up the lanes of every accumulator after 40 vectors of each row, a tenth of its time; here each
// accumulator takes 512 multiply-adds before it is added to the sums as it is. That pays where a column, once turned round
// and filled up to whole vectors, meets many rows.
#pragma once

#include <cmath>

#include "contract.hpp"

namespace eapcore {

constexpr int kMaxLanes = 16;
// Steps in a block: 512 words with 16 lanes, so that 12 rows take 24 KB of a first-level cache.
constexpr std::int64_t kOuterSteps = 32;
constexpr std::int64_t kColumnBytes = 384 * 1024;  // packed columns; two buffers of them stay in a second-level cache

// Costs in vector multiply-adds for each word of the inner dimension, measured on Zen 4: turning a column round, copying a
// row, and what a multiply-add of tile.hpp's form costs.
constexpr double kTurnCost = 0.6, kCopyCost = 0.2, kDotCost = 1.3;

inline double outer_cost(double columns, double rows, double lanes) {
  const double vectors = std::ceil(columns / lanes);
  return vectors * (rows + kTurnCost * lanes) + kCopyCost * rows;
}

// Which side to turn round.
inline bool columns_are_receivers(std::int64_t n_senders, std::int64_t n_receivers, int lanes) {
  const auto senders = static_cast<double>(n_senders), receivers = static_cast<double>(n_receivers);
  return outer_cost(receivers, senders, lanes) < outer_cost(senders, receivers, lanes);
}

// Whether outer products are the faster form, before and after it is known which tiles have an edge.
inline bool outer_pays(std::int64_t columns, std::int64_t rows, int lanes) {
  const auto c = static_cast<double>(columns), r = static_cast<double>(rows);
  return outer_cost(c, r, lanes) < kDotCost * c * r / lanes;
}
inline bool outer_pays(const Edges& edges) {
  const auto lanes = static_cast<double>(edges.max_m), columns = static_cast<double>(edges.senders.size());
  const double tiles = static_cast<double>(edges.sender_tiles.size() * edges.receiver_tiles.size());
  const double share = static_cast<double>(edges.active_tiles) / std::max(tiles, 1.0);
  const auto rows = static_cast<double>(edges.receivers.size());
  const double turning = outer_cost(columns, rows, lanes) - std::ceil(columns / lanes) * rows;
  return share * std::ceil(columns / lanes) * rows + turning < kDotCost * static_cast<double>(edges.n_edges) / lanes;
}

// What one thread works with. While one buffer of packed columns is multiplied, the other is filled.
template <class P, class Columns, class Rows>
struct OuterWorker {
  Columns columns;  // opened at the block that is packed
  Rows rows;        // opened at the block that is multiplied
  P *packed[2], *tile;
};

// Adds one task's products to sums [column tile][row tile][row][column].
template <class P, class Layout, class Columns, class Rows>
void run_outer_task(const OuterTiles<P>& tiles, const Edges& edges, const Layout& layout, const Task& task,
                    std::int64_t group_tiles, OuterWorker<P, Columns, Rows>& worker, double* sums) {
  const auto row_tiles = static_cast<std::int64_t>(edges.receiver_tiles.size());
  const std::int64_t tile_elements = layout.block_size() * tiles.lanes;
  // A pass multiplies one group of columns with all rows in one block.
  struct Pass {
    std::int64_t block;
    Range columns;
  };
  std::vector<Pass> passes;
  for (std::int64_t block = task.blocks.begin; block < task.blocks.end; ++block) {
    for (const Range& group : even_tiles(task.sender_tiles.size(), group_tiles)) {
      passes.push_back({block, {task.sender_tiles.begin + group.begin, task.sender_tiles.begin + group.end}});
    }
  }
  // Packing of a pass's columns; behind the last pass there is nothing to pack.
  const auto packing_of = [&](std::size_t index) {
    const bool exists = index < passes.size();
    const Range columns = exists ? passes[index].columns : Range{0, 0};
    if (exists) worker.columns.open(task.group, passes[index].block);
    P* packed = worker.packed[index % 2];
    return Packing(edges.sender_tiles, edges.senders, worker.columns, columns, [&, columns, packed](std::int64_t i) {
      const Range tile = edges.sender_tiles[static_cast<std::size_t>(i)];
      worker.columns.pack_columns(tiles, edges.senders.data() + tile.begin, tile.size(),
                                  packed + (i - columns.begin) * tile_elements);
    });
  };
  packing_of(0).finish();

  for (std::size_t index = 0; index < passes.size(); ++index) {
    const Pass& pass = passes[index];
    auto packing = packing_of(index + 1);
    worker.rows.open(task.group, pass.block);
    const std::int64_t steps = (layout.length(task.group, pass.block) + tiles.width - 1) / tiles.width;
    for (std::int64_t j = 0; j < row_tiles; ++j) {
      packing.begin_step(j, row_tiles);
      std::int64_t i = pass.columns.begin;
      while (i < pass.columns.end && !edges.has(i, j)) ++i;
      if (i == pass.columns.end) continue;
      const Range rows = edges.receiver_tiles[static_cast<std::size_t>(j)];
      worker.rows.pack(edges.receivers.data() + rows.begin, rows.size(), worker.tile);
      // Each call fetches rows that are needed soon: those of the next tile, then columns of the next pass.
      std::int64_t next = rows.end;
      const std::int64_t next_end = j + 1 < row_tiles ? edges.receiver_tiles[static_cast<std::size_t>(j + 1)].end : next;
      for (; i < pass.columns.end; ++i) {
        if (!edges.has(i, j)) continue;
        const char* ahead[kAhead];
        for (const char*& address : ahead) {
          address = next < next_end ? worker.rows.address(edges.receivers[static_cast<std::size_t>(next++)])
                                    : packing.fetch();
          if (address == nullptr) address = reinterpret_cast<const char*>(worker.tile);
        }
        tiles.tile[rows.size() - 1](worker.tile,
                                    worker.packed[index % 2] + (i - pass.columns.begin) * tile_elements, steps,
                                    sums + ((i - task.sender_tiles.begin) * row_tiles + j) * edges.tile_sums, ahead);
      }
    }
    packing.finish();
  }
}

// As contract(), with columns for senders and rows for receivers; a side has pack_columns(tiles, rows, count, target) and
// take_columns(tiles, workspace) too.
template <class P, class Out, class Layout, class Columns, class Rows>
void contract_outer(const OuterTiles<P>& tiles, const Edges& edges, const Layout& layout, const Columns& columns,
                    const Rows& rows, int threads, Out* scores, const Allocate& allocate) {
  const Plan plan = plan_tasks(edges, layout.blocks(), edges.active_tiles * edges.tile_sums * layout.inner(), threads);
  const std::int64_t tile_elements = layout.block_size() * tiles.lanes;
  const std::int64_t group_tiles =
      std::max<std::int64_t>(1, kColumnBytes / static_cast<std::int64_t>(sizeof(P)) / tile_elements);
  const std::int64_t packed = std::min(group_tiles, plan.most_sender_tiles()) * tile_elements;
  const auto groups = static_cast<std::int64_t>(layout.blocks().size());
  struct Team {
    std::vector<OuterWorker<P, Columns, Rows>> workers;
    Sums sums;
  };
  auto team = in_workspace(allocate, [&](Workspace& workspace) {
    Team made{{}, take_sums(plan, edges, groups, workspace)};
    for (int i = 0; i < plan.threads; ++i) {
      made.workers.push_back({columns,
                              rows,
                              {workspace.take<P>(packed), workspace.take<P>(packed)},
                              workspace.take<P>(kMaxOuterRows * layout.block_size())});
      made.workers.back().columns.take_columns(tiles, workspace);
      made.workers.back().rows.take(workspace);
    }
    return made;
  });
  if (!team) return;
  run_plan(plan, edges, groups, team->workers, team->sums,
           [&](OuterWorker<P, Columns, Rows>& worker, const Task& task, double* sums) {
             run_outer_task(tiles, edges, layout, task, group_tiles, worker, sums);
           },
           scores);
}

}  // namespace eapcore
