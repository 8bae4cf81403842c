// Convolutions with packed weights on CPUs: no columns are written out, pixels are read where they are.
//
// The weight is tiled (sqs_pyro/kernels/tiled.py) as a matrix [outputs, taps x channels], channels in pairs. A tile's
// weights are decoded once, as units of 16 outputs: one input, or a pair of bfloat16. Of x there is a padded copy,
// whose columns stand in one phase for each residue modulo the stride: neighbouring outputs read neighbouring numbers
// whatever the stride. So a unit is multiplied with a block of pixels at its tap's offset, and 16 sums a block stay
// in registers over all units.

#include <algorithm>
#include <array>

#include "arguments.h"

namespace {

constexpr int64_t kCached = 256 << 10;  // bytes of padded images that all tiles read before the next images are read

// ---- geometry ---------------------------------------------------------------------------------------------------

struct Geometry {
  int64_t images, channels, height, width;                // of x
  std::array<int64_t, 2> kernel, stride, padding, dilation;
  int64_t out_height, out_width;

  int64_t padded_height() const { return height + 2 * padding[0]; }
  int64_t phase_width() const { return (width + 2 * padding[1] + stride[1] - 1) / stride[1]; }
  int64_t row() const { return phase_width() * stride[1]; }  // numbers in a row of the padded copy
  int64_t plane() const { return padded_height() * row(); }
  int64_t pixels() const { return out_height * out_width; }
};

// Where the units of a weight are in the padded copy, from the first number that an output reads.
std::vector<int64_t> unit_offsets(const Geometry& g, int64_t planes) {
  std::vector<int64_t> offsets;
  for (int64_t y = 0; y < g.kernel[0]; ++y) {
    for (int64_t x = 0; x < g.kernel[1]; ++x) {
      const int64_t column = x * g.dilation[1];
      const int64_t tap = y * g.dilation[0] * g.row() + column % g.stride[1] * g.phase_width() + column / g.stride[1];
      for (int64_t plane = 0; plane < planes; ++plane) offsets.push_back(plane * g.plane() + tap);
    }
  }
  return offsets;
}

// ---- x ----------------------------------------------------------------------------------------------------------

// `count` numbers of one channel, `stride` apart, or of two channels joined; `second` is null behind the last.
void gather(const float* first, const float*, int64_t count, int64_t stride, float* to) {
  if (stride == 1) {
    std::copy(first, first + count, to);
  } else {
    for (int64_t i = 0; i < count; ++i) to[i] = first[i * stride];
  }
}

void gather(const BFloat16* first, const BFloat16* second, int64_t count, int64_t stride, uint32_t* to) {
  int64_t i = 0;
#if defined(__AVX512BW__)
  const auto sixteen = [](const BFloat16* from) { return _mm512_cvtepu16_epi32(load<__m256i>(from)); };
  for (; stride == 1 && i + 16 <= count; i += 16) {
    const __m512i high = second ? _mm512_slli_epi32(sixteen(second + i), 16) : __m512i{};
    store(to + i, _mm512_or_si512(sixteen(first + i), high));
  }
#endif
  for (; i < count; ++i) to[i] = first[i * stride].x | (second ? uint32_t(second[i * stride].x) << 16 : 0);
}

// One plane of the padded copy: a channel, or two whose numbers are joined; `second` is null behind the last channel.
template <class X, class T>
void pad_plane(const Geometry& g, const T* first, const T* second, X* to) {
  std::fill(to, to + g.plane(), X(0));
  const int64_t stride = g.stride[1], before = g.padding[1];
  for (int64_t y = 0; y < g.height; ++y) {
    for (int64_t phase = 0; phase < stride; ++phase) {
      const int64_t skipped = (before - phase + stride - 1) / stride;  // columns of this phase that are padding
      const int64_t start = std::max<int64_t>(skipped, 0), x = start * stride + phase - before;
      const int64_t count = x < g.width ? (g.width - x + stride - 1) / stride : 0;
      X* row = to + (y + g.padding[0]) * g.row() + phase * g.phase_width() + start;
      const int64_t at = y * g.width + x;
      gather(first + at, second ? second + at : nullptr, count, stride, row);
    }
  }
}

// ---- blocks of pixels -------------------------------------------------------------------------------------------

// Sums over all units for M neighbouring pixels of each of R rows, from `column` on: `[R][M][16]`.
template <class Kernel, int R, int M>
void block(const typename Kernel::X* weights, const std::vector<int64_t>& offsets,
           const std::array<const typename Kernel::X*, R>& x, int64_t column, float* sums) {
  for (int lane = 0; lane < kRows; lane += kLanes) {
    Floats parts[R][M] = {};
    const typename Kernel::X* weight = weights + lane;
    for (const int64_t offset : offsets) {
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) Kernel::accumulate(weight, x[r] + column + offset, parts[r]);
      weight += kRows;
    }
    for (int r = 0; r < R; ++r) {
      for (int m = 0; m < M; ++m) store(sums + (r * M + m) * kRows + lane, parts[r][m]);
    }
  }
}

