// What operators are given: tensors in order, a weight that fits its shape, the dtype that sums are made in.

#pragma once

#include <optional>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/Half.h>

#include "codes.h"
#include "processor.h"

namespace sqs {

using torch::headeronly::Half;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Neither asks the dispatcher for what is there already: a small product takes less time than that.
inline Tensor in_order(const Tensor& tensor) { return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor); }

inline Tensor as(const Tensor& tensor, ScalarType dtype) {
  return tensor.scalar_type() == dtype ? tensor : torch::stable::to(tensor, dtype);
}

// A new tensor in order, or with the second dimension last; without a way through the dispatcher by name, which takes a
// microsecond.
inline Tensor empty(const std::vector<int64_t>& sizes, ScalarType dtype, bool channels_last = false) {
  std::vector<int64_t> strides(sizes.size(), 1);
  int64_t stride = channels_last ? std::max<int64_t>(sizes[1], 1) : 1;
  for (size_t d = sizes.size(); d-- > 0;) {
    if (channels_last && d == 1) continue;
    strides[d] = stride, stride *= std::max<int64_t>(sizes[d], 1);
  }
  AtenTensorHandle made;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      int64_t(sizes.size()), sizes.data(), strides.data(), torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)), aoti_torch_device_type_cpu(), 0, &made));
  return Tensor(made);
}

template <class F>
void with_bits(int64_t bits, F&& f) {
  switch (bits) {
    case 1: return f.template operator()<1>();
    case 2: return f.template operator()<2>();
    case 3: return f.template operator()<3>();
    case 4: return f.template operator()<4>();
    case 5: return f.template operator()<5>();
    case 8: return f.template operator()<8>();
    default: STD_TORCH_CHECK(false, "packed weights have codes of 1, 2, 3, 4, 5 or 8 bits, not ", bits);
  }
}

inline float widened(Half number) {
#if defined(__F16C__)
  return _cvtsh_ss(number.x);
#else
  return number;
#endif
}

// Tiled: a word of 64 bytes holds a few inputs of 16 outputs. In rows: it holds chunks of 32 inputs of one output, or of
// the end of one and the beginning of the next.
enum class Layout { kTiled, kRows };

struct Weight {
  Layout layout;
  Tensor codes, table;
  std::optional<Tensor> scales;
  int64_t outputs, inputs, bits;
  int64_t words;  // of a tile; in rows, of all
  int64_t parts = 0;  // of an output's inputs, each with a scale of its own; 0 where outputs have scales or none has

  Weight(Layout layout_, Tensor codes_, Tensor table_, std::optional<Tensor> scales_, const std::vector<int64_t>& shape,
         int64_t bits_)
      : layout(layout_), codes(in_order(codes_)), table(in_order(table_)), scales(scales_), bits(bits_) {
    STD_TORCH_CHECK(shape.size() >= 2 && shape.size() <= 4, "a packed weight has 2 to 4 dimensions, not ", shape.size());
    outputs = shape[0], inputs = shape[1];
    if (shape.size() > 2) inputs += inputs % 2;  // channels of a convolution stand in pairs, tap by tap
    for (size_t d = 2; d < shape.size(); ++d) inputs *= shape[d];
    const bool tiled = layout == Layout::kTiled;
    with_bits(bits, [&]<int B>() {
      // Pairs of inputs that each lane of a tile has, or chunks of all rows.
      const int64_t units = tiled ? (inputs + 1) / 2 : outputs * chunks();
      words = (units + kPairs<B> - 1) / kPairs<B>;
    });
    const int64_t bytes = (tiled ? (outputs + kRows - 1) / kRows : 1) * words * 64;
    STD_TORCH_CHECK(codes.numel() == bytes, "codes of this weight have ", bytes, " bytes, not ", codes.numel());
    STD_TORCH_CHECK(table.dim() == 2 && table.size(1) % 4 == 0 && 0 < table.size(1) && table.size(1) <= 4 << bits,
                    "a table of ", table.numel(), " bytes does not fit codes of ", bits, " bits");
    const int64_t tables = table.size(0), of_table = tables > 0 ? outputs * inputs / tables : 0;
    const bool rows = of_table > 0 && of_table * tables == outputs * inputs && of_table % inputs == 0;
    const bool within = !tiled && of_table > 0 && inputs % of_table == 0 && of_table % (2 * kRows) == 0;
    STD_TORCH_CHECK(rows || within, tables, " tables do not fit ", outputs, " outputs of ", inputs, " inputs");
    if (!scales) return;
    scales = in_order(*scales);
    if (scales->dim() == 2) {
      parts = scales->size(1) / 2;
      const bool fits = !tiled && parts > 0 && scales->size(0) == outputs && scales->size(1) == 2 * parts &&
                        inputs % (parts * 2 * kRows) == 0;
      STD_TORCH_CHECK(fits, "scales of ", parts, " parts do not fit ", outputs, " outputs of ", inputs, " inputs");
    } else {
      STD_TORCH_CHECK(scales->numel() == 4 * outputs, "scales have ", 4 * outputs, " bytes, not ", scales->numel());
    }
  }

