"""An architecture as a table of names: where the blocks are, and what their linear layers are for."""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from sqs_pyro.errors import NetworkError

BLOCKS = "blocks"


@dataclass(frozen=True)
class Architecture:
    """Names in the networks of one ``model_type``, none of them with a prefix of the network around it.

    Attributes:
        name: ``config.model_type``.
        blocks: path of the list of blocks in the base model, such as ``"encoder.layer"``; of several stacks,
            such as an encoder and a decoder, one path each, so that no stack feeds one before it.
        groups: the linear layers of a block, ``role -> path in the block``. Layers of one group share their input;
            groups stand in the order in which a block calls them. A ``*`` in a path stands for the numbers of many
            layers, such as experts.
        parts: what else can be compressed, ``part -> paths of modules with a weight``, in the base model
            (``"embedding"``) or in the network around it (``"head"``). A network has those of its own head only.
        optional: roles that not every block has.
        apart: roles with a ``*`` whose layers have an input each, not one for all.
        kept: paths in the block of linear layers that stay as they are, such as gates of one output.
        bare: whether a block returns the hidden state alone. Blocks that hand on more are called in earnest where
            others are stepped over, which needs their weights.
        preceding: what gives a group of layers its input, ``a role of the group -> path in the block`` of a norm
            or a linear layer, whose weight (and bias) divided by row divides that input, and which nothing but
            this group reads. Of other groups nothing is said.

    Raises:
        NetworkError: there is no layer, a group is empty, a role or a layer stands twice, or a role is not there.
    """

    name: str
    blocks: str | Sequence[str]
    groups: Sequence[Mapping[str, str]]
    parts: Mapping[str, Sequence[str]] = field(default_factory=dict)
    optional: Collection[str] = ()
    apart: Collection[str] = ()
    kept: Collection[str] = ()
    bare: bool = True
    preceding: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        roles = [role for group in self.groups for role in group]
        if not all(self.groups) or not roles:
            raise NetworkError(
                f"Architecture {self.name!r} has a group without a layer, or no group: give a mapping from role "
                "to path in the block for each group of linear layers that share their input."
            )
        paths = [path for group in self.groups for path in group.values()]
        twice = [name for names in (roles, paths) for name, count in Counter(names).items() if count > 1]
        if twice:
            raise NetworkError(f"Architecture {self.name!r} names {twice[0]!r} twice: name every layer once.")
        unknown = sorted({*self.optional, *self.apart, *self.preceding} - {*roles})
        if unknown:
            raise NetworkError(
                f"Architecture {self.name!r} calls {unknown[0]!r} optional, apart or preceded, but has no such "
                f"role: name some of {', '.join(roles)}."
            )
        if BLOCKS in self.parts:
            raise NetworkError(
                f"Architecture {self.name!r} has a part {BLOCKS!r}, which its groups are already: rename it."
            )

    @property
    def stacks(self) -> tuple[str, ...]:
        """Paths of the lists of blocks."""
        return (self.blocks,) if isinstance(self.blocks, str) else tuple(self.blocks)

    @property
    def layers(self) -> dict[str, str]:
        """The linear layers of a block, ``role -> path in the block``, in the order of their calls."""
        return {role: path for group in self.groups for role, path in group.items()}

    @property
    def preceded(self) -> dict[str, str]:
        """:attr:`preceding` by path of the layer: ``path in the block -> path in the block``."""
        return {self.layers[role]: path for role, path in self.preceding.items()}
