"""The training loop of compression: three stages, one step at a time, resumable at any step."""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pyro
import torch
from torch import Tensor, nn

from sqs_pyro.compression.checkpoint import check_same, read_checkpoint, write_checkpoint
from sqs_pyro.compression.finetune.allocation import allocation
from sqs_pyro.compression.finetune.optimizers import make_gradients_dense, optimizers
from sqs_pyro.compression.finetune.recipe import CompressionRecipe
from sqs_pyro.compression.finetune.recomputation import check_not_recomputed, no_recomputation
from sqs_pyro.compression.finetune.shards import Shards, check_divisible
from sqs_pyro.compression.interruption import deferred_interrupt, interruption
from sqs_pyro.compression.patience import Kept, best_of, is_over
from sqs_pyro.compression.precision import training_autocast, training_dtype
from sqs_pyro.compression.together import check_same_call, check_same_state, stoppable_together
from sqs_pyro.errors import DataError, DivergenceError, NetworkError, SQSError, first_line
from sqs_pyro.evaluation.input_checks import check_inputs, check_minibatch
from sqs_pyro.evaluation.judging import Judge, judge_by, judged
from sqs_pyro.fingerprint import Fingerprint, fingerprint, loader_fingerprint, network_fingerprint
from sqs_pyro.inference.diagnostics import diagnose
from sqs_pyro.inference.elbo import SQSELBO, ElboTerms
from sqs_pyro.inference.findings import Finding
from sqs_pyro.inference.guides.spike_gmm import SpikeGMMGuide
from sqs_pyro.networks.calling import device_of, move_to
from sqs_pyro.networks.loaders import examples_an_epoch
from sqs_pyro.networks.minibatches import minibatches
from sqs_pyro.ranks import Ranks, ranks
from sqs_pyro.shipping.pack import hard_network, network_with
from sqs_pyro.shipping.shipped import folded_and_rounded, keeps_outputs, shipped_network

_WARM_UP = 0.02  # share of the steps over which the learning rate rises
_STATE_KEYS = frozenset(
    {
        "fingerprint",
        "stage",
        "step",
        "kl",
        "draws",
        "model",
        "guide",
        "optimizers",
        "allocation",
        "history",
        "rng",
        "cuda_rng",
        "seconds",
    }
)
_LOOK_EVERY = 10  # steps between two looks at the loss: each look waits for the device


@dataclass(frozen=True)
class StepRecord:
    """What a step was like.

    Attributes:
        step: from 1 to ``total_steps``.
        total_steps: steps of the whole compression.
        stage: ``"dense"``, ``"coded"`` or ``"frozen"``.
        loss: ``nll + β kl``, nats an example.
        nll: negative log-likelihood, nats an example.
        kl: KL term of all weights divided by the number of examples, without β, when last evaluated.
        kl_weight: β: the recipe's, or what a target size has come to.
        nonzero_rate: share of open gates.
        temperature: τ.
        learning_rate: of latents.
        score: of the hard network on validation data, where it was evaluated at this step: what the judge says (of
            classes the accuracy), at most 1.
    """

    step: int
    total_steps: int
    stage: str
    loss: float
    nll: float
    kl: float
    kl_weight: float
    nonzero_rate: float
    temperature: float
    learning_rate: float
    score: float | None = None

    @property
    def accuracy(self) -> float | None:
        """The older name of ``score``."""
        return self.score

    def row(self) -> dict[str, Any]:
        """Return the row of ``history.csv``, whose columns keep the names that they always had."""
        return {"accuracy" if key == "score" else key: value for key, value in asdict(self).items()}


_BRANCHING = 0.5  # of the steps; the size may then still become any other


def branching_step(recipe: CompressionRecipe, steps_per_epoch: int) -> int:
    """Return after how many steps calls for different sizes part, if they share their beginning.

    Half of the steps; under a schedule of pruning before its last masks and K-means' codebooks are made.
    """
    share = _BRANCHING
    if recipe.allocation == "schedule":
        share = min(share, recipe.pruning.end, recipe.coding_start)
    return max(1, math.floor(share * recipe.epochs * steps_per_epoch))


