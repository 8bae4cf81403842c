"""Ranks as `torchrun` starts them, without the seconds that it takes to."""

import socket

from kits import forks

#: What is there already in a rank that compresses transformers.
TRANSFORMERS = (
    f"{forks.LIBRARY}, torch.distributed, torch.distributed.tensor, sqs_pyro.integrations.checkpoint, "
    "transformers.models.llama.modeling_llama, transformers.models.bert.modeling_bert"
)


def start_ranks(
    size: int,
    code: str,
    *arguments: object,
    environment: dict[str, str] | None = None,
    imported: str = f"{forks.LIBRARY}, torch.distributed",
) -> list[forks.Started]:
    """Start a process for each rank, which executes the code as ``python -c`` would."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1"}
    common |= {"MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"} | (environment or {})
    return [
        forks.Started(
            code,
            *arguments,
            environment={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            imported=imported,
        )
        for rank in range(size)
    ]


def run_on_ranks(size: int, code: str, *arguments: object, **options) -> list[str]:
    """Run code on ranks, which all must end well; return what each has printed."""
    ended = [started.wait() for started in start_ranks(size, code, *arguments, **options)]
    assert not any(each.returncode for each in ended), "\n".join(each.stderr[-3000:] for each in ended)
    return [each.stdout for each in ended]
