"""What is said of a compression that does not fit."""

import pytest
import torch

from sqs_pyro.compression.blockwise.fitting import LIBRARIES, unfit
from sqs_pyro.compression.blockwise.memory_plan import plan_memory
from sqs_pyro.compression.blockwise.recipe import BlockwiseRecipe

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def net():
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 6, "vocab_size": 30_000}
    with torch.device("meta"):
        return transformers.LlamaForCausalLM(
            transformers.LlamaConfig(**sizes, num_attention_heads=8, num_key_value_heads=4)
        )


def test_what_would_fit_is_named_and_fits(net):
    recipe = BlockwiseRecipe(bits=3.0)

    def peak(ranks=1, **changes):
        changed = BlockwiseRecipe(**{"bits": 3.0, **changes})
        return plan_memory(net, 64, 128, changed, streamed=changed.streamed, ranks=ranks).peak + LIBRARIES

    assert unfit(net, 64, 128, recipe, peak()) is None
    said = unfit(net, 64, 128, recipe, peak() - 1)
    assert said is not None
    assert said.startswith(f"Compression needs {peak() / 1e9:.1f} GB, libraries included")
    more = next(ranks for ranks in (2, 4, 8) if peak(ranks) < peak())
    assert f"take {more} ranks or blockwise.streamed with allocation even or embedding and head false." in said
    streamed = {"streamed": True, "allocation": "even"}
    given = peak(8, **streamed)
    more = next(ranks for ranks in (4, 8) if peak(ranks, **streamed) <= given)
    said = unfit(net, 64, 128, BlockwiseRecipe(bits=3.0, **streamed), given, ranks=2)
    assert said is not None
    assert said.startswith("Each of 2 ranks needs") and f": take {more} ranks" in said


def test_what_nothing_makes_fit(net):
    said = unfit(net, 64, 128, BlockwiseRecipe(bits=3.0), 4e8)
    assert said is not None
    assert (
        "with 8 ranks, blockwise.streamed with allocation even, batch_size 1, embedding and head false it" in said
    )
    least = {"streamed": True, "allocation": "even", "embedding": False, "head": False, "batch_size": 1}
    last = unfit(net, 64, 128, BlockwiseRecipe(**least), 4e8, ranks=8)
    assert last is not None and "there is nothing to divide further." in last
