"""Packed networks and ensembles called by threads, beside one that loads their state again and again.

Every answer must be, bit for bit, the one that the network gives alone. Exits with 1 if one is not.

    python tests/reliability/threads.py [--calls 20000] [--threads 8]
"""

import argparse
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor, nn

from sqs_pyro.kernels import packed_ensemble, packed_network
from sqs_pyro.packing import CodedTensor

INPUTS, DRAWS = 8, 3


class Attention(nn.Module):
    """It reads one of its weights by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x, x, x)[0]


def network() -> nn.Module:
    """One of every kind of product, a norm, and attention, which reads decoded weights."""
    return nn.Sequential(
        nn.Conv2d(2, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.ConvTranspose2d(8, 4, 2, stride=2),
        nn.Flatten(2),
        nn.Linear(64, 16),
        Attention(),
        nn.Flatten(),
        nn.Linear(64, 5),
    ).eval()


def coded(net: nn.Module) -> dict[str, CodedTensor]:
    """Random codes for every matrix and kernel, with one codebook of all draws."""
    found = {}
    for name, parameter in net.named_parameters():
        if parameter.dim() > 1:
            mask = torch.rand(parameter.shape) < 0.6
            codes = torch.randint(0, 4, parameter.shape, dtype=torch.uint8) * mask
            found[name] = CodedTensor(codes, mask, torch.tensor([[-0.3, -0.1, 0.1, 0.2]]))
    return found


def subjects() -> dict[str, nn.Module]:
    """Networks to call, by name."""
    torch.manual_seed(0)
    net = network()
    draws = [coded(net) for _ in range(DRAWS)]
    vectorised = packed_ensemble(net, draws)
    vectorised.draws_at_once = DRAWS
    return {
        "single network": packed_network(net, draws[0]),
        "ensemble": packed_ensemble(net, draws),
        "ensemble, draws at once": vectorised,
    }


def wrong_answers(net: nn.Module, calls: int, threads: int) -> int:
    """How many of ``calls`` answers are not the right one, while another thread loads the network's own state."""
    inputs = [torch.randn(2, 2, 4, 4) for _ in range(INPUTS)]
    with torch.no_grad():
        expected = [net(x) for x in inputs]
    state = {name: value.clone() for name, value in net.state_dict().items()}
    done = threading.Event()

    def load_again() -> None:
        while not done.is_set():
            net.load_state_dict(state)

    with ThreadPoolExecutor(threads + 1) as pool:
        loading = pool.submit(load_again)
        try:
            rights = list(pool.map(_call(net, inputs, expected), range(calls)))
        finally:
            done.set()
        loading.result()
    return rights.count(False)


def _call(net: nn.Module, inputs: list[Tensor], expected: list[Tensor]) -> Callable[[int], bool]:
    def call(i: int) -> bool:
        with torch.inference_mode() if i % 2 else torch.no_grad():
            return torch.equal(net(inputs[i % INPUTS]), expected[i % INPUTS])

    return call


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=20_000, help="of all networks together")
    parser.add_argument("--threads", type=int, default=8)
    args = parser.parse_args()
    torch.set_num_threads(1)
    sys.setswitchinterval(1e-5)
    nets, wrong = subjects(), 0
    for name, net in nets.items():
        calls = args.calls // len(nets)
        found = wrong_answers(net, calls, args.threads)
        print(f"{name}: {found} of {calls} answers are wrong", flush=True)
        wrong += found
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
