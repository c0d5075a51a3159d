// Where the threads of a parallel region wait for each other.
//
// OpenMP's own barriers spin for milliseconds before they sleep: where another process holds a core, each of them would
// cost as much processor time as the thread that it waits for stays away. Here a thread soon sleeps, and all come to
// OpenMP's barrier together: who has woken others stays away, asleep, until they run.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <thread>

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace eapcore {

constexpr int kLooks = 2000;  // at what the others do before a thread sleeps: about as long as waking one takes
constexpr std::chrono::microseconds kNap{20};

class Meeting {
 public:
  // Returns when every thread of the region has called it as often.
  void wait() {
#if defined(_OPENMP)
    const int team = omp_get_num_threads();
    if (team == 1) return;
    const unsigned round = round_.load(std::memory_order_acquire);
    // Those who sleep in this round. Who has been woken may be asleep again in the next one, which nobody leaves before
    // this round's last: two counts suffice.
    std::atomic<int>& asleep = asleep_[round % 2];
    if (here_.fetch_add(1, std::memory_order_acq_rel) + 1 == team) {
      here_.store(0, std::memory_order_relaxed);
      {
        const std::lock_guard<std::mutex> lock(mutex_);
        round_.store(round + 1, std::memory_order_release);
      }
      all_.notify_all();
      while (asleep.load(std::memory_order_acquire) > 0) std::this_thread::sleep_for(kNap);
      return;
    }
    for (int look = 0; look < kLooks; ++look) {
      if (round_.load(std::memory_order_acquire) != round) return;
#if defined(__x86_64__) || defined(__i386__)
      __builtin_ia32_pause();
#endif
    }
    std::unique_lock<std::mutex> lock(mutex_);
    asleep.fetch_add(1, std::memory_order_relaxed);
    all_.wait(lock, [&] { return round_.load(std::memory_order_acquire) != round; });
    asleep.fetch_sub(1, std::memory_order_release);
#endif
  }

 private:
  std::atomic<int> here_{0}, asleep_[2] = {};
  std::atomic<unsigned> round_{0};
  std::mutex mutex_;
  std::condition_variable all_;
};

// run(thread, task) for every task, by a team of threads that each take the next one.
template <class Run>
void in_team(int team, std::int64_t tasks, const Run& run) {
  Meeting meeting;
#if defined(_OPENMP)
#pragma omp parallel num_threads(team)
#endif
  {
#if defined(_OPENMP)
    const auto thread = static_cast<std::size_t>(omp_get_thread_num());
#pragma omp for schedule(dynamic, 1) nowait
#else
    const std::size_t thread = 0;
#endif
    for (std::int64_t task = 0; task < tasks; ++task) run(thread, task);
    meeting.wait();
  }
  static_cast<void>(team);
}

}  // namespace eapcore
