// Attention of few queries to a cache (sqs_pyro/kernels/attention.py): only what a mask lets be seen is read, and keys
// and values that several heads share are read where they are.

#include <cmath>
#include <limits>
#include <vector>

#include "arguments.h"

namespace sqs {

constexpr int kNear = 64;  // places whose keys or values stay in the first-level cache while heads take turns

// `exp(x)` of x at most 0, to 2e-7 of it: 2^n times a polynomial in the rest, between -log(2) / 2 and log(2) / 2.
inline Floats exponential(Floats x) {
  typedef int32_t Numbers __attribute__((vector_size(4 * kLanes)));
  x = x < -87.0f ? -87.0f - Floats{} : x;  // what is below has no number of this size
  const Floats whole = __builtin_convertvector(__builtin_convertvector(x * 1.44269504f - 0.5f, Numbers), Floats);
  const Floats rest = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;  // log(2) in two parts
  Floats sum = rest * 1.9875691500e-4f + 1.3981999507e-3f;
  sum = sum * rest + 8.3334519073e-3f;
  sum = sum * rest + 4.1665795894e-2f;
  sum = sum * rest + 1.6666665459e-1f;
  sum = sum * rest + 5.0000001201e-1f;
  sum = sum * rest * rest + rest + 1.0f;
  return sum * (Floats)((__builtin_convertvector(whole, Numbers) + 127) << 23);
}

inline float total(Floats values) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)values);
#else
  float sum = 0;
  for (int i = 0; i < kLanes; ++i) sum += values[i];
  return sum;
#endif
}

inline void totals(const Floats (&values)[4], float (&found)[4]) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  const __m256 pairs = _mm256_hadd_ps((__m256)values[0], (__m256)values[1]);
  const __m256 sums = _mm256_hadd_ps(pairs, _mm256_hadd_ps((__m256)values[2], (__m256)values[3]));
  store(found, _mm_add_ps(_mm256_castps256_ps128(sums), _mm256_extractf128_ps(sums, 1)));
#else
  for (int n = 0; n < 4; ++n) found[n] = total(values[n]);
#endif
}

// Products of a query with N keys.
template <int N>
inline void products(const float* query, const float* const (&keys)[N], int64_t size, float (&found)[N]) {
  Floats sums[N] = {};
  int64_t d = 0;
  for (; d + kLanes <= size; d += kLanes) {
    const Floats here = load<Floats>(query + d);
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) sums[n] += here * load<Floats>(keys[n] + d);
  }
  if constexpr (N == 4) {
    totals(sums, found);
  } else {
    for (int n = 0; n < N; ++n) found[n] = total(sums[n]);
  }
  for (; d < size; ++d) {
    for (int n = 0; n < N; ++n) found[n] += query[d] * keys[n][d];
  }
}

// Adds weights times values, of N registers side by side.
template <int N>
inline void add_values(const float* weights, const float* values, const int64_t* places, int64_t count, int64_t size,
                       float* to) {
  Floats sums[N];
#pragma GCC unroll 8
  for (int n = 0; n < N; ++n) sums[n] = load<Floats>(to + n * kLanes);
  for (int64_t j = 0; j < count; ++j) {
    const float* value = values + places[j] * size;
    const Floats weight = weights[j] - Floats{};
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) sums[n] += weight * load<Floats>(value + n * kLanes);
  }
#pragma GCC unroll 8
  for (int n = 0; n < N; ++n) store(to + n * kLanes, sums[n]);
}

struct Heads {
  int64_t shared, size, value_size;  // queries' heads to one of keys and values; numbers of a key and of a value
  float scale;
};

