// Whole numbers times inputs of 8 bits, from tiled codes of 2, 3 and 4 bits (sqs_pyro/kernels/tiled.py).
//
// Inputs of a row of x are rounded to whole numbers from -127 to 127 times a scale of their block, some 32 of them. A
// register of codes has a 32-bit lane for each of 8 outputs. Codes of 2 and 4 bits are brought to the bottoms of its 4
// bytes, a shuffle makes numbers of them, from 0, and one instruction adds their products with 4 inputs in pairs: what
// the offset of the numbers has added is taken off once a row. 3 bits stand in 16-bit halves, so that 2 inputs are
// multiplied at once. Sums of a block fit into 16 bits.

#pragma once

#include <cmath>
#include <vector>

#include "products.h"

namespace sqs {

typedef int32_t Numbers __attribute__((vector_size(4 * kLanes)));

// The whole numbers next to numbers of at most 2^22: 1.5 2^23 and one of them has no digits behind the point, so that
// it stands in the last bits.
inline Numbers nearest(Floats values) {
  const Floats start = 12582912.0f - Floats{};
  return (Numbers)(values + start) - (Numbers)start;
}

constexpr int kTogether = 256;  // rows of x that are rounded before they are multiplied: as bytes they fit in the cache

template <int B>
struct Integers {
  static_assert(B == 2 || B == 3 || B == 4);
  static constexpr int kOffset = 1 << (B - 1);              // of the numbers, which are no less than its negative
  static constexpr int kSteps = B == 3 ? kPairs<3> : 8 / B;  // shifts of a word
  static constexpr int kInputs = 2 * kPairs<B>;             // of a word
  static constexpr int kWords = B == 3 ? 3 : 32 / kInputs;  // of a block
  static constexpr int kBlock = kWords * kInputs;           // inputs that are rounded together
  static constexpr int kPadded = 32;                        // of them, in whole registers
  int8_t numbers[16];  // by code, repeated
  float step;          // what they are multiplied with to be the table's values

  // The values are whole numbers times one step, which whoever calls has checked.
  Integers(const float* table, int64_t size) {
    float least = 0;
    for (int64_t i = 0; i < size; ++i) {
      const float value = std::fabs(table[i]);
      if (value > 0 && (least == 0 || value < least)) least = value;
    }
    step = least > 0 ? least : 1;
    for (int few = 1; few <= kOffset; ++few) {  // the least value may be several steps
      step = (least > 0 ? least : 1) / few;
      bool fits = true;
      for (int64_t i = 0; i < size; ++i) fits = fits && std::round(table[i] / step) * step == table[i];
      if (fits) break;
    }
    for (int i = 0; i < 16; ++i) {
      const int64_t code = i % (1 << B);
      numbers[i] = int8_t(kOffset + (code < size ? std::lround(table[code] / step) : 0));
    }
  }

  // The place of an input in its word: which shift, which byte.
  static constexpr int shift_of(int input) { return B == 3 ? input / 2 : input / 2 % kSteps; }
  static constexpr int byte_of(int input) {
    return input % 2 * 2 + (B == 3 ? 0 : input / 2 / kSteps);
  }

  // M rows of x, `[M, inputs]`, as `[word][shift][M]` lanes of 4 bytes; their blocks' scales `[block][M]`, times the
  // step; and what the offset adds to each row's sums.
  struct Rows {
    std::vector<int8_t> bytes;
    std::vector<float> scales;
    std::vector<float> excess;
  };

  template <class T>
  Rows rounded(const T* x, int64_t rows, int64_t inputs, int64_t words, int width) const {
    const int64_t blocks = (words + kWords - 1) / kWords;
    Rows made{std::vector<int8_t>(words * kSteps * width * 4), std::vector<float>(blocks * width),
              std::vector<float>(width)};
    for (int64_t m = 0; m < rows; ++m) {
      for (int64_t b = 0; b < blocks; ++b) {
        const int64_t first = b * kBlock, count = std::min<int64_t>(kBlock, inputs - first);
        float values[kPadded] = {};
        for (int64_t k = 0; k < count; ++k) values[k] = float(x[m * inputs + first + k]);
        Floats most = {}, odd = {};
        for (int k = 0; k < kPadded; k += kLanes) {
          const Floats here = load<Floats>(values + k), size = here < 0 ? -here : here;
          most = size > most ? size : most;
          odd += here * 0;  // NaN of what is not finite, which no comparison would tell
        }
        float largest = 0, none = 0;
        for (int i = 0; i < kLanes; ++i) largest = std::max(largest, most[i]), none += odd[i];
        const float scale = largest / 127 + none, inverse = scale > 0 && largest < INFINITY ? 127 / largest : 0;
        int32_t numbers[kPadded];
        for (int k = 0; k < kPadded; k += kLanes) store(numbers + k, nearest(load<Floats>(values + k) * inverse));
        int8_t* to = made.bytes.data() + m * 4;
        int sum = 0;
        for (int k = 0; k < int(count); ++k) {
          const int64_t word = b * kWords + k / kInputs;
          const int place = k % kInputs;
          to[(word * kSteps + shift_of(place)) * width * 4 + byte_of(place)] = int8_t(numbers[k]);
          sum += numbers[k];
        }
        made.scales[b * width + m] = scale * step;
        made.excess[m] += scale * step * float(sum * kOffset);
      }
    }
    return made;
  }

