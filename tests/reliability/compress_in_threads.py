"""`import sqs_pyro; compress` in all threads of a fresh process at once, many times.

Every network must be, bit for bit, the one that a process with a single thread makes. Exits with 1 if one is not.

    python tests/reliability/compress_in_threads.py [--times 50] [--threads 8]
"""

import argparse
import hashlib
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor


def compressed(start: threading.Barrier, seed: int) -> str:
    """Import the library and compress; a digest of the network."""
    start.wait()
    import torch
    from torch import nn
    from torch.utils.data import DataLoader, TensorDataset

    from sqs_pyro import compress

    draw = torch.Generator().manual_seed(seed)
    y = torch.arange(24) % 2
    x = torch.randn(24, 1, 6, 6, generator=draw) + 2 * y[:, None, None, None]
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Dropout(0.2), nn.Linear(64, 2)
    )
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=draw))
    data = DataLoader(TensorDataset(x, y), batch_size=8, shuffle=True)
    recipe = {"epochs": 2, "num_components": 2, "nonzero_rate": 0.5, "batch_norm_batches": 2}
    start.wait()  # layers draw first weights from torch's one random state, which the seed of a call is for
    result = compress(net, data, recipe, seed=seed)
    state = result.hard.state_dict() | {"outputs": result.network(x)}
    return hashlib.sha256(b"".join(value.detach().numpy().tobytes() for value in state.values())).hexdigest()


def process(threads: int) -> str:
    """A digest for each seed, on one line, made in as many threads."""
    start = threading.Barrier(threads)
    with ThreadPoolExecutor(threads) as pool:
        return " ".join(pool.map(lambda seed: compressed(start, seed), range(threads)))


def alone(threads: int) -> str:
    """The same digests, one after the other."""
    return " ".join(compressed(threading.Barrier(1), seed) for seed in range(threads))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=50)
    parser.add_argument("--threads", type=int, default=8)
    parser.add_argument("--one", choices=("process", "alone"), help="be one of the processes")
    args = parser.parse_args()
    if args.one is not None:
        print({"process": process, "alone": alone}[args.one](args.threads))
        return 0

    def run(one: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, __file__, "--one", one, "--threads", str(args.threads)]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    expected = run("alone")
    wrong = 0
    for i in range(args.times):
        found = run("process")
        if found.returncode or not found.stdout or found.stdout != expected.stdout:
            wrong += 1
            print(f"process {i + 1}:\n{found.stdout}{found.stderr[-2000:]}", flush=True)
    print(f"{wrong} of {args.times} processes of {args.threads} threads made other networks than one thread does")
    return 1 if wrong or expected.returncode else 0


if __name__ == "__main__":
    sys.exit(main())