struct Outputs {
  int64_t outputs, first, count;  // of the weight; of the tile
  float scales[kRows], biases[kRows];
};

#if defined(__AVX512F__)

inline void store_pixels(float* to, __m512 values, __mmask16 wanted) { _mm512_mask_storeu_ps(to, wanted, values); }

#if defined(__AVX512BF16__)
inline void store_pixels(BFloat16* to, __m512 values, __mmask16 wanted) {
  _mm256_mask_storeu_epi16(to, wanted, (__m256i)_mm512_cvtneps_pbh(values));
}
#endif

// Sums `[M][16]` of M pixels of a row: turn them over, scale, add the bias, round, write each output's plane.
template <int M, class T>
void write_pixels(const Outputs& o, const float* sums, int64_t count, int64_t pixels, T* y) {
  __m512 rows[kRows], turned[kRows];
  for (int m = 0; m < kRows; ++m) rows[m] = m < M ? load<__m512>(sums + m * kRows) : __m512{};
#pragma GCC unroll 8
  for (int m = 0; m < kRows; m += 2) {
    turned[m] = _mm512_unpacklo_ps(rows[m], rows[m + 1]), turned[m + 1] = _mm512_unpackhi_ps(rows[m], rows[m + 1]);
  }
#pragma GCC unroll 4
  for (int m = 0; m < kRows; m += 4) {
    for (int half = 0; half < 2; ++half) {
      const __m512d low = (__m512d)turned[m + half], high = (__m512d)turned[m + 2 + half];
      rows[m + 2 * half] = (__m512)_mm512_unpacklo_pd(low, high);
      rows[m + 2 * half + 1] = (__m512)_mm512_unpackhi_pd(low, high);
    }
  }
  const __mmask16 wanted = __mmask16((1u << count) - 1);
#pragma GCC unroll 4
  for (int n = 0; n < 4; ++n) {  // of every 128 bits: output n, four pixels at a time
    const __m512 low = _mm512_shuffle_f32x4(rows[n], rows[n + 4], 0x88);
    const __m512 high = _mm512_shuffle_f32x4(rows[n + 8], rows[n + 12], 0x88);
    const __m512 low_odd = _mm512_shuffle_f32x4(rows[n], rows[n + 4], 0xdd);
    const __m512 high_odd = _mm512_shuffle_f32x4(rows[n + 8], rows[n + 12], 0xdd);
    turned[n] = _mm512_shuffle_f32x4(low, high, 0x88);
    turned[n + 8] = _mm512_shuffle_f32x4(low, high, 0xdd);
    turned[n + 4] = _mm512_shuffle_f32x4(low_odd, high_odd, 0x88);
    turned[n + 12] = _mm512_shuffle_f32x4(low_odd, high_odd, 0xdd);
  }
  for (int64_t n = 0; n < o.count; ++n) {
    const __m512 scaled = _mm512_fmadd_ps(turned[n], _mm512_set1_ps(o.scales[n]), _mm512_set1_ps(o.biases[n]));
    store_pixels(y + n * pixels, scaled, wanted);
  }
}

#else

// Sums `[M][16]` of M pixels of a row: scale, add the bias, round, write each output's plane.
template <int M, class T>
void write_pixels(const Outputs& o, const float* sums, int64_t count, int64_t pixels, T* y) {
  for (int64_t n = 0; n < o.count; ++n) {
    for (int64_t m = 0; m < count; ++m) y[n * pixels + m] = T(sums[m * kRows + n] * o.scales[n] + o.biases[n]);
  }
}

#endif

