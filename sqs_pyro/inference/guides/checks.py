"""What a guide is made of, checked before it is: arguments, priors, initial values."""

from collections.abc import Collection, Mapping
from typing import Any, Literal

from torch import Tensor
from torch.distributions import constraints

from sqs_pyro.arguments import is_finite, is_positive, is_whole
from sqs_pyro.documents import shown
from sqs_pyro.errors import ArgumentError, NetworkError
from sqs_pyro.inference.called import PyroCallable
from sqs_pyro.inference.guides.windows import Windows
from sqs_pyro.packing import CodedTensor

#: Estimators that draw from q; the others make values to train a hard network with.
DRAWING = ("local", "pathwise")
#: Estimators whose codes are hard: widths and mixing weights stay as K-means, or an E-step, has set them.
HARD = ("one_hot", "straight_through", "ttq", "lsq")
_ESTIMATORS = (*DRAWING, *HARD, "soft", "concrete")


def check_components(given: int | Mapping[str, int], sites: Collection[str]) -> None:
    """Check K of a guide's sites: one for all, or one for each by name.

    Raises:
        ArgumentError: one is not 1 to 256, or the names are not those of the sites.
    """
    by_name = given if isinstance(given, Mapping) else {"": given}
    for name, components in by_name.items():
        if not is_whole(components, 1, 256):
            place = f" of '{name}'" if name else ""
            raise ArgumentError(f"num_components{place} is {shown(components)}, but must be 1 to 256.")
    if isinstance(given, Mapping) and (odd := sorted(set(given) ^ set(sites))):
        what = "no number for" if odd[0] in sites else "a number for what is no site,"
        raise ArgumentError(f"num_components has {what} '{odd[0]}': name each of {', '.join(sites)}.")


def check_zero(
    zero: Any,
    num_components: int | Mapping[str, int],
    estimator: str,
    grid: str,
    coded: Mapping[str, CodedTensor] | None,
) -> Literal["gate", "codeword"] | float:
    """Return what is zero in a guide's sites, checked against its other arguments.

    Raises:
        ArgumentError: it is impossible, or does not go with one of them.
    """
    if zero in ("gate", "codeword"):
        found: Literal["gate", "codeword"] | float = "gate" if zero == "gate" else "codeword"
    elif is_finite(zero) and 0 <= zero < 1:
        found = float(zero)
    else:
        raise ArgumentError(f"zero is {shown(zero)}, but must be gate, codeword or a number from 0 to below 1.")
    given = num_components.values() if isinstance(num_components, Mapping) else [num_components]
    if found != "gate" and estimator in (*DRAWING, "one_hot"):
        raise ArgumentError(
            f"zero is {shown(zero)} beside estimator {estimator!r}, whose gates are drawn: use 'gate'."
        )
    if isinstance(found, float) and coded:
        raise ArgumentError(
            f"zero is {shown(zero)} beside coded, whose zeros no threshold has made: use 'gate', or 'codeword'."
        )
    beside = [*given, *(value.num_components for value in (coded or {}).values())]
    if found != "gate" and max(beside) > 255:
        raise ArgumentError(f"num_components is {max(beside)} beside zero {shown(zero)}, but must be at most 255.")
    if isinstance(found, float) and (set(given) != {2} or grid != "free"):
        raise ArgumentError(
            f"zero is {shown(zero)} beside num_components {sorted(set(given))} and grid {grid!r}, but a threshold "
            "leaves a codeword for each sign: use 2 and 'free'."
        )
    if estimator == "ttq" and not isinstance(found, float):
        raise ArgumentError(
            f"estimator 'ttq' is of weights with a threshold: give zero as a number, not {zero!r}."
        )
    if estimator == "lsq" and (found != "codeword" or grid != "uniform" or min(given) < 2):
        raise ArgumentError(
            f"estimator 'lsq' rounds to whole numbers and 0: use grid 'uniform', zero 'codeword' and 2 or more "
            f"num_components, not {grid!r}, {shown(zero)} and {min(given)}."
        )
    return found


