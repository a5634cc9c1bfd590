// Threads for C++ programs that have no pool of their own. (The torch layer uses torch's.)
#pragma once

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "tome_core/types.h"

#if defined(__unix__) || defined(__APPLE__)
#include <unistd.h>
#endif

namespace tome {

// A fixed number of threads, the calling one among them, that wait between loops. Loops started
// from several threads at once take turns; one started inside a loop runs on its own thread, and so
// does every loop in a process that was forked off, where the other threads do not exist.
class ThreadPool {
  public:
    // The calling thread and `count` - 1 more.
    explicit ThreadPool(int count = static_cast<int>(std::thread::hardware_concurrency()))
        : workers_(std::make_unique<Workers>(std::max(1, count))) {}

    ~ThreadPool() {
        // In a fork the locks may be held, and the threads waited for, for ever: left as they are.
        if (forked()) static_cast<void>(workers_.release());
    }

    ThreadPool(const ThreadPool&) = delete;
    ThreadPool& operator=(const ThreadPool&) = delete;

    // What the kernels take. Valid as long as the pool lives.
    Threads threads() { return {&ThreadPool::run, this, workers_->count()}; }

  private:
    static int64_t process() {
#if defined(__unix__) || defined(__APPLE__)
        return getpid();
#else
        return 0;
#endif
    }

    bool forked() const { return process() != process_; }

    static void run(void* self, int64_t count, int64_t grain, Threads::Body body, void* context) {
        const auto* pool = static_cast<const ThreadPool*>(self);
        if (Workers::inside_loop() || pool->forked()) {
            body(context, 0, count);
            return;
        }
        pool->workers_->run_loop(count, grain, body, context);
    }

    // The threads, and the loop that they work on.
    class Workers {
      public:
        explicit Workers(int count) : count_(count) {
            for (int i = 1; i < count_; ++i) threads_.emplace_back([this] { wait_for_work(); });
        }

        ~Workers() {
            {
                const std::lock_guard<std::mutex> lock(mutex_);
                stop_ = true;
            }
            wake_.notify_all();
            for (std::thread& thread : threads_) thread.join();
        }

        int count() const { return count_; }

        static bool& inside_loop() {
            thread_local bool inside = false;
            return inside;
        }

        void run_loop(int64_t count, int64_t grain, Threads::Body body, void* context) {
            const std::lock_guard<std::mutex> turn(turn_);
            // A few chunks per thread, so that a thread that falls behind is relieved.
            const int64_t even = (count + 4 * count_ - 1) / (4 * count_);
            {
                const std::lock_guard<std::mutex> lock(mutex_);
                loop_ = {count, std::max({grain, even, int64_t{1}}), body, context};
                next_ = 0;
                error_ = nullptr;
                busy_ = static_cast<int>(threads_.size());
                ++generation_;
            }
            wake_.notify_all();
            work();
            std::unique_lock<std::mutex> lock(mutex_);
            done_.wait(lock, [this] { return busy_ == 0; });
            if (error_) std::rethrow_exception(error_);
        }

      private:
        struct Loop {
            int64_t count = 0, chunk = 1;
            Threads::Body body = nullptr;
            void* context = nullptr;
        };

        // Takes chunks of the current loop until none is left.
        void work() {
            inside_loop() = true;
            for (;;) {
                const int64_t begin = next_.fetch_add(loop_.chunk);
                if (begin >= loop_.count) break;
                try {
                    loop_.body(loop_.context, begin, std::min(begin + loop_.chunk, loop_.count));
                } catch (...) {
                    const std::lock_guard<std::mutex> lock(mutex_);
                    if (!error_) error_ = std::current_exception();
                }
            }
            inside_loop() = false;
        }

        void wait_for_work() {
            uint64_t seen = 0;
            for (;;) {
                {
                    std::unique_lock<std::mutex> lock(mutex_);
                    wake_.wait(lock, [&] { return stop_ || generation_ != seen; });
                    if (stop_) return;
                    seen = generation_;
                }
                work();
                const std::lock_guard<std::mutex> lock(mutex_);
                if (--busy_ == 0) done_.notify_one();
            }
        }

        const int count_;
        std::vector<std::thread> threads_;
        std::mutex turn_;   // held for a whole loop
        std::mutex mutex_;  // guards everything below but next_
        std::condition_variable wake_, done_;
        Loop loop_;
        std::atomic<int64_t> next_{0};
        int busy_ = 0;
        uint64_t generation_ = 0;
        bool stop_ = false;
        std::exception_ptr error_;
    };

    std::unique_ptr<Workers> workers_;
    int64_t process_ = process();
};

}  // namespace tome
