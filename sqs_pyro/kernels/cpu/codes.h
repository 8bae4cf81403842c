// Codes to weights: how a register of codes becomes registers of values, and how these are multiplied.
//
// A tile is 16 output rows. Its codes are 64-byte words, a 32-bit lane a row. A word holds the codes of 2 P
// consecutive inputs, P = 16 / B: code c of a lane's low half belongs to input 2c, that of its high half to input
// 2c + 1. So one shift brings the codes of two inputs of 16 rows to the bottom of 32 halves, where a permutation of
// registers looks up bfloat16 values for `vdpbf16ps`, and float32 values of either half with one shift more: the same
// bytes serve both. Bits above a code are never masked away: tables repeat up to the width of the look-up's index.
//
// The instruction set is the compiler's: AVX-512 with bfloat16, AVX-512, AVX2, or none of these.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <type_traits>

#include <torch/headeronly/util/BFloat16.h>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace sqs {

using torch::headeronly::BFloat16;

// Memory for `count` numbers, not set to zero, in whole cache lines: a load of a register then touches one line.
template <class X>
std::unique_ptr<X[], decltype(&std::free)> scratch(int64_t count) {
  const size_t bytes = (size_t(count) * sizeof(X) + 63) / 64 * 64;
  return {static_cast<X*>(std::aligned_alloc(64, std::max<size_t>(bytes, 64))), &std::free};
}

constexpr int kRows = 16;      // output rows of a tile
#if defined(__AVX512F__)
constexpr int kLanes = 16;     // float32 lanes of a register
constexpr int kPanel = 16;     // rows of x that a decoded value is multiplied with at once
#elif defined(__AVX2__)
constexpr int kLanes = 8;
constexpr int kPanel = 8;
#else
constexpr int kLanes = 4;
constexpr int kPanel = 8;
#endif

typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef uint32_t Words __attribute__((vector_size(4 * kLanes)));

template <class V, class T>
inline V load(const T* from) {
  V value;
  std::memcpy(&value, from, sizeof(V));
  return value;
}

template <class V, class T>
inline void store(T* to, V value) {
  std::memcpy(to, &value, sizeof(V));
}

// Codes are read once and in order. What hardware fetches ahead ends with a page, and from memory it comes too late.
[[gnu::always_inline]] inline void fetch_ahead(const uint32_t* codes) {
  __builtin_prefetch(codes + 16 * kRows);
  __builtin_prefetch(codes + 128 * kRows, 0, 2);  // into the second cache
}

// As many outputs as a register has, or the first ones of a tile's end: those that `wanted` names.
template <class T>
inline void store_outputs(T* to, Floats values, uint32_t wanted) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<T, float>) return _mm512_mask_storeu_ps(to, __mmask16(wanted), (__m512)values);
#endif
#if defined(__AVX512BF16__)
  if constexpr (std::is_same_v<T, BFloat16>) {
    return _mm256_mask_storeu_epi16(to, __mmask16(wanted), (__m256i)_mm512_cvtneps_pbh((__m512)values));
  }
#endif
  for (int i = 0; i < kLanes; ++i) {
    if (wanted >> i & 1) to[i] = T(values[i]);
  }
}

template <int B>
constexpr int kPairs = 16 / B;  // pairs of inputs in a word

// ---- float32: a table in registers, or in memory where it is too long -----------------------------------------

template <int B>
struct Table {
  float values[B < 4 ? 16 : 1 << B];  // repeated: bits above a code do not matter

  Table(const float* table, int64_t size) {
    constexpr int span = 1 << B;
#if defined(__AVX512F__)
    if constexpr (B <= 4) {  // weights in rows may have a table for every few inputs
      const __m512i place = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
      const __m512 there = _mm512_maskz_loadu_ps(__mmask16((1u << size) - 1), table);
      store(values, _mm512_permutexvar_ps(_mm512_and_si512(place, _mm512_set1_epi32(span - 1)), there));
      return;
    }
#endif
    if (B >= 4 && size == span) {
      std::memcpy(values, table, sizeof(values));
      return;
    }
    for (int i = 0; i < int(sizeof(values) / sizeof(float)); ++i) {
      values[i] = i % span < size ? table[i % span] : 0.0f;
    }
  }

