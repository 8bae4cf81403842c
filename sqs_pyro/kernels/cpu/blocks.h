// Sums of neighbouring outputs of a convolution: all of a block stay in registers over all runs of inputs.

#pragma once

#include <array>
#include <optional>
#include <type_traits>
#include <utility>
#include <vector>

#include "geometry.h"
#include "matrix_unit.h"

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

// Outputs of M pixels, `step` apart, of a register that begins at a tile's output `lane`. Sums that a function took by
// their address would not stay in registers.
template <int M, class T>
[[gnu::always_inline]] inline void store_pixels(T* to, int64_t step, uint32_t wanted, int lane,
                                                const Floats (&values)[M]) {
  constexpr uint32_t all = (1u << kLanes) - 1;
  const uint32_t here = wanted >> lane & all;
  if (here == all && std::is_same_v<T, float>) {  // nearly always: the stores' own conditions cost as much as they
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) store(to + m * step + lane, values[m]);
  } else if (here) {
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) store_outputs(to + m * step + lane, values[m], here);
  }
}

constexpr int kWide = 3;  // tiles whose outputs are computed together, at most
#if defined(__AVX512F__)
constexpr int kSums = 24;  // registers of sums, which leave enough for weights and inputs
#else
constexpr int kSums = 12;
#endif

// Registers of outputs that are computed together: some of each tile.
constexpr int registers_at_once(int wide) { return wide == 1 ? kRows / kLanes : wide; }

// Pixels that are computed together, at most: fewer sums than a multiplier has under way would wait for each other.
constexpr int pixels_of(int registers) { return std::min(8, kSums / registers); }

// Keep a value in a register: a compiler that reads it from memory at each use has more reads than products.
template <class V>
inline void keep(V& value) {
#if defined(__AVX512F__)
  asm("" : "+v"(value));
#elif defined(__AVX2__)
  asm("" : "+x"(value));
#endif
}

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

// M neighbouring outputs of W tiles: all sums stay in registers over all runs. Where a tile takes several registers,
// these are computed one after the other; those of a single tile together, which reads inputs only once.
template <class L, int M, int W, class T>
void block(const Task<typename L::X, T>& t, const typename L::X* x, T* y) {
  constexpr int of_tile = registers_at_once(W) / W, count = W * of_tile;
  for (int lane = 0; lane < kRows; lane += of_tile * kLanes) {
    const auto weight_of = [&](int i) { return i / of_tile * t.of_tile + i % of_tile * kLanes; };
    Floats sums[M][count] = {};
    for (const Run& run : t.runs) {
      const typename L::X *weight = t.weights + run.weight + lane, *end = weight + run.length * kRows;
      const typename L::X* from[M];
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) from[m] = x + run.at + m * t.x_step;
      for (int64_t c = 0; weight != end; weight += kRows, ++c) {
        typename L::V weights[count];
#pragma GCC unroll 4
        for (int i = 0; i < count; ++i) keep(weights[i] = load<typename L::V>(weight + weight_of(i)));
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) {
          const auto input = L::broadcast(from[m] + c);
#pragma GCC unroll 4
          for (int i = 0; i < count; ++i) L::add(sums[m][i], weights[i], input);
        }
      }
    }
#pragma GCC unroll 4
    for (int i = 0; i < count; ++i) {
      const int w = i / of_tile, first = lane + i % of_tile * kLanes;
      const Floats scale = load<Floats>(t.scales + w * kRows + first);
      const Floats bias = load<Floats>(t.biases + w * kRows + first);
      Floats values[M];
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) values[m] = sums[m][i] * scale + bias;
      store_pixels(y + w * kRows, t.y_step, t.wanted[w], first, values);
    }
  }
}

#if defined(SQS_MATRIX_UNIT)
// Pairs of inputs behind the last whole block of runs, if all have as many, so that one shape of registers is enough.
inline std::optional<int> pairs_left(const std::vector<Run>& runs) {
  const int64_t left = runs.empty() ? 0 : runs[0].length % kUnits;
  for (const Run& run : runs) {
    if (run.length % kUnits != left) return std::nullopt;
  }
  return int(left ? left : kUnits);
}

// `count` neighbouring outputs of W tiles, the rows of the matrix unit's registers.
template <int W, class T>
void unit_block(const Task<uint32_t, T>& t, int64_t count, const uint32_t* x, T* y) {
  each<W>([&]<int w>() { clear_block<w>(); });
  for (const Run& run : t.runs) {
    const uint32_t *from = x + run.at, *weights = t.weights + run.weight;
    int64_t c = 0;
    for (; c + kUnits <= run.length; c += kUnits) {
      load_block<4>(from + c, 4 * t.x_step);
      each<W>([&]<int w>() { load_block<6>(weights + w * t.of_tile + c * kRows), add_product<w, 4, 6>(); });
    }
    if (c == run.length) continue;
    load_block<5>(from + c, 4 * t.x_step);
    each<W>([&]<int w>() { load_block<7>(weights + w * t.of_tile + c * kRows), add_product<w, 5, 7>(); });
  }
  alignas(64) float sums[W][kUnits * kRows];
  each<W>([&]<int w>() { store_block<w>(sums[w]); });
  for (int w = 0; w < W; ++w) {
    const Floats scale = load<Floats>(t.scales + w * kRows), bias = load<Floats>(t.biases + w * kRows);
    for (int64_t m = 0; m < count; ++m) {
      store_outputs(y + m * t.y_step + w * kRows, load<Floats>(sums[w] + m * kRows) * scale + bias, t.wanted[w]);
    }
  }
}
#endif

// M neighbouring outputs of 16 channels, each of its own: a run is a tap, or a pair of neighbours.
template <class L, int M, class T>
void depthwise(const Task<typename L::X, T>& t, const typename L::X* x, T* y) {
  for (int lane = 0; lane < kRows && t.wanted[0] >> lane; lane += kLanes) {
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
    for (int m = 0; m < M; ++m) sums[m] = sums[m] * scale + bias;
    store_pixels(y, t.y_step, t.wanted[0], lane, sums);
  }
}

// `f.operator()<M>(first)` for blocks of at most `most` neighbouring outputs, as equal as can be.
template <int most, class F>
void in_blocks(int64_t count, const F& f) {
  const int64_t blocks = (count + most - 1) / most;
  for (int64_t i = 0; i < blocks; ++i) {
    const int64_t first = count * i / blocks, length = count * (i + 1) / blocks - first;
    [&]<int... M>(std::integer_sequence<int, M...>) {
      ((length == M + 1 && (f.template operator()<M + 1>(first), true)) || ...);
    }(std::make_integer_sequence<int, most>());
  }
}

}  // namespace sqs
