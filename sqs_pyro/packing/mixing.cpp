// Weights coded under mixed contexts: the law of mixing.py, in the same whole numbers, decision by decision.

#include <algorithm>
#include <array>
#include <bit>
#include <cstdint>
#include <new>
#include <type_traits>
#include <vector>

namespace {

constexpr int kUnit = 256;            // of a logarithm to base 2
constexpr int kMost = 12 * kUnit;     // log odds
constexpr int kMantissa = 11;         // bits of a number that its logarithm looks at
constexpr int kChannels = 4096;       // that have contexts of their own
constexpr int kEnergies = 256, kEdges = 25, kCorners = 81;
constexpr int kContexts = 6, kTrusts = 9;
constexpr int64_t kWeight = 1 << 14, kMostWeight = 1 << 24;  // 16 fractional bits
constexpr int64_t kSlow = 20, kFast = 380, kSlowing = 3000;  // rates of learning, in 2^-22
constexpr uint32_t kCounts = 1023;                           // of a slot, below its probability's 22 bits

struct Tables {
  const int32_t* logarithms;     // [2048]
  const int32_t* log_odds;       // [4096], of the leading 12 bits of a probability
  const int32_t* probabilities;  // [2 kMost + 1], in 2^-16

  int64_t log2(uint64_t number) const {
    const int exponent = std::bit_width(number) - 1, shift = exponent - kMantissa;
    const uint64_t mantissa = shift >= 0 ? number >> shift : number << -shift;
    return logarithms[mantissa - (1 << kMantissa)] + kUnit * exponent;
  }
};

// ---- arithmetic coding of decisions -----------------------------------------------------------------------------

struct Range {
  uint32_t low = 0, high = ~0u;

  uint32_t split(uint32_t probability) const {  // of 2^-16
    return low + uint32_t((uint64_t(high - low) * probability) >> 16);
  }
  void take(bool bit, uint32_t middle) { bit ? high = middle : low = middle + 1; }
  bool settled() const { return (low ^ high) >> 24 == 0; }
  void shift() { low <<= 8, high = high << 8 | 255; }
};

struct Encoder : Range {
  uint8_t* stream;
  int64_t capacity, size = 0;

  Encoder(uint8_t* bytes, int64_t room) : stream(bytes), capacity(room) {}
  bool code(bool bit, uint32_t probability) {
    take(bit, split(probability));
    for (; settled(); shift(), ++size) {
      if (size < capacity) stream[size] = high >> 24;  // where there is no room, it is counted
    }
    return bit;
  }
};

struct Decoder : Range {
  const uint8_t* stream;
  int64_t length, size = 0;
  uint32_t value = 0;

  Decoder(const uint8_t* bytes, int64_t count) : stream(bytes), length(count) {
    for (int64_t i = 0; i < 4; ++i) value = value << 8 | byte(i);
  }
  uint32_t byte(int64_t i) const { return i < length ? stream[i] : 0; }
  bool code(bool, uint32_t probability) {
    const uint32_t middle = split(probability);
    const bool bit = value <= middle;
    take(bit, middle);
    for (; settled(); shift(), ++size) value = value << 8 | byte(size + 4);
    return bit;
  }
};

// ---- the law ----------------------------------------------------------------------------------------------------

// What one kind of decision has learned of its contexts: how much to trust each, by how often it was met.
struct Mixture {
  int64_t weights[kContexts][kTrusts];
  int64_t seen = 0, rate = 0;

  Mixture() { std::fill_n(weights[0], kContexts * kTrusts, kWeight); }

  template <int kCount, class Coder>
  bool decide(Coder& coder, const Tables& tables, uint32_t* const (&rows)[kContexts], int64_t node, bool bit) {
    if (seen % 64 == 0) rate = kSlow + kFast * kSlowing / (kSlowing + seen);
    ++seen;
    const uint32_t first = rows[0][node];
    const int64_t base = tables.log_odds[first >> 20];
    int64_t evidence[kContexts], mixed = 0;
    int64_t* trusted[kContexts];
    for (int j = 1; j < kCount; ++j) {
      uint32_t& slot = rows[j][node];
      const uint32_t met = slot & kCounts;
      if (met == 0) slot = first & ~kCounts;
      evidence[j] = tables.log_odds[slot >> 20] - base;
      trusted[j] = &weights[j][std::bit_width(std::min(met, 255u))];
      mixed += *trusted[j] * evidence[j];
    }
    const int64_t odds = std::clamp<int64_t>(base + (mixed >> 16), -kMost, kMost);
    const uint32_t probability = tables.probabilities[odds + kMost];
    bit = coder.code(bit, probability);
    const int64_t error = (int64_t(bit) << 16) - probability;
    for (int j = 1; j < kCount; ++j) {
      const int64_t learned = *trusted[j] + ((error * rate * evidence[j] + (1 << 21)) >> 22);
      *trusted[j] = std::clamp(learned, -kMostWeight, kMostWeight);
    }
    for (int j = 0; j < kCount; ++j) learn(rows[j][node], bit);
    return bit;
  }

