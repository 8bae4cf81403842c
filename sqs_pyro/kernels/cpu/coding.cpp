// Symbols of a panel of inputs, one input after the other (sqs_pyro/kernels/coding.py): a few rows at a time, for which
// the whole panel stays in the first-level cache.
//
// Every number comes out of the operations that torch's calls make, in their order, and each of them rounds for itself:
// this is compiled without contraction of products and sums. Rows are independent, so threads make no difference.

#include <type_traits>

#include "arguments.h"

namespace sqs {

constexpr int kSide = 2;  // registers of rows side by side: one's comparisons run while the other's are waited for

template <class T>
constexpr int kWide = kLanes * sizeof(float) / sizeof(T);  // rows of a register
template <class T>
constexpr int kBlock = kSide * kWide<T>;

template <class T>
struct Registers {
  typedef T Values __attribute__((vector_size(4 * kLanes)));
  using Number = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
  typedef Number Numbers __attribute__((vector_size(4 * kLanes)));
};

template <class T>
struct Panel {
  int64_t inputs, rows, symbols;  // P, n, 1 + K
  const T *matrix, *values, *rates, *price;
  const T* units;   // [P, n], of codewords; or none
  const T* weight;  // [P, n], given all others
  T* state;         // [P, n]: means, or slopes
  uint8_t* chosen;
  T *means, *changes;
};

// `count` rows of one input into a block, zeros behind them; and back.
template <class T>
inline void fetch(T* to, const T* from, int64_t count) {
  if (count == kBlock<T>) return void(std::memcpy(to, from, kBlock<T> * sizeof(T)));
  std::memset(to, 0, kBlock<T> * sizeof(T));
  std::memcpy(to, from, count * sizeof(T));
}

template <class T>
inline void put(T* to, const T* from, int64_t count) {
  std::memcpy(to, from, count * sizeof(T));
}

// Which symbol is the cheapest for each row of a block; the first of several, and the first whose cost is no number.
template <class T>
inline void cheapest(const Panel<T>& panel, const T* means, const T* price, typename Registers<T>::Number* places) {
  using Values = typename Registers<T>::Values;
  using Numbers = typename Registers<T>::Numbers;
  Values mean[kSide], nat[kSide], least[kSide];
  Numbers place[kSide] = {};
  const auto cost = [&](int s, int64_t z) {
    const Values difference = mean[s] - panel.values[z];
    return difference * difference * T(0.5) + panel.rates[z] * nat[s];
  };
#pragma GCC unroll 2
  for (int s = 0; s < kSide; ++s) {
    mean[s] = load<Values>(means + s * kWide<T>), nat[s] = load<Values>(price + s * kWide<T>);
    least[s] = cost(s, 0);
  }
  for (int64_t z = 1; z < panel.symbols; ++z) {
    const Numbers here = typename Registers<T>::Number(z) - Numbers{};
#pragma GCC unroll 2
    for (int s = 0; s < kSide; ++s) {
      const Values found = cost(s, z);
      const Numbers cheaper = ~(found >= least[s]) & (least[s] == least[s]);
      least[s] = cheaper ? found : least[s];
      place[s] = cheaper ? here : place[s];
    }
  }
#pragma GCC unroll 2
  for (int s = 0; s < kSide; ++s) store(places + s * kWide<T>, place[s]);
}

template <bool kChain, class T>
void code_block(const Panel<T>& panel, int64_t first, T* state) {
  using Values = typename Registers<T>::Values;
  constexpr int block = kBlock<T>;
  const int64_t count = std::min<int64_t>(block, panel.rows - first), n = panel.rows;
  for (int64_t j = 0; j < panel.inputs; ++j) fetch(state + j * block, panel.state + j * n + first, count);
  for (int64_t j = 0; j < panel.inputs; ++j) {
    const T *row = panel.matrix + j * panel.inputs, own = row[j];
    T mean[block], near[block], unit[block], price[block], weight[block], change[block];
    typename Registers<T>::Number places[block];
    fetch(price, panel.price + j * n + first, count);
    if constexpr (!kChain) fetch(weight, panel.weight + j * n + first, count);
    for (int i = 0; i < block; ++i) {
      mean[i] = state[j * block + i];
      if constexpr (!kChain) mean[i] = weight[i] - mean[i] / own;
    }
    if (panel.units) fetch(unit, panel.units + j * n + first, count);
    for (int i = 0; i < block; ++i) near[i] = panel.units ? mean[i] / unit[i] : mean[i];
    cheapest(panel, near, price, places);
    for (int i = 0; i < block; ++i) {
      const T value = panel.units ? panel.values[places[i]] * unit[i] : panel.values[places[i]];
      change[i] = kChain ? (mean[i] - value) / own : value - weight[i];
    }
    for (int64_t k = j + 1; k < panel.inputs; ++k) {
#pragma GCC unroll 2
      for (int i = 0; i < block; i += kWide<T>) {
        const Values moved = row[k] * load<Values>(change + i), before = load<Values>(state + k * block + i);
        store(state + k * block + i, kChain ? before - moved : before + moved);
      }
    }
    for (int64_t i = 0; i < count; ++i) panel.chosen[j * n + first + i] = uint8_t(places[i]);
    put(panel.changes + j * n + first, change, count);
    if constexpr (!kChain) put(panel.means + j * n + first, mean, count);
  }
  for (int64_t j = 0; j < panel.inputs; ++j) put(panel.state + j * n + first, state + j * block, count);
}

template <bool kChain, class T>
void code(const Panel<T>& panel) {
  torch::stable::parallel_for(0, (panel.rows + kBlock<T> - 1) / kBlock<T>, 1, [&](int64_t from, int64_t end) {
    const auto state = scratch<T>(panel.inputs * kBlock<T>);
    for (int64_t i = from; i < end; ++i) code_block<kChain>(panel, i * kBlock<T>, state.get());
  });
}

// ---- operators --------------------------------------------------------------------------------------------------

template <class T>
const T* read(const Tensor& tensor) { return static_cast<const T*>(tensor.const_data_ptr()); }

template <class T>
T* write(const Tensor& tensor) { return static_cast<T*>(tensor.mutable_data_ptr()); }

// By the chain rule, or given all others, which takes the weight as it is and gives the means.
template <bool kChain>
void run(const Tensor& state, const Tensor* weight, const Tensor& matrix_, const Tensor& values_, const Tensor& rates_,
         const Tensor& price_, const std::optional<Tensor>& units_, const Tensor& chosen, const Tensor* means,
         const Tensor& changes) {
  const Tensor matrix = in_order(matrix_), values = in_order(values_), rates = in_order(rates_);
  const Tensor price = in_order(price_);
  const std::optional<Tensor> units = units_ ? std::optional(in_order(*units_)) : std::nullopt;
  STD_TORCH_CHECK(state.dim() == 2, "a panel has two dimensions");
  const int64_t inputs = state.size(0), rows = state.size(1), symbols = values.numel();
  const ScalarType dtype = state.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double,
                  "symbols are chosen in float32 or float64");
  STD_TORCH_CHECK(matrix.dim() == 2 && matrix.size(0) == inputs && matrix.size(1) == inputs &&
                  matrix.scalar_type() == dtype, "the panel of a matrix does not fit ", inputs, " inputs");
  STD_TORCH_CHECK(0 < symbols && symbols <= 256 && rates.numel() == symbols && values.scalar_type() == dtype &&
                  rates.scalar_type() == dtype, "1 to 256 symbols have a value and a rate each");
  for (const Tensor* each : {weight, &price, units ? &*units : nullptr, &chosen, means, &changes}) {
    const bool fits = !each || (each->dim() == 2 && each->size(0) == inputs && each->size(1) == rows &&
                                each->scalar_type() == (each == &chosen ? ScalarType::Byte : dtype));
    STD_TORCH_CHECK(fits, "what belongs to a panel is of ", inputs, " inputs and ", rows, " rows, and of its dtype");
  }
  for (const Tensor* each : {&state, &chosen, means, &changes}) {
    STD_TORCH_CHECK(!each || each->is_contiguous(), "what is written to lies in order");
  }
  const std::optional<Tensor> now = weight ? std::optional(in_order(*weight)) : std::nullopt;
  const auto of = [&]<class T>(T) {
    code<kChain>(Panel<T>{inputs, rows, symbols, read<T>(matrix), read<T>(values), read<T>(rates), read<T>(price),
                          units ? read<T>(*units) : nullptr, now ? read<T>(*now) : nullptr, write<T>(state),
                          write<uint8_t>(chosen),
                          means ? write<T>(*means) : nullptr, write<T>(changes)});
  };
  dtype == ScalarType::Float ? of(float()) : of(double());
}

void chain_coding(Tensor means, Tensor upper, Tensor values, Tensor rates, Tensor price, std::optional<Tensor> units,
                  Tensor symbols, Tensor errors) {
  run<true>(means, nullptr, upper, values, rates, price, units, symbols, nullptr, errors);
}

void conditional_coding(Tensor slopes, Tensor weight, Tensor curvature, Tensor values, Tensor rates, Tensor price,
                        std::optional<Tensor> units, Tensor symbols, Tensor means, Tensor changes) {
  run<false>(slopes, &weight, curvature, values, rates, price, units, symbols, &means, changes);
}

}  // namespace sqs

STABLE_TORCH_LIBRARY_IMPL(sqs, CPU, m) {
  m.impl("chain_coding", TORCH_BOX(&sqs::chain_coding));
  m.impl("conditional_coding", TORCH_BOX(&sqs::conditional_coding));
}
