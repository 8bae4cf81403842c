// The operator of convolutions with packed weights on CPUs; what computes them is in convolution.h.

#include <array>

#include "convolution.h"

namespace sqs {

#if defined(__AVX512F__)
constexpr int64_t kWideEnough = 64;  // channels, for which torch's own sums are faster
#else
constexpr int64_t kWideEnough = 32;
#endif
constexpr int64_t kPixels = 512;      // that share a weight: decoding is a few hundredths of the time
constexpr int64_t kLong = 32 << 20;  // products that are added: the way to torch's own takes a tenth of a millisecond

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

// Whether the channels of a pixel stand side by side; where that is so of planes, too, these do, but not for one channel.
bool channels_last(const Tensor& x) {
  if (x.dim() != 4 || (x.is_contiguous() && x.size(1) != 1)) return false;
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

// Whether torch's own convolution with the decoded weight is faster: its sums are, by up to a quarter.
bool decodes_first(const Geometry& g, size_t dims) {
  const bool ordinary = dims == 4 && g.groups == 1 && !g.transposed() && g.taps() > 1;
  const int64_t pixels = g.images * g.pixels(), sums = pixels * g.taps() * g.channels * g.outputs;
  return ordinary && std::min(g.channels, g.outputs) >= kWideEnough && pixels >= kPixels && sums >= kLong;
}

Tensor convolution_of_decoded(const Geometry& g, const Weight& weight, const Tensor& x, const std::optional<Tensor>& bias,
                              const std::vector<int64_t>& shape, const std::vector<int64_t>& stride,
                              const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation) {
  const Tensor dense = empty(shape, ScalarType::Float, g.last);
  decode_float32(g, weight, static_cast<float*>(dense.mutable_data_ptr()));
  using torch::stable::detail::from;
  const std::vector<int64_t> none{0, 0};
  std::array<StableIValue, 9> stack{from(x),        from(dense), from(bias), from(stride), from(padding),
                                    from(dilation), from(false), from(none), from(int64_t(1))};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::convolution", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

Tensor convolution_tiled(Tensor x, std::optional<Tensor> bias, std::vector<int64_t> stride,
                         std::vector<int64_t> padding, std::vector<int64_t> dilation, bool transposed,
                         std::vector<int64_t> output_padding, int64_t groups, Tensor codes, Tensor table,
                         std::optional<Tensor> scales, std::vector<int64_t> shape, int64_t bits) {
  const Weight weight(Layout::kTiled, codes, table, scales, shape, bits);
  const Geometry g = geometry(x, shape, stride, padding, dilation, transposed, output_padding, groups);
  const ScalarType dtype = x.scalar_type(), inner = computed_in(dtype, has_matrix_unit() && !g.depthwise());
  x = as(g.last ? x : in_order(x), inner);
  const std::optional<Tensor> offset = bias_for(bias, g.outputs, dtype, inner);
  if (inner == ScalarType::Float && decodes_first(g, shape.size())) {
    return as(convolution_of_decoded(g, weight, x, offset, shape, stride, padding, dilation), dtype);
  }
  std::vector<int64_t> sizes{g.images, g.outputs, g.rows.out, g.columns.out};
  if (shape.size() == 3) sizes.erase(sizes.begin() + 2);
  Tensor y = empty(sizes, inner, g.last);
  if (y.numel() == 0) return as(y, dtype);
  const void *from = x.const_data_ptr(), *biases = offset ? offset->const_data_ptr() : nullptr;
  void* to = y.mutable_data_ptr();
  const auto run = [&]<class T, class B>(void (*convolve)(const Geometry&, const Weight&, const B*, const T*, T*)) {
    convolve(g, weight, static_cast<const B*>(biases), static_cast<const T*>(from), static_cast<T*>(to));
  };
  if (inner == ScalarType::Float) {
    run(convolve_float32);
#if defined(__AVX512BF16__)
  } else if (inner == ScalarType::BFloat16) {
    run(convolve_bfloat16);
#endif
  } else {
    with_bits(bits, [&]<int B>() { run(convolve_double<B>); });
  }
  return as(y, dtype);
}

}  // namespace sqs

STABLE_TORCH_LIBRARY_IMPL(sqs, CPU, m) { m.impl("convolution_tiled", TORCH_BOX(&sqs::convolution_tiled)); }
