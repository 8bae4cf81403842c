"""All kinds of files that are read."""

from fuzz.data import Idx, Kernels, Pictures, Rows
from fuzz.documents import Checkpoints, Metrics, Recipes, Studies, Weights
from fuzz.hugging_face import PackedCheckpoints, StreamedCheckpoints
from fuzz.kind import Kind
from fuzz.packed import Packed

KINDS: tuple[type[Kind], ...] = (
    *(Packed, Recipes, Studies, Metrics, Checkpoints, Weights),
    *(Idx, Rows, Pictures, Kernels, PackedCheckpoints, StreamedCheckpoints),
)
