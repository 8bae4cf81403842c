// Pixels in the order that convolutions read: channels side by side, in bfloat16 as pairs.

#pragma once

#include <algorithm>

#include "codes.h"

namespace sqs {

#if defined(__AVX512BW__)

constexpr int kTurned = 16;  // rows and columns that are turned over in registers

// Their columns become rows.
inline void turn(__m512 (&rows)[16]) {
  __m512 turned[16];
#pragma GCC unroll 8
  for (int m = 0; m < 16; m += 2) {
    turned[m] = _mm512_unpacklo_ps(rows[m], rows[m + 1]), turned[m + 1] = _mm512_unpackhi_ps(rows[m], rows[m + 1]);
  }
#pragma GCC unroll 4
  for (int m = 0; m < 16; m += 4) {
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      const __m512d low = (__m512d)turned[m + half], high = (__m512d)turned[m + 2 + half];
      rows[m + 2 * half] = (__m512)_mm512_unpacklo_pd(low, high);
      rows[m + 2 * half + 1] = (__m512)_mm512_unpackhi_pd(low, high);
    }
  }
#pragma GCC unroll 4
  for (int n = 0; n < 4; ++n) {  // of every 128 bits: column n, four rows at a time
    const __m512 low = _mm512_shuffle_f32x4(rows[n], rows[n + 4], 0x88);
    const __m512 high = _mm512_shuffle_f32x4(rows[n + 8], rows[n + 12], 0x88);
    const __m512 low_odd = _mm512_shuffle_f32x4(rows[n], rows[n + 4], 0xdd);
    const __m512 high_odd = _mm512_shuffle_f32x4(rows[n + 8], rows[n + 12], 0xdd);
    turned[n] = _mm512_shuffle_f32x4(low, high, 0x88), turned[n + 8] = _mm512_shuffle_f32x4(low, high, 0xdd);
    turned[n + 4] = _mm512_shuffle_f32x4(low_odd, high_odd, 0x88);
    turned[n + 12] = _mm512_shuffle_f32x4(low_odd, high_odd, 0xdd);
  }
  std::copy(turned, turned + 16, rows);
}

inline __mmask16 first_lanes(int64_t count) { return __mmask16((1u << count) - 1); }

inline __m512 words(const float* from, int64_t count) { return _mm512_maskz_loadu_ps(first_lanes(count), from); }
inline __m512 words(const BFloat16* from, int64_t count) {  // their bits
  return (__m512)_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(first_lanes(count), from));
}
inline void put_words(float* to, __m512 words, int64_t count) { _mm512_mask_storeu_ps(to, first_lanes(count), words); }
inline void put_words(BFloat16* to, __m512 words, int64_t count) {
  _mm256_mask_storeu_epi16(to, first_lanes(count), _mm512_cvtepi32_epi16((__m512i)words));
}

#elif defined(__AVX2__)

constexpr int kTurned = 8;

inline void turn(__m256 (&rows)[8]) {
  __m256 turned[8];
#pragma GCC unroll 4
  for (int m = 0; m < 8; m += 2) {
    turned[m] = _mm256_unpacklo_ps(rows[m], rows[m + 1]), turned[m + 1] = _mm256_unpackhi_ps(rows[m], rows[m + 1]);
  }
#pragma GCC unroll 2
  for (int m = 0; m < 8; m += 4) {  // of every 128 bits: a column, four rows at a time
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      const __m256d low = (__m256d)turned[m + half], high = (__m256d)turned[m + 2 + half];
      rows[m + 2 * half] = (__m256)_mm256_unpacklo_pd(low, high);
      rows[m + 2 * half + 1] = (__m256)_mm256_unpackhi_pd(low, high);
    }
  }
#pragma GCC unroll 4
  for (int n = 0; n < 4; ++n) {
    turned[n] = _mm256_permute2f128_ps(rows[n], rows[n + 4], 0x20);
    turned[n + 4] = _mm256_permute2f128_ps(rows[n], rows[n + 4], 0x31);
  }
  std::copy(turned, turned + 8, rows);
}

