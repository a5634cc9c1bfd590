#include "tome_core/thread_pool.h"

#include <gtest/gtest.h>

#include <numeric>
#include <stdexcept>

#if defined(__unix__) || defined(__APPLE__)
#include <sys/wait.h>
#include <unistd.h>
#endif

namespace {

TEST(ThreadPool, CoversEveryIndexOnce) {
    for (int count : {1, 2, 3, 8}) {
        tome::ThreadPool pool(count);
        const tome::Threads threads = pool.threads();
        EXPECT_EQ(threads.count, count);
        for (int64_t total : {0, 1, 2, 7, 100, 1001}) {
            for (int64_t grain : {1, 3, 64, 5000}) {
                std::vector<int> hits(static_cast<size_t>(total));
                threads.parallel_for(total, grain, [&](int64_t begin, int64_t end) {
                    for (int64_t i = begin; i < end; ++i) ++hits[static_cast<size_t>(i)];
                });
                EXPECT_EQ(hits, std::vector<int>(static_cast<size_t>(total), 1));
            }
        }
    }
}

TEST(ThreadPool, RunsNestedLoops) {
    tome::ThreadPool pool(3);
    const tome::Threads threads = pool.threads();
    std::atomic<int64_t> sum{0};
    threads.parallel_for(10, 1, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            threads.parallel_for(10, 1, [&](int64_t b, int64_t e) { sum += e - b; });
        }
    });
    EXPECT_EQ(sum, 100);
}

TEST(ThreadPool, TakesLoopsFromSeveralThreads) {
    tome::ThreadPool pool(2);
    std::vector<int64_t> sums(4);
    std::vector<std::thread> callers;
    for (int64_t& sum : sums) {
        callers.emplace_back([&sum, threads = pool.threads()] {
            for (int repeat = 0; repeat < 50; ++repeat) {
                std::atomic<int64_t> part{0};
                threads.parallel_for(64, 1, [&](int64_t begin, int64_t end) {
                    for (int64_t i = begin; i < end; ++i) part += i;
                });
                sum += part;
            }
        });
    }
    for (std::thread& caller : callers) caller.join();
    EXPECT_EQ(sums, std::vector<int64_t>(4, 50 * 64 * 63 / 2));
}

TEST(ThreadPool, PassesExceptionsOnAndLivesOn) {
    tome::ThreadPool pool(2);
    const tome::Threads threads = pool.threads();
    EXPECT_THROW(threads.parallel_for(
                     100, 1, [](int64_t, int64_t) { throw std::runtime_error("from the loop"); }),
                 std::runtime_error);
    std::atomic<int64_t> done{0};
    threads.parallel_for(100, 1, [&](int64_t begin, int64_t end) { done += end - begin; });
    EXPECT_EQ(done, 100);
}

#if defined(__unix__) || defined(__APPLE__)

// As the workers of a data loader come about. One that hangs is ended by its alarm, which shows.
TEST(ThreadPool, RunsLoopsInAForkedProcess) {
    auto pool = std::make_unique<tome::ThreadPool>(3);
    const auto sum_to = [&](int64_t total) {
        std::atomic<int64_t> sum{0};
        pool->threads().parallel_for(total, 1, [&](int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; ++i) sum += i;
        });
        return sum.load();
    };
    EXPECT_EQ(sum_to(100), 4950);
    const pid_t child = fork();
    if (child == 0) {
        alarm(20);
        const bool right = sum_to(100) == 4950;
        tome::ThreadPool own(2);  // one of its own has threads
        std::atomic<int64_t> done{0};
        own.threads().parallel_for(64, 1, [&](int64_t begin, int64_t end) { done += end - begin; });
        pool.reset();
        _exit(right && done == 64 ? 0 : 1);
    }
    int status = -1;
    ASSERT_EQ(waitpid(child, &status, 0), child);
    EXPECT_TRUE(WIFEXITED(status));
    EXPECT_EQ(WEXITSTATUS(status), 0);
    EXPECT_EQ(sum_to(1000), 499500);
}

// One thread runs a loop, with the pool's locks, while another forks.
TEST(ThreadPool, MayBeForkedDuringALoop) {
    tome::ThreadPool pool(2);
    std::atomic<bool> begun{false}, go_on{false};
    std::thread other([&] {
        pool.threads().parallel_for(2, 1, [&](int64_t, int64_t) {
            begun = true;
            while (!go_on) std::this_thread::yield();
        });
    });
    while (!begun) std::this_thread::yield();
    const pid_t child = fork();
    if (child == 0) {
        alarm(20);
        int64_t done = 0;
        pool.threads().parallel_for(8, 1, [&](int64_t begin, int64_t end) { done += end - begin; });
        _exit(done == 8 ? 0 : 1);
    }
    go_on = true;
    other.join();
    int status = -1;
    ASSERT_EQ(waitpid(child, &status, 0), child);
    EXPECT_TRUE(WIFEXITED(status));
    EXPECT_EQ(WEXITSTATUS(status), 0);
}

#endif

}  // namespace
