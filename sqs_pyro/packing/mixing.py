r"""A law of zeros, signs and sizes that learns as it goes: the probability of a weight given those before it.

Weights ``[O, I, ...]`` are taken as ``[O, I, P]``, one after the other, each as a few decisions: is it a value;
is the value negative; which of its sign's values is it, smallest first, bit by bit. Every decision is met in six
contexts:

* none,
* of the out-channel, and of the in-channel (their number modulo 4096),
* of how large weights have been so far in the out-channel and in the in-channel, beside all, in quarters of an
  octave,
* in a kernel (P > 1), of sign and size of the weights to the left and above,
* in a kernel, of the signs of the four neighbours that came before.

A context keeps, for each decision, the share of ones, which starts at that of the first context. Their log odds
are mixed (logistic mixing, Mattern 2012; of the family of PAQ):

    log odds = l_0 + Σ_j w_j(n_j) (l_j - l_0),

w_j(n_j) is how much context j is trusted where it was met n_j times: one number for each j and octave of n_j,
learned by gradient descent on the code length, for zeros, signs and ranks by themselves. Multiplied over all
weights it is one prior of a tensor without parameters, and ``-log2`` of it the code length, which an arithmetic
coder meets to two bytes.

All is in whole numbers (:mod:`~sqs_pyro.packing.odds`). What runs where there is a compiler is ``mixing.cpp``
(:mod:`~sqs_pyro.packing.mixing_native`); this is the same, a few hundred times as slow.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sqs_pyro.packing.odds import LOGARITHMS, MANTISSA, MOST, PROBABILITIES, UNIT

Bytes = NDArray[np.uint8]
Bits = NDArray[np.bool_]

CHANNELS = 4096  # that have contexts of their own
ENERGIES, EDGES, CORNERS = 16 * 16, 5 * 5, 3**4
LOG_ODDS_BITS = 12  # of a probability, that its log odds look at
_ONE = 1 << 22  # of a context's probability
_WEIGHT, _MOST_WEIGHT = 1 << 14, 1 << 24  # a quarter, and 256: of 2^16
_SLOW, _FAST, _SLOWING = 20, 380, 3000  # rates of learning, in 2^-22, and how long the fast one lasts
_PERIOD = 64  # decisions between two rates
_EARLY = 16  # weights of a channel of which nothing is concluded
_MOST_MET = 1023
_BYTE, _WORD = 255, 0xFFFFFFFF

_LOGARITHMS, _PROBABILITIES = LOGARITHMS.tolist(), PROBABILITIES.tolist()


def log2(number: int) -> int:
    """Return the logarithm of a positive whole number, in 256ths, as :func:`sqs_pyro.packing.odds.log2`."""
    exponent = number.bit_length() - 1
    mantissa = number >> exponent - MANTISSA if exponent >= MANTISSA else number << MANTISSA - exponent
    return _LOGARITHMS[mantissa - (1 << MANTISSA)] + UNIT * exponent


#: Log odds in 256ths, of the leading bits of a probability: of the middle of what they leave open.
LOG_ODDS = [log2(2 * i + 1) - log2((2 << LOG_ODDS_BITS) - 2 * i - 1) for i in range(1 << LOG_ODDS_BITS)]


@dataclass(frozen=True, eq=False)
class CodedShape:
    """What is known before the first decision.

    Attributes:
        kernels: O, I and P.
        width: of a row of a kernel; 1 without kernels.
        nonzeros: weights that are not zero.
        codebook: ``[G, K]``; an entry of 0.0 is none.
    """

    kernels: tuple[int, int, int]
    width: int
    nonzeros: int
    codebook: NDArray[np.float32]

    @classmethod
    def of(cls, shape: tuple[int, ...], nonzeros: int, codebook: NDArray[np.float32]) -> "CodedShape":
        """Return it for weights of a shape ``[O, I, ...]`` or ``[O]``."""
        ins = shape[1] if len(shape) > 1 else 1
        positions = int(np.prod(shape[2:], dtype=np.int64))
        return cls((shape[0], ins, positions), shape[-1] if len(shape) > 2 else 1, nonzeros, codebook)

    @property
    def numel(self) -> int:
        """Number of weights."""
        outs, ins, positions = self.kernels
        return outs * ins * positions


@dataclass(frozen=True, eq=False)
class Values:
    """A codebook's values by sign and rank, the smallest of a sign first.

    Attributes:
        count: positive and negative values of a group, int32 ``[G, 2]``.
        place: of each code, ``2 rank + negative``, int32 ``[G, K]``.
        code: of each sign and rank, uint8 ``[G, 2, most]``.
    """

    count: NDArray[np.int32]
    place: NDArray[np.int32]
    code: Bytes

    @classmethod
    def of(cls, codebook: NDArray[np.float32]) -> "Values":
        """Sort the rows of a codebook, ``[G, K]``."""
        # By bits: shorter rows are filled up with 0.0, which is no value, but -0.0 is one.
        there, negative = codebook.view(np.uint32) != 0, codebook < 0
        count = np.stack([there & ~negative, there & negative], -1).sum(1, dtype=np.int32)  # [G, 2]
        place = np.zeros(codebook.shape, np.int32)
        code = np.zeros((len(codebook), 2, max(1, int(count.max()))), np.uint8)
        for sign in (0, 1):
            mine = there & (negative == bool(sign))
            size = np.where(mine, np.abs(codebook), np.inf)
            order = size.argsort(1, kind="stable")  # [G, K], those of the sign first
            place[mine] = 2 * order.argsort(1, kind="stable")[mine] + sign
            code[:, sign] = order[:, : code.shape[2]]
        return cls(count, place, code)


class Range:
    """Arithmetic coding of decisions, 32 bits wide: what is left of ``[0, 2^32)`` after those before.

    Args:
        stream: to decode; None: to encode.
    """

    def __init__(self, stream: bytes | None = None) -> None:
        self.low, self.high, self.settled = 0, _WORD, bytearray()
        self.decodes = stream is not None
        self._left = iter(stream or b"")
        self._value = int.from_bytes(self._next() for _ in range(4))

    def code(self, bit: int, probability: int) -> int:
        """Return a decision: ``bit`` when encoding; the probability of a 1 is in 2^-16."""
        middle = self.low + ((self.high - self.low) * probability >> 16)
        if self.decodes:
            bit = int(self._value <= middle)
        if bit:
            self.high = middle
        else:
            self.low = middle + 1
        while (self.low ^ self.high) >> 24 == 0:
            self.settled.append(self.high >> 24)
            self.low, self.high = self.low << 8 & _WORD, (self.high << 8 & _WORD) | _BYTE
            self._value = (self._value << 8 & _WORD) | self._next()
        return bit

    def _next(self) -> int:
        return next(self._left, 0)


def closed(settled: bytes, low: int, high: int) -> bytes:
    """Return a whole stream: what is settled, and the fewest bytes that stay in the last range whatever follows.

    So no stream begins another: bytes that are missing, or too many, are noticed.
    """
    for size in range(5):
        unit = 1 << 32 - 8 * size
        value = -(-low // unit) * unit
        if value + unit - 1 <= high:
            break
    return settled + value.to_bytes(4)[:size]


class Mixture:
    """One kind of decision: how much each context is trusted, by how often it was met.

    Args:
        coder: of decisions.
    """

    def __init__(self, coder: Range) -> None:
        self.coder = coder
        self.trust = [[_WEIGHT] * 9 for _ in range(6)]
        self.seen, self.rate = 0, 0

    def decide(self, slots: list[list[int]], node: int, bit: int) -> int:
        """Return a decision, and learn from it.

        Args:
            slots: of each context its decisions, as ``probability * 1024 + times met``.
            node: which decision.
            bit: what it is, when encoding.
        """
        if self.seen % _PERIOD == 0:
            self.rate = _SLOW + _FAST * _SLOWING // (_SLOWING + self.seen)
        self.seen += 1
        first = slots[0][node]
        base = LOG_ODDS[first >> 20]
        evidence, mixed = [], 0
        for slot, trust in zip(slots[1:], self.trust[1:], strict=False):
            met = slot[node] & _MOST_MET
            if not met:
                slot[node] = first & ~_MOST_MET
            of_context, octave = LOG_ODDS[slot[node] >> 20] - base, min(met, _BYTE).bit_length()
            evidence.append((trust, octave, of_context))
            mixed += trust[octave] * of_context
        odds = max(-MOST, min(MOST, base + (mixed >> 16)))
        probability = _PROBABILITIES[odds + MOST]
        bit = self.coder.code(bit, probability)
        error = (bit << 16) - probability
        for trust, octave, of_context in evidence:
            learned = trust[octave] + (error * self.rate * of_context + (1 << 21) >> 22)
            trust[octave] = max(-_MOST_WEIGHT, min(_MOST_WEIGHT, learned))
        for slot in slots:
            slot[node] = learn(slot[node], bit)
        return bit


def learn(slot: int, bit: int) -> int:
    """Return a context's decision after one more: the share of ones, after n + 4 of them."""
    probability, met = slot >> 10, slot & _MOST_MET
    probability += ((bit * _ONE - probability) * ((1 << 16) // (met + 4)) + (1 << 15)) >> 16
    return max(0, min(_ONE - 1, probability)) << 10 | min(met + 1, _MOST_MET)


def code_weights(coder: Range, shape: CodedShape, values: Values, codes: Bytes, mask: Bits) -> bool:
    """Encode weights, or decode them into ``codes`` and ``mask``, both ``[n]``.

    Returns:
        False where a weight should have a value, but its codebook has none.
    """
    (outs, ins, positions), numel = shape.kernels, shape.numel
    span = 1 << (int(values.count.max()) - 1).bit_length() if values.count.max() else 1
    nodes, counts, places = 2 + 2 * span, values.count.tolist(), values.place.tolist()
    first = [1 << 31] * nodes
    first[0] = max(64, min(_ONE - 64, ((shape.nonzeros << 22) + numel // 2) // numel)) << 10
    slots: dict[tuple[str, int], list[int]] = {}
    zeros, signs, ranks = Mixture(coder), Mixture(coder), Mixture(coder)
    of_in, total, index = [0] * ins, 0, 0

    def of(kind: str, number: int) -> list[int]:
        return slots.setdefault((kind, number), [0] * nodes)

    def energy(sums: int, seen: int) -> int:
        if seen < _EARLY:
            return 8
        ratio = log2(sums + 1) - log2(seen + 1) - log2(total + 1) + log2(index + 1)
        return max(0, min(15, 8 + (ratio >> 6)))

    for out in range(outs):
        of_out = 0
        for into in range(ins):
            energies = 16 * energy(of_out, into * positions) + energy(of_in[into], out * positions)
            fixed = [first, of("out", out % CHANNELS), of("in", into % CHANNELS), of("energy", energies)]
            looks: list[int] = []  # of the kernel's weights: 0 a zero, else 1 + 2 negative + large
            sums = 0
            for _ in range(positions):
                contexts = fixed + [of(*each) for each in _neighbours(looks, shape.width)] * (positions > 1)
                kept = int(mask[index])
                if 0 < shape.nonzeros < numel:
                    kept = zeros.decide(contexts, 0, kept)
                looks.append(0)
                if kept:
                    group = index // (numel // len(counts))
                    place = places[group][codes[index]]
                    rank, negative, most = _code_value(contexts, signs, ranks, counts[group], span, place)
                    if not most:
                        return False
                    if coder.decodes:
                        codes[index] = values.code[group, negative, rank]
                    looks[-1] = 1 + 2 * negative + (2 * rank >= most)
                    sums += rank + 1
                mask[index] = bool(kept)
                index += 1
            of_out, of_in[into], total = of_out + sums, of_in[into] + sums, total + sums
    return True


def _neighbours(looks: list[int], width: int) -> list[tuple[str, int]]:
    """Return the contexts that a kernel's weights so far are for the next."""
    position = len(looks)
    column = position % width
    left = looks[-1] if column else 0
    above = looks[-width] if position >= width else 0
    before = looks[-width - 1] if position >= width and column else 0
    behind = looks[1 - width] if position >= width and column + 1 < width else 0
    corner = 0
    for look in (left, above, before, behind):
        corner = 3 * corner + (look + 1) // 2
    return [("edge", 5 * left + above), ("corner", corner)]


def _code_value(
    contexts: list[list[int]], signs: Mixture, ranks: Mixture, count: list[int], span: int, place: int
) -> tuple[int, int, int]:
    """Return rank and sign of a weight that is not zero, and how many values its sign has."""
    negative = int(count[0] == 0)
    if all(count):
        negative = signs.decide(contexts, 1, place & 1)
    most, rank, node = count[negative], 0, 1
    for bit in reversed(range((most - 1).bit_length() if most else 0)):
        up = 0  # known where there is no such rank
        if rank + (1 << bit) < most:
            up = ranks.decide(contexts, 2 + negative * span + node, place >> bit + 1 & 1)
        rank += up << bit
        node = 2 * node + up
    return rank, negative, most
