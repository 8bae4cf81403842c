// What operators are given: tensors in order, a weight that fits its shape, the dtype that sums are made in.

#pragma once

#include <optional>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include "codes.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Neither asks the dispatcher for what is there already: a small product takes less time than that.
Tensor in_order(const Tensor& tensor) { return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor); }

Tensor as(const Tensor& tensor, ScalarType dtype) {
  return tensor.scalar_type() == dtype ? tensor : torch::stable::to(tensor, dtype);
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
    default: STD_TORCH_CHECK(false, "the tiled layout has codes of 1, 2, 3, 4, 5 or 8 bits, not ", bits);
  }
}

struct Weight {
  Tensor codes, table;
  std::optional<Tensor> scales;
  int64_t outputs, inputs, bits, words;

  Weight(Tensor codes_, Tensor table_, std::optional<Tensor> scales_, const std::vector<int64_t>& shape, int64_t bits_)
      : codes(in_order(codes_)), table(in_order(table_)), scales(scales_), bits(bits_) {
    STD_TORCH_CHECK(shape.size() >= 2 && shape.size() <= 4, "a tiled weight has 2 to 4 dimensions, not ", shape.size());
    outputs = shape[0], inputs = shape[1];
    if (shape.size() > 2) inputs += inputs % 2;  // channels of a convolution stand in pairs, tap by tap
    for (size_t d = 2; d < shape.size(); ++d) inputs *= shape[d];
    with_bits(bits, [&]<int B>() { words = (inputs + 2 * kPairs<B> - 1) / (2 * kPairs<B>); });
    const int64_t tiles = (outputs + kRows - 1) / kRows;
    STD_TORCH_CHECK(codes.numel() == tiles * words * 64, "codes of a tiled weight have ", tiles * words * 64,
                    " bytes, not ", codes.numel());
    STD_TORCH_CHECK(table.dim() == 2 && table.size(1) % 4 == 0 && 0 < table.size(1) && table.size(1) <= 4 << bits,
                    "a table of ", table.numel(), " bytes does not fit codes of ", bits, " bits");
    STD_TORCH_CHECK(table.size(0) > 0 && outputs % table.size(0) == 0, table.size(0), " tables do not fit ", outputs,
                    " outputs");
    if (scales) {
      scales = in_order(*scales);
      STD_TORCH_CHECK(scales->numel() == 4 * outputs, "scales have ", 4 * outputs, " bytes, not ", scales->numel());
    }
  }

  const uint32_t* words_data() const { return reinterpret_cast<const uint32_t*>(codes.const_data_ptr()); }
  const float* values() const { return reinterpret_cast<const float*>(table.const_data_ptr()); }
  int64_t size() const { return table.size(1) / 4; }
  int64_t tables() const { return table.size(0); }
  const float* scale() const {
    return scales ? reinterpret_cast<const float*>(scales->const_data_ptr()) : nullptr;
  }
};

// What sums are made of: float16 and, without instructions for it, bfloat16 are widened.
ScalarType computed_in(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float: case ScalarType::Double: return dtype;
    case ScalarType::Half: return ScalarType::Float;
#if defined(__AVX512BF16__)
    case ScalarType::BFloat16: return dtype;
#else
    case ScalarType::BFloat16: return ScalarType::Float;
#endif
    default: STD_TORCH_CHECK(false, "x should be float32, bfloat16, float16 or float64");
  }
}

// The bias as sums take it: cast to the dtype of x, as the reference does; added before the result is rounded.
std::optional<Tensor> bias_for(const std::optional<Tensor>& bias, int64_t outputs, ScalarType dtype, ScalarType inner) {
  if (!bias) return std::nullopt;
  STD_TORCH_CHECK(bias->dim() == 1 && bias->numel() == outputs, "the bias should have ", outputs, " numbers");
  return in_order(as(as(*bias, dtype), inner == ScalarType::Double ? inner : ScalarType::Float));
}

}  // namespace