// Rows of one tile's outputs, numbered through the images.
template <class Kernel, int R, int M, class T>
void tile_rows(const Geometry& g, const typename Kernel::X* weights, const std::vector<int64_t>& offsets,
               const Outputs& o, const typename Kernel::X* padded, int64_t image, int64_t from, int64_t to, T* y) {
  float sums[R * M * kRows];
  for (int64_t row = from; row < to; row += R) {
    std::array<const typename Kernel::X*, R> x;
    std::array<T*, R> out;
    for (int r = 0; r < R; ++r) {  // a last group of rows that is not full does its last row several times
      const int64_t i = std::min(row + r, to - 1) / g.out_height, within = std::min(row + r, to - 1) % g.out_height;
      x[r] = padded + i * image + within * g.stride[0] * g.row();
      out[r] = y + (i * o.outputs + o.first) * g.pixels() + within * g.out_width;
    }
    for (int64_t column = 0; column < g.out_width; column += M) {
      block<Kernel, R, M>(weights, offsets, x, column, sums);
      const int64_t count = std::min<int64_t>(M, g.out_width - column);
      for (int r = 0; r < R && row + r < to; ++r) {
        write_pixels<M>(o, sums + r * M * kRows, count, g.pixels(), out[r] + column);
      }
    }
  }
}

#if defined(__AVX512F__)
constexpr int kSums = 16;  // blocks of R x M pixels fill the registers
#else
constexpr int kSums = 8;
#endif

// Blocks that cover a row with the fewest idle pixels.
template <class Kernel, class T, class... Arguments>
void rows_of_tile(const Geometry& g, Arguments&&... arguments) {
  const int64_t blocks = (g.out_width + kSums - 1) / kSums, width = (g.out_width + blocks - 1) / blocks;
  if (width <= kSums / 4) return tile_rows<Kernel, 4, kSums / 4, T>(g, arguments...);
  if (width <= 7 * kSums / 16) return tile_rows<Kernel, 2, 7 * kSums / 16, T>(g, arguments...);
  if (width <= kSums / 2) return tile_rows<Kernel, 2, kSums / 2, T>(g, arguments...);
  if (width <= 3 * kSums / 4) return tile_rows<Kernel, 1, 3 * kSums / 4, T>(g, arguments...);
  if (width <= 7 * kSums / 8) return tile_rows<Kernel, 1, 7 * kSums / 8, T>(g, arguments...);
  return tile_rows<Kernel, 1, kSums, T>(g, arguments...);
}

// ---- weights ----------------------------------------------------------------------------------------------------

// A tile's weights, `[unit][16]`; of an odd number of channels the empty half pairs are left out.
template <class Kernel, int B, class Decoder>
void decode_tile(const Weight& w, const Decoder& decoder, int64_t tile, int64_t channels, typename Kernel::X* to) {
  constexpr int units_of_word = 2 / Kernel::kInputs * kPairs<B>;
  for (int64_t word = 0; word < w.words; ++word) {
    for (int lane = 0; lane < kRows; lane += kLanes) {
      const uint32_t* codes = w.words_data() + (tile * w.words + word) * kRows + lane;
      decoder.decode(codes, to + word * units_of_word * kRows + lane, lane);
    }
  }
  if (Kernel::kInputs == 1 && channels % 2) {
    const int64_t taps = w.inputs / (channels + 1);
    for (int64_t tap = 1; tap < taps; ++tap) {
      const auto* from = to + tap * (channels + 1) * kRows;
      std::copy(from, from + channels * kRows, to + tap * channels * kRows);
    }
  }
}

// ---- all of it --------------------------------------------------------------------------------------------------

template <class Kernel, int B, class T>
struct Convolution {
  using X = typename Kernel::X;
  const Geometry& g;
  const Weight& w;
  const float* bias;
  const T* x;
  T* y;
  int64_t planes = (g.channels + Kernel::kInputs - 1) / Kernel::kInputs;
  int64_t image = planes * g.plane();      // numbers in the padded copy of an image
  int64_t behind = g.row() + kSums;        // blocks read over the end of a row
  int64_t tiles = (w.outputs + kRows - 1) / kRows;
  int64_t of_tile = w.words * 2 / Kernel::kInputs * kPairs<B> * kRows;
  std::vector<int64_t> offsets = unit_offsets(g, planes);

  // The padded copy of a plane, numbered through the images.
  void pad(int64_t plane, X* to) const {
    const int64_t channel = plane % planes * Kernel::kInputs, size = g.height * g.width;
    const T* first = x + (plane / planes * g.channels + channel) * size;
    pad_plane(g, first, Kernel::kInputs == 1 || channel + 1 == g.channels ? nullptr : first + size, to);
  }

  void decode(int64_t tile, X* weights) const {
    if (w.tables() == 1) {
      decode_tile<Kernel, B>(w, Kernel(w.values(), w.size()), tile, g.channels, weights);
    } else {
      const LaneTables<B> tables(w.values(), w.size(), tile * kRows, w.outputs, w.of_table() / w.inputs);
      decode_tile<Kernel, B>(w, tables, tile, g.channels, weights);
    }
  }

