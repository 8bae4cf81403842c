// Matrix products with packed weights on CPUs, and rows of them (sqs_pyro/kernels/tiled.py writes the layout).
//
// Compiled on first use for the machine at hand (sqs_pyro/kernels/native.py). Only PyTorch's stable C interface is used.

#include "integers.h"
#include "matrix_unit.h"
#include "operators.h"
#include "products.h"

namespace sqs {

// ---- operators --------------------------------------------------------------------------------------------------

Tensor linear_tiled(Tensor x, std::optional<Tensor> bias, Tensor codes, Tensor table, std::optional<Tensor> scales,
                    std::vector<int64_t> shape, int64_t bits) {
  const Weight weight(Layout::kTiled, codes, table, scales, shape, bits);
  STD_TORCH_CHECK(weight.tables() == 1, "a product with tiled codes takes one table, not ", weight.tables());
  return linear(weight, shape, x, bias, has_matrix_unit(), []<class Kernel, int B, class T>(
      const Weight& w, const float* bias, int64_t rows, const T* x, T* y) {
    const Problem p{w.words_data(), w.words, rows, w.inputs, w.outputs, bias, w.scale()};
    product<Kernel, B>(p, w.values(), w.size(), x, y);
  });
}

// Inputs rounded to 8 bits, a table of whole numbers times one step.
Tensor linear_int8_tiled(Tensor x, std::optional<Tensor> bias, int64_t block, Tensor codes, Tensor table,
                         std::optional<Tensor> scales, std::vector<int64_t> shape, int64_t bits) {
  const Weight weight(Layout::kTiled, codes, table, scales, shape, bits);
  STD_TORCH_CHECK(weight.tables() == 1, "a product with tiled codes takes one table, not ", weight.tables());
  STD_TORCH_CHECK(2 <= bits && bits <= 4, "a product with inputs of 8 bits takes codes of 2 to 4 bits, not ", bits);
  STD_TORCH_CHECK(x.dim() >= 1 && x.size(x.dim() - 1) == weight.inputs, "the last dimension of x should be ",
                  weight.inputs);
  const ScalarType dtype = x.scalar_type();
  x = in_order(as(x, ScalarType::Float));
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  sizes.back() = weight.outputs;
  Tensor y = empty(sizes, ScalarType::Float);
  const std::optional<Tensor> offset = bias_for(bias, weight.outputs, dtype, ScalarType::Float);
  const int64_t rows = x.numel() / weight.inputs;
  const float* biases = offset ? static_cast<const float*>(offset->const_data_ptr()) : nullptr;
  const Problem p{weight.words_data(), weight.words, rows, weight.inputs, weight.outputs, biases, weight.scale()};
  const float* from = static_cast<const float*>(x.const_data_ptr());
  float* to = static_cast<float*>(y.mutable_data_ptr());
  const auto multiply = [&]<int B>(const Integers<B>& integers) {
    constexpr int own = Integers<B>::kBlock;
    STD_TORCH_CHECK(block == own, "codes of ", bits, " bits have blocks of ", own, " inputs, not ", block);
    integers.multiply(p, from, to);
  };
  if (bits == 2) multiply(Integers<2>(weight.values(), weight.size()));
  if (bits == 3) multiply(Integers<3>(weight.values(), weight.size()));
  if (bits == 4) multiply(Integers<4>(weight.values(), weight.size()));
  return as(y, dtype);
}

Tensor embedding_tiled(Tensor indices, ScalarType dtype, Tensor codes, Tensor table, std::optional<Tensor> scales,
                       std::vector<int64_t> shape, int64_t bits) {
  return embedding(Weight(Layout::kTiled, codes, table, scales, shape, bits), shape, indices, dtype);
}

}  // namespace sqs

extern "C" [[gnu::visibility("default")]] const char* sqs_bfloat16_products() {
  if (sqs::has_matrix_unit()) return "a matrix unit";
#if defined(__AVX512BF16__)
  if (sqs::pairs_are_fast()) return "products of pairs";
#endif
  return "float32";
}

STABLE_TORCH_LIBRARY_IMPL(sqs, CPU, m) {
  m.impl("linear_tiled", TORCH_BOX(&sqs::linear_tiled));
  m.impl("linear_int8_tiled", TORCH_BOX(&sqs::linear_int8_tiled));
  m.impl("embedding_tiled", TORCH_BOX(&sqs::embedding_tiled));
}
