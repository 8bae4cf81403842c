// Rows of x times a tiled weight (sqs_pyro/kernels/tiled.py writes the layout).

#pragma once

#include <algorithm>

#include <torch/csrc/stable/ops.h>

#include "codes.h"

namespace sqs {

constexpr int kDepth = 512;    // inputs that are decoded at once where several rows of x share them
constexpr int kTiles = 4;      // tiles that share a panel of x while it is in the first-level cache

// ---- rows of x -------------------------------------------------------------------------------------------------

// Rows `[rows, K]` as panels: `[units][M]`, a unit one float or a pair of bfloat16; zeros behind the last input and
// the last row.
template <class Kernel, class T>
void pack_panel(const T* x, int64_t rows, int64_t inputs, int64_t units, int width, typename Kernel::X* to) {
  std::fill(to, to + units * width, typename Kernel::X(0));
  for (int64_t m = 0; m < rows; ++m) {
    const T* row = x + m * inputs;
    if constexpr (Kernel::kInputs == 1) {
      for (int64_t k = 0; k < inputs; ++k) to[k * width + m] = float(row[k]);
    } else {
      for (int64_t k = 0; k + 1 < inputs; k += 2) {
        uint32_t pair;
        std::memcpy(&pair, row + k, 4);
        to[k / 2 * width + m] = pair;
      }
      if (inputs % 2) to[inputs / 2 * width + m] = row[inputs - 1].x;
    }
  }
}

struct Problem {
  const uint32_t* codes;  // [tiles][words][16]
  int64_t words, rows, inputs, outputs;
  const float* bias;    // [outputs], or null
  const float* scales;  // [outputs], or null
};

// Sums of one tile for one row of x: scale, add the bias, round, write.
template <class T>
inline void finish(const Problem& p, int64_t tile, int64_t row, const float* sums, T* y) {
  const int64_t first = tile * kRows, count = std::min<int64_t>(kRows, p.outputs - first);
  if (count == kRows) {
    for (int lane = 0; lane < kRows; lane += kLanes) {
      Floats values = load<Floats>(sums + lane);
      if (p.scales) values *= load<Floats>(p.scales + first + lane);
      if (p.bias) values += load<Floats>(p.bias + first + lane);
      store_outputs(y + row * p.outputs + first + lane, values, (1u << kLanes) - 1);
    }
    return;
  }
  for (int64_t n = 0; n < count; ++n) {
    float value = sums[n];
    if (p.scales) value *= p.scales[first + n];
    if (p.bias) value += p.bias[first + n];
    y[row * p.outputs + first + n] = T(value);
  }
}

// A panel of x, or less: look up in registers, multiply at once.
template <class Kernel, int B, int M, class T>
void few_rows(const Problem& p, const Kernel& kernel, const typename Kernel::X* x, T* y) {
  constexpr int A = M == 1 ? 4 : M == 4 ? 2 : 1;  // independent sums, so that no addition waits for the one before
  constexpr int step = 2 / Kernel::kInputs * kPairs<B> * M;
  torch::stable::parallel_for(0, (p.outputs + kRows - 1) / kRows, 1, [&](int64_t from, int64_t to) {
    for (int64_t tile = from; tile < to; ++tile) {
      float sums[M][kRows];
      for (int lane = 0; lane < kRows; lane += kLanes) {
        Floats parts[A][M] = {};
        const uint32_t* codes = p.codes + tile * p.words * kRows + lane;
        for (int64_t w = 0; w < p.words; ++w) {
          fetch_ahead(codes + w * kRows);
          kernel.template multiply<M, A>(codes + w * kRows, x + w * step, parts);
        }
        for (int m = 0; m < M; ++m) {
          for (int a = 1; a < A; ++a) parts[0][m] += parts[a][m];
          store(sums[m] + lane, parts[0][m]);
        }
      }
      for (int64_t m = 0; m < p.rows; ++m) finish(p, tile, m, sums[m], y);
    }
  });
}

// `count` units of a tile's decoded weights `[unit][16]` times a panel, added to `sums` `[panel][16]`.
template <class Kernel>
void add_panel(const typename Kernel::X* weights, const typename Kernel::X* x, int64_t count, float* sums) {
  for (int lane = 0; lane < kRows; lane += kLanes) {
    Floats parts[kPanel];
    for (int m = 0; m < kPanel; ++m) parts[m] = load<Floats>(sums + m * kRows + lane);
#pragma GCC unroll 4
    for (int64_t u = 0; u < count; ++u) Kernel::accumulate(weights + u * kRows + lane, x + u * kPanel, parts);
    for (int m = 0; m < kPanel; ++m) store(sums + m * kRows + lane, parts[m]);
  }
}

// More rows of x: decode some inputs of some tiles, multiply them with all rows, go on.
template <class Kernel, int B, class T>
void many_rows(const Problem& p, const Kernel& kernel, const typename Kernel::X* panels, T* y) {
  using X = typename Kernel::X;
  constexpr int units_of_word = 2 / Kernel::kInputs * kPairs<B>;
  const int64_t units = p.words * units_of_word, words_at_once = std::max(1, kDepth / (2 * kPairs<B>));
  const int64_t tiles = (p.outputs + kRows - 1) / kRows, groups = (tiles + kTiles - 1) / kTiles;
  const int64_t count = (p.rows + kPanel - 1) / kPanel;
  torch::stable::parallel_for(0, groups, 1, [&](int64_t from, int64_t to) {
    const auto weights = scratch<X>(kTiles * words_at_once * units_of_word * kRows);
    const auto sums = scratch<float>(kTiles * count * kPanel * kRows);
    for (int64_t group = from; group < to; ++group) {
      const int64_t first = group * kTiles, height = std::min<int64_t>(kTiles, tiles - first);
      std::fill(sums.get(), sums.get() + kTiles * count * kPanel * kRows, 0.0f);
      for (int64_t start = 0; start < p.words; start += words_at_once) {
        const int64_t length = std::min(words_at_once, p.words - start), depth = length * units_of_word;
        for (int64_t t = 0; t < height; ++t) {
          const uint32_t* codes = p.codes + ((first + t) * p.words + start) * kRows;
          for (int64_t w = 0; w < length; ++w) {
            for (int lane = 0; lane < kRows; lane += kLanes) {
              kernel.decode(codes + w * kRows + lane, weights.get() + (t * depth + w * units_of_word) * kRows + lane, lane);
            }
          }
        }
        for (int64_t panel = 0; panel < count; ++panel) {
          const X* x = panels + panel * units * kPanel;
          for (int64_t t = 0; t < height; ++t) {
            const X* decoded = weights.get() + t * depth * kRows;
            float* out = sums.get() + (t * count + panel) * kPanel * kRows;
            add_panel<Kernel>(decoded, x + start * units_of_word * kPanel, depth, out);
          }
        }
      }
      for (int64_t m = 0; m < p.rows; ++m) {  // outputs side by side one after the other: a row of y is a page, or several
        for (int64_t t = 0; t < height; ++t) finish(p, first + t, m, sums.get() + (t * count * kPanel + m) * kRows, y);
      }
    }
  });
}

template <class Kernel, int B, class T>
void multiply(const Problem& p, const float* table, int64_t size, const T* x, T* y) {
  using X = typename Kernel::X;
  const Kernel kernel(table, size);
  const int64_t units = p.words * 2 / Kernel::kInputs * kPairs<B>;
  if (p.rows <= kPanel) {
    const int width = p.rows == 1 ? 1 : p.rows <= 4 ? 4 : p.rows <= 8 ? 8 : kPanel;
    if (width == 1 && sizeof(T) * Kernel::kInputs == sizeof(X) && units * Kernel::kInputs == p.inputs) {
      return few_rows<Kernel, B, 1>(p, kernel, reinterpret_cast<const X*>(x), y);  // x is its own panel
    }
    const auto panel = scratch<X>(units * width);
    pack_panel<Kernel>(x, p.rows, p.inputs, units, width, panel.get());
    if (width == 1) return few_rows<Kernel, B, 1>(p, kernel, panel.get(), y);
    if (width == 4) return few_rows<Kernel, B, 4>(p, kernel, panel.get(), y);
    if (width == 8) return few_rows<Kernel, B, 8>(p, kernel, panel.get(), y);
    return few_rows<Kernel, B, kPanel>(p, kernel, panel.get(), y);
  }
  const int64_t count = (p.rows + kPanel - 1) / kPanel;
  const auto panels = scratch<X>(count * units * kPanel);
  torch::stable::parallel_for(0, count, 1, [&](int64_t from, int64_t to) {
    for (int64_t panel = from; panel < to; ++panel) {
      const int64_t rows = std::min<int64_t>(kPanel, p.rows - panel * kPanel);
      pack_panel<Kernel>(
          x + panel * kPanel * p.inputs, rows, p.inputs, units, kPanel, panels.get() + panel * units * kPanel);
    }
  });
  many_rows<Kernel, B>(p, kernel, panels.get(), y);
}

}  // namespace sqs
