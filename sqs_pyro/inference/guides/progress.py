"""How far a guide has come: part of its state, so that what is loaded is read as it was when it was saved."""

from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from sqs_pyro.errors import ArgumentError
from sqs_pyro.models.ownership import OwningModule

#: ``"dense"``: latents without a codebook (warm-up); ``"coded"``: codes follow the latents; ``"frozen"``:
#: codes and gates stay, only codebooks learn.
Stage = Literal["dense", "coded", "frozen"]
STAGES: tuple[Stage, ...] = get_args(Stage)


class GuideProgress(OwningModule):
    """The stage of a guide and the draws it has made.

    Attributes:
        steps: place of the stage in ``STAGES`` and number of draws, int64 ``[2]``.
    """

    stored_buffers: ClassVar[tuple[str, ...]] = ("steps",)

    steps: Tensor

    def __init__(self, stage: Stage) -> None:
        super().__init__()
        _check_stage(stage)
        self.register_buffer("steps", torch.tensor([STAGES.index(stage), 0], device="cpu"))
        # Which buffer was read last, in which version, and what it said.
        self._read: tuple[Tensor | None, int, tuple[Stage, int]] = (None, 0, (stage, 0))

    @property
    def stage(self) -> Stage:
        """The stage that training is in."""
        return self._values()[0]

    @stage.setter
    def stage(self, stage: Stage) -> None:
        self._write(stage, self.draws)

    @property
    def draws(self) -> int:
        """Draws in training so far."""
        return self._values()[1]

    @draws.setter
    def draws(self, draws: int) -> None:
        self._write(self.stage, draws)

    def _values(self) -> tuple[Stage, int]:
        """Return stage and draws, read from the buffer where it has changed: on a GPU that takes a while."""
        steps = self.steps
        read, version, values = self._read
        # Replaced (by a load, by a move to a device) or written to in place.
        if read is not steps or version != steps._version:
            stage, draws = steps.tolist()
            values = STAGES[stage], draws
            self._read = (steps, steps._version, values)
        return values

    @torch.inference_mode(False)
    def _write(self, stage: Stage, draws: int) -> None:
        _check_stage(stage)
        # Assigned, not written in place: the assignment tells Pyro's store. Outside of inference mode, because its
        # tensors have no version, which `_values` reads.
        self.steps = self.steps.new_tensor([STAGES.index(stage), draws])

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Leave the guide at its own stage where a state was saved without one."""
        # In a strict load a key that is missing would be an error.
        super()._load_from_state_dict({prefix + "steps": self.steps, **state_dict}, prefix, *args)


def _check_stage(stage: str) -> None:
    if stage not in STAGES:
        raise ArgumentError(f"stage {stage!r} is unknown: use 'dense', 'coded' or 'frozen'.")
