"""Sentence embedding: the compressed network is to embed every sentence where the fp32 network does."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from pyro.distributions import TorchDistribution
from torch import Tensor, nn
from torch.nn import functional as F

from sqs_pyro.data.rows import is_file
from sqs_pyro.data.text import PYDOC
from sqs_pyro.data.text_sources import documents_in_file, documents_of_hub, pydoc_documents
from sqs_pyro.data.token_loader import TokenDataset, TokenLoader
from sqs_pyro.errors import DataError
from sqs_pyro.models.likelihoods import Gaussian
from sqs_pyro.networks.calling import output_tensor
from sqs_pyro.networks.loaders import Loader
from sqs_pyro.tasks.outputs import outputs
from sqs_pyro.tasks.parts import TextData, split_parts
from sqs_pyro.tasks.task import Parts

_END = re.compile(r"(?<=[.!?])\s+|\n\s*\n")
_AT_ONCE = 1024  # rows of the matrix of all cosines


class SentenceData(TextData):
    """Which sentences, and how they are cut into minibatches.

    Attributes:
        source: `pydoc` (the topics of Python's own help), a file (.txt, .json, .jsonl, .csv), or the name of a
            data set on the Hugging Face hub.
        column: with the text; `pydoc` and .txt need none.
        sentences: cut texts into sentences; otherwise every row (paragraph of a .txt) is one.
        min_words: of a sentence; shorter ones are left out, as are repetitions.
        noise: standard deviation σ of the Gaussian around the embedding, in units of the root mean square of the
            coordinates of the fp32 network's.
    """

    source: str = Field(default=PYDOC, min_length=1)
    column: str = Field(default="text", min_length=1)
    sentences: bool = True
    min_words: int = Field(default=5, ge=1)
    noise: float = Field(default=0.3, gt=0)


class SentenceEmbedding:
    """The fp32 network's embedding of a sentence, observed with Gaussian noise.

    Args:
        data: which sentences; they are read here.

    Raises:
        DataError: a file, split or column is missing, or there are too few sentences.
    """

    name = "embedding"
    headline = "cosine"

    def __init__(self, data: SentenceData) -> None:
        self.data = data
        self.examples = split_parts(data, self._part)

    @property
    def network_options(self) -> dict[str, Any]:
        """None: every network has hidden states."""
        return {}

    def datasets(self, tokenizer: Any) -> Parts[TokenDataset]:
        """Return tokens; targets come from :meth:`observed`."""

        def dataset(texts: list[str]) -> TokenDataset:
            encoded = tokenizer(texts, truncation=True, max_length=self.data.max_length)
            columns = [name for name in encoded if name != "attention_mask"]
            inputs = [{name: torch.tensor(encoded[name][i]) for name in columns} for i in range(len(texts))]
            return TokenDataset(inputs, torch.empty(len(texts), 0))  # targets without numbers until `observed`

        return self.examples.each(dataset)

    def observed(self, datasets: Parts[TokenDataset], net: nn.Module) -> Parts[TokenDataset]:
        """Return targets ``[N, D]``: the embeddings that the fp32 network gives."""

        def dataset(of: TokenDataset) -> TokenDataset:
            # Not shuffled, so that targets are in the order of the examples; masked tokens may have any number.
            loader = TokenLoader(of, self.data.evaluation_batch_size, pad_token=0)
            return TokenDataset(of.inputs, outputs(net, loader)[0])

        return datasets.each(dataset)

    def likelihood(self, output: Any) -> TorchDistribution:
        """Return a Gaussian around embeddings ``[B, D]`` of unit length: coordinates of root mean square 1/√D."""
        return Gaussian(self.data.noise * output_tensor(output).shape[-1] ** -0.5)(output)

    def measure(self, net: nn.Module, loader: Loader) -> dict[str, Any]:
        """Return the mean cosine to the fp32 network's embedding, recall@1 among all of them, NLL."""
        found, targets = outputs(net, loader)
        nll = -self.likelihood(found).log_prob(targets).mean()
        return {
            "cosine": float(F.cosine_similarity(found, targets).mean()),
            "recall_at_1": recall_at_1(found, targets),
            "nll": float(nll),
            "num_examples": len(targets),
        }

    def _part(self, where: str) -> list[str]:
        found = self._documents(where)
        if self.data.sentences:
            found = [part for text in found for part in _END.split(text)]
        found = [" ".join(text.split()) for text in found]
        # Once each, in order: a sentence that is repeated would be nearest to its double in recall@1.
        kept = list(dict.fromkeys(text for text in found if len(text.split()) >= self.data.min_words))
        if not kept:
            raise DataError(
                f"'{where}' has no sentence of {self.data.min_words} words: give another text, or lower min_words."
            )
        return kept

    def _documents(self, where: str) -> Iterable[str]:
        if where == PYDOC:
            return pydoc_documents()
        if is_file(where):
            return documents_in_file(Path(where), self.data.column)
        return documents_of_hub(self.data.source, self.data.subset, where, self.data.column)


def recall_at_1(found: Tensor, targets: Tensor) -> float:
    """Return how often the target nearest by cosine is one's own; both ``[N, D]``."""
    found, targets = F.normalize(found, dim=-1), F.normalize(targets, dim=-1)
    nearest = torch.cat([(rows @ targets.T).argmax(-1) for rows in found.split(_AT_ONCE)])
    return float((nearest == torch.arange(len(targets))).double().mean())
