"""Any ``nn.Module`` as a Pyro model whose weights are random."""

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from typing import Any, TypeAlias

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from sqs_pyro.arguments import is_whole
from sqs_pyro.distributions import SpikeAndMixture, SpikeAndSlab
from sqs_pyro.errors import DataError, ModelError, NetworkError
from sqs_pyro.models.likelihood_sites import LikelihoodSites
from sqs_pyro.models.likelihoods import resolve
from sqs_pyro.models.likelihoods.learned import taken
from sqs_pyro.models.network_prior import Codebooks, FixedPrior, HyperPrior, NetworkPrior, SitePrior
from sqs_pyro.models.observation import Likelihood, examples_of, observe, settle
from sqs_pyro.models.ownership import OwningModule, claim, point_estimate, show_buffer, take_over_in_place
from sqs_pyro.models.prediction import predicting
from sqs_pyro.models.priors import scale_matched_prior
from sqs_pyro.models.sharding import mean_over_ranks, whole_when_used
from sqs_pyro.models.stacked import StackedDistribution, drawn_networks, plates_around, stack_networks
from sqs_pyro.networks.batch_statistics import statistics_of
from sqs_pyro.networks.calling import call_arguments, device_of, output_tensor
from sqs_pyro.networks.checks import check_network
from sqs_pyro.networks.coverage import coverage
from sqs_pyro.networks.modes import evaluating
from sqs_pyro.networks.sites import select_sites
from sqs_pyro.networks.substitution import call_with

#: One distribution for every weight, a function of a site's name and pretrained value, or a strategy.
Prior: TypeAlias = dist.TorchDistribution | SitePrior | NetworkPrior

_OWN_SITES = ("data", "logits", "obs")


