// Convolutions with packed weights on CPUs, ordinary, grouped and transposed: no columns are written out.
//
// Channels of a pixel stand side by side (channels last); of other images strips are brought into that order, and
// outputs back. A register holds 16 outputs of a pixel, so that a tile of the weight
// (sqs_pyro/kernels/tiled.py: a matrix [outputs, taps x channels], channels in pairs) is multiplied as it is decoded,
// with one input in all lanes. What an output reads is a few runs of numbers that also stand side by side in the
// weight: one for each row of the kernel, or one for each tap. Depthwise, a register holds 16 channels of inputs and
// of outputs. Transposed, outputs of each residue modulo the stride are a convolution of their own.

#include <array>

#include "arguments.h"
#include "products.h"

namespace {

constexpr int64_t kCopied = 512 << 10;   // bytes of x that all tiles read before the next are read
constexpr int64_t kDecoded = 256 << 10;  // bytes of weights that are decoded once for all of x

// ---- geometry ---------------------------------------------------------------------------------------------------

// One dimension of space.
struct Axis {
  int64_t size, kernel, stride, padding, dilation, out;
  bool transposed;

  struct Read {  // of the first output of a residue: a tap, and where it is with `before` zeros put before x
    int64_t tap, at;
  };

  int64_t step() const { return transposed ? stride : 1; }   // between outputs of a residue
  int64_t pace() const { return transposed ? 1 : stride; }  // between what neighbours of them read
  int64_t outputs(int64_t residue) const { return residue < out ? (out - residue - 1) / step() + 1 : 0; }
  int64_t before() const {
    return transposed ? std::max<int64_t>(0, (dilation * (kernel - 1) - padding + stride - 1) / stride) : padding;
  }
  // Numbers with zeros before and behind that `count` outputs of a residue may read.
  int64_t reach(int64_t count) const {
    return transposed ? count + before() + padding / stride + 1 : (count - 1) * stride + dilation * (kernel - 1) + 1;
  }

  std::vector<Read> reads(int64_t residue) const {
    std::vector<Read> found;
    for (int64_t tap = 0; tap < kernel; ++tap) {
      const int64_t place = transposed ? residue + padding - tap * dilation : tap * dilation;
      if (transposed && place % stride) continue;
      found.push_back({tap, transposed ? place / stride + before() : place});
    }
    return found;
  }
};

struct Geometry {
  int64_t images, channels, outputs, groups;
  Axis rows, columns;
  bool last;  // channels are, of x and of the outputs

  int64_t of_group() const { return channels / groups; }
  int64_t outputs_of_group() const { return outputs / groups; }
  int64_t taps() const { return rows.kernel * columns.kernel; }
  int64_t size() const { return rows.size * columns.size; }
  int64_t pixels() const { return rows.out * columns.out; }
  bool transposed() const { return rows.transposed; }
  bool depthwise() const { return of_group() == 1 && outputs_of_group() == 1; }
  bool padded() const { return rows.padding + columns.padding > 0 || transposed(); }
  // Whether an output reads the one pixel that stands where it does.
  bool pointwise() const { return taps() == 1 && rows.stride * columns.stride == 1 && !padded(); }