  // A slot is the probability of a 1, and below it how often it was met.
  static void learn(uint32_t& slot, bool bit) {
    static constexpr auto kShares = [] {
      std::array<int64_t, kCounts + 1> shares{};
      for (int64_t met = 0; met <= kCounts; ++met) shares[met] = (1 << 16) / (met + 4);
      return shares;
    }();
    const uint32_t met = slot & kCounts;
    int64_t probability = slot >> 10;
    probability += (((int64_t(bit) << 22) - probability) * kShares[met] + (1 << 15)) >> 16;
    probability = std::clamp<int64_t>(probability, 0, (1 << 22) - 1);
    slot = uint32_t(probability) << 10 | (met < kCounts ? met + 1 : met);
  }
};

struct Values {            // of the codebooks: `[groups]` rows
  const int32_t* count;    // [groups, 2], positive and negative values
  const int32_t* place;    // [groups, components], 2 rank + negative of a code; encoding
  const uint8_t* code;     // [groups, 2, most], of a sign and a rank; decoding
  int64_t components, most, per_group;
};

struct Shape {
  int64_t outs, ins, positions, width, nonzeros;
};

template <int kCount, class Coder>
bool code_weights(Coder& coder, const Tables& tables, const Shape& shape, const Values& values, uint8_t* codes,
                  uint8_t* mask) {
  constexpr bool kDecodes = std::is_same_v<Coder, Decoder>;
  const auto [outs, ins, positions, width, nonzeros] = shape;
  const int64_t numel = outs * ins * positions, span = std::bit_ceil(uint64_t(values.most)), nodes = 2 + 2 * span;
  const bool any = nonzeros > 0, some = any && nonzeros < numel;
  const int64_t by_out = 1, by_in = by_out + std::min<int64_t>(outs, kChannels);
  const int64_t by_energy = by_in + std::min<int64_t>(ins, kChannels), by_edge = by_energy + kEnergies;
  const int64_t by_corner = by_edge + kEdges;
  std::vector<uint32_t> slots((by_corner + kCorners) * nodes);
  std::fill_n(slots.begin(), nodes, 1u << 31);
  // From the manifest's counts, so that nothing is learned twice.
  const auto share = ((unsigned __int128)(nonzeros) << 22) + numel / 2;
  slots[0] = uint32_t(std::clamp<int64_t>(int64_t(share / numel), 64, (1 << 22) - 64)) << 10;

  Mixture zeros, signs, ranks;
  std::vector<int64_t> of_in(ins);
  std::vector<uint8_t> looks(positions);  // of the kernel: 0 a zero, else 1 + 2 negative + large
  int64_t total = 0, index = 0;
  const auto energy = [&](int64_t sum, int64_t seen) -> int64_t {
    if (seen < 16) return 8;
    const int64_t all = index;
    const int64_t ratio = tables.log2(sum + 1) - tables.log2(seen + 1) - tables.log2(total + 1) + tables.log2(all + 1);
    return std::clamp<int64_t>(8 + (ratio >> 6), 0, 15);
  };
  for (int64_t out = 0; out < outs; ++out) {
    int64_t of_out = 0;
    for (int64_t in = 0; in < ins; ++in) {
      const int64_t energies = 16 * energy(of_out, in * positions) + energy(of_in[in], out * positions);
      const int64_t fixed[] = {0, by_out + out % kChannels, by_in + in % kChannels, by_energy + energies};
      uint32_t* rows[kContexts];
      for (int j = 0; j < 4; ++j) rows[j] = &slots[fixed[j] * nodes];
      int64_t sum = 0;
      for (int64_t position = 0; position < positions; ++position, ++index) {
        if constexpr (kCount == kContexts) {
          const int64_t column = position % width;
          const auto look = [&](bool there, int64_t back) { return there ? looks[position - back] : 0; };
          const int left = look(column > 0, 1), above = look(position >= width, width);
          const int before = look(position >= width && column > 0, width + 1);
          const int behind = look(position >= width && column + 1 < width, width - 1);
          const auto sign = [](int look) { return (look + 1) / 2; };
          rows[4] = &slots[(by_edge + 5 * left + above) * nodes];
          rows[5] = &slots[(by_corner + 27 * sign(left) + 9 * sign(above) + 3 * sign(before) + sign(behind)) * nodes];
        }
        bool kept = kDecodes ? any : mask[index];
        if (some) kept = zeros.decide<kCount>(coder, tables, rows, 0, kept);
        looks[position] = 0;
        if constexpr (kDecodes) mask[index] = kept, codes[index] = 0;
        if (!kept) continue;
        const int64_t group = index / values.per_group;
        const int32_t* counts = values.count + 2 * group;
        const int32_t place = kDecodes ? 0 : values.place[group * values.components + codes[index]];
        bool negative = counts[0] == 0;
        if (counts[0] && counts[1]) negative = signs.decide<kCount>(coder, tables, rows, 1, place & 1);
        const int64_t most = counts[negative];
        if (most == 0) return false;  // a codebook without values, but a weight that has one
        int64_t rank = 0, node = 1;
        for (int bit = std::bit_width(uint64_t(most - 1)) - 1; bit >= 0; --bit) {
          bool up = place >> (bit + 1) & 1;
          if (rank + (int64_t(1) << bit) >= most) up = false;  // there is no such rank
          else up = ranks.decide<kCount>(coder, tables, rows, 2 + negative * span + node, up);
          rank += int64_t(up) << bit;
          node = 2 * node + up;
        }
        if constexpr (kDecodes) codes[index] = values.code[(2 * group + negative) * values.most + rank];
        looks[position] = 1 + 2 * negative + (2 * rank >= most);
        sum += rank + 1;
      }
      of_out += sum, of_in[in] += sum, total += sum;
    }
  }
  return true;
}

// Matrices have no kernels, whose weights know of each other.
template <class Coder>
int64_t run(Coder& coder, const int32_t* tables, const int64_t* sizes, const int32_t* count, const int32_t* place,
            const uint8_t* code, uint8_t* codes, uint8_t* mask, uint32_t* range) {
  const Tables of{tables, tables + 2048, tables + 2048 + 4096};
  const Values values{count, place, code, sizes[5], sizes[6], sizes[7]};
  const Shape shape{sizes[0], sizes[1], sizes[2], sizes[3], sizes[4]};
  try {
    const bool good = shape.positions > 1 ? code_weights<kContexts>(coder, of, shape, values, codes, mask)
                                          : code_weights<4>(coder, of, shape, values, codes, mask);
    range[0] = coder.low, range[1] = coder.high;
    return good ? coder.size : -1;
  } catch (const std::bad_alloc&) {  // no exception may leave for Python
    return -2;
  }
}

}  // namespace

// `tables`: logarithms, log odds, probabilities, one after the other. `sizes`: outs, ins, positions, width, nonzeros,
// components, most values of a sign, weights of a group. `range` becomes the last interval. Each returns how many bytes
// were settled; -1 where the weights cannot be of these codebooks, -2 where there is not enough memory.

extern "C" __attribute__((visibility("default"))) int64_t sqs_encode(
    const int32_t* tables, const int64_t* sizes, const int32_t* count, const int32_t* place, const uint8_t* codes,
    const uint8_t* mask, uint8_t* stream, int64_t capacity, uint32_t* range) {
  Encoder coder(stream, capacity);
  return run(coder, tables, sizes, count, place, nullptr, const_cast<uint8_t*>(codes), const_cast<uint8_t*>(mask),
             range);
}

extern "C" __attribute__((visibility("default"))) int64_t sqs_decode(
    const int32_t* tables, const int64_t* sizes, const int32_t* count, const uint8_t* code, uint8_t* codes,
    uint8_t* mask, const uint8_t* stream, int64_t length, uint32_t* range) {
  Decoder coder(stream, length);
  return run(coder, tables, sizes, count, nullptr, code, codes, mask, range);
}
