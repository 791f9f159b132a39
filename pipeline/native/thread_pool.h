// Threads that wait for work.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace regatta {

// Runs one function on all its threads at once. The caller works along, so a pool of one thread starts none.
class ThreadPool {
 public:
  explicit ThreadPool(int threads) {
    try {
      for (int i = 1; i < threads; ++i) threads_.emplace_back([this] { serve(); });
    } catch (...) {
      stop();  // destroying a thread that still runs would end the process
      throw;
    }
  }
  ~ThreadPool() { stop(); }
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  // Returns when `work` has returned on every thread. It must not throw. Calls from several threads take turns.
  void run(const std::function<void()>& work) {
    std::lock_guard<std::mutex> one_call_at_a_time(calls_);
    {
      std::lock_guard<std::mutex> lock(mutex_);
      work_ = &work;
      busy_ = static_cast<int>(threads_.size());
      ++generation_;
    }
    wake_.notify_all();
    work();
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [this] { return busy_ == 0; });
    work_ = nullptr;
  }

 private:
  void stop() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      closing_ = true;
    }
    wake_.notify_all();
    for (std::thread& thread : threads_) thread.join();
  }

  void serve() {
    uint64_t seen = 0;
    for (;;) {
      const std::function<void()>* work;
      {
        std::unique_lock<std::mutex> lock(mutex_);
        wake_.wait(lock, [&] { return closing_ || generation_ != seen; });
        if (closing_) return;
        seen = generation_;
        work = work_;
      }
      (*work)();
      std::lock_guard<std::mutex> lock(mutex_);
      if (--busy_ == 0) done_.notify_one();
    }
  }

  std::vector<std::thread> threads_;
  std::mutex mutex_, calls_;
  std::condition_variable wake_, done_;
  const std::function<void()>* work_ = nullptr;
  int busy_ = 0;
  uint64_t generation_ = 0;  // of `work_`; tells a thread that woke up whether there is something new
  bool closing_ = false;
};

}  // namespace regatta