inline __m256 words(const float* from, int64_t count) {
  if (count == 8) return _mm256_loadu_ps(from);
  const __m256i there = _mm256_cmpgt_epi32(_mm256_set1_epi32(int(count)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  return _mm256_maskload_ps(from, there);
}
inline void put_words(float* to, __m256 words, int64_t count) {  // masked stores are slow on many of these machines
  if (count == 8) return _mm256_storeu_ps(to, words);
  __m128 rest = _mm256_castps256_ps128(words);
  if (count & 4) _mm_storeu_ps(to, rest), to += 4, rest = _mm256_extractf128_ps(words, 1);
  if (count & 2) _mm_storel_pi((__m64*)to, rest), to += 2, rest = _mm_movehl_ps(rest, rest);
  if (count & 1) _mm_store_ss(to, rest);
}

#endif

// `[rows][columns]`, rows `stride` apart, turned over into rows that are `step` apart.
template <class T>
void turn_over(const T* from, int64_t rows, int64_t columns, int64_t stride, T* to, int64_t step) {
#if defined(__AVX512BW__) || defined(__AVX2__)
  for (int64_t row = 0; row < rows; row += kTurned) {
    const int64_t height = std::min<int64_t>(kTurned, rows - row);
    for (int64_t column = 0; column < columns; column += kTurned) {
      const int64_t width = std::min<int64_t>(kTurned, columns - column);
      decltype(words(from, 0)) block[kTurned];
      for (int64_t i = 0; i < kTurned; ++i) {
        block[i] = words(from + (row + std::min(i, height - 1)) * stride + column, width);
      }
      turn(block);
      for (int64_t i = 0; i < width; ++i) put_words(to + (column + i) * step + row, block[i], height);
    }
  }
#else
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t column = 0; column < columns; ++column) to[column * step + row] = from[row * stride + column];
  }
#endif
}

// Neighbouring numbers as the copy has them: as they are, or joined to pairs.
inline void put_numbers(const float* from, int64_t count, float* to) {
  int64_t i = 0;
#if defined(__AVX512BW__)
  for (; i < count; i += 16) {
    const int64_t some = std::min<int64_t>(16, count - i);
    put_words(to + i, words(from + i, some), some);
  }
#endif
  for (; i + kLanes <= count; i += kLanes) store(to + i, load<Floats>(from + i));
  for (; i < count; ++i) to[i] = from[i];
}

inline void put_numbers(const BFloat16* from, int64_t count, uint32_t* to) {
  std::memcpy(to, from, count / 2 * 4);
  if (count % 2) to[count / 2] = from[count - 1].x;
}

// Pixels of few channels, an odd number of them, as pairs: the last one's other half is empty.
inline void put_odd_pixels(const BFloat16* from, int64_t pixels, int64_t channels, uint32_t* to) {
  const int64_t pairs = (channels + 1) / 2;
#if defined(__AVX512BW__)
  const int64_t together = 16 / pairs;  // pixels in a register
  uint16_t places[32] = {};
  uint32_t there = 0;
  for (int64_t i = 0; i < together * channels; ++i) {
    const int64_t half = i / channels * 2 * pairs + i % channels;
    places[half] = uint16_t(i), there |= 1u << half;
  }
  for (; pixels > 0; pixels -= together, from += together * channels, to += together * pairs) {
    const int64_t some = std::min(pixels, together);
    const __m512i found = _mm512_maskz_loadu_epi16(__mmask32((1ull << some * channels) - 1), from);
    const __m512i paired = _mm512_maskz_permutexvar_epi16(there, load<__m512i>(places), found);
    _mm512_mask_storeu_epi32(to, first_lanes(some * pairs), paired);
  }
#else
  for (int64_t i = 0; i < pixels; ++i) put_numbers(from + i * channels, channels, to + i * pairs);
#endif
}

// Pixels for depthwise sums, `of_pixel` numbers each.
inline void put_own_pixels(const float* from, int64_t pixels, int64_t channels, float* to, int64_t of_pixel, bool) {
  for (int64_t i = 0; i < pixels; ++i) put_numbers(from + i * channels, channels, to + i * of_pixel);
}

#if defined(__AVX512BF16__)
// Each paired with the next one of the row; where there are zeros before, the last of these with the first.
inline void put_own_pixels(const BFloat16* from, int64_t pixels, int64_t channels, uint32_t* to, int64_t of_pixel,
                           bool zeros) {
  for (int64_t i = zeros ? -1 : 0; i < pixels; ++i) {
    const BFloat16 *here = from + i * channels, *next = here + channels;
    for (int64_t c = 0; c < channels; c += 16) {
      const int64_t some = std::min<int64_t>(16, channels - c);
      const __m512i low = i < 0 ? __m512i{} : (__m512i)words(here + c, some);
      const __m512i high = i + 1 == pixels ? __m512i{} : (__m512i)words(next + c, some);
      store(to + i * of_pixel + c, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
    }
  }
}
#endif

}  // namespace sqs
