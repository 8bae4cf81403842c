// Sums of neighbouring outputs of a convolution: all of a block stay in registers over all runs of inputs.

#pragma once

#include <array>
#include <vector>

#include "geometry.h"
#include "products.h"

namespace sqs {

struct Singles {
  using X = float;
  using V = Floats;
  static constexpr int kInputs = 1;
#if defined(__AVX512F__)
  static inline V broadcast(const float* x) { return (V)_mm512_set1_ps(*x); }
#else
  static inline V broadcast(const float* x) { return *x - V{}; }
#endif
  static inline void add(Floats& sum, V weights, V x) { sum += weights * x; }
  static inline void add_first(Floats& sum, V weights, V x) { add(sum, weights, x); }
  template <int B>
  using Decoder = FloatKernel<B>;
};

#if defined(__AVX512BF16__)
struct Pairs {
  using X = uint32_t;
  using V = __m512bh;
  static constexpr int kInputs = 2;
  static inline V broadcast(const uint32_t* x) { return (V)_mm512_set1_epi32(load<int>(x)); }
  static inline void add(Floats& sum, V weights, V x) { sum = (Floats)_mm512_dpbf16_ps((__m512)sum, weights, x); }
  static inline void add_first(Floats& sum, V weights, V x) {  // of each pair
    sum += (Floats)((Words)weights << 16) * (Floats)((Words)x << 16);
  }
  template <int B>
  using Decoder = PairKernel<B>;
};
#endif

// Of 16 outputs from `lane` on as many as a register has, those that `wanted` names.
template <class T>
inline void store_outputs(T* to, Floats values, uint32_t wanted, int lane) {
  for (int i = 0; i < kLanes; ++i) {
    if (wanted >> (lane + i) & 1) to[lane + i] = T(values[i]);
  }
}

#if defined(__AVX512F__)
template <>
inline void store_outputs(float* to, Floats values, uint32_t wanted, int) {
  _mm512_mask_storeu_ps(to, __mmask16(wanted), (__m512)values);
}
#endif
#if defined(__AVX512BF16__)
template <>
inline void store_outputs(BFloat16* to, Floats values, uint32_t wanted, int) {
  _mm256_mask_storeu_epi16(to, __mmask16(wanted), (__m256i)_mm512_cvtneps_pbh((__m512)values));
}
#endif

#if defined(__AVX512F__)
constexpr int kPixels = 8;  // that are computed together, at most; with kWide tiles their sums fill the registers
#else
constexpr int kPixels = 4;
#endif
constexpr int kWide = 3;

// What rows of outputs have in common. Pointers are to the first output's, tiles' to the first tile's.
template <class X, class T>
struct Task {
  const std::vector<Run>& runs;
  const X* weights;  // [tile][unit][16]
  int64_t of_tile;
  const float *scales, *biases;
  std::array<uint32_t, kWide> wanted;  // outputs of each tile
  int64_t x_step, y_step;              // between neighbouring outputs
};

// M neighbouring outputs of W tiles: all sums stay in registers over all runs.
template <class L, int M, int W, class T>
void block(const Task<typename L::X, T>& t, const typename L::X* x, T* y) {
  for (int lane = 0; lane < kRows; lane += kLanes) {
    Floats sums[M][W] = {};
    for (const Run& run : t.runs) {
      const typename L::X *weight = t.weights + run.weight + lane, *end = weight + run.length * kRows;
      const typename L::X* from[M];
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) from[m] = x + run.at + m * t.x_step;
      for (int64_t c = 0; weight != end; weight += kRows, ++c) {
        typename L::V weights[W];
#pragma GCC unroll 4
        for (int w = 0; w < W; ++w) weights[w] = load<typename L::V>(weight + w * t.of_tile);
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) {
          const auto input = L::broadcast(from[m] + c);
#pragma GCC unroll 4
          for (int w = 0; w < W; ++w) L::add(sums[m][w], weights[w], input);
        }
      }
    }
#pragma GCC unroll 4
    for (int w = 0; w < W; ++w) {
      const Floats scale = load<Floats>(t.scales + w * kRows + lane), bias = load<Floats>(t.biases + w * kRows + lane);
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) {
        store_outputs(y + m * t.y_step + w * kRows, sums[m][w] * scale + bias, t.wanted[w], lane);
      }
    }
  }
}

// M neighbouring outputs of 16 channels, each of its own: a run is a tap, or a pair of neighbours.
template <class L, int M, class T>
void depthwise(const Task<typename L::X, T>& t, const typename L::X* x, T* y) {
  for (int lane = 0; lane < kRows; lane += kLanes) {
    Floats sums[M] = {};
    const typename L::X* from[M];
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) from[m] = x + m * t.x_step + lane;
    for (const Run& run : t.runs) {
      const auto weights = load<typename L::V>(t.weights + run.weight + lane);
      if (run.length == L::kInputs) {
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) L::add(sums[m], weights, load<typename L::V>(from[m] + run.at));
      } else {
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) L::add_first(sums[m], weights, load<typename L::V>(from[m] + run.at));
      }
    }
    const Floats scale = load<Floats>(t.scales + lane), bias = load<Floats>(t.biases + lane);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) store_outputs(y + m * t.y_step, sums[m] * scale + bias, t.wanted[0], lane);
  }
}

// `f.operator()<M>(first)` for blocks of neighbouring outputs, as equal as can be.
template <class F>
void in_blocks(int64_t count, const F& f) {
  const int64_t blocks = (count + kPixels - 1) / kPixels;
  for (int64_t i = 0; i < blocks; ++i) {
    const int64_t first = count * i / blocks;
    switch (count * (i + 1) / blocks - first) {
#if defined(__AVX512F__)
      case 8: f.template operator()<8>(first); break;
      case 7: f.template operator()<7>(first); break;
      case 6: f.template operator()<6>(first); break;
      case 5: f.template operator()<5>(first); break;
#endif
      case 4: f.template operator()<4>(first); break;
      case 3: f.template operator()<3>(first); break;
      case 2: f.template operator()<2>(first); break;
      default: f.template operator()<1>(first);
    }
  }
}

}  // namespace sqs