// One query of each head that shares `keys` and `values`, `[places][size]`: `[shared][value_size]`.
inline void attend(const Heads& heads, const float* queries, int64_t next_query, const float* keys, const float* values,
                   const std::vector<int64_t>& places, float* to) {
  const int64_t count = int64_t(places.size()), padded = (count + kLanes - 1) / kLanes * kLanes;
  std::fill(to, to + heads.shared * heads.value_size, 0.0f);
  if (count == 0) return;  // as torch has it of a query that sees nothing
  const auto scratched = scratch<float>(padded * heads.shared);
  float* scores = scratched.get();
  for (int64_t near = 0; near < count; near += kNear) {
    for (int64_t r = 0; r < heads.shared; ++r) {
      const float* query = queries + r * next_query;
      float* score = scores + r * padded;
      int64_t j = near;
      const int64_t end = std::min(count, near + kNear);
      for (; j + 4 <= end; j += 4) {
        const float* four[4];
        for (int n = 0; n < 4; ++n) four[n] = keys + places[j + n] * heads.size;
        float found[4];
        products<4>(query, four, heads.size, found);
        for (int n = 0; n < 4; ++n) score[j + n] = found[n] * heads.scale;
      }
      for (; j < end; ++j) {
        const float* one[1] = {keys + places[j] * heads.size};
        float found[1];
        products<1>(query, one, heads.size, found);
        score[j] = found[0] * heads.scale;
      }
    }
  }
  for (int64_t r = 0; r < heads.shared; ++r) {
    float* score = scores + r * padded;
    std::fill(score + count, score + padded, -std::numeric_limits<float>::infinity());
    Floats most = load<Floats>(score), sums = {};
    for (int64_t j = kLanes; j < padded; j += kLanes) {
      const Floats here = load<Floats>(score + j);
      most = here > most ? here : most;
    }
    float largest = most[0];
    for (int i = 1; i < kLanes; ++i) largest = most[i] > largest ? most[i] : largest;
    for (int64_t j = 0; j < padded; j += kLanes) {
      Floats weights = exponential(load<Floats>(score + j) - largest);
      for (int64_t i = count - j; i < kLanes; ++i) weights[i] = 0;  // behind the last place
      store(score + j, weights);
      sums += weights;
    }
    const float share = 1 / total(sums);
    for (int64_t j = 0; j < padded; j += kLanes) store(score + j, load<Floats>(score + j) * share);
  }
  for (int64_t near = 0; near < count; near += kNear) {
    const int64_t here = std::min<int64_t>(kNear, count - near);
    for (int64_t r = 0; r < heads.shared; ++r) {
      const float* weights = scores + r * padded + near;
      float* sum = to + r * heads.value_size;
      int64_t d = 0;
      for (; d + 8 * kLanes <= heads.value_size; d += 8 * kLanes) {
        add_values<8>(weights, values + d, places.data() + near, here, heads.value_size, sum + d);
      }
      for (; d + kLanes <= heads.value_size; d += kLanes) {
        add_values<1>(weights, values + d, places.data() + near, here, heads.value_size, sum + d);
      }
      for (int64_t j = 0; j < here; ++j) {
        for (int64_t k = d; k < heads.value_size; ++k) sum[k] += weights[j] * values[places[near + j] * heads.value_size + k];
      }
    }
  }
}

// `softmax(scale q kᵀ) v` of what the mask lets be seen: q `[B, H, T, D]`, k `[B, G, S, D]`, v `[B, G, S, E]`, of which
// each serves `H / G` heads; mask `[B or 1, 1, T, S]`. Gives `[B, T, H, E]`.
Tensor cached_attention(Tensor q, Tensor k, Tensor v, std::optional<Tensor> mask, double scale) {
  STD_TORCH_CHECK(q.dim() == 4 && k.dim() == 4 && v.dim() == 4, "queries, keys and values have four dimensions");
  STD_TORCH_CHECK(q.scalar_type() == ScalarType::Float && k.scalar_type() == ScalarType::Float &&
                  v.scalar_type() == ScalarType::Float, "queries, keys and values are float32");
  const int64_t batch = q.size(0), all = q.size(1), rows = q.size(2), groups = k.size(1), length = k.size(2);
  const Heads heads{groups ? all / groups : 0, q.size(3), v.size(3), float(scale)};
  STD_TORCH_CHECK(k.size(0) == batch && v.size(0) == batch && v.size(1) == groups && v.size(2) == length &&
                  k.size(3) == heads.size && heads.shared * groups == all, "keys and values do not fit the queries");
  q = in_order(q), k = in_order(k), v = in_order(v);
  const bool* seen = nullptr;
  int64_t next_mask = 0;
  std::optional<Tensor> given;
  if (mask) {
    STD_TORCH_CHECK(mask->dim() == 4 && mask->scalar_type() == ScalarType::Bool && mask->size(1) == 1 &&
                    (mask->size(0) == 1 || mask->size(0) == batch) && mask->size(2) == rows && mask->size(3) == length,
                    "a mask says of each query and place whether it is seen");
    given = in_order(*mask);
    seen = static_cast<const bool*>(given->const_data_ptr());
    next_mask = mask->size(0) == 1 ? 0 : rows * length;
  }
  Tensor found = empty({batch, rows, all, heads.value_size}, ScalarType::Float);
  const float *queries = static_cast<const float*>(q.const_data_ptr()), *keys = static_cast<const float*>(k.const_data_ptr()),
              *values = static_cast<const float*>(v.const_data_ptr());
  float* to = static_cast<float*>(found.mutable_data_ptr());
  torch::stable::parallel_for(0, batch * rows * groups, 1, [&](int64_t from, int64_t end) {
    std::vector<int64_t> places;
    places.reserve(length);
    for (int64_t i = from; i < end; ++i) {
      const int64_t g = i % groups, t = i / groups % rows, b = i / groups / rows;
      places.clear();
      for (int64_t s = 0; s < length; ++s) {
        if (!seen || seen[b * next_mask + t * length + s]) places.push_back(s);
      }
      const int64_t head = g * heads.shared;
      attend(heads, queries + ((b * all + head) * rows + t) * heads.size, rows * heads.size,
             keys + (b * groups + g) * length * heads.size, values + (b * groups + g) * length * heads.value_size, places,
             to + ((b * rows + t) * all + head) * heads.value_size);
    }
  });
  return found;
}

}  // namespace sqs

STABLE_TORCH_LIBRARY_IMPL(sqs, CPU, m) { m.impl("cached_attention", TORCH_BOX(&sqs::cached_attention)); }