  // Rows `from` to `to`, numbered through the images from `first` on, of which `padded` are the copies.
  void rows(int64_t tile, const X* weights, const X* padded, int64_t first, int64_t from, int64_t to) const {
    Outputs o{w.outputs, tile * kRows, std::min<int64_t>(kRows, w.outputs - tile * kRows), {}, {}};
    for (int64_t n = 0; n < o.count; ++n) {
      o.scales[n] = w.scale() ? w.scale()[o.first + n] : 1.0f;
      o.biases[n] = bias ? bias[o.first + n] : 0.0f;
    }
    rows_of_tile<Kernel, T>(g, weights, offsets, o, padded, image, from, to, y + first * w.outputs * g.pixels());
  }

  // Threads share the images: as many at a time as stay in a cache while all tiles read them.
  void by_images(int64_t at_once) const {
    torch::stable::parallel_for(0, (g.images + at_once - 1) / at_once, 1, [&](int64_t from, int64_t to) {
      const auto padded = scratch<X>(at_once * image + behind), weights = scratch<X>(of_tile);
      for (int64_t first = from * at_once; first < std::min(to * at_once, g.images); first += at_once) {
        const int64_t count = std::min(at_once, g.images - first);
        for (int64_t i = 0; i < count * planes; ++i) pad(first * planes + i, padded.get() + i * g.plane());
        for (int64_t tile = 0; tile < tiles; ++tile) {
          decode(tile, weights.get());
          rows(tile, weights.get(), padded.get(), first, 0, count * g.out_height);
        }
      }
    });
  }

  // Fewer images than threads: these share tiles, and with few tiles the rows of one.
  void by_tiles(int64_t threads) const {
    const auto padded = scratch<X>(g.images * image + behind);
    torch::stable::parallel_for(0, g.images * planes, 1, [&](int64_t from, int64_t to) {
      for (int64_t i = from; i < to; ++i) pad(i, padded.get() + i * g.plane());
    });
    const int64_t all = g.images * g.out_height;
    const int64_t parts = std::clamp<int64_t>((4 * threads + tiles - 1) / tiles, 1, (all + 7) / 8);
    torch::stable::parallel_for(0, tiles * parts, 1, [&](int64_t from, int64_t to) {
      const auto weights = scratch<X>(of_tile);
      for (int64_t task = from; task < to; ++task) {
        const int64_t tile = task / parts, part = task % parts;
        if (task == from || part == 0) decode(tile, weights.get());
        rows(tile, weights.get(), padded.get(), 0, all * part / parts, all * (part + 1) / parts);
      }
    });
  }

  void operator()() const {
    const int64_t threads = torch::stable::get_num_threads();
    if (g.images < threads) return by_tiles(threads);
    const int64_t cached = std::max<int64_t>(1, kCached / (image * int64_t(sizeof(X))));
    by_images(std::min(cached, (g.images + threads - 1) / threads));
  }
};

// float64 is for checks of gradients: the same sums, without hurry.
template <int B>
void convolve_double(const Geometry& g, const Weight& w, const double* bias, const double* x, double* y) {
  const int64_t channels = g.channels + g.channels % 2;
  for (int64_t i = 0; i < g.images * w.outputs * g.pixels(); ++i) {
    const int64_t image = i / g.pixels() / w.outputs, n = i / g.pixels() % w.outputs;
    double sum = 0;
    for (int64_t tap = 0; tap < g.kernel[0] * g.kernel[1]; ++tap) {
      const int64_t row = i % g.pixels() / g.out_width * g.stride[0] - g.padding[0] + tap / g.kernel[1] * g.dilation[0];
      const int64_t column = i % g.out_width * g.stride[1] - g.padding[1] + tap % g.kernel[1] * g.dilation[1];
      if (row < 0 || row >= g.height || column < 0 || column >= g.width) continue;
      for (int64_t c = 0; c < g.channels; ++c) {
        sum += w.value<B>(n, tap * channels + c) * x[((image * g.channels + c) * g.height + row) * g.width + column];
      }
    }
    y[i] = sum * (w.scale() ? w.scale()[n] : 1.0f) + (bias ? bias[n] : 0.0);
  }
}

// Numbers for one or two dimensions as two: an image of one dimension has one row.
std::array<int64_t, 2> two(const std::vector<int64_t>& given, size_t dims, int64_t missing, const char* name) {
  STD_TORCH_CHECK(given.size() == dims, name, " should have ", dims, " numbers, not ", given.size());
  return dims == 1 ? std::array<int64_t, 2>{missing, given[0]} : std::array<int64_t, 2>{given[0], given[1]};
}

