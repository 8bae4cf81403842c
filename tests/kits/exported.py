"""Networks to export, and processes that run exports without sqs_pyro. Imports only torch."""

from pathlib import Path

from kits import forks
from torch import nn

_WITHOUT_US = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "sqs_pyro":
            raise ImportError("an export must not need sqs_pyro")

sys.meta_path.insert(0, Refuse())
sys.path.append({tests!r})
{script}
assert "sqs_pyro" not in sys.modules
try:
    import sqs_pyro
except ImportError:
    pass
else:
    raise AssertionError("sqs_pyro was there all along")
"""


def run_without_us(script: str, *arguments) -> str:
    """Run a script in a Python that cannot import sqs_pyro; return what it prints."""
    code = _WITHOUT_US.format(tests=str(Path(__file__).parents[1]), script=script)
    done = forks.run(code, *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


class _Block(nn.Module):
    def __init__(self, inner: int, outer: int, stride: int):
        super().__init__()
        self.first = nn.Conv2d(inner, outer, 3, stride, 1, bias=False)
        self.first_norm = nn.BatchNorm2d(outer)
        self.second = nn.Conv2d(outer, outer, 3, padding="same", padding_mode="reflect")
        self.second_norm = nn.BatchNorm2d(outer)
        self.beside = nn.Identity() if stride == 1 else nn.Conv2d(inner, outer, 1, stride)

    def forward(self, x):
        y = self.first_norm(self.first(x)).relu()
        return (self.second_norm(self.second(y)) + self.beside(x)).relu()


class Residual(nn.Module):
    """A small ResNet: strides, a padding of its own, batch norms, a head."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), _Block(8, 8, 1), _Block(8, 16, 2))
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        return self.head(self.blocks(x).mean((2, 3)))


class Words(nn.Module):
    """A transformer block between an embedding and a head that share their weight."""

    def __init__(self, words: int = 41, width: int = 64):
        super().__init__()
        self.words = nn.Embedding(words, width)
        self.block = nn.TransformerEncoderLayer(width, 2, 24, dropout=0.0, batch_first=True)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, words, bias=False)
        self.head.weight = self.words.weight

    def forward(self, tokens):
        return self.head(self.norm(self.block(self.words(tokens))))