class BayesianNetwork(OwningModule):
    """A network as a Pyro model: one sample site for each compressed tensor, named after its parameter.

    ``forward(inputs, y)`` samples every site from its prior, runs the user's network with the samples in place
    of its weights (``torch.func.functional_call``, the network itself is not rewritten) and observes ``y`` at
    site ``"obs"`` inside ``plate("data", num_data)``, so that a minibatch counts for the whole data set. The
    network's output is recorded at the deterministic site ``"logits"``. Weights drawn in plates
    (``vectorize_particles``, ``Predictive(parallel=True)``) are so many networks, which run one after the other.

    Compressed parameters are frozen (``requires_grad=False``): their pretrained values only initialise a
    guide. All other parameters (biases, norms, ...) stay trainable and are learned as point estimates.

    Args:
        net: the network, with its pretrained weights.
        prior: a scalar distribution used for every weight, a callable ``(name, weight) -> distribution``, or a
            :class:`~sqs_pyro.models.NetworkPrior`; by default :func:`scale_matched_prior`.
        likelihood: a name (``"categorical"``, ``"gaussian"``, ``"poisson"``, ..., see
            :func:`~sqs_pyro.models.likelihoods.resolve`), one of :mod:`sqs_pyro.models.likelihoods`, or a callable
            from the network's output to a distribution with batch shape ``[B]``.
        num_data: N, the number of training examples; by default the size of the minibatch at hand.
        include, exclude: see :func:`sqs_pyro.networks.sites.select_sites`.

    Raises:
        NetworkError: nothing to compress, weights that are not finite or cannot be replaced (see
            :func:`~sqs_pyro.networks.checks.check_network`), a site named like one of the model's own, or an
            impossible argument.

    Attributes:
        evaluates_predictions: under ``pyro.infer.Predictive`` the network runs in evaluation mode, whatever its
            own mode is: batch norms use and keep their statistics, nothing is dropped out. Set it to False for
            Monte Carlo dropout; the network's own mode counts then.
        batch_norm_inputs: a minibatch of training inputs, from which each network that is drawn under
            ``Predictive`` takes statistics of its own for its batch norms; None (default) gives all of them the
            running ones. It costs a pass over these inputs for each draw.
    """

    evaluates_predictions = True
    batch_norm_inputs: Any = None
    #: Ranks among which :func:`~sqs_pyro.models.sharding.shard_sites` has divided the sites.
    mesh: Any = None

    def __init__(
        self,
        net: nn.Module,
        prior: Prior | None = None,
        likelihood: str | Likelihood = "categorical",
        num_data: int | None = None,
        include: str | Sequence[str] | None = None,
        exclude: str | Sequence[str] = (),
    ) -> None:
        super().__init__()
        if num_data is not None and not is_whole(num_data, 1):
            raise NetworkError(
                f"num_data is {num_data!r}, but must be at least 1: the number of training examples."
            )
        check_network(net)  # before anything of the caller's is frozen
        sites = select_sites(net, include, exclude)
        self.net = net
        self.num_data = num_data
        self.likelihood = taken(resolve(likelihood))
        self._names = tuple(sites)
        self.prior = _network_prior(prior or scale_matched_prior())
        self.prior.start(sites)
        # Two networks would share its parameters, and its shapes are those of one.
        self.prior.belongs_to_a_network = True
        _check_names(sites, self.prior)
        for weight in sites.values():
            weight.requires_grad_(False)

    def site_values(self) -> dict[str, Tensor]:
        """Return the pretrained value of every site, by name, in the order in which the model samples them."""
        parameters = dict(self.net.named_parameters())
        return {name: parameters[name].detach() for name in self._names}

    @property
    def priors(self) -> dict[str, dist.TorchDistribution]:
        """The prior of every site by name, as it is now; what is random in it stands at its mean."""
        return self.prior.site_priors({name: own.distribution.mean for name, own in self.hyper_priors().items()})

    def hyper_priors(self) -> dict[str, HyperPrior]:
        """Sample sites of the prior itself, by name: guides sample them before the weights, in this order."""
        return self.prior.hyper_priors()

    def bind_codebooks(self, codebooks: Codebooks) -> None:
        """Let a prior that shares components with a guide find them, by the name of a site."""
        self.prior.bind_codebooks(codebooks)

    def forward(self, inputs: Any, y: Tensor | None = None) -> Tensor:
        """Sample a network, run it on ``inputs`` and observe ``y``.

        Args:
            inputs: a tensor, a tuple of positional arguments, or a mapping of keyword arguments of the net.
            y: observations, first dimension B; ``None`` samples them (``pyro.infer.Predictive``).

        Returns:
            What was observed or sampled at ``"obs"``.

        Raises:
            DataError: the observations do not have the shape that the likelihood describes, or batch norm cannot
                take statistics of one example.
            ModelError: it is traced by ``torch.jit.trace``.
        """
        if torch.jit.is_tracing():
            raise ModelError(
                "torch.jit.trace, and with it Pyro's JitTrace_ELBO and jit_compile, cannot follow a network whose "
                "weights are sampled: use SQSELBO() or a loss without Jit, or leave jit_compile out."
            )
        # Past our own `__getattr__`, which would settle with Pyro's store at each look.
        own = dict(self._modules["net"].named_parameters())
        weights = {
            name: pyro.sample(name, prior).to(own[name].dtype)  # guides work in float32
            for name, prior in self.prior().items()
        }
        # `drawn` is the joint shape of plates around the weights, () for one network.
        drawn, networks = drawn_networks({**weights, **self._point_estimates()}, own)
        outputs = [self._output(tensors, inputs) for tensors in networks]
        sites = LikelihoodSites(len(outputs))  # of a likelihood that samples, noise say
        if y is None:
            observations = sites.for_each(outputs, lambda output: examples_of(self.likelihood(output)))
        else:
            # Where classes stand is decided by the first minibatch and stays: a later one may fit two readings.
            settled = settle(self.likelihood, outputs[0], y)
            if settled is not self.likelihood:  # one that is a module would change its place among the parameters
                self.likelihood = settled
            given = y
            observed = sites.for_each(outputs, lambda output: observe(self.likelihood, output, given))
            observations, y = [observation for observation, _ in observed], observed[0][1]
        batch = observations[0].batch_shape[0]
        # An explicit subsample gives the factor N/B without drawing N random indices a step.
        subsample = torch.arange(batch, device=device_of(self._modules["net"]))
        # A plate cannot be smaller than its subsample.
        examples = pyro.plate("data", max(self.num_data or batch, batch), subsample=subsample)
        with examples:
            plates = plates_around(drawn, examples.dim)
            # Other outputs are the likelihood's own affair: a site holds a tensor.
            if all(torch.is_tensor(output) or hasattr(output, "logits") for output in outputs):
                logits = [output_tensor(output) for output in outputs]
                event_dims = logits[0].dim() - 1
                joint = stack_networks(logits, plates, examples.dim, event_dims) if drawn else logits[0]
                pyro.deterministic("logits", joint, event_dim=event_dims)
            if y is not None:  # plates of the user's own may be to the right of the examples
                y = y.reshape(batch, *[1] * (-1 - examples.dim), *y.shape[1:])  # [B, 1.., *event]
            predicted = StackedDistribution(observations, plates, examples.dim) if drawn else observations[0]
            return pyro.sample("obs", predicted, obs=y)

    def _output(self, tensors: dict[str, Tensor], inputs: Any) -> Any:
        """Return the network's output with these tensors in place of its own."""
        net = self._modules["net"]
        args, kwargs = call_arguments(inputs, net)
        evaluates = self.evaluates_predictions and predicting()
        if self.mesh is not None:
            tensors = whole_when_used(net, tensors)
        if evaluates and self.batch_norm_inputs is not None:
            tensors = tensors | statistics_of(net, tensors, self.batch_norm_inputs)
        with evaluating(net) if evaluates else nullcontext():
            try:
                return call_with(net, tensors, args, kwargs)
            except ValueError as error:
                # torch has no class for this error, only its words.
                if not str(error).startswith("Expected more than 1 value per channel"):
                    raise
                raise DataError(
                    "A minibatch has one example, of which batch norm in training can make no statistics: leave "
                    "it out (DataLoader(..., drop_last=True)), choose another batch size, or call "
                    "model.net.eval()."
                ) from error

    def _point_estimates(self) -> dict[str, Tensor]:
        """Return trainable parameters that are no sites as Pyro's ``net.<name>``; the store shows buffers, too."""
        # With the parameters: a saved store without them would restore a network with the statistics of a fresh
        # one.
        for name, buffer in self._statistics():
            take_over_in_place(self._store_name(name), buffer)
            show_buffer(self, self._store_name(name), buffer)
        found = {name: point_estimate(self, self._store_name(name), own) for name, own in self._learned()}
        return found if self.mesh is None else {name: mean_over_ranks(own) for name, own in found.items()}

    def take_loaded(self) -> None:
        """Take over what was loaded into Pyro's store for the parameters that are no sites."""
        for name, own in self._learned():
            claim(self, self._store_name(name), own, put=False)
        for name, buffer in self._statistics():
            take_over_in_place(self._store_name(name), buffer)

    def _learned(self) -> list[tuple[str, Tensor]]:
        """Return trainable parameters that are no sites, by name."""
        net = self._modules.get("net")  # past PyroModule, which warns of frozen ones
        return [] if net is None else [(name, own) for name, own in net.named_parameters() if own.requires_grad]

    def _statistics(self) -> list[tuple[str, Tensor]]:
        """Return the buffers that the network's state dict holds, by name; none where Pyro uses no store."""
        # `net` is missing while the base class is still being made.
        if "net" not in self._modules or pyro.settings.get("module_local_params"):
            return []
        return [
            (f"{prefix}.{name}".removeprefix("."), buffer)
            for prefix, module in self._modules["net"].named_modules()
            for name, buffer in module._buffers.items()
            if buffer is not None and name not in module._non_persistent_buffers_set
        ]

    def _store_name(self, name: str) -> str:
        return f"{self._pyro_name}.net.{name}".removeprefix(".")

    def _claim(self, name: str, put: bool = False) -> None:
        if name == "net":  # whoever looks at the network sees what was loaded
            self.take_loaded()
        super()._claim(name, put)

    def __repr__(self) -> str:
        values, priors = self.site_values(), self.priors
        width = max(len(name) for name in values)
        lines = [
            f"  {name:<{width}}  {tuple(value.shape)!s:<18}  {_describe(priors[name])}"
            for name, value in values.items()
        ]
        weights = sum(value.numel() for value in values.values())
        total = sum(parameter.numel() for parameter in self.net.parameters())
        return (
            f"BayesianNetwork({type(self.net).__name__}, num_data={self.num_data}): "
            f"{len(lines)} sites, {weights:,} of {total:,} parameters\n" + "\n".join(lines + self._left_out())
        )

    def _left_out(self) -> list[str]:
        largest = coverage(self.net, self._names).largest()
        return [f"  {other.name} {other.shape} is not compressed" for other in largest]