  int64_t chunks() const { return (inputs + 2 * kRows - 1) / (2 * kRows); }  // of a row
  const uint32_t* words_data() const { return reinterpret_cast<const uint32_t*>(codes.const_data_ptr()); }
  const float* values() const { return reinterpret_cast<const float*>(table.const_data_ptr()); }
  int64_t size() const { return table.size(1) / 4; }
  int64_t tables() const { return table.size(0); }
  int64_t of_table() const { return outputs * inputs / table.size(0); }  // weights that share a table
  // Of each output.
  const float* scale() const {
    return scales && !parts ? reinterpret_cast<const float*>(scales->const_data_ptr()) : nullptr;
  }
  // Of each part of each output.
  const Half* part_scales() const {
    return parts ? reinterpret_cast<const Half*>(scales->const_data_ptr()) : nullptr;
  }
  int64_t of_part() const { return parts ? inputs / parts : inputs; }  // inputs that share a scale

  // What one weight is multiplied by.
  float factor(int64_t n, int64_t k) const {
    if (parts) return widened(part_scales()[n * parts + k / of_part()]);
    return scales ? scale()[n] : 1.0f;
  }

  // One weight without its scale, where there is no hurry.
  template <int B>
  float value(int64_t n, int64_t k) const {
    constexpr int P = kPairs<B>;
    const bool tiled = layout == Layout::kTiled;
    const int64_t unit = tiled ? k / 2 : n * chunks() + k / (2 * kRows), word = unit / P;
    const int64_t lane = tiled ? ((n / kRows) * words + word) * kRows + n % kRows : word * kRows + k % (2 * kRows) / 2;
    const int64_t shift = 16 * (k % 2) + B * (unit % P);
    const int64_t code = words_data()[lane] >> shift & ((1 << B) - 1);
    return code < size() ? values()[(n * inputs + k) / of_table() * size() + code] : 0.0f;
  }
};

// What is multiplied: float16 is widened, and bfloat16 where that is faster. `unit` says whether a matrix unit would do it.
inline ScalarType computed_in(ScalarType dtype, [[maybe_unused]] bool unit) {
  switch (dtype) {
    case ScalarType::Float: case ScalarType::Double: return dtype;
    case ScalarType::Half: return ScalarType::Float;
#if defined(__AVX512BF16__)
    case ScalarType::BFloat16: return unit || pairs_are_fast() ? dtype : ScalarType::Float;
#else
    case ScalarType::BFloat16: return ScalarType::Float;
#endif
    default: STD_TORCH_CHECK(false, "x should be float32, bfloat16, float16 or float64");
  }
}

// The bias as sums take it: cast to the dtype of x, as the reference does; added before the result is rounded.
inline std::optional<Tensor> bias_for(const std::optional<Tensor>& bias, int64_t outputs, ScalarType dtype, ScalarType inner) {
  if (!bias) return std::nullopt;
  STD_TORCH_CHECK(bias->dim() == 1 && bias->numel() == outputs, "the bias should have ", outputs, " numbers");
  return in_order(as(as(*bias, dtype), inner == ScalarType::Double ? inner : ScalarType::Float));
}

}  // namespace sqs