  // The same with all pixels in one row; channels last, those of all images.
  Geometry flat() const {
    Geometry g = *this;
    g.images = last ? 1 : images;
    g.rows.size = g.rows.out = 1, g.columns.size = g.columns.out = pixels() * (last ? images : 1);
    return g;
  }
};

// Numbers that stand side by side in x, and the weights of an output that they are multiplied with.
struct Run {
  int64_t at, weight, length;
};

// ---- x ----------------------------------------------------------------------------------------------------------

#if defined(__AVX512BW__)

// 16 registers of 16 words: their columns become rows.
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

#endif

// `[rows][columns]`, rows `stride` apart, turned over into rows that are `step` apart.
template <class T>
void turn_over(const T* from, int64_t rows, int64_t columns, int64_t stride, T* to, int64_t step) {
#if defined(__AVX512BW__)
  for (int64_t row = 0; row < rows; row += 16) {
    const int64_t height = std::min<int64_t>(16, rows - row);
    for (int64_t column = 0; column < columns; column += 16) {
      const int64_t width = std::min<int64_t>(16, columns - column);
      __m512 block[16];
      for (int64_t i = 0; i < 16; ++i) {
        block[i] = i < height ? words(from + (row + i) * stride + column, width) : __m512{};
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

// ---- products ---------------------------------------------------------------------------------------------------

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

// ---- weights ----------------------------------------------------------------------------------------------------

// Numbers that a tile's units take; decoding writes whole words.
template <class L>
int64_t numbers_of_tile(const Weight& w) {
  int64_t units = 0;
  with_bits(w.bits, [&]<int B>() { units = w.words * 2 / L::kInputs * kPairs<B>; });
  return units * kRows;
}

// A tile's weights, `[unit][16]`; of an odd number of channels (of a row of the weight) the empty halves are left out.
template <class L, int B>
void decode_tile(const Weight& w, int64_t tile, int64_t channels, typename L::X* to) {
  constexpr int of_word = 2 / L::kInputs * kPairs<B>;
  const auto decode = [&](const auto& decoder) {
    for (int64_t word = 0; word < w.words; ++word) {
      for (int lane = 0; lane < kRows; lane += kLanes) {
        const uint32_t* codes = w.words_data() + (tile * w.words + word) * kRows + lane;
        decoder.decode(codes, to + word * of_word * kRows + lane, lane);
      }
    }
  };
  if (w.tables() == 1) {
    decode(typename L::template Decoder<B>(w.values(), w.size()));
  } else {
    decode(LaneTables<B>(w.values(), w.size(), tile * kRows, w.outputs, w.of_table() / w.inputs));
  }
  if (L::kInputs == 1 && channels % 2) {
    const int64_t taps = w.inputs / (channels + 1);
    for (int64_t tap = 1; tap < taps; ++tap) {
      const auto* from = to + tap * (channels + 1) * kRows;
      std::copy(from, from + channels * kRows, to + tap * channels * kRows);
    }
  }
}

// A depthwise tile's taps as pairs of neighbours in a row of the kernel, the last of a row by itself.
inline void pair_taps(const Geometry&, float*) {}  // float32 is multiplied one by one

inline void pair_taps(const Geometry& g, uint32_t* tile) {
  const int64_t of_row = g.columns.kernel * kRows;
  for (int64_t i = 0; i < g.taps() * kRows; ++i) {
    const uint32_t next = i % of_row + kRows < of_row ? tile[i + kRows] << 16 : 0;
    tile[i] = (tile[i] & 0xffff) | next;
  }
}

inline void put_weight(float value, int64_t, float* unit) { *unit = value; }

inline void put_weight(float value, int64_t half, uint32_t* unit) {
  const uint16_t rounded = BFloat16(value).x;
  std::memcpy(reinterpret_cast<char*>(unit) + 2 * half, &rounded, 2);
}

// All tiles of outputs of a transposed weight, whose rows are inputs, as are its scales; `to` holds zeros.
template <class L>
void transpose_weight(const Geometry& g, const Weight& w, int64_t units_of_tap, int64_t of_tile, typename L::X* to) {
  const int64_t outputs = g.outputs_of_group();
  const auto rows = scratch<float>(numbers_of_tile<Singles>(w));  // [tap, output][16 inputs]
  for (int64_t input = 0; input < g.channels; ++input) {
    if (input % kRows == 0) {
      with_bits(w.bits, [&]<int B>() { decode_tile<Singles, B>(w, input / kRows, outputs, rows.get()); });
    }
    const int64_t first = input / g.of_group() * outputs, within = input % g.of_group();
    const float scale = w.scale() ? w.scale()[input] : 1.0f;
    for (int64_t tap = 0; tap < g.taps(); ++tap) {
      const int64_t unit = tap * units_of_tap + within / L::kInputs;
      for (int64_t n = first; n < first + outputs; ++n) {
        const float value = rows[(tap * outputs + n - first) * kRows + input % kRows] * scale;
        put_weight(value, within % L::kInputs, to + n / kRows * of_tile + unit * kRows + n % kRows);
      }
    }
  }
}

// ---- all of it --------------------------------------------------------------------------------------------------

// Outputs that are computed together: of one group, in few tiles; or depthwise all of them.
struct Range {
  int64_t first, last, tile, wide;
};

std::vector<Range> ranges_of(const Geometry& g) {
  if (g.depthwise()) return {{0, g.outputs, 0, (g.outputs + kRows - 1) / kRows}};
  std::vector<Range> ranges;
  const int64_t together = g.outputs_of_group();
  for (int64_t group = 0; group < g.outputs; group += together) {
    const int64_t end = group + together, first = group / kRows, tiles = (end - 1) / kRows - first + 1;
    const int64_t parts = (tiles + kWide - 1) / kWide;
    for (int64_t i = 0; i < parts; ++i) {
      const int64_t tile = first + tiles * i / parts, behind = first + tiles * (i + 1) / parts;
      ranges.push_back({std::max(group, tile * kRows), std::min(end, behind * kRows), tile, behind - tile});
    }
  }
  return ranges;
}

// Rows of outputs of an image, or some of the only one.
struct Strip {
  int64_t image, row, rows, column, columns;
};

// Whether numbers of x are copied: with zeros around them, or because an odd number of channels is no pairs.
template <class L>
bool copied(const Geometry& g) {
  return g.padded() || g.depthwise() || g.of_group() % L::kInputs;
}

template <class L, class T>
struct Convolution {
  using X = typename L::X;
  const Geometry& g;
  const Weight& w;
  bool flat;  // strips are of the only row
  const T* x;
  T* y;
  const float *scales, *biases;  // of all tiles
  int64_t channels = (g.of_group() + L::kInputs - 1) / L::kInputs;  // of a group, in numbers of the copy
  int64_t tiles = (g.outputs + kRows - 1) / kRows;
  int64_t of_pixel = g.depthwise() ? tiles * kRows : channels * g.groups;
  bool copies = copied<L>(g);
  int64_t pitch = !copies ? g.columns.size  // pixels from row to row
                          : std::max(g.columns.reach(g.columns.outputs(0)), g.columns.before() + g.columns.size);
  int64_t of_tile = g.transposed() ? g.taps() * channels * kRows : numbers_of_tile<L>(w);
  std::vector<Range> ranges = ranges_of(g);
  std::vector<std::vector<Run>> runs{};  // of each residue
  int64_t of_done = (g.depthwise() ? tiles : kWide) * kRows;  // outputs of a pixel that are turned over together

  // Rows of x that a strip reads, of those that there are, and how many zeros stand before them.
  struct Rows {
    int64_t first, count, before;
  };
  Rows rows_of(const Strip& s) const {
    const int64_t first = s.row * g.rows.pace() - g.rows.before(), reach = g.rows.reach(s.rows);
    const int64_t from = std::clamp<int64_t>(first, 0, g.rows.size);
    const int64_t to = std::clamp<int64_t>(first + reach, from, g.rows.size);
    return {from, to - from, std::clamp<int64_t>(from - first, 0, reach)};
  }

  // A row of pixels as the copy has them: groups of an odd number of channels end with half a pair.
  void put_pixels(const T* from, X* to) const {
    const int64_t pixels = g.columns.size;
    if (g.depthwise()) return put_own_pixels(from, pixels, g.channels, to, of_pixel, g.columns.before() > 0);
    if (of_pixel * L::kInputs == g.channels) return put_numbers(from, pixels * g.channels, to);
    if constexpr (L::kInputs == 2) {
      if (g.groups == 1 && channels <= 8) return put_odd_pixels(from, pixels, g.channels, to);
    }
    for (int64_t i = 0; i < pixels * g.groups; ++i) {
      put_numbers(from + i * g.of_group(), g.of_group(), to + i * channels);
    }
  }

  // A strip's numbers, channels last and with zeros around them; `turned` and `copied` have room for them.
  const X* prepare(const Strip& s, T* turned, X* copied) const {
    const Rows rows = rows_of(s);
    const T* from = x + s.image * g.channels * g.size();
    const int64_t first = rows.first * g.columns.size + s.column;
    if (g.last) {
      from += first * g.channels;
    } else {
      const int64_t pixels = flat ? s.columns : rows.count * g.columns.size;
      turn_over(from + first, g.channels, pixels, g.size(), turned, g.channels);
      from = turned;
    }
    if (!copies) return reinterpret_cast<const X*>(from);
    const int64_t before = g.columns.before() * of_pixel, within = g.columns.size * of_pixel, row = pitch * of_pixel;
    std::fill(copied, copied + rows.before * row, X(0));
    for (int64_t i = 0; i < rows.count; ++i) {
      X* to = copied + (rows.before + i) * row;
      std::fill(to, to + before, X(0));
      put_pixels(from + i * g.columns.size * g.channels, to + before);
      std::fill(to + before + within, to + row, X(0));
    }
    std::fill(copied + (rows.before + rows.count) * row, copied + g.rows.reach(s.rows) * row, X(0));
    return copied;
  }

  // What an output of a residue reads of the strip, of the first group, and the weights that belong to it.
  std::vector<Run> runs_of(int64_t row_residue, int64_t column_residue) const {
    std::vector<Run> runs;
    for (const auto& row : g.rows.reads(row_residue)) {
      for (const auto& column : g.columns.reads(column_residue)) {
        const int64_t tap = row.tap * g.columns.kernel + column.tap;
        const Run run{(row.at * pitch + column.at) * of_pixel, tap * channels * kRows, channels};
        Run* last = runs.empty() ? nullptr : &runs.back();
        if (g.depthwise()) {
          const bool next = last && last->at + of_pixel == run.at && last->weight + kRows == run.weight;
          if (next && last->length < L::kInputs && column.tap > 0) ++last->length;
          else runs.push_back(run);
        } else if (last && last->at + last->length == run.at && last->weight + last->length * kRows == run.weight) {
          last->length += run.length;
        } else {
          runs.push_back(run);
        }
      }
    }
    return runs;
  }

  // Outputs of a range from a strip; `at` is where the strip's first output goes, and pixels are `of_output` apart.
  void outputs(const Strip& s, const Range& r, const X* weights, const X* from, T* at, int64_t of_output) const {
    for (int64_t row_residue = 0; row_residue < g.rows.step(); ++row_residue) {
      for (int64_t column_residue = 0; column_residue < g.columns.step(); ++column_residue) {
        const auto& reads = runs[row_residue * g.columns.step() + column_residue];
        const int64_t rows = std::min(s.rows, g.rows.outputs(row_residue) - s.row);
        const int64_t columns = std::min(s.columns, g.columns.outputs(column_residue) - s.column);
        const int64_t x_step = g.columns.pace() * of_pixel, y_step = g.columns.step() * of_output;
        Task<X, T> task{reads, weights, of_tile, scales + r.tile * kRows, biases + r.tile * kRows, {}, x_step, y_step};
        for (int64_t row = 0; row < rows; ++row) {
          const X* x_row = from + row * g.rows.pace() * pitch * of_pixel;
          T* y_row = at + ((row * g.rows.step() + row_residue) * g.columns.out + column_residue) * of_output;
          if (g.depthwise()) {
            channels_of_row(task, columns, x_row, y_row);
          } else {
            outputs_of_row(task, r, columns, x_row, y_row);
          }
        }
      }
    }
  }

  static uint32_t wanted(int64_t tile, const Range& r) {
    const int64_t first = std::max<int64_t>(0, r.first - tile * kRows);
    const int64_t end = std::min<int64_t>(kRows, r.last - tile * kRows);
    return (1u << end) - (1u << first);
  }

  void outputs_of_row(Task<X, T>& task, const Range& r, int64_t columns, const X* from, T* to) const {
    for (int64_t t = 0; t < r.wide; ++t) task.wanted[t] = wanted(r.tile + t, r);
    in_blocks(columns, [&]<int M>(int64_t first) {
      const X* x = from + first * task.x_step;
      T* y = to + first * task.y_step;
      if (r.wide == 3) return block<L, M, 3>(task, x, y);
      if (r.wide == 2) return block<L, M, 2>(task, x, y);
      return block<L, M, 1>(task, x, y);
    });
  }

  void channels_of_row(Task<X, T> task, int64_t columns, const X* from, T* to) const {
    for (int64_t tile = 0; tile < tiles; ++tile, from += kRows, to += kRows) {
      task.wanted[0] = wanted(tile, ranges[0]);
      in_blocks(columns, [&]<int M>(int64_t first) {
        depthwise<L, M>(task, from + first * task.x_step, to + first * task.y_step);
      });
      task.weights += of_tile, task.scales += kRows, task.biases += kRows;
    }
  }

  // How the work is cut: images of a chunk, strips of an image, parts of the ranges of outputs.
  struct Cut {
    int64_t length, at_once, strips, parts;
    int64_t longest() const { return (length + strips - 1) / strips; }
  };

  Cut cut() const {
    const int64_t threads = torch::stable::get_num_threads();
    Cut c{flat ? g.columns.out : g.rows.outputs(0), 1, 1, 1};
    const int64_t numbers = (flat ? g.columns.size : g.rows.reach(c.length) * pitch) * of_pixel;
    const int64_t bytes = std::max<int64_t>(1, numbers * int64_t(sizeof(X)));
    c.strips = std::clamp<int64_t>((bytes + kCopied - 1) / kCopied, 1, c.length);
    c.at_once = std::clamp<int64_t>(kCopied / bytes, 1, (g.images + threads - 1) / threads);
    // Too few for the threads: these share ranges, and with few of them strips are shorter.
    const int64_t tasks = (g.images + c.at_once - 1) / c.at_once * c.strips;
    c.parts = std::clamp<int64_t>((threads + tasks - 1) / tasks, 1, int64_t(ranges.size()));
    if (tasks * c.parts < threads) {
      c.strips = std::min(c.length, (threads * c.strips + tasks * c.parts - 1) / (tasks * c.parts));
    }
    return c;
  }

  // What a thread needs to work in.
  struct Room {
    int64_t of_turned, of_copied;  // of an image
    decltype(scratch<T>(0)) turned, done;
    decltype(scratch<X>(0)) copied, decoded;
  };

  Room room(const Cut& c) const {
    const int64_t rows = flat ? 1 : c.longest(), reach = g.rows.reach(rows);
    const int64_t pixels = flat ? c.longest() : std::min(reach, g.rows.size) * g.columns.size;
    const int64_t of_turned = g.last ? 0 : pixels * g.channels;
    const int64_t of_copied = copies ? reach * pitch * of_pixel : 0;
    const int64_t outputs = rows * g.rows.step() * (flat ? c.longest() : g.columns.out);
    return {of_turned, of_copied, scratch<T>(c.at_once * of_turned), scratch<T>(g.last ? 0 : outputs * of_done),
            scratch<X>(c.at_once * of_copied), scratch<X>(g.transposed() ? 0 : kWide * of_tile)};
  }

  // A range's outputs of a strip, where they belong.
  void finish(const Strip& s, const Range& r, const X* weights, const X* prepared, const Room& room) const {
    const int64_t row = s.row * g.rows.step(), rows = std::min(s.rows * g.rows.step(), g.rows.out - row);
    const int64_t first = row * g.columns.out + s.column, pixels = flat ? s.columns : rows * g.columns.out;
    T* image = y + s.image * g.outputs * g.pixels();
    if (g.last) return outputs(s, r, weights, prepared, image + first * g.outputs + r.tile * kRows, g.outputs);
    outputs(s, r, weights, prepared, room.done.get(), of_done);
    const T* done = room.done.get() + r.first - r.tile * kRows;
    turn_over(done, pixels, r.last - r.first, of_done, image + r.first * g.pixels() + first, g.pixels());
  }

  // Ranges `from` to `to` of strips that differ in nothing but their image; `ready` are weights of all tiles, or null.
  void strips(const std::vector<Strip>& some, int64_t from, int64_t to, const X* ready, const Room& room) const {
    std::vector<const X*> prepared;
    for (const Strip& s : some) {
      const int64_t i = int64_t(prepared.size());
      X* copied = room.copied.get() + i * room.of_copied;
      prepared.push_back(prepare(s, room.turned.get() + i * room.of_turned, copied));
    }
    const Range* decoded = nullptr;
    for (const Range* r = &ranges[from]; r != ranges.data() + to; ++r) {
      if (!ready && !(decoded && decoded->tile == r->tile && decoded->wide == r->wide)) {
        decode(r->tile, r->wide, room.decoded.get());
        decoded = r;
      }
      const X* weights = ready ? ready + r->tile * of_tile : room.decoded.get();
      for (size_t i = 0; i < some.size(); ++i) {
        const int64_t group = g.depthwise() ? 0 : r->first / g.outputs_of_group();
        finish(some[i], *r, weights, prepared[i] + group * channels, room);
      }
    }
  }

  void decode(int64_t tile, int64_t wide, X* to) const {
    with_bits(w.bits, [&]<int B>() {
      for (int64_t t = 0; t < wide; ++t) {
        decode_tile<L, B>(w, tile + t, g.of_group(), to + t * of_tile);
        if (g.depthwise()) pair_taps(g, to + t * of_tile);
      }
    });
  }

  void operator()() {
    for (int64_t row = 0; row < g.rows.step(); ++row) {
      for (int64_t column = 0; column < g.columns.step(); ++column) runs.push_back(runs_of(row, column));
    }
    const bool small = tiles * of_tile * int64_t(sizeof(X)) <= kDecoded;
    const auto all = scratch<X>(small || g.depthwise() || g.transposed() ? tiles * of_tile : 0);
    const X* ready = all.get();
    if (g.transposed()) {
      std::fill(all.get(), all.get() + tiles * of_tile, X(0));
      transpose_weight<L>(g, w, channels, of_tile, all.get());
    } else if (small || g.depthwise()) {
      decode(0, tiles, all.get());
    } else {
      ready = nullptr;
    }
    const Cut c = cut();
    const int64_t chunks = (g.images + c.at_once - 1) / c.at_once, count = int64_t(ranges.size());
    torch::stable::parallel_for(0, chunks * c.strips * c.parts, 1, [&](int64_t from, int64_t to) {
      const Room room = this->room(c);
      for (int64_t task = from; task < to; ++task) {
        const int64_t chunk = task / c.parts / c.strips, strip = task / c.parts % c.strips, part = task % c.parts;
        const int64_t start = c.length * strip / c.strips, length = c.length * (strip + 1) / c.strips - start;
        std::vector<Strip> some;
        for (int64_t image = chunk * c.at_once; image < std::min(g.images, (chunk + 1) * c.at_once); ++image) {
          const Strip rows{image, start, length, 0, g.columns.outputs(0)}, columns{image, 0, 1, start, length};
          some.push_back(flat ? columns : rows);
        }
        strips(some, count * part / c.parts, count * (part + 1) / c.parts, ready, room);
      }
    });
  }
};

// float64 is for checks of gradients: the same sums, without hurry.
template <int B>
void convolve_double(const Geometry& g, const Weight& w, const double* bias, const double* x, double* y) {
  const bool transposed = g.transposed();
  const int64_t of_row = transposed ? g.outputs_of_group() : g.of_group(), padded = of_row + of_row % 2;
  const auto place = [&](int64_t image, int64_t channel, int64_t pixel, int64_t channels, int64_t pixels) {
    return g.last ? (image * pixels + pixel) * channels + channel : (image * channels + channel) * pixels + pixel;
  };
  const auto reads = [&](const Axis& axis, int64_t output) {
    std::vector<Axis::Read> found;  // without the zeros around x
    for (auto read : axis.reads(output % axis.step())) {
      read.at += output / axis.step() * axis.pace() - axis.before();
      if (read.at >= 0 && read.at < axis.size) found.push_back(read);
    }
    return found;
  };
  for (int64_t i = 0; i < g.images * g.outputs * g.pixels(); ++i) {
    const int64_t image = i / g.pixels() / g.outputs, n = i / g.pixels() % g.outputs, pixel = i % g.pixels();
    const int64_t within = n % g.outputs_of_group();
    double sum = bias ? bias[n] : 0.0;
    for (const auto& row : reads(g.rows, pixel / g.columns.out)) {
      for (const auto& column : reads(g.columns, pixel % g.columns.out)) {
        const int64_t tap = row.tap * g.columns.kernel + column.tap, from = row.at * g.columns.size + column.at;
        for (int64_t c = 0; c < g.of_group(); ++c) {
          const int64_t input = n / g.outputs_of_group() * g.of_group() + c, weight_row = transposed ? input : n;
          const double scale = w.scale() ? w.scale()[weight_row] : 1.0f;
          const double weight = w.value<B>(weight_row, tap * padded + (transposed ? within : c));
          sum += weight * scale * x[place(image, input, from, g.channels, g.size())];
        }
      }
    }
    y[place(image, n, pixel, g.outputs, g.pixels())] = sum;
  }
}

// ---- operator ---------------------------------------------------------------------------------------------------

// Whether the channels of a pixel stand side by side; where that is so of planes, too, these do.
bool channels_last(const Tensor& x) {
  if (x.dim() != 4 || x.is_contiguous()) return false;
  int64_t expected = 1;
  for (const int64_t d : {1, 3, 2, 0}) {
    if (x.size(d) != 1 && x.stride(d) != expected) return false;
    expected *= x.size(d);
  }
  return true;
}

// Numbers for one or two dimensions as two: an image of one dimension has one row.
std::array<int64_t, 2> two(const std::vector<int64_t>& given, size_t dims, int64_t missing, const char* name) {
  STD_TORCH_CHECK(given.size() == dims, name, " should have ", dims, " numbers, not ", given.size());
  return dims == 1 ? std::array<int64_t, 2>{missing, given[0]} : std::array<int64_t, 2>{given[0], given[1]};
}

Geometry geometry(const Tensor& x, const std::vector<int64_t>& shape, const std::vector<int64_t>& strides,
                  const std::vector<int64_t>& paddings, const std::vector<int64_t>& dilations, bool transposed,
                  const std::vector<int64_t>& output_paddings, int64_t groups) {
  const size_t dims = shape.size() - 2;
  STD_TORCH_CHECK(dims == 1 || dims == 2, "tiled convolutions have 1 or 2 dimensions of space");
  STD_TORCH_CHECK(groups > 0 && shape[0] % groups == 0, "a weight of ", shape[0], " rows has no ", groups, " groups");
  Geometry g{};
  g.groups = groups, g.channels = transposed ? shape[0] : shape[1] * groups;
  g.outputs = transposed ? shape[1] * groups : shape[0];
  STD_TORCH_CHECK(size_t(x.dim()) == dims + 2 && x.size(1) == g.channels, "x should have ", dims + 2,
                  " dimensions and ", g.channels, " channels");
  g.images = x.size(0), g.last = channels_last(x);
  const auto stride = two(strides, dims, 1, "stride"), padding = two(paddings, dims, 0, "padding");
  const auto dilation = two(dilations, dims, 1, "dilation");
  const auto more = two(output_paddings, dims, 0, "output_padding");
  const std::array<int64_t, 2> size{dims == 1 ? 1 : x.size(2), x.size(x.dim() - 1)};
  const std::array<int64_t, 2> kernel{dims == 1 ? 1 : shape[2], shape.back()};
  for (int d = 0; d < 2; ++d) {
    STD_TORCH_CHECK(stride[d] > 0 && dilation[d] > 0 && padding[d] >= 0 && kernel[d] > 0,
                    "stride, dilation and kernel should be positive, padding not negative");
    Axis& axis = d ? g.columns : g.rows;
    axis = {size[d], kernel[d], stride[d], padding[d], dilation[d], 0, transposed};
    const int64_t reach = dilation[d] * (kernel[d] - 1) - 2 * padding[d];
    if (transposed) {
      axis.out = (size[d] - 1) * stride[d] + reach + more[d] + 1;
      STD_TORCH_CHECK(more[d] >= 0 && axis.out > 0, "a transposed convolution of this geometry leaves no output");
    } else {
      STD_TORCH_CHECK(size[d] > reach, "the kernel is larger than the padded image");
      axis.out = (size[d] - reach - 1) / stride[d] + 1;
    }
  }
  return g;
}

template <class L, class T>
void convolve(const Geometry& g, const Weight& w, const float* bias, const void* x, void* y) {
  const int64_t tiles = (g.outputs + kRows - 1) / kRows;
  const auto scales = scratch<float>(tiles * kRows), biases = scratch<float>(tiles * kRows);
  for (int64_t n = 0; n < tiles * kRows; ++n) {
    scales[n] = w.scale() && !g.transposed() && n < g.outputs ? w.scale()[n] : 1.0f;
    biases[n] = bias && n < g.outputs ? bias[n] : 0.0f;
  }
  const bool flat = g.pointwise() && !copied<L>(g);
  const Geometry used = flat ? g.flat() : g;
  Convolution<L, T>{used, w, flat, static_cast<const T*>(x), static_cast<T*>(y), scales.get(), biases.get()}();
}

// A convolution of images of one pixel is a product of matrices.
template <template <int> class Kernel, class T>
void convolve_pixels(const Geometry& g, const Weight& w, const float* bias, const void* x, void* y) {
  with_bits(w.bits, [&]<int B>() {
    const Problem p{w.words_data(), w.words, g.images, g.channels, g.outputs, bias, w.scale()};
    multiply<Kernel<B>, B>(p, w.values(), w.size(), static_cast<const T*>(x), static_cast<T*>(y));
  });
}

Tensor convolution_tiled(Tensor x, std::optional<Tensor> bias, std::vector<int64_t> stride,
                         std::vector<int64_t> padding, std::vector<int64_t> dilation, bool transposed,
                         std::vector<int64_t> output_padding, int64_t groups, Tensor codes, Tensor table,
                         std::optional<Tensor> scales, std::vector<int64_t> shape, int64_t bits) {
  const Weight weight(Layout::kTiled, codes, table, scales, shape, bits);
  const Geometry g = geometry(x, shape, stride, padding, dilation, transposed, output_padding, groups);
  const ScalarType dtype = x.scalar_type(), inner = computed_in(dtype);
  x = as(g.last ? x : in_order(x), inner);
  std::vector<int64_t> sizes{g.images, g.outputs, g.rows.out, g.columns.out};
  if (shape.size() == 3) sizes.erase(sizes.begin() + 2);
  Tensor y = empty(sizes, inner, g.last);
  const std::optional<Tensor> offset = bias_for(bias, g.outputs, dtype, inner);
  if (y.numel() == 0) return as(y, dtype);
  const void *from = x.const_data_ptr(), *bias_data = offset ? offset->const_data_ptr() : nullptr;
  void* to = y.mutable_data_ptr();
  const float* biases = static_cast<const float*>(bias_data);
  const bool pixels = g.pointwise() && g.pixels() == 1 && groups == 1 && weight.tables() == 1;
  if (inner == ScalarType::Float) {
    if (pixels) convolve_pixels<FloatKernel, float>(g, weight, biases, from, to);
    else convolve<Singles, float>(g, weight, biases, from, to);
#if defined(__AVX512BF16__)
  } else if (inner == ScalarType::BFloat16) {
    if (pixels) convolve_pixels<PairKernel, BFloat16>(g, weight, biases, from, to);
    else convolve<Pairs, BFloat16>(g, weight, biases, from, to);
#endif
  } else {
    with_bits(bits, [&]<int B>() {
      convolve_double<B>(g, weight, static_cast<const double*>(bias_data), static_cast<const double*>(from),
                         static_cast<double*>(to));
    });
  }
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