class Driver:
    """Trains a guide and the leftovers of its network by the recipe's schedule.

    Args:
        model: a ``BayesianNetwork``.
        guide: its guide, in the dense stage.
        recipe: what to do when.
        train: minibatches, see :func:`~sqs_pyro.networks.minibatches.split_minibatch`; ``len(train)`` steps an
            epoch.
        validation: minibatches on which the hard network is evaluated during training, or None.
        progress: called with a record every few steps, and at each evaluation.
        bits: what symbols, tables and codebooks may take in the file; None follows the recipe's rate or β.
        judge: of the hard network on validation data; by default what the model's likelihood asks for, see
            :func:`~sqs_pyro.evaluation.judging.judge_by`.
        setting: what else decides what comes out, plain data; a checkpoint of another one is refused.
        inputs: of a minibatch, on which what is not compressed must keep outputs; see
            :func:`~sqs_pyro.shipping.shipped.shipped_network`.
        labels: that an example has: more than 1 of pixels or tokens.
        seed: of the draws of shards.

    Attributes:
        findings: what was wrong with the posterior when it was last looked over, at the end of an epoch or stage.
        earlier_seconds: what the interrupted parts of a resumed run took, up to their last checkpoints.
        kept: which step's weights were kept, where the recipe has patience.
    """

    def __init__(
        self,
        model: Any,
        guide: SpikeGMMGuide,
        recipe: CompressionRecipe,
        train: Any,
        validation: Any | None = None,
        progress: Callable[[StepRecord], None] | None = None,
        bits: float | None = None,
        judge: Judge | None = None,
        setting: Mapping[str, Any] | None = None,
        inputs: Any | None = None,
        labels: float = 1.0,
        seed: int = 0,
    ) -> None:
        self.model, self.guide, self.recipe = model, guide, recipe
        self.train, self.validation, self.progress = train, validation, progress
        self.judge, self.setting, self.inputs = judge or judge_by(model.likelihood), setting, inputs
        self.device = device_of(model)
        # N of the ELBO; counting is the last resort, for it may cost a pass over the data.
        self.num_data = int(model.num_data or examples_an_epoch(train, model.net))
        self.labels = labels
        self.total_steps = recipe.epochs * len(train)
        self.elbo = SQSELBO(kl=recipe.kl)  # its weight is set anew at each step
        steps = max(1, self.total_steps)  # without any the schedule has come to its end
        self.allocation = allocation(model, guide, recipe, steps, self.num_data, labels, bits)
        # At least one step is dense and one is coded, however few there are.
        self.coding_step = max(round(recipe.coding_start * self.total_steps), 1)
        self.freeze_step = max(round(recipe.freeze_start * self.total_steps), self.coding_step + 1)
        self.optimizers = optimizers(model, guide, recipe)
        self.ranks, self.shards = Ranks(), None
        if recipe.shards > 1:
            self.ranks = ranks()
            examples = check_divisible(train, model.net, recipe.shards)
            self.shards = Shards(guide, recipe.shards, examples, seed, self.ranks)
        self.step = 0
        self.kl = 0.0
        self.earlier_seconds = 0.0
        self._start = time.perf_counter()
        self._between_steps = True  # whether state is whole, so that a checkpoint may be written
        self._latest_kl: Tensor | None = None
        self._fingerprint: Fingerprint = {}
        self._outputs_kept: dict[str, bool] = {}  # by stage
        self.history: list[StepRecord] = []
        self.findings: list[Finding] = []
        self.kept: Kept | None = None
        self._best: dict[str, dict[str, Any]] | None = None  # of the best evaluation of frozen codes, on the CPU

    def run(self, checkpoint: str | Path | None = None, branch: str | Path | None = None) -> list[StepRecord]:
        """Train to the end; from ``checkpoint`` if that file exists, which is renewed each epoch and on Ctrl-C.

        Else from ``branch`` if that file exists: the state, after :func:`branching_step` steps, of a run to any
        size. It is written if it does not exist.

        Ctrl-C takes effect after the step at hand, so that the checkpoint is exact. A second one takes effect at
        once and leaves the checkpoint of the last epoch.

        Raises:
            DivergenceError: loss or weights are not finite.
            DataError: a minibatch holds NaN or labels that do not fit the network, the loader fails, or it yields
                another number of minibatches than it says.
            NetworkError, RecipeError: the checkpoint is damaged, or belongs to another network, recipe or setting;
                with other data a DataError.
            OutputError: the checkpoint cannot be written.
        """
        alone = self.ranks.size == 1
        if checkpoint is not None or not alone:
            self._fingerprint = self._of_this_call()  # before training: of what is given, not of what it becomes
            check_same_call(self.ranks, self._fingerprint)
        if checkpoint is not None:
            checkpoint = Path(checkpoint)
            if self.ranks.of_leader(checkpoint.exists):
                self._restore(checkpoint, self._fingerprint)
        branching = None
        if branch is not None:
            branch = Path(branch)
            of_any_size = self._of_this_call(target_ratio=None)
            there = self.ranks.of_leader(branch.exists)
            if there and self.step == 0:
                self._restore(branch, of_any_size)
                self.earlier_seconds = 0.0  # another run's
            branching = None if there else branching_step(self.recipe, len(self.train))
        try:
            # The store's scope: the parameters stay in the modules.
            with pyro.get_param_store().scope(), stoppable_together(self.ranks) as signal_to_any:
                for x, y in self._minibatches(checkpoint):
                    with deferred_interrupt():  # a step is done whole or not at all
                        self._train_step(move_to(x, self.device), y.to(self.device))
                    if branch is not None and self.step == branching:
                        self._keep(branch, of_any_size)
                    if (number := signal_to_any()) is not None:
                        self._keep(checkpoint, self._fingerprint)
                        raise interruption(number)
        except KeyboardInterrupt:
            # A second signal strikes within a step, where state is half old and half new: that is not kept.
            if alone and self._between_steps:
                self._keep(checkpoint, self._fingerprint)
            raise
        self._complete_schedule()
        return self.history

    def _complete_schedule(self) -> None:
        """Do what, with few steps, falls after the last one: the last masks, the codebooks, the freezing."""
        if self.total_steps == 0:
            self.allocation.finish()  # first, so that K-means is of the survivors
        if self.guide.stage == "dense":
            self._start_coding()
        if self.guide.stage != "frozen":
            self._freeze_codes()
        if self._best is not None:
            self.model.load_state_dict(self._best["model"])
            self.guide.load_state_dict(self._best["guide"])
            judged = self._frozen_evaluations()
            best = judged[best_of([score for _, score in judged])][0]
            self.kept = Kept(best, self.step, self.total_steps)
        self._diagnose()
        if hasattr(self.train, "epoch"):  # what follows sees the same minibatches after a resumption, too
            self.train.epoch = self.recipe.epochs

    def _start_coding(self) -> None:
        self._diagnose()  # of the stage that ends here
        self.guide.start_coding(fit_codebooks=not self.allocation.makes_codebooks)

    def _freeze_codes(self) -> None:
        self._diagnose()
        self.allocation.finish()  # the last word on zeros, while gates can still be written
        self.guide.freeze_codes()

    def _minibatches(self, checkpoint: Path | None) -> Iterator[tuple[Any, Tensor]]:
        per_epoch = len(self.train)
        first_epoch, done = divmod(self.step, per_epoch)  # where a checkpoint was left
        for epoch in range(first_epoch, self.recipe.epochs):
            if is_over([score for _, score in self._frozen_evaluations()], self.recipe.patience):
                return
            if hasattr(self.train, "epoch"):
                self.train.epoch = epoch  # chooses the order, so that a resumed epoch is the same one
            for i, (x, y) in enumerate(minibatches(self.train, self.model.net, "training")):
                if i >= per_epoch:
                    raise DataError(
                        f"The training data goes on after {per_epoch} minibatches in epoch {epoch + 1}: its "
                        "length must be the number of minibatches it yields (an IterableDataset must share its "
                        "examples among the workers of its DataLoader)."
                    )
                if epoch > first_epoch or i >= done:  # minibatches already trained on are read and left
                    yield x, y
            if self.step < (epoch + 1) * per_epoch:
                raise DataError(
                    f"The training data ended after {self.step - epoch * per_epoch} of {per_epoch} minibatches in "
                    f"epoch {epoch + 1}: its length must be the number of minibatches it yields."
                )
            if self.shards is not None:
                self.shards.compare_paces()
            # No step is under way: the loop in `run` has come back for the next epoch's first minibatch.
            self._keep(checkpoint, self._fingerprint)

    def _keep(self, path: Path | None, of_call: Fingerprint) -> None:
        """Keep the state, if there is a place for it: on ranks it is the same on each, and the leader writes."""
        check_same_state(self.ranks, self._state, self.step)
        if path is not None:
            self.ranks.of_leader(lambda: write_checkpoint(path, self._state() | {"fingerprint": of_call}))

    def _train_step(self, x: Any, y: Tensor) -> None:
        self._between_steps = False
        self._follow_schedule()
        for trained in (self.model, self.guide):
            if not all(module.training for module in trained.modules()):  # asking costs less than saying it anew
                trained.train()
        recipe = self.recipe
        with_kl = (
            recipe.kl_weight > 0
            and self.step % recipe.kl_every == 0
            and self.guide.stage != "frozen"  # gates and codes, which it is about, are decided
            and not self.allocation.optimises_kl
        )
        for optimizer in self.optimizers:
            # None, not 0: momentum and decay must not move frozen latents, which get no gradient any more.
            optimizer.zero_grad(set_to_none=True)
        if self.shards is None:
            terms = self._backward(x, y, 1.0, with_kl)
            nll, kl = terms.nll.detach(), terms.kl.detach()
        else:
            learning = [p for each in self.optimizers for g in each.param_groups for p in g["params"]]
            learning = [p for p in learning if p.requires_grad]
            nll, kl = self.shards.backward(x, y, self.step, with_kl, learning, self._statistics, self._backward)
        make_gradients_dense(self.optimizers)
        self.allocation.after_backward(self.step, len(y))
        for optimizer in self.optimizers:
            optimizer.step()
        self.allocation.after_step()  # what the optimizers have opened or closed against the masks
        self.step += 1
        record = self._look(nll, kl if with_kl else None, x, y)
        # Whole again before the caller's own function runs, which may raise or be interrupted.
        self._between_steps = True
        if record is not None and self.progress is not None:
            self.progress(record)

    def _backward(self, x: Any, y: Tensor, share: float, with_kl: bool) -> ElboTerms:
        """Add the gradients of a minibatch, or of a shard that is a share of it."""
        recipe = self.recipe
        # Where the KL is evaluated it stands for the steps that skip it: the expected objective is unchanged.
        self.elbo.kl_weight = recipe.kl_weight * recipe.kl_every if with_kl else 0.0
        try:
            with training_autocast(recipe.precision, self.device):
                terms = self.elbo.terms(self.model, self.guide, x, y)
                if share < 1:  # a shard stands for all data as the minibatch does
                    terms = replace(terms, nll=terms.nll * share)
            if not self.history:  # once, at the first step
                check_not_recomputed(terms.loss)
            with no_recomputation():
                # Nats a label: learning rates depend neither on N nor on how many pixels or tokens an example has.
                (terms.loss / (self.num_data * self.labels)).backward()
        except (MemoryError, torch.OutOfMemoryError):
            raise  # `enough_resources` around the call says which setting to lower
        except Exception as error:
            # Our own errors say what to repair, but a DataError from within the model does not know the minibatch.
            if not isinstance(error, SQSError) or isinstance(error, DataError):
                self._explain(error, x, y)
            raise
        return terms

    def _statistics(self) -> list[Tensor]:
        """Return what a forward pass changes."""
        return [*self.model.buffers(), *self.allocation.statistics()]

    def _follow_schedule(self) -> None:
        """Set learning rate, temperature, masks and stage for the coming step."""
        rate = self.learning_rate(self.step)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["highest_lr"] * rate
        if self.guide.stage != "frozen":  # masks first: codebooks are fitted to what they leave
            self.allocation.before_step(self.step)
        if self.step == self.coding_step:
            self._start_coding()
        if self.step == self.freeze_step:
            self._freeze_codes()
        self.guide.temperature = self.temperature(self.step)

    def learning_rate(self, step: int) -> float:
        """Return the share of the highest learning rate at a step: linear warm-up, then half a cosine to 0."""
        warm_up = max(1, round(_WARM_UP * self.total_steps))
        if step < warm_up:
            return (step + 1) / warm_up
        return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, self.total_steps - warm_up)))

    def temperature(self, step: int) -> float:
        """Return τ at a step: constant until coding starts, then falling geometrically to the final one."""
        first, last = self.recipe.temperature, self.recipe.final_temperature
        progress = (step - self.coding_step) / max(1, self.freeze_step - self.coding_step)
        return first * (last / first) ** min(max(progress, 0.0), 1.0)

    def _look(self, nll_now: Tensor, kl_now: Tensor | None, x: Any, y: Tensor) -> StepRecord | None:
        """Check every few steps that all is finite, and record it."""
        if kl_now is not None:
            self._latest_kl = kl_now  # read only when looked at: reading waits for the device
        last_of_epoch = self.step % len(self.train) == 0
        # The first three steps are looked at one by one: what diverges at once is told at once.
        if self.step > 3 and self.step % _LOOK_EVERY and not last_of_epoch:
            return None
        nll = float(nll_now) / self.num_data
        self._read_kl()
        if not math.isfinite(nll) or not math.isfinite(self.kl):  # is it the data, or has training diverged?
            check_inputs((x, y), f"Training minibatch {self.step}")
            raise self._divergence(self.step)
        if last_of_epoch:
            self._diagnose()
        kl_weight = self.allocation.beta or self.recipe.kl_weight  # found for a target size, or given
        due = last_of_epoch and (self.step // len(self.train)) % self.recipe.evaluate_every == 0
        record = StepRecord(
            step=self.step,
            total_steps=self.total_steps,
            stage=self.guide.stage,
            loss=nll + kl_weight * self.kl,
            nll=nll,
            kl=self.kl,
            kl_weight=kl_weight,
            nonzero_rate=self.guide.nonzero_rate(),
            temperature=self.guide.temperature,
            learning_rate=self.optimizers[0].param_groups[0]["lr"],
            score=self._validation_score() if due else None,
        )
        self.history.append(record)
        self._keep_best(record)
        return record

    def _keep_best(self, record: StepRecord) -> None:
        if self.recipe.patience is None or record.score is None or record.stage != "frozen":
            return
        judged = self._frozen_evaluations()
        if best_of([score for _, score in judged]) == len(judged) - 1:
            states = {"model": self.model.state_dict(), "guide": self.guide.state_dict()}
            self._best = {name: {key: _copied(v) for key, v in state.items()} for name, state in states.items()}

    def _frozen_evaluations(self) -> list[tuple[int, float]]:
        """Return step and score of each evaluation since codes were frozen: of networks of the same size."""
        return [(r.step, r.score) for r in self.history if r.stage == "frozen" and r.score is not None]

    def _diagnose(self) -> None:
        self.findings = diagnose(self.model, self.guide, averaging=False, recipe=self.recipe)

    def _read_kl(self) -> None:
        known = self.allocation.kl()
        if known is not None:
            self.kl = known / self.num_data
        elif self._latest_kl is not None:
            self.kl = float(self._latest_kl) / self.num_data

    def _validation_score(self) -> float | None:
        if self.validation is None:
            return None
        sites = self.guide.site_guides()
        if self.guide.stage == "dense":  # there are no codes yet: latents, with the zeros so far
            net = network_with(
                self.model.net, {name: site.latent * (site.gates() > 0.5) for name, site in sites.items()}
            )
        else:
            net = hard_network(self.model.net, self.guide.harden(self.recipe.storage.codebook))
        return judged(self.judge, self._shipped(net), self.validation, self.ranks)

    def _shipped(self, hard: nn.Module) -> nn.Module:
        """A hard network as it ships.

        Whether folding and rounding keep outputs is the network's nature more than its weights': it is asked once
        in each stage and at the end, and in between the answer holds.
        """
        sites, dtype = self.guide.site_guides(), self.recipe.leftover_dtype
        shipped = folded_and_rounded(hard, sites, dtype)
        if self.inputs is None:
            return shipped
        if self.guide.stage not in self._outputs_kept or self.step == self.total_steps:
            self._outputs_kept[self.guide.stage] = keeps_outputs(hard, shipped, self.inputs)
        return (
            shipped if self._outputs_kept[self.guide.stage] else shipped_network(hard, sites, dtype, self.inputs)
        )

    def _explain(self, error: Exception, x: Any, y: Tensor) -> None:
        """Raise the sentence for a step that failed, if the data or a divergence explain it; else return."""
        step = self.step + 1
        dtype = training_dtype(self.recipe.precision)
        try:
            check_minibatch(self.model.net, self.model.likelihood, x, y, "training", step, dtype)
        except DataError as explained:
            # A first step that fails by itself is a mistake in the network, which its own error explains.
            if explained.__cause__ is None or self.step > 0:
                raise explained from error
        except NetworkError:  # it may have come to that in training
            pass
        if "Expected parameter" in str(error):  # a distribution's own check of the network's output
            raise self._divergence(step) from error

    def _divergence(self, step: int) -> DivergenceError:
        return DivergenceError(
            f"The loss is not finite at step {step} of {self.total_steps} (stage '{self.guide.stage}'): "
            f"lower learning_rate ({self.recipe.learning_rate}) or kl_weight ({self.recipe.kl_weight})."
            + "".join(f" Before that: {finding.sentence}" for finding in self.findings[:1] if finding.site)
        )

    def _of_this_call(self, **changed: Any) -> Fingerprint:
        """Return what this call, or one of another recipe, is made of, before it has trained anything."""
        frozen = [name for name, parameter in self.model.net.named_parameters() if not parameter.requires_grad]
        return fingerprint(
            self.recipe.model_dump(mode="json") | changed,
            network_fingerprint(self.model.net),
            loader_fingerprint(self.train),
            # Of patterns the later one counts: their order, too, decides what comes out.
            {"num_data": self.num_data, "frozen": frozen, "patterns": list(self.recipe.layers)}
            | dict(self.setting or {}),
        )

    def _state(self) -> dict[str, Any]:
        self._read_kl()  # a record of a step without KL is then the same after a resumption
        best = {} if self._best is None else {"best": self._best}
        return {
            **best,
            "fingerprint": self._fingerprint,
            "stage": self.guide.stage,
            "step": self.step,
            "kl": self.kl,
            "draws": self.guide.draws,  # by which the guide counts when hard codes are renewed
            "model": self.model.state_dict(),
            "guide": self.guide.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "allocation": self.allocation.state_dict(),
            "history": [asdict(record) for record in self.history],
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
            "seconds": self.earlier_seconds + time.perf_counter() - self._start,
        }

    def _restore(self, path: Path, expected: Fingerprint) -> None:
        state = self.ranks.of_leader(lambda: read_checkpoint(path, _STATE_KEYS))
        check_same(state["fingerprint"], expected, path)
        try:
            self.model.load_state_dict(state["model"])
            self.guide.load_state_dict(state["guide"])
        except RuntimeError as error:
            raise NetworkError(f"Checkpoint '{path}' is of another network: {first_line(error)}") from None
        self.guide.resume(state["stage"], state["draws"])  # which says what learns
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.allocation.load_state_dict(state["allocation"])
        # The clock of this process began in `__init__`; what came before is added to it.
        self.step, self.kl, self.earlier_seconds = state["step"], state["kl"], state["seconds"]
        self.history = [StepRecord(**_renamed(record)) for record in state["history"]]
        self._best = state.get("best")
        torch.set_rng_state(state["rng"])  # last: what is above may draw
        if state["cuda_rng"] is not None and self.device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda_rng"], self.device)


def _copied(value: Any) -> Any:
    """Return a value of a state that training does not change any more."""
    return value.detach().cpu().clone() if isinstance(value, Tensor) else value


def _renamed(record: dict[str, Any]) -> dict[str, Any]:
    """Return a record that was kept before its score was called so."""
    return {"score" if key == "accuracy" else key: value for key, value in record.items()}
