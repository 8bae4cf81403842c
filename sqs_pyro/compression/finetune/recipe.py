"""What compression does, as one validated section of a recipe."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from sqs_pyro.compression.layers import OwnSettings, of_layer
from sqs_pyro.inference.guides.windows import EqualMass, OutlierAware, PerWeight, Windows
from sqs_pyro.packing.storage import Storage
from sqs_pyro.recipes import RecipeSection


class WindowsRecipe(RecipeSection):
    """How weights of a layer share responsibilities.

    Attributes:
        kind: `per_weight` (each its own), `equal_mass` (quantile bins), or `outlier_aware` (quantile bins
            between Tukey's fences and bins of their own for each tail).
        count: windows (of the bulk).
        tail_count: windows of each tail, for `outlier_aware`.
    """

    kind: Literal["per_weight", "equal_mass", "outlier_aware"] = "per_weight"
    count: int = Field(default=256, ge=1, le=65_536)
    tail_count: int = Field(default=8, ge=1, le=65_536)

    def build(self) -> Windows:
        """Return the strategy this section names."""
        if self.kind == "equal_mass":
            return EqualMass(self.count)
        return OutlierAware(self.count, self.tail_count) if self.kind == "outlier_aware" else PerWeight()


class PriorRecipe(RecipeSection):
    """Prior of every weight (docs/priors.md).

    Attributes:
        kind: a spike at zero with a `normal`, `laplace` or `student_t` slab; `plain_normal`, without a spike;
            `gaussian_spike`, a narrow Gaussian in place of the point mass; `hierarchical`, a Normal slab and a
            Beta prior on the inclusion; or `learned`, a spike and the guide's own components, under which the KL
            is the code length of gates and codes.
        inclusion: λ₀, prior probability that a weight is not zero; `learned` starts from it.
        slab_scale: scale parameter of the slab; None takes the one whose root mean square is that of the layer's
            pretrained weights.
        degrees_of_freedom: ν of a `student_t` slab.
        spike_scale: standard deviation of a `gaussian_spike`; None takes a twentieth of the slab's.
        concentration1: a of the Beta prior of `hierarchical`, the non-zeros it counts as seen.
        concentration0: b of the Beta prior of `hierarchical`, the zeros it counts as seen.
        scope: whether `hierarchical` and `learned` have one inclusion a `layer` or a `global` one; or, for
            `learned` with `allocation: rate_distortion`, a `structured` one that depends on channels and kernel.
    """

    kind: Literal[
        "normal", "laplace", "student_t", "plain_normal", "gaussian_spike", "hierarchical", "learned"
    ] = "normal"
    inclusion: float = Field(default=0.5, ge=1e-6, le=0.999999)
    slab_scale: float | None = Field(default=None, ge=1e-4, le=1e6)
    degrees_of_freedom: float = Field(default=4.0, gt=2, le=1e6)
    spike_scale: float | None = Field(default=None, ge=1e-6, le=1e6)
    concentration1: float = Field(default=1.0, ge=1e-3, le=1e6)
    concentration0: float = Field(default=1.0, ge=1e-3, le=1e6)
    scope: Literal["layer", "global", "structured"] = "layer"


class PruningRecipe(RecipeSection):
    """When weights become zero, and which.

    Attributes:
        start: fraction of the steps at which the non-zero rate begins to fall.
        end: fraction of the steps from which it is the target.
        every: steps between two renewals of the masks.
        scope: `global` compares saliencies across layers; `layer` gives each layer the same rate.
        saliency: `gate` is λ (the paper's), `magnitude` is λ·|w|, `activation` is λ·|w| times the root mean square
            of the inputs that the weight multiplies, which linear and convolutional layers have.
    """

    start: float = Field(default=0.05, ge=0, lt=1)
    end: float = Field(default=0.5, gt=0, le=1)
    every: int = Field(default=20, ge=1)
    scope: Literal["global", "layer"] = "global"
    saliency: Literal["gate", "magnitude", "activation"] = "magnitude"

    @model_validator(mode="after")
    def _ends_after_it_starts(self) -> "PruningRecipe":
        if self.end <= self.start:
            raise ValueError(f"a pruning section whose end ({self.end}) is after its start ({self.start})")
        return self


class DistillationRecipe(RecipeSection):
    """The fp32 network's opinion as a second observation of every example, of classifiers.

    Attributes:
        weight: w of the opinion; 1 - w remains for the label.
        temperature: T at which both networks' probabilities are compared.
    """

    weight: float = Field(default=0.5, gt=0, le=1)
    temperature: float = Field(default=2.0, ge=0.01, le=100)


class LayerRecipe(OwnSettings):
    """What the layers whose names match a pattern have of their own.

    Attributes:
        num_components: K, in place of `compression.num_components`.
        nonzero_rate: share of each layer's weights that are not zero. The size that `target_ratio` asks for
            remains that of the whole file; without it `compression.nonzero_rate` is of the other layers.
    """

    num_components: int | None = Field(default=None, ge=1, le=256)
    nonzero_rate: float | None = Field(default=None, ge=1e-4, le=1)


class CompressionRecipe(RecipeSection):
    """Compression in three stages: dense latents while pruning, then codes that follow the latents, then
    frozen codes while codebooks, norms and biases settle.

    Attributes:
        epochs: passes over the training data; without any, weights are pruned and coded by K-means as they are.
        nonzero_rate: target share of weights that are not zero; reached to the weight. Without effect beside
            `target_ratio` or `rate_distortion`.
        allocation: what decides which weights are zero: a `schedule` of pruning, or `rate_distortion`: the
            `learned` prior, by E- and M-steps in closed form, at β or at a target size.
        target_ratio: fp32 size of the whole network over the size of the whole file to reach; the non-zero rate,
            or with `rate_distortion` β, is then found. Needs layout `auto`, `entropy` or `adaptive`.
        curvature: for `rate_distortion`, h of the likelihood's expansion: one mean squared gradient for the whole
            `network`, or that of each `layer`.
        num_components: K, values in a codebook besides zero.
        include: regular expressions (or one) of parameter names to compress; None takes the weights of Linear and
            convolution layers, and the projections of torch's attention.
        exclude: regular expressions (or one) of parameter names to leave uncompressed.
        layers: settings of single layers, by pattern of their names as file names have them (`*`, `?`, `[abc]`):
            `{"layer3.*": {num_components: 4}, fc: {skip: true}}`. Of each setting the last pattern counts that
            matches. It chooses among what `include` and `exclude` leave.
        groups: weights that share a codebook: `layer`, `channel` (out-channel), or a number of consecutive
            weights.
        grid: `free` lets codewords be any numbers; with `uniform` they are whole numbers, `-⌈K/2⌉` to `⌊K/2⌋`,
            times a step of each codebook, as integer kernels of other runtimes multiply.
        zero: what is zero. `gate`: the weights that pruning, or a prior, leaves out. `codeword`: zero is one more
            codeword, to which weights fall and which they leave again: with `estimator: soft` DGMS, with `lsq`
            LSQ. A number t, with two components: the weights of at most t times the largest of their codebook; the
            others have the codeword of their sign, as in TTQ (t = 0.05).
        windows: how weights share responsibilities.
        prior: of every weight.
        pruning: when and which weights become zero; of `rate_distortion` only when.
        distillation: whether, and how, the likelihood observes the fp32 network's opinion, too; None does not.
        kl: which KL term the ELBO has: `jensen` (a bound), `dominant` (the paper's), `monte_carlo`.
        kl_weight: β on the KL; below 1 it is a cold posterior. With `rate_distortion` it decides the size of
            the file, unless `target_ratio` does.
        kl_every: steps between two evaluations of the KL, whose weight is raised to match; the expected
            objective stays the same.
        temperature: τ of the responsibilities when coding starts.
        final_temperature: τ at the end; in between it falls geometrically.
        estimator: of the gradient through the draw: `straight_through`, `soft` or `concrete`; or `one_hot`, which
            adds the posterior's widths to the first and trains under them. It needs `rate_distortion`, whose
            E-step sets them. `ttq` and `lsq` are the first with these methods' own gradients of latents and step,
            beside a `zero` that is theirs.
        coding_start: fraction of the steps at which K-means makes the codebooks.
        freeze_start: fraction of the steps from which codes are frozen.
        refresh_every: steps between two renewals of the hard codes.
        learning_rate: highest learning rate of latents, norms and biases (warm-up over the first 2 %, then half a
            cosine to 0).
        optimizer: of these: `sgd`, or `adamw`, which transformers need.
        momentum: of `sgd`.
        weight_decay: of latents and other weights; norms and biases have none.
        codebook_learning_rate: of component means and, with the estimators `soft` and `concrete`, widths and
            mixing weights (Adam), relative to the layer's root mean square weight.
        gate_learning_rate: of gate logits (Adam); 0 leaves gates to pruning. Once the target rate is reached,
            gates of kept weights stay above ½, so that the count is exact.
        initial_gate: g, gate logit at the start.
        shards: equal parts of a minibatch, each with draws and batch-norm statistics of its own; a smaller last
            minibatch has fewer. As many ranks (docs/ranks.md) may share them: the file depends on the shards, and
            not on the ranks.
        precision: of the network's multiplications in training. `bfloat16` is fast on GPUs and on CPUs with
            AVX-512; elsewhere it takes ten times as long as `float32`.
        batch_norm_batches: minibatches from which batch-norm statistics are estimated anew at the end.
        layout: of packed tensors in the file: `auto` takes the smallest of `dense`, `bitmap`, `entropy` and, for
            tensors of up to 65,536 weights, `adaptive`; or `structured` beside a prior of that scope. `adaptive`
            is the smallest where kernels have structure, and is read ten times as slowly as `entropy`.
        leftover_dtype: of parameters that are not compressed (norms, biases), each where its values survive it;
            buffers stay exact. `fixed8` is fixed point of 8 bits: multiples of a power of two.
        codebook_dtype: of codebook values; a codebook whose values do not survive it is stored as `float32`.
        evaluate_every: epochs between two evaluations of the hard network on the validation data.
        patience: of these, evaluations without improvement after which compression stops, once codes are frozen:
            before that the network becomes smaller by plan. The weights of the best evaluation of frozen codes are
            kept, also where it does not stop. None goes to the end and keeps the last.
    """

    later_keys: ClassVar[frozenset[str]] = frozenset({"patience", "shards", "zero"})

    epochs: int = Field(default=6, ge=0)
    nonzero_rate: float = Field(default=0.25, ge=1e-4, le=1)
    allocation: Literal["schedule", "rate_distortion"] = "schedule"
    target_ratio: float | None = Field(default=None, gt=1)
    curvature: Literal["layer", "network"] = "network"
    num_components: int = Field(default=16, ge=1, le=256)
    include: tuple[str, ...] | None = None
    exclude: tuple[str, ...] = ()
    layers: dict[str, LayerRecipe] = Field(default_factory=dict)
    groups: Literal["layer", "channel"] | Annotated[int, Field(ge=1)] = "layer"
    grid: Literal["free", "uniform"] = "free"
    zero: Literal["gate", "codeword"] | Annotated[float, Field(ge=0, lt=1)] = "gate"
    windows: WindowsRecipe = Field(default_factory=WindowsRecipe)
    prior: PriorRecipe = Field(default_factory=PriorRecipe)
    pruning: PruningRecipe = Field(default_factory=PruningRecipe)
    distillation: DistillationRecipe | None = None
    kl: Literal["jensen", "dominant", "monte_carlo"] = "jensen"
    kl_weight: float = Field(default=0.01, ge=0, le=1e3)
    kl_every: int = Field(default=4, ge=1, le=100)
    temperature: float = Field(default=1.0, ge=1e-6, le=1e6)
    final_temperature: float = Field(default=0.05, ge=1e-6, le=1e6)
    estimator: Literal["straight_through", "one_hot", "soft", "concrete", "ttq", "lsq"] = "straight_through"
    coding_start: float = Field(default=0.5, ge=0, lt=1)
    freeze_start: float = Field(default=0.8, gt=0, le=1)
    refresh_every: int = Field(default=4, ge=1)
    learning_rate: float = Field(default=0.02, gt=0, le=10)
    optimizer: Literal["sgd", "adamw"] = "sgd"
    momentum: float = Field(default=0.9, ge=0, lt=1)
    weight_decay: float = Field(default=5e-4, ge=0, le=1)
    codebook_learning_rate: float = Field(default=1e-2, ge=0, le=1)
    gate_learning_rate: float = Field(default=0.0, ge=0, le=100)
    initial_gate: float = Field(default=5.0, ge=1e-3, le=100)
    shards: int = Field(default=1, ge=1, le=65536)
    precision: Literal["float32", "bfloat16"] = "float32"
    batch_norm_batches: int = Field(default=60, ge=0)
    layout: Literal["auto", "dense", "bitmap", "entropy", "adaptive", "structured"] = "auto"
    leftover_dtype: Literal["float16", "float32", "fixed8"] = "float16"
    codebook_dtype: Literal["float16", "float32"] = "float16"
    evaluate_every: int = Field(default=1, ge=1)
    patience: int | None = Field(default=None, ge=1)

    @property
    def storage(self) -> Storage:
        """How the network is stored."""
        structured = self.layout == "auto" and self.prior.scope == "structured"
        return Storage("structured" if structured else self.layout, self.leftover_dtype, self.codebook_dtype)

    def components_of(self, name: str) -> int:
        """Return K of a layer."""
        return int(of_layer(self.layers, name).get("num_components", self.num_components))

    def rate_of(self, name: str) -> float | None:
        """Return the share of weights that are not zero, of a layer that has one of its own."""
        return of_layer(self.layers, name).get("nonzero_rate")

    @field_validator("include", "exclude", mode="before")
    @classmethod
    def _one_pattern_or_several(cls, given: Any) -> Any:
        return (given,) if isinstance(given, str) else given  # not one for each of its letters

    @model_validator(mode="after")
    def _target_is_of_an_entropy_coded_file(self) -> "CompressionRecipe":
        if self.prior.scope == "structured":
            if self.allocation != "rate_distortion":
                raise ValueError(
                    f"allocation 'rate_distortion' beside prior.scope 'structured', not {self.allocation!r}: that "
                    "is what gives zeros their structure"
                )
            if self.layout not in ("auto", "structured", "adaptive"):
                raise ValueError(
                    f"layout 'auto', 'structured' or 'adaptive' beside prior.scope 'structured', not "
                    f"{self.layout!r}: other layouts take no notice of structure"
                )
        elif self.target_ratio is not None and self.layout not in ("auto", "entropy", "adaptive"):
            raise ValueError(
                f"layout 'auto', 'entropy' or 'adaptive' beside target_ratio, not {self.layout!r}: the size is "
                "predicted for entropy-coded weights"
            )
        return self

    @property
    def _least_rate(self) -> float:
        return min([self.nonzero_rate, *(own.nonzero_rate or 1 for own in self.layers.values())])

    @property
    def _numbers_of_components(self) -> set[int]:
        return {self.num_components, *(own.num_components or self.num_components for own in self.layers.values())}

    @model_validator(mode="after")
    def _codes_fit_the_layout(self) -> "CompressionRecipe":
        has_zeros = self._least_rate < 1 or self.allocation != "schedule" or self.target_ratio is not None
        most = max(self._numbers_of_components)
        if self.layout == "dense" and has_zeros and most > 255:
            raise ValueError(
                f"num_components of at most 255 beside layout 'dense', not {most}: its 8 bits must tell zero "
                "apart, too"
            )
        return self

    @model_validator(mode="after")
    def _zero_is_decided_once(self) -> "CompressionRecipe":
        sizes = self._numbers_of_components
        if self.zero != "gate":
            if self.allocation != "schedule" or self.target_ratio is not None or self._least_rate < 1:
                raise ValueError(
                    f"allocation 'schedule', a nonzero_rate of 1 and no target_ratio beside zero {self.zero!r}, "
                    "under which weights become zero by themselves"
                )
            if self.gate_learning_rate > 0:
                raise ValueError(
                    f"a gate_learning_rate of 0 beside zero {self.zero!r}, not {self.gate_learning_rate}: gates "
                    "say nothing there"
                )
            if max(sizes) > 255:
                raise ValueError(f"num_components of at most 255 beside zero {self.zero!r}, not {max(sizes)}")
        if isinstance(self.zero, float) and (sizes != {2} or self.grid != "free"):
            raise ValueError(
                f"num_components 2 and grid 'free' beside zero {self.zero:g}, not {max(sizes)} and {self.grid!r}: "
                "a threshold leaves one codeword to each sign"
            )
        if isinstance(self.zero, float) != (self.estimator == "ttq"):
            raise ValueError(
                f"estimator 'ttq' and a number as zero beside each other, not {self.estimator!r} and {self.zero!r}"
            )
        if self.estimator == "lsq" and (self.zero != "codeword" or self.grid != "uniform" or min(sizes) < 2):
            raise ValueError(
                f"grid 'uniform', zero 'codeword' and at least 2 num_components beside estimator 'lsq', not "
                f"{self.grid!r}, {self.zero!r} and {min(sizes)}: it rounds to whole numbers"
            )
        return self

    @model_validator(mode="after")
    def _epochs_are_for_what_learns(self) -> "CompressionRecipe":
        learns = self.allocation == "rate_distortion" or self.distillation or self.patience
        if self.epochs == 0 and (learns or self.gate_learning_rate > 0 or self.pruning.saliency == "activation"):
            raise ValueError(
                "at least 1 epoch for what is learned from data (allocation 'rate_distortion', distillation, "
                "patience, gate_learning_rate, saliency 'activation'): without epochs weights are pruned and coded"
            )
        return self

    @model_validator(mode="after")
    def _rate_distortion_decides_alone(self) -> "CompressionRecipe":
        if self.estimator == "one_hot" and self.allocation != "rate_distortion":
            raise ValueError(
                f"allocation 'rate_distortion' beside estimator 'one_hot', not {self.allocation!r}: its E-step "
                "says how wide weights are"
            )
        if self.allocation != "rate_distortion":
            return self
        if self.prior.kind != "learned":
            raise ValueError(f"prior.kind 'learned' beside allocation 'rate_distortion', not {self.prior.kind!r}")
        for pattern, own in self.layers.items():
            if own.nonzero_rate is not None:
                raise ValueError(
                    f"no nonzero_rate in layers ({pattern!r} has {own.nonzero_rate:g}) beside allocation "
                    "'rate_distortion', under which zeros follow from β: give num_components or skip"
                )
        if self.gate_learning_rate > 0:
            raise ValueError(
                f"a gate_learning_rate of 0 beside allocation 'rate_distortion', not {self.gate_learning_rate}: "
                "the gates are set in closed form"
            )
        if self.target_ratio is None and self.kl_weight == 0:
            raise ValueError(
                "a target_ratio or a positive kl_weight beside allocation 'rate_distortion': one decides the size"
            )
        return self

    @model_validator(mode="after")
    def _patience_has_something_to_wait_for(self) -> "CompressionRecipe":
        last = self.epochs - self.epochs % self.evaluate_every  # epoch of the last evaluation
        if self.patience is not None and last <= self.freeze_start * self.epochs:
            raise ValueError(
                f"no patience ({self.patience}) where none of {self.epochs} epochs is evaluated after "
                f"freeze_start ({self.freeze_start}): lower that or evaluate_every, or give more epochs"
            )
        return self

    @model_validator(mode="after")
    def _stages_in_order(self) -> "CompressionRecipe":
        if self.freeze_start <= self.coding_start:
            raise ValueError(
                f"a freeze_start ({self.freeze_start}) after coding_start ({self.coding_start}): codes must "
                "exist before they are frozen"
            )
        if self.pruning.end > self.freeze_start:
            raise ValueError(
                f"a pruning.end ({self.pruning.end}) not after freeze_start ({self.freeze_start}): frozen codes "
                "cannot be pruned"
            )
        return self
