// Matrix products with packed weights on CPUs, and rows of them (sqs_pyro/kernels/tiled.py writes the layout).
//
// Compiled on first use for the machine at hand (sqs_pyro/kernels/native.py). Only PyTorch's stable C interface is used.

#include <algorithm>

#include "arguments.h"

namespace {

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
          __builtin_prefetch(codes + (w + 64) * kRows);  // what hardware fetches ahead ends with a page
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
    std::vector<X> weights(kTiles * words_at_once * units_of_word * kRows);
    std::vector<float> sums(kTiles * count * kPanel * kRows);
    for (int64_t group = from; group < to; ++group) {
      const int64_t first = group * kTiles, height = std::min<int64_t>(kTiles, tiles - first);
      std::fill(sums.begin(), sums.end(), 0.0f);
      for (int64_t start = 0; start < p.words; start += words_at_once) {
        const int64_t length = std::min(words_at_once, p.words - start), depth = length * units_of_word;
        for (int64_t t = 0; t < height; ++t) {
          const uint32_t* codes = p.codes + ((first + t) * p.words + start) * kRows;
          for (int64_t w = 0; w < length; ++w) {
            for (int lane = 0; lane < kRows; lane += kLanes) {
              kernel.decode(codes + w * kRows + lane, weights.data() + (t * depth + w * units_of_word) * kRows + lane, lane);
            }
          }
        }
        for (int64_t panel = 0; panel < count; ++panel) {
          const X* x = panels + panel * units * kPanel;
          for (int64_t t = 0; t < height; ++t) {
            const X* decoded = weights.data() + t * depth * kRows;
            float* out = sums.data() + (t * count + panel) * kPanel * kRows;
            add_panel<Kernel>(decoded, x + start * units_of_word * kPanel, depth, out);
          }
        }
      }
      for (int64_t t = 0; t < height; ++t) {
        for (int64_t m = 0; m < p.rows; ++m) {
          finish(p, first + t, m, sums.data() + (t * count * kPanel + m) * kRows, y);
        }
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
    std::vector<X> panel(units * width);
    pack_panel<Kernel>(x, p.rows, p.inputs, units, width, panel.data());
    if (width == 1) return few_rows<Kernel, B, 1>(p, kernel, panel.data(), y);
    if (width == 4) return few_rows<Kernel, B, 4>(p, kernel, panel.data(), y);
    if (width == 8) return few_rows<Kernel, B, 8>(p, kernel, panel.data(), y);
    return few_rows<Kernel, B, kPanel>(p, kernel, panel.data(), y);
  }
  const int64_t count = (p.rows + kPanel - 1) / kPanel;
  std::vector<X> panels(count * units * kPanel);
  torch::stable::parallel_for(0, count, 1, [&](int64_t from, int64_t to) {
    for (int64_t panel = from; panel < to; ++panel) {
      const int64_t rows = std::min<int64_t>(kPanel, p.rows - panel * kPanel);
      pack_panel<Kernel>(
          x + panel * kPanel * p.inputs, rows, p.inputs, units, kPanel, panels.data() + panel * units * kPanel);
    }
  });
  many_rows<Kernel, B>(p, kernel, panels.data(), y);
}

// ---- operators -------------------------------------------------------------------------------------------------

// float64 is for checks of gradients: the same sums, without hurry.
template <int B>
void multiply_double(const Problem& p, const float* values, int64_t size, const double* bias, const double* x, double* y) {
  const int64_t mask = (1 << B) - 1;
  for (int64_t n = 0; n < p.outputs; ++n) {
    for (int64_t m = 0; m < p.rows; ++m) {
      double sum = 0;
      for (int64_t k = 0; k < p.inputs; ++k) {
        const int64_t word = k / (2 * kPairs<B>), place = k % (2 * kPairs<B>);
        const uint32_t lane = p.codes[((n / kRows) * p.words + word) * kRows + n % kRows];
        const int64_t code = lane >> (16 * (place % 2) + B * (place / 2)) & mask;
        sum += double(code < size ? values[code] : 0.0f) * x[m * p.inputs + k];
      }
      y[m * p.outputs + n] = sum * (p.scales ? p.scales[n] : 1.0f) + (bias ? bias[n] : 0.0);
    }
  }
}

Tensor linear_tiled(Tensor x, std::optional<Tensor> bias, Tensor codes, Tensor table, std::optional<Tensor> scales,
                    std::vector<int64_t> shape, int64_t bits) {
  const Weight weight(codes, table, scales, shape, bits);
  STD_TORCH_CHECK(shape.size() == 2, "the weight of a product has two dimensions, not ", shape.size());
  STD_TORCH_CHECK(weight.tables() == 1, "a product with tiled codes takes one table, not ", weight.tables());
  STD_TORCH_CHECK(x.dim() >= 1 && x.size(x.dim() - 1) == weight.inputs, "the last dimension of x should be ",
                  weight.inputs);
  const ScalarType dtype = x.scalar_type(), inner = computed_in(dtype);
  x = in_order(as(x, inner));
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  sizes.back() = weight.outputs;
  Tensor y = torch::stable::new_empty(x, sizes);
  const std::optional<Tensor> offset = bias_for(bias, weight.outputs, dtype, inner);
  const int64_t rows = x.numel() / weight.inputs;
  const void* bias_data = offset ? offset->const_data_ptr() : nullptr;
  const Problem p{weight.words_data(), weight.words, rows, weight.inputs, weight.outputs,
                  static_cast<const float*>(bias_data), weight.scale()};
  if (rows == 0) return as(y, dtype);
  with_bits(bits, [&]<int B>() {
    const float* values = weight.values();
    const int64_t size = weight.size();
    if (inner == ScalarType::Float) {
      multiply<FloatKernel<B>, B>(p, values, size, static_cast<const float*>(x.const_data_ptr()),
                                  static_cast<float*>(y.mutable_data_ptr()));
#if defined(__AVX512BF16__)
    } else if (inner == ScalarType::BFloat16) {
      multiply<PairKernel<B>, B>(p, values, size, static_cast<const BFloat16*>(x.const_data_ptr()),
                                 static_cast<BFloat16*>(y.mutable_data_ptr()));
#endif
    } else {
      multiply_double<B>(p, values, size, static_cast<const double*>(bias_data),
                         static_cast<const double*>(x.const_data_ptr()), static_cast<double*>(y.mutable_data_ptr()));
    }
  });
  return as(y, dtype);
}

// Rows of the weight, decoded: `[*indices, inputs]`.
template <int B>
void look_up_rows(const Weight& weight, const int64_t* indices, int64_t count, float* to) {
  const int64_t mask = (1 << B) - 1;
  torch::stable::parallel_for(0, count, 16, [&](int64_t from, int64_t end) {
    for (int64_t i = from; i < end; ++i) {
      const int64_t row = indices[i];
      const float scale = weight.scale() ? weight.scale()[row] : 1.0f;
      const float* values = weight.values() + row / (weight.outputs / weight.tables()) * weight.size();
      const uint32_t* lanes = weight.words_data() + row / kRows * weight.words * kRows + row % kRows;
      for (int64_t k = 0; k < weight.inputs; ++k) {
        const int64_t word = k / (2 * kPairs<B>), place = k % (2 * kPairs<B>);
        const int64_t code = lanes[word * kRows] >> (16 * (place % 2) + B * (place / 2)) & mask;
        to[i * weight.inputs + k] = (code < weight.size() ? values[code] : 0.0f) * scale;
      }
    }
  });
}

Tensor rows_tiled(Tensor indices, ScalarType dtype, Tensor codes, Tensor table, std::optional<Tensor> scales,
                  std::vector<int64_t> shape, int64_t bits) {
  const Weight weight(codes, table, scales, shape, bits);
  STD_TORCH_CHECK(shape.size() == 2, "a weight with rows has two dimensions, not ", shape.size());
  indices = in_order(as(indices, ScalarType::Long));
  const int64_t* rows = static_cast<const int64_t*>(indices.const_data_ptr());
  for (int64_t i = 0; i < indices.numel(); ++i) {
    STD_TORCH_CHECK(rows[i] >= 0 && rows[i] < weight.outputs, "index ", rows[i], " is outside of a table of ",
                    weight.outputs, " rows");
  }
  std::vector<int64_t> sizes(indices.sizes().begin(), indices.sizes().end());
  sizes.push_back(weight.inputs);
  Tensor found = torch::stable::new_empty(indices, sizes, ScalarType::Float);
  with_bits(bits, [&]<int B>() {
    look_up_rows<B>(weight, rows, indices.numel(), static_cast<float*>(found.mutable_data_ptr()));
  });
  return as(found, dtype);
}

}  // namespace

#if defined(SQS_STANDALONE)  // without our Python nobody else has said what the operators look like
STABLE_TORCH_LIBRARY_FRAGMENT(sqs, m) {
  m.def("linear_tiled(Tensor x, Tensor? bias, Tensor codes, Tensor table, Tensor? scales, int[] shape, int bits) -> Tensor");
  m.def("embedding_tiled(Tensor indices, ScalarType dtype, Tensor codes, Tensor table, Tensor? scales, int[] shape, int bits) -> Tensor");
}
#endif

STABLE_TORCH_LIBRARY_IMPL(sqs, CPU, m) {
  m.impl("linear_tiled", TORCH_BOX(&linear_tiled));
  m.impl("embedding_tiled", TORCH_BOX(&rows_tiled));
}
