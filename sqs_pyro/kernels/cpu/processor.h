// What this processor multiplies bfloat16 with: a matrix unit, products of pairs, or, where these are slow, float32.

#pragma once

#include <algorithm>
#include <chrono>

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

#if defined(__AMX_BF16__) && defined(__linux__)
#define SQS_MATRIX_UNIT
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace sqs {

// Whether there is a matrix unit, and the system lets this process have its registers: it saves them only for those
// that have asked.
inline bool has_matrix_unit() {
#if defined(SQS_MATRIX_UNIT)
  static const bool allowed = [] {
    constexpr int request = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return syscall(SYS_arch_prctl, request, tile_data) == 0;
  }();
  return allowed;
#else
  return false;
#endif
}

#if defined(__AVX512BF16__)
// Whether a product of pairs takes hardly longer than two products: half as long on AMD's processors, nearly twice as
// long on Intel's as yet. Measured once in a process, in some microseconds, of which the shortest count.
inline bool pairs_are_fast() {
  static const bool fast = [] {
    const auto shortest = [](auto&& eight) {
      auto least = std::chrono::steady_clock::duration::max();
      for (int attempt = 0; attempt < 8; ++attempt) {
        const auto start = std::chrono::steady_clock::now();
        for (int i = 0; i < 256; ++i) eight();
        least = std::min(least, std::chrono::steady_clock::now() - start);
      }
      return least;
    };
    // Independent of each other, so that it is throughput that counts; zeros, so that no number is a special one.
    __m512 sums[8] = {};
    const __m512 x = _mm512_setzero_ps();
    const auto pairs = shortest([&] {
#pragma GCC unroll 8
      for (auto& sum : sums) {
        sum = _mm512_dpbf16_ps(sum, (__m512bh)x, (__m512bh)x);
        asm volatile("" : "+v"(sum));
      }
    });
    const auto twice = shortest([&] {
#pragma GCC unroll 2
      for (int time = 0; time < 2; ++time) {
#pragma GCC unroll 8
        for (auto& sum : sums) {
          sum = _mm512_fmadd_ps(x, x, sum);
          asm volatile("" : "+v"(sum));
        }
      }
    });
    return 4 * pairs < 5 * twice;
  }();
  return fast;
}
#endif

}  // namespace sqs