  Table(const Table& table, float factor) {
    for (int i = 0; i < int(sizeof(values) / sizeof(float)); ++i) values[i] = table.values[i] * factor;
  }

  inline Floats operator[](Words index) const {
#if defined(__AVX512F__)
    if constexpr (B <= 4) {
      return (Floats)_mm512_permutexvar_ps((__m512i)index, load<__m512>(values));
    } else if constexpr (B == 5) {
      return (Floats)_mm512_permutex2var_ps(load<__m512>(values), (__m512i)index, load<__m512>(values + 16));
    } else {
      return (Floats)_mm512_i32gather_ps((__m512i)(index & 255u), values, 4);
    }
#elif defined(__AVX2__)
    if constexpr (B <= 3) {
      return (Floats)_mm256_permutevar8x32_ps(load<__m256>(values), (__m256i)index);
    } else if constexpr (B == 4) {
      const __m256 low = _mm256_permutevar8x32_ps(load<__m256>(values), (__m256i)index);
      const __m256 high = _mm256_permutevar8x32_ps(load<__m256>(values + 8), (__m256i)index);
      return (Floats)_mm256_blendv_ps(low, high, (__m256)(index << 28));  // bit 3 becomes the sign
    } else {
      return (Floats)_mm256_i32gather_ps(values, (__m256i)(index & ((1u << B) - 1)), 4);
    }
#else
    Floats found;
    for (int i = 0; i < kLanes; ++i) found[i] = values[index[i] & ((1u << B) - 1)];
    return found;
#endif
  }
};

// Weights of 2 P inputs times M rows of x, laid out as `[input][M]`.
template <int B>
struct FloatKernel {
  using X = float;  // one input of a panel of x
  static constexpr int kInputs = 1;
  Table<B> table;

  FloatKernel(const float* values, int64_t size) : table(values, size) {}
  explicit FloatKernel(const Table<B>& floats) : table(floats) {}

  template <int M, int A>
  inline void multiply(const uint32_t* word, const float* x, Floats (&sums)[A][M]) const {
    const Words codes = load<Words>(word);
#pragma GCC unroll 16
    for (int c = 0; c < kPairs<B>; ++c) {
      const Floats even = table[codes >> (B * c)], odd = table[codes >> (16 + B * c)];
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m) sums[(2 * c) % A][m] += even * x[2 * c * M + m];
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m) sums[(2 * c + 1) % A][m] += odd * x[(2 * c + 1) * M + m];
    }
  }

  inline void decode(const uint32_t* word, float* to, int) const {  // [input][row]
    const Words codes = load<Words>(word);
#pragma GCC unroll 16
    for (int c = 0; c < kPairs<B>; ++c) {
      store(to + 2 * c * kRows, table[codes >> (B * c)]);
      store(to + (2 * c + 1) * kRows, table[codes >> (16 + B * c)]);
    }
  }

  template <int M>
  static inline void accumulate(const float* weights, const float* x, Floats (&sums)[M]) {
    const Floats weight = load<Floats>(weights);
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) sums[m] += weight * x[m];
  }
};

#if defined(__AVX512BF16__)

// ---- bfloat16: pairs of inputs, products of pairs ---------------------------------------------------------------

template <int B>
struct PairKernel {
  using X = uint32_t;  // two inputs of a panel of x
  static constexpr int kInputs = 2;
  uint16_t values[B < 5 ? 32 : 1 << B];

  PairKernel(const float* table, int64_t size) : PairKernel(Table<B>(table, size)) {}

  explicit PairKernel(const Table<B>& floats) {
    constexpr int count = sizeof(floats.values) / 4;
    for (int i = 0; i < int(sizeof(values) / 2); i += 32) {
      const __m512 low = load<__m512>(floats.values + i % count), high = load<__m512>(floats.values + (i + 16) % count);
      store(values + i, _mm512_cvtne2ps_pbh(high, low));
    }
  }