  // Sums of a tile's outputs for M rows: `[M][16]`.
  template <int M>
  void tile(const uint32_t* codes, int64_t words, const Rows& x, float (&sums)[M][kRows]) const {
    const int64_t blocks = (words + kWords - 1) / kWords;
#if defined(__AVX2__)
    const __m256i table = _mm256_broadcastsi128_si256(load<__m128i>(numbers));
    const __m256i low = B == 3 ? _mm256_set1_epi16(7) : _mm256_set1_epi8((1 << B) - 1);
    for (int lane = 0; lane < kRows; lane += 8) {
      __m256 totals[M];
#pragma GCC unroll 4
      for (int m = 0; m < M; ++m) totals[m] = _mm256_setzero_ps();
      for (int64_t b = 0; b < blocks; ++b) {
        __m256i parts[M];
#pragma GCC unroll 4
        for (int m = 0; m < M; ++m) parts[m] = _mm256_setzero_si256();
        const int64_t end = std::min(words, (b + 1) * kWords);
        for (int64_t w = b * kWords; w < end; ++w) {
          fetch_ahead(codes + w * kRows);
          const __m256i word = load<__m256i>(codes + w * kRows + lane);
#pragma GCC unroll 8
          for (int s = 0; s < kSteps; ++s) {
            const __m256i here = _mm256_and_si256(_mm256_srli_epi16(word, B * s), low);
            const __m256i weights = _mm256_shuffle_epi8(table, here);
#pragma GCC unroll 4
            for (int m = 0; m < M; ++m) {
              int inputs;
              std::memcpy(&inputs, x.bytes.data() + ((w * kSteps + s) * M + m) * 4, 4);
              parts[m] = _mm256_add_epi16(parts[m], _mm256_maddubs_epi16(weights, _mm256_set1_epi32(inputs)));
            }
          }
        }
#pragma GCC unroll 4
        for (int m = 0; m < M; ++m) {
          const __m256i whole = _mm256_madd_epi16(parts[m], _mm256_set1_epi16(1));
          totals[m] += _mm256_cvtepi32_ps(whole) * _mm256_set1_ps(x.scales[b * M + m]);
        }
      }
#pragma GCC unroll 4
      for (int m = 0; m < M; ++m) store(sums[m] + lane, totals[m] - _mm256_set1_ps(x.excess[m]));
    }
#else
    for (int m = 0; m < M; ++m) {
      for (int row = 0; row < kRows; ++row) {
        float total = 0;
        for (int64_t b = 0; b < blocks; ++b) {
          int part = 0;
          for (int64_t w = b * kWords; w < std::min(words, (b + 1) * kWords); ++w) {
            const uint32_t word = codes[w * kRows + row];
            for (int place = 0; place < kInputs; ++place) {
              const int code = word >> (16 * (place % 2) + B * (place / 2)) & ((1 << B) - 1);
              part += numbers[code] * x.bytes[((w * kSteps + shift_of(place)) * M + m) * 4 + byte_of(place)];
            }
          }
          total += float(part) * x.scales[b * M + m];
        }
        sums[m][row] = total - x.excess[m];
      }
    }
#endif
  }

  // Rows of x in panels of M, which share what is looked up; for all of them the codes of a tile stay in the cache.
  template <int M, class T>
  void panels(const Problem& p, const T* x, T* y) const {
    const int64_t count = (p.rows + M - 1) / M;
    const auto rows = [&](int64_t i) { return std::min<int64_t>(M, p.rows - i * M); };
    std::vector<Rows> inputs(count);
    torch::stable::parallel_for(0, count, 1, [&](int64_t from, int64_t to) {
      for (int64_t i = from; i < to; ++i) inputs[i] = rounded(x + i * M * p.inputs, rows(i), p.inputs, p.words, M);
    });
    torch::stable::parallel_for(0, (p.outputs + kRows - 1) / kRows, 1, [&](int64_t from, int64_t to) {
      for (int64_t t = from; t < to; ++t) {
        for (int64_t i = 0; i < count; ++i) {
          float sums[M][kRows];
          tile<M>(p.codes + t * p.words * kRows, p.words, inputs[i], sums);
          for (int64_t m = 0; m < rows(i); ++m) finish(p, t, i * M + m, sums[m], y);
        }
      }
    });
  }

  template <class T>
  void multiply(const Problem& p, const T* x, T* y) const {
    if (p.rows == 1) return panels<1>(p, x, y);
    for (int64_t m = 0; m < p.rows; m += kTogether) {
      Problem part = p;
      part.rows = std::min<int64_t>(kTogether, p.rows - m);
      panels<4>(part, x + m * p.inputs, y + m * p.outputs);
    }
  }
};

}  // namespace sqs