def _network_prior(prior: Prior) -> NetworkPrior:
    if not isinstance(prior, NetworkPrior):
        return FixedPrior(prior)
    if prior.belongs_to_a_network:
        raise NetworkError(f"This {type(prior).__name__} already belongs to a network: make another one.")
    return prior


def _check_names(sites: Iterable[str], prior: NetworkPrior) -> None:
    """Raise a :class:`NetworkError` if the model samples something else under the name of a site."""
    # Pyro keeps sites by name: a second one of a name would be an error in the midst of training.
    taken = dict.fromkeys(_OWN_SITES, "the model") | dict.fromkeys(prior.hyper_priors(), "its prior")
    for name in sites:
        if name in taken:
            raise NetworkError(
                f"Parameter '{name}' cannot be a site, because {taken[name]} has a site of that name: rename the "
                f"parameter, wrap the network in a module, or leave it out with exclude=['^{name}$']."
            )


def _describe(prior: dist.TorchDistribution) -> str:
    base = getattr(prior, "base_dist", prior)
    if isinstance(base, SpikeAndSlab):
        return f"SpikeAndSlab({_scalar(base.inclusion)}, {_describe(base.slab)})"
    if isinstance(base, SpikeAndMixture):
        return f"SpikeAndMixture({_scalar(base.inclusion)}, {base.num_components} components)"
    arguments = ", ".join(_scalar(getattr(base, name)) for name in base.arg_constraints if hasattr(base, name))
    return f"{type(base).__name__}({arguments})"


def _scalar(value: Any) -> str:
    value = value.detach().float() if torch.is_tensor(value) else torch.tensor(float(value), device="cpu")
    low, high = float(value.min()), float(value.max())
    return f"{low:.3g}" if low == high else f"{low:.3g}..{high:.3g}"