  inline __m512bh look_up(__m512i index) const {
    if constexpr (B <= 5) {
      return (__m512bh)_mm512_permutexvar_epi16(index, load<__m512i>(values));
    } else {
      __m512i quarter[4];
      for (int q = 0; q < 4; ++q) {
        quarter[q] = _mm512_permutex2var_epi16(
            load<__m512i>(values + 64 * q), index, load<__m512i>(values + 64 * q + 32));
      }
      const __mmask32 bit6 = _mm512_test_epi16_mask(index, _mm512_set1_epi16(64));
      const __mmask32 bit7 = _mm512_test_epi16_mask(index, _mm512_set1_epi16(128));
      return (__m512bh)_mm512_mask_blend_epi16(
          bit7, _mm512_mask_blend_epi16(bit6, quarter[0], quarter[1]),
          _mm512_mask_blend_epi16(bit6, quarter[2], quarter[3]));
    }
  }

  static inline void add(Floats& sum, __m512bh weights, uint32_t pair) {
    sum = (Floats)_mm512_dpbf16_ps((__m512)sum, weights, (__m512bh)_mm512_set1_epi32(int(pair)));
  }

  template <int M, int A>
  inline void multiply(const uint32_t* word, const uint32_t* x, Floats (&sums)[A][M]) const {
    const __m512i codes = load<__m512i>(word);
#pragma GCC unroll 16
    for (int c = 0; c < kPairs<B>; ++c) {
      const __m512bh weights = look_up(_mm512_srli_epi16(codes, B * c));
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m) add(sums[c % A][m], weights, x[c * M + m]);
    }
  }

  inline void decode(const uint32_t* word, uint32_t* to, int) const {  // [pair][row]
    const __m512i codes = load<__m512i>(word);
#pragma GCC unroll 16
    for (int c = 0; c < kPairs<B>; ++c) store(to + c * kRows, look_up(_mm512_srli_epi16(codes, B * c)));
  }

  template <int M>
  static inline void accumulate(const uint32_t* weights, const uint32_t* x, Floats (&sums)[M]) {
    const __m512bh weight = load<__m512bh>(weights);
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) add(sums[m], weight, x[m]);
  }
};

#endif

// ---- a table for each output: too many for registers, so looked up in memory ------------------------------------

template <int B>
struct LaneTables {
  const float* values;
  uint32_t size;
  uint32_t first[kRows];  // of a row's table in `values`

  // Tables of `size` values; those of output `n` are the `n / outputs_of_table`-th.
  LaneTables(const float* values, int64_t size, int64_t output, int64_t outputs, int64_t outputs_of_table)
      : values(values), size(uint32_t(size)) {
    for (int64_t row = 0; row < kRows; ++row) {
      first[row] = uint32_t(std::min(output + row, outputs - 1) / outputs_of_table * size);
    }
  }

  inline Floats look_up(Words codes, int lane) const {
    Words index = codes & ((1u << B) - 1);
    index = index < size ? index : Words{} + (size - 1);
    index += load<Words>(first + lane);
#if defined(__AVX512F__)
    return (Floats)_mm512_i32gather_ps((__m512i)index, values, 4);
#elif defined(__AVX2__)
    return (Floats)_mm256_i32gather_ps(values, (__m256i)index, 4);
#else
    Floats found;
    for (int i = 0; i < kLanes; ++i) found[i] = values[index[i]];
    return found;
#endif
  }

  inline void decode(const uint32_t* word, float* to, int lane) const {
    const Words codes = load<Words>(word);
    for (int c = 0; c < kPairs<B>; ++c) {
      store(to + 2 * c * kRows, look_up(codes >> (B * c), lane));
      store(to + (2 * c + 1) * kRows, look_up(codes >> (16 + B * c), lane));
    }
  }

  inline void decode(const uint32_t* word, uint32_t* to, int lane) const {
    const Words codes = load<Words>(word);
    for (int c = 0; c < kPairs<B>; ++c) {
      const Floats even = look_up(codes >> (B * c), lane), odd = look_up(codes >> (16 + B * c), lane);
      for (int i = 0; i < kLanes; ++i) {
        to[c * kRows + i] = uint32_t(BFloat16(even[i]).x) | uint32_t(BFloat16(odd[i]).x) << 16;
      }
    }
  }
};

}  // namespace sqs