Geometry geometry(const Tensor& x, const std::vector<int64_t>& shape, const std::vector<int64_t>& stride,
                  const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation) {
  const size_t dims = shape.size() - 2;
  STD_TORCH_CHECK(dims == 1 || dims == 2, "tiled convolutions have 1 or 2 dimensions of space");
  STD_TORCH_CHECK(size_t(x.dim()) == dims + 2 && x.size(1) == shape[1], "x should have ", dims + 2, " dimensions and ",
                  shape[1], " channels");
  Geometry g{};
  g.images = x.size(0), g.channels = x.size(1), g.width = x.size(x.dim() - 1), g.height = dims == 1 ? 1 : x.size(2);
  g.kernel = dims == 1 ? std::array<int64_t, 2>{1, shape[2]} : std::array<int64_t, 2>{shape[2], shape[3]};
  g.stride = two(stride, dims, 1, "stride"), g.padding = two(padding, dims, 0, "padding");
  g.dilation = two(dilation, dims, 1, "dilation");
  std::array<int64_t, 2> out{};
  for (int d = 0; d < 2; ++d) {
    STD_TORCH_CHECK(g.stride[d] > 0 && g.dilation[d] > 0 && g.padding[d] >= 0 && g.kernel[d] > 0,
                    "stride, dilation and kernel should be positive, padding not negative");
    const int64_t left = (d ? g.width : g.height) + 2 * g.padding[d] - g.dilation[d] * (g.kernel[d] - 1) - 1;
    STD_TORCH_CHECK(left >= 0, "the kernel is larger than the padded image");
    out[d] = left / g.stride[d] + 1;
  }
  g.out_height = out[0], g.out_width = out[1];
  return g;
}

Tensor convolution_tiled(Tensor x, std::optional<Tensor> bias, std::vector<int64_t> stride,
                         std::vector<int64_t> padding, std::vector<int64_t> dilation, bool transposed,
                         std::vector<int64_t>, int64_t groups, Tensor codes, Tensor table, std::optional<Tensor> scales,
                         std::vector<int64_t> shape, int64_t bits) {
  STD_TORCH_CHECK(!transposed && groups == 1, "tiled convolutions are neither transposed nor of several groups");
  const Weight weight(Layout::kTiled, codes, table, scales, shape, bits);
  const Geometry g = geometry(x, shape, stride, padding, dilation);
  const ScalarType dtype = x.scalar_type(), inner = computed_in(dtype);
  x = in_order(as(x, inner));
  std::vector<int64_t> sizes{g.images, weight.outputs, g.out_height, g.out_width};
  if (shape.size() == 3) sizes.erase(sizes.begin() + 2);
  Tensor y = empty(sizes, inner);
  const std::optional<Tensor> offset = bias_for(bias, weight.outputs, dtype, inner);
  const void* bias_data = offset ? offset->const_data_ptr() : nullptr;
  if (y.numel() == 0) return as(y, dtype);
  with_bits(bits, [&]<int B>() {
    const void* from = x.const_data_ptr();
    void* to = y.mutable_data_ptr();
    const float* biases = static_cast<const float*>(bias_data);
    if (inner == ScalarType::Float) {
      Convolution<FloatKernel<B>, B, float>{
          g, weight, biases, static_cast<const float*>(from), static_cast<float*>(to)}();
#if defined(__AVX512BF16__)
    } else if (inner == ScalarType::BFloat16) {
      Convolution<PairKernel<B>, B, BFloat16>{
          g, weight, biases, static_cast<const BFloat16*>(from), static_cast<BFloat16*>(to)}();
#endif
    } else {
      convolve_double<B>(g, weight, static_cast<const double*>(bias_data), static_cast<const double*>(from),
                         static_cast<double*>(to));
    }
  });
  return as(y, dtype);
}

}  // namespace

#if defined(SQS_STANDALONE)  // without our Python nobody else has said what the operator looks like
STABLE_TORCH_LIBRARY_FRAGMENT(sqs, m) {
  m.def(
      "convolution_tiled(Tensor x, Tensor? bias, int[] stride, int[] padding, int[] dilation, bool transposed, "
      "int[] output_padding, int groups, Tensor codes, Tensor table, Tensor? scales, int[] shape, int bits) -> Tensor");
}
#endif

STABLE_TORCH_LIBRARY_IMPL(sqs, CPU, m) { m.impl("convolution_tiled", TORCH_BOX(&convolution_tiled)); }