def check_arguments(
    windows: Windows | None,
    estimator: str,
    refresh_every: int,
    spike_scale: float | None,
    init_scale: float,
    initial_gate: float,
    init: Mapping[str, Tensor] | None,
    coded: Mapping[str, CodedTensor] | None,
) -> None:
    """Check the arguments of a guide that its other parts do not check.

    Raises:
        ArgumentError: it names the one that is impossible.
    """
    if windows is not None and not isinstance(windows, Windows):
        raise ArgumentError(
            f"windows is {shown(windows)}, but must be a strategy such as PerWeight() or EqualMass(256)."
        )
    for what, given, kind in (("init", init, Tensor), ("coded", coded, CodedTensor)):
        if given is not None and not (
            isinstance(given, Mapping) and all(isinstance(value, kind) for value in given.values())
        ):
            raise ArgumentError(f"{what} is {shown(given)}, but must be {kind.__name__}s by names of sites.")
    if estimator not in _ESTIMATORS:
        raise ArgumentError(f"estimator {estimator!r} is unknown: use one of {', '.join(_ESTIMATORS)}.")
    if not is_whole(refresh_every, 1):
        raise ArgumentError(f"refresh_every is {shown(refresh_every)}, but must be at least 1 step.")
    if not is_finite(initial_gate):
        raise ArgumentError(
            f"initial_gate is {shown(initial_gate)}, but must be a finite number, the gates' logit."
        )
    if not is_positive(init_scale):
        raise ArgumentError(f"init_scale is {shown(init_scale)}, but must be positive.")
    if spike_scale is not None and not is_positive(spike_scale):
        raise ArgumentError(f"spike_scale is {shown(spike_scale)}, but must be positive; None is a point mass.")


def check_support(name: str, prior: Any, weight: Tensor) -> None:
    """Raise a :class:`NetworkError` if a prior excludes values that weights are going to have."""
    # Latents move in training and codewords follow: four times the largest weight leaves them room.
    size = 4 * weight.abs().max().float().cpu()
    try:
        support = getattr(prior, "support", constraints.real)
        excludes = not all(bool(support.check(size * factor).all()) for factor in (-1, 0, 1))
    # Only what is known to exclude them is refused.
    except NotImplementedError:  # a class that does not say
        return
    if excludes:
        raise NetworkError(
            f"The prior of '{name}' is a {type(prior).__name__}, whose values are {support}, but weights of a "
            f"SpikeGMMGuide may be any number, and here about from {-size:.3g} to {size:.3g}: give a prior of the "
            "whole real line, or take another guide, such as pyro.infer.autoguide.AutoNormal."
        )


def initial_values(model: PyroCallable, init: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """Return the pretrained value of every site: those given, or the model's own.

    Raises:
        NetworkError: there are none, or one is given that is of no site or of another shape.
    """
    own: Mapping[str, Tensor] | None = model.site_values() if hasattr(model, "site_values") else None
    if init is not None:
        if own is not None:
            for name, value in init.items():
                check_like_sites("init", name, value, own)
        # Of a plain Pyro model nothing is known to compare them with.
        return dict(init)
    if own is not None:
        return dict(own)
    raise NetworkError(
        f"{type(model).__name__} does not tell its pretrained weights: give init={{site name: tensor}}, "
        "or wrap the network in BayesianNetwork."
    )


def check_like_sites(what: str, name: str, value: Tensor, sites: Mapping[str, Tensor]) -> None:
    """Check that a tensor is named, shaped and divided like that of a site: torch would stretch it to fit.

    Raises:
        NetworkError: it is not.
    """
    if name not in sites:
        raise NetworkError(f"There is no '{name}' to take the {what} given for it: there are {', '.join(sites)}.")
    if value.shape != sites[name].shape:
        raise NetworkError(
            f"The {what} of '{name}' has shape {list(value.shape)}, but the weights have "
            f"{list(sites[name].shape)}: give one value for each weight."
        )
    if getattr(value, "placements", None) != getattr(sites[name], "placements", None):
        raise NetworkError(
            f"The {what} of '{name}' is not divided among ranks as the weights are (shard_sites): make it of "
            "guide.saliencies(), which are."
        )
