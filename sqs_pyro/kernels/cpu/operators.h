// The two operators that matrices have in every layout: products, and rows of the weight.

#pragma once

#include "arguments.h"

namespace sqs {

// float64 is for checks of gradients: the same sums, without hurry.
template <int B>
void multiply_double(const Weight& w, const double* bias, int64_t rows, const double* x, double* y) {
  for (int64_t n = 0; n < w.outputs; ++n) {
    for (int64_t m = 0; m < rows; ++m) {
      double sum = 0;
      for (int64_t k = 0; k < w.inputs; ++k) sum += double(w.value<B>(n, k)) * w.factor(n, k) * x[m * w.inputs + k];
      y[m * w.outputs + n] = sum + (bias ? bias[n] : 0.0);
    }
  }
}

// `x @ weight.T + bias`; `multiply.operator()<Kernel, B>(weight, bias, rows, x, y)` does it, bfloat16 perhaps by a matrix
// unit.
template <class F>
Tensor linear(const Weight& weight, const std::vector<int64_t>& shape, Tensor x, const std::optional<Tensor>& bias,
              bool unit, const F& multiply) {
  STD_TORCH_CHECK(shape.size() == 2, "the weight of a product has two dimensions, not ", shape.size());
  STD_TORCH_CHECK(x.dim() >= 1 && x.size(x.dim() - 1) == weight.inputs, "the last dimension of x should be ",
                  weight.inputs);
  const ScalarType dtype = x.scalar_type(), inner = computed_in(dtype, unit);
  x = in_order(as(x, inner));
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  sizes.back() = weight.outputs;
  Tensor y = empty(sizes, inner);
  const std::optional<Tensor> offset = bias_for(bias, weight.outputs, dtype, inner);
  const int64_t rows = x.numel() / weight.inputs;
  if (rows == 0) return as(y, dtype);
  const void* from = x.const_data_ptr();
  const void* biases = offset ? offset->const_data_ptr() : nullptr;
  void* to = y.mutable_data_ptr();
  with_bits(weight.bits, [&]<int B>() {
    const float* floats = static_cast<const float*>(biases);
    if (inner == ScalarType::Float) {
      multiply.template operator()<FloatKernel<B>, B>(
          weight, floats, rows, static_cast<const float*>(from), static_cast<float*>(to));
#if defined(__AVX512BF16__)
    } else if (inner == ScalarType::BFloat16) {
      multiply.template operator()<PairKernel<B>, B>(
          weight, floats, rows, static_cast<const BFloat16*>(from), static_cast<BFloat16*>(to));
#endif
    } else {
      multiply_double<B>(weight, static_cast<const double*>(biases), rows, static_cast<const double*>(from),
                         static_cast<double*>(to));
    }
  });
  return as(y, dtype);
}

// Rows of the weight, decoded: `[*indices, inputs]`.
inline Tensor embedding(const Weight& weight, const std::vector<int64_t>& shape, Tensor indices, ScalarType dtype) {
  STD_TORCH_CHECK(shape.size() == 2, "a weight with rows has two dimensions, not ", shape.size());
  indices = in_order(as(indices, ScalarType::Long));
  const int64_t* rows = static_cast<const int64_t*>(indices.const_data_ptr());
  for (int64_t i = 0; i < indices.numel(); ++i) {
    STD_TORCH_CHECK(rows[i] >= 0 && rows[i] < weight.outputs, "index ", rows[i], " is outside of a table of ",
                    weight.outputs, " rows");
  }
  std::vector<int64_t> sizes(indices.sizes().begin(), indices.sizes().end());
  sizes.push_back(weight.inputs);
  Tensor found = empty(sizes, ScalarType::Float);
  float* to = static_cast<float*>(found.mutable_data_ptr());
  with_bits(weight.bits, [&]<int B>() {
    torch::stable::parallel_for(0, indices.numel(), 16, [&](int64_t from, int64_t end) {
      for (int64_t i = from; i < end; ++i) {
        for (int64_t k = 0; k < weight.inputs; ++k) {
          to[i * weight.inputs + k] = weight.value<B>(rows[i], k) * weight.factor(rows[i], k);
        }
      }
    });
  });
  return as(found, dtype);
}

}  // namespace sqs
