"""The training loop: its schedule, what it records, interruption and resumption, and what stops it."""

import copy
import math
import signal
import threading
from typing import ClassVar

import pyro
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from sqs_pyro import compress
from sqs_pyro.compression.checkpoint import read_checkpoint, write_checkpoint
from sqs_pyro.compression.finetune.loop import Driver
from sqs_pyro.compression.finetune.recipe import CompressionRecipe
from sqs_pyro.compression.interruption import deferred_interrupt
from sqs_pyro.data import ArrayLoader
from sqs_pyro.errors import DataError, DivergenceError, NetworkError, RecipeError, SQSError
from sqs_pyro.evaluation.first_minibatch import try_first_minibatch
from sqs_pyro.inference.guides.spike_gmm import SpikeGMMGuide
from sqs_pyro.models import BayesianNetwork
from sqs_pyro.models.likelihoods import categorical

QUICK = {
    "epochs": 4,
    "nonzero_rate": 0.3,
    "num_components": 4,
    "learning_rate": 0.02,
    "pruning": {"every": 2},
    "refresh_every": 3,
    "kl_every": 2,
}


def network() -> nn.Sequential:
    """Convolution, batch norm and dropout: everything that holds state or draws random numbers."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Dropout(0.1),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(24, 3),
    )


def data(n: int = 96, batch: int = 16, shuffle: bool = True, labels: torch.Tensor | None = None) -> ArrayLoader:
    """Three classes told apart by their brightness in one corner."""
    generator = torch.Generator().manual_seed(1)
    y = torch.arange(n) % 3
    images = torch.randn(n, 1, 6, 6, generator=generator)
    images[:, :, :3, :3] += 2.0 * (y.float() - 1)[:, None, None, None]
    return ArrayLoader(images, y if labels is None else labels, batch, shuffle=shuffle)


def driver(recipe=None, loader=None, validation=None, progress=None, net=None) -> Driver:
    recipe = CompressionRecipe(**{**QUICK, **(recipe or {})})
    loader = data() if loader is None else loader
    model = BayesianNetwork(network() if net is None else net, num_data=len(loader.dataset))
    guide = SpikeGMMGuide(
        model,
        recipe.num_components,
        recipe.windows.build(),
        temperature=recipe.temperature,
        estimator=recipe.estimator,
        refresh_every=recipe.refresh_every,
        stage="dense",
    )
    torch.manual_seed(7)
    return Driver(model, guide, recipe, loader, validation, progress)


def nonzeros(guide: SpikeGMMGuide) -> int:
    return sum(tensor.nonzeros for tensor in guide.harden().values())


def everything(d: Driver) -> dict[str, torch.Tensor]:
    return {**d.model.state_dict(prefix="model."), **d.guide.state_dict(prefix="guide.")}


class TestSchedule:
    def test_stages_in_order_and_the_exact_count_at_the_end(self):
        d = driver()
        history = d.run()
        stages = [record.stage for record in history]
        assert sorted(set(stages), key=stages.index) == ["dense", "coded", "frozen"]
        assert stages == sorted(stages, key=["dense", "coded", "frozen"].index)
        assert history[-1].step == history[-1].total_steps == 24
        total = 6 * 9 + 72
        assert nonzeros(d.guide) == round(0.3 * total)
        assert history[-1].nonzero_rate == round(0.3 * total) / total
        rates = [record.nonzero_rate for record in history]
        assert rates == sorted(rates, reverse=True) and rates[0] == 1

    @pytest.mark.parametrize("rate", [0.013, 0.5, 1.0])
    @pytest.mark.parametrize("scope", ["global", "layer"])
    def test_count_is_exact_for_other_rates(self, rate, scope):
        d = driver({"nonzero_rate": rate, "pruning": {"scope": scope}, "epochs": 2})
        d.run()
        sizes = [54, 72]
        expected = round(rate * sum(sizes)) if scope == "global" else sum(round(rate * n) for n in sizes)
        assert nonzeros(d.guide) == expected

    @pytest.mark.parametrize(
        ("saliency", "pruning", "scope"),
        [
            (saliency, pruning, ("global", "layer")[(i + j) % 2])
            for i, saliency in enumerate(["gate", "magnitude", "activation"])
            for j, pruning in enumerate([{}, {"start": 0.7, "end": 0.8}, {"start": 0.0, "end": 1.0}])
        ],
    )
    def test_count_is_exact_when_gates_close_by_themselves(self, scope, pruning, saliency):
        closing = {
            "kl_weight": 1.0,
            "gate_learning_rate": 1.0,
            "freeze_start": 1.0 if pruning.get("end") == 1.0 else 0.8,
            "pruning": {"every": 2, "scope": scope, "saliency": saliency, **pruning},
        }
        rates = []
        d = driver(closing, progress=lambda record: rates.append(record.nonzero_rate))
        d.run()
        assert nonzeros(d.guide) == (round(0.3 * 126) if scope == "global" else round(0.3 * 54) + round(0.3 * 72))
        if pruning:
            assert min(rates) < 0.3  # they did close, before the masks were final

    @pytest.mark.parametrize(
        "recipe",
        [
            {"epochs": 1},
            {"pruning": {"start": 0.0, "end": 1.0}, "freeze_start": 1.0},
            {"pruning": {"start": 0.4, "end": 0.5}},
            {"coding_start": 0.0, "freeze_start": 0.5, "pruning": {"end": 0.5}},
            {"coding_start": 0.95, "freeze_start": 1.0},
        ],
    )
    @pytest.mark.parametrize("batch", [16, 96])  # 96: one step an epoch
    def test_count_is_exact_however_the_stages_lie(self, recipe, batch):
        d = driver(recipe, data(batch=batch))
        d.run()
        assert d.guide.stage == "frozen"
        assert nonzeros(d.guide) == round(0.3 * 126)

    def test_learning_rate_and_temperature(self):
        d = driver({"epochs": 50, "temperature": 1.0, "final_temperature": 0.01})
        assert d.total_steps == 300
        rates = [d.learning_rate(step) for step in range(301)]
        assert rates[5] == rates[6] == 1.0 and rates[:6] == pytest.approx([(i + 1) / 6 for i in range(6)])
        assert rates[153] == pytest.approx(0.5) and rates[300] == pytest.approx(0, abs=1e-12)
        taus = [d.temperature(step) for step in range(300)]
        assert taus[: d.coding_step + 1] == [1.0] * (d.coding_step + 1)
        assert taus[d.freeze_step :] == pytest.approx([0.01] * (300 - d.freeze_step))
        middle = (d.coding_step + d.freeze_step) // 2
        assert math.log(taus[middle]) == pytest.approx(math.log(0.01) / 2, rel=0.02)  # geometric

    def test_frozen_stage_keeps_codes_latents_and_gates(self):
        seen = []

        def progress(record):
            if record.stage == "frozen":
                sites = d.guide.site_guides().values()
                seen.append(
                    [(s.codes.clone(), s.latent.detach().clone(), s.gates().detach().clone()) for s in sites]
                )

        d = driver({"epochs": 8}, progress=progress)
        d.run()
        assert len(seen) > 1
        first = seen[0]
        for later in seen[1:]:
            for before, after in zip(first, later, strict=True):
                assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))

    def test_training_draw_at_the_end_is_what_is_shipped(self):
        d = driver()
        d.run()
        d.guide.train()
        hard = d.guide.harden(torch.float32)
        assert all(torch.equal(value.detach(), hard[name].dense()) for name, value in d.guide().items())

    @pytest.mark.parametrize("estimator", ["straight_through", "soft", "concrete"])
    @pytest.mark.parametrize("windows", ["per_weight", "equal_mass", "outlier_aware"])
    def test_every_estimator_with_every_window(self, estimator, windows):
        d = driver({"estimator": estimator, "windows": {"kind": windows, "count": 8}, "epochs": 2})
        history = d.run()
        assert all(math.isfinite(record.loss) for record in history)
        assert nonzeros(d.guide) == round(0.3 * 126)

    @pytest.mark.parametrize("kl", ["jensen", "dominant", "monte_carlo"])
    def test_every_kl(self, kl):
        history = driver({"kl": kl, "epochs": 2, "gate_learning_rate": 1e-3, "precision": "bfloat16"}).run()
        assert all(math.isfinite(record.kl) and record.kl > 0 for record in history)

    def test_it_learns(self):
        untrained = network()
        d = driver({"epochs": 10, "learning_rate": 0.1}, validation=data(300, 100, shuffle=False), net=untrained)
        history = d.run()
        accuracies = [record.score for record in history if record.score is not None]
        assert accuracies[-1] > 0.9 > accuracies[0]
        assert history[-1].nll < history[0].nll


class TestRecords:
    def test_looking_does_not_change_training(self):
        """Validation hardens the guide at each epoch; its cached codes must not be renewed by that."""
        recipe = {
            "epochs": 3,
            "refresh_every": 100,
            "num_components": 16,
            "nonzero_rate": 1.0,
            "learning_rate": 0.2,
        }
        looked = driver(recipe, validation=data(30, 30))
        assert looked.run()[-1].score is not None
        alone = driver(recipe)
        alone.run()
        state = everything(alone)
        assert all(torch.equal(value, state[name]) for name, value in everything(looked).items())

    def test_validation_score_every_so_many_epochs(self):
        d = driver({"evaluate_every": 2}, validation=data(30, 30, shuffle=False))
        measured = {r.step: r.score for r in d.run() if r.score is not None}
        assert list(measured) == [12, 24]
        assert all(0 <= a <= 1 for a in measured.values())

    def test_without_validation_there_is_no_score(self):
        assert all(record.score is None for record in driver().run())

    def test_progress_gets_every_record_of_the_history(self):
        seen = []
        assert driver(progress=seen.append).run() == seen
        assert seen[0].step == 1 and seen[-1].step == 24

    def test_loss_is_nll_plus_weighted_kl(self):
        d = driver({"kl_weight": 0.3})
        for record in d.run():
            assert record.loss == pytest.approx(record.nll + 0.3 * record.kl)

    def test_parameter_store_is_left_alone(self):
        pyro.param("mine", torch.tensor(1.0))
        driver().run()
        assert list(pyro.get_param_store()) == ["mine"]


class Interrupt:
    """Ctrl-C at one step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def __call__(self, record) -> None:
        if record.step == self.step:
            raise KeyboardInterrupt


def struck(net: nn.Module, step: int, times: int = 1) -> nn.Module:
    """The same network, in whose forward pass Ctrl-C is pressed at one training step."""
    calls = 0

    def press(module, inputs, output):
        nonlocal calls
        calls += module.training
        if module.training and calls == step:
            for _ in range(times):
                signal.raise_signal(signal.SIGINT)

    net[0].register_forward_hook(press)
    return net


class TestDeferredInterrupt:
    def test_it_takes_effect_at_the_end(self):
        finished = False
        with pytest.raises(KeyboardInterrupt), deferred_interrupt():
            signal.raise_signal(signal.SIGINT)
            finished = True
        assert finished

    def test_the_handler_that_was_there_decides(self):
        seen = []
        before = signal.signal(signal.SIGINT, lambda number, frame: seen.append(number))
        try:
            with deferred_interrupt():
                signal.raise_signal(signal.SIGINT)
                assert not seen
            assert seen == [signal.SIGINT]
        finally:
            signal.signal(signal.SIGINT, before)

    def test_an_error_in_the_body_comes_first(self):
        with pytest.raises(ZeroDivisionError), deferred_interrupt():
            signal.raise_signal(signal.SIGINT)
            raise ZeroDivisionError
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler

    def test_other_threads_do_nothing(self):
        ran = []

        def work():
            with deferred_interrupt():
                ran.append(signal.getsignal(signal.SIGINT) is signal.default_int_handler)

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        assert ran == [True]


@pytest.fixture(scope="module")
def whole():
    """State and history of a run that nothing interrupted."""
    d = driver(validation=data(30, 30, shuffle=False))
    history = d.run()
    return everything(d), history


class TestPatience:
    """Ten epochs of six steps, frozen after the fourth; validation says what it is told to."""

    recipe: ClassVar = {
        "epochs": 10,
        "coding_start": 0.2,
        "freeze_start": 0.4,
        "pruning": {"every": 2, "end": 0.4},
        "patience": 2,
    }
    # The highest is of a network that still becomes smaller; the last is as good as the best, and no better.
    scores: ClassVar = {6: 0.2, 12: 0.3, 18: 0.8, 24: 0.9, 30: 0.5, 36: 0.7, 42: 0.6, 48: 0.7, 54: 0.1, 60: 0.1}

    def made(self, recipe=None, **options):
        d = driver({**self.recipe, **(recipe or {})}, validation=data(6, 6, shuffle=False), **options)
        d.judge = lambda net, validation: self.scores[d.step]
        return d

    def test_it_stops_and_keeps_the_best_of_frozen_codes(self):
        states = {}
        d = self.made(progress=lambda record: states.update({record.step: copy.deepcopy(everything(d))}))
        history = d.run()
        assert (d.kept.best, d.kept.last, d.kept.planned) == (36, 48, 60) and history[-1].step == 48
        state = everything(d)
        assert all(torch.equal(value, states[36][name]) for name, value in state.items())
        assert any(not torch.equal(value, states[48][name]) for name, value in state.items())

    def test_with_more_patience_it_keeps_the_best_at_the_end(self):
        d = self.made({"patience": 5})
        d.run()
        assert (d.kept.best, d.kept.last) == (36, 60)

    def test_without_patience_nothing_is_kept_but_the_end(self):
        recipe = {**self.recipe, "epochs": 3}
        d, judged = self.made({**recipe, "patience": None}), driver(recipe)
        d.run(), judged.run()
        assert d.kept is None and judged.kept is None  # the second has nothing to judge by

    @pytest.fixture(scope="class")
    @classmethod
    def patient(cls):
        d = cls().made()
        d.run()
        return d, everything(d)

    @pytest.mark.parametrize("step", [24, 36, 40, 42, 48])
    def test_resumed_equals_uninterrupted(self, patient, step, tmp_path):
        whole, state = patient
        with pytest.raises(KeyboardInterrupt):
            self.made(progress=Interrupt(step)).run(tmp_path / "c.pt")
        for _ in range(2):  # the second time it is finished
            resumed = self.made()
            assert resumed.run(tmp_path / "c.pt") == whole.history and resumed.kept == whole.kept
            for name, value in everything(resumed).items():
                assert torch.equal(value, state[name]), name

    def test_kept_states_of_before_have_no_such_key(self):
        assert "patience" not in CompressionRecipe().model_dump()
        assert CompressionRecipe(patience=3).model_dump()["patience"] == 3

    def test_patience_without_an_evaluation_to_wait_for_is_refused(self):
        with pytest.raises(ValueError, match=r"none of 4 epochs is evaluated after freeze_start \(0\.8\)"):
            CompressionRecipe(epochs=4, evaluate_every=3, patience=1)
        with pytest.raises(RecipeError, match=r"'compression\.patience' needs validation data"):
            compress(network(), data(), {**QUICK, "patience": 1})

    def test_what_is_compressed_is_the_best(self):
        recipe = {**QUICK, **self.recipe, "batch_norm_batches": 0}
        seen = []

        def judge(net, validation):
            seen.append(copy.deepcopy(net.state_dict()))
            return 1 / len(seen)  # each one is worse than that before

        result = compress(network(), data(), recipe, validation=data(6, 6, shuffle=False), judge=judge)
        assert (result.kept.best, result.kept.last) == (30, 42)
        # Tried, then judged after each of seven epochs, and at the end the best of them again.
        assert len(seen) == 9 and result.history[-1].score == 1 / 9
        assert all(torch.equal(value, seen[-1][name]) for name, value in result.hard.state_dict().items())
        assert all(torch.equal(value, seen[5][name]) for name, value in result.hard.state_dict().items())


class TestResumption:
    # 24 steps; looks at 1-3, 6, 10, 12, 18, 20, 24: dense, first coded step, mid-epoch, at an epoch's end, frozen
    @pytest.mark.parametrize("step", [1, 3, 10, 12, 18, 20, 24])
    def test_interrupted_equals_uninterrupted_bit_for_bit(self, whole, step, tmp_path):
        checkpoint = tmp_path / "run" / "checkpoint.pt"
        validation = data(30, 30, shuffle=False)
        with pytest.raises(KeyboardInterrupt):
            driver(validation=validation, progress=Interrupt(step)).run(checkpoint)
        assert [path.name for path in checkpoint.parent.iterdir()] == ["checkpoint.pt"]
        torch.manual_seed(123)
        resumed = driver(validation=validation)
        torch.rand(5)  # another state of the random numbers
        history = resumed.run(checkpoint)
        state, expected = everything(resumed), whole[0]
        assert state.keys() == expected.keys()
        for name, value in state.items():
            assert torch.equal(value, expected[name]), name
        assert history == whole[1]

    @pytest.fixture(scope="class")
    @classmethod
    def of_activations(cls):
        d = driver({"pruning": {"every": 2, "saliency": "activation"}})
        d.run()
        return d, everything(d)

    @pytest.mark.parametrize("step", [1, 6, 18])
    def test_saliency_of_activations_remembers_its_inputs(self, of_activations, step, tmp_path):
        whole, state = of_activations
        recipe = {"pruning": {"every": 2, "saliency": "activation"}}
        checkpoint = tmp_path / "checkpoint.pt"
        with pytest.raises(KeyboardInterrupt):
            driver(recipe, progress=Interrupt(step)).run(checkpoint)
        resumed = driver(recipe)
        assert resumed.run(checkpoint) == whole.history
        for name, value in everything(resumed).items():
            assert torch.equal(value, state[name]), name

    @pytest.mark.parametrize("step", [1, 5, 13, 22])
    def test_ctrl_c_in_the_middle_of_a_step(self, whole, step, tmp_path):
        checkpoint, validation = tmp_path / "checkpoint.pt", data(30, 30, shuffle=False)
        interrupted = driver(validation=validation, net=struck(network(), step))
        with pytest.raises(KeyboardInterrupt):
            interrupted.run(checkpoint)
        assert interrupted.step == step
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        resumed = driver(validation=validation)
        history = resumed.run(checkpoint)
        assert all(torch.equal(value, whole[0][name]) for name, value in everything(resumed).items())
        assert history == whole[1]

    def test_a_second_ctrl_c_leaves_the_last_epochs_checkpoint(self, whole, tmp_path):
        checkpoint, validation = tmp_path / "checkpoint.pt", data(30, 30, shuffle=False)
        interrupted = driver(validation=validation, net=struck(network(), 9, times=2))
        with pytest.raises(KeyboardInterrupt):
            interrupted.run(checkpoint)
        assert interrupted.step == 8  # the ninth was not finished
        assert torch.load(checkpoint, weights_only=True)["step"] == 6
        resumed = driver(validation=validation)
        resumed.run(checkpoint)
        assert all(torch.equal(value, whole[0][name]) for name, value in everything(resumed).items())

    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
    def test_on_a_gpu_dropout_goes_on_where_it_was(self, tmp_path):
        def losses(d, *arguments):
            return [record.loss for record in d.run(*arguments)]

        expected = losses(driver(net=network().cuda()))
        with pytest.raises(KeyboardInterrupt):
            driver(net=network().cuda(), progress=Interrupt(10)).run(tmp_path / "c.pt")
        torch.cuda.manual_seed(5)
        assert losses(driver(net=network().cuda()), tmp_path / "c.pt") == pytest.approx(expected, rel=1e-3)

    def test_seconds_count_every_part(self, tmp_path):
        first = driver(progress=Interrupt(10))
        with pytest.raises(KeyboardInterrupt):
            first.run(tmp_path / "c.pt")
        state = torch.load(tmp_path / "c.pt", weights_only=True)
        assert state["seconds"] > 0
        write_checkpoint(tmp_path / "c.pt", {**state, "seconds": 1000.0})
        second = driver(progress=Interrupt(18))
        with pytest.raises(KeyboardInterrupt):
            second.run(tmp_path / "c.pt")
        assert 1000 < torch.load(tmp_path / "c.pt", weights_only=True)["seconds"] < 1100
        third = driver()
        third.run(tmp_path / "c.pt")
        assert 1000 < third.earlier_seconds < 1100

    def test_twice_interrupted(self, whole, tmp_path):
        checkpoint, validation = tmp_path / "checkpoint.pt", data(30, 30, shuffle=False)
        for step in (6, 18):
            with pytest.raises(KeyboardInterrupt):
                driver(validation=validation, progress=Interrupt(step)).run(checkpoint)
        resumed = driver(validation=validation)
        resumed.run(checkpoint)
        assert all(torch.equal(value, whole[0][name]) for name, value in everything(resumed).items())

    def test_a_finished_checkpoint_takes_no_more_steps(self, whole, tmp_path):
        checkpoint = tmp_path / "checkpoint.pt"
        first, loader = driver(validation=data(30, 30, shuffle=False)), data()
        first.run(checkpoint)
        again = driver(validation=data(30, 30, shuffle=False), loader=loader)
        assert again.run(checkpoint) == first.history
        assert all(torch.equal(value, whole[0][name]) for name, value in everything(again).items())
        assert loader.epoch == first.train.epoch  # what comes next, batch-norm statistics, sees the same order

    def test_a_failed_step_leaves_the_last_epochs_checkpoint(self, tmp_path):
        checkpoint = tmp_path / "checkpoint.pt"

        def progress(record):
            if record.step == 10:
                raise RuntimeError("power cut")

        with pytest.raises(RuntimeError, match="power cut"):
            driver(progress=progress).run(checkpoint)
        assert read_checkpoint(checkpoint)["step"] == 6

    def test_another_recipe(self, tmp_path):
        driver({"epochs": 1}).run(tmp_path / "c.pt")
        with pytest.raises(SQSError, match=r"was made with another recipe \(nonzero_rate: .* -> 0.4\)"):
            driver({"epochs": 1, "nonzero_rate": 0.4}).run(tmp_path / "c.pt")

    def test_another_network(self, tmp_path):
        driver({"epochs": 1}).run(tmp_path / "c.pt")
        other = nn.Sequential(nn.Flatten(), nn.Linear(36, 3))
        with pytest.raises(NetworkError, match="was made of another network"):
            driver({"epochs": 1}, net=other).run(tmp_path / "c.pt")

    @pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04 cut"])
    def test_a_damaged_checkpoint(self, tmp_path, content):
        (tmp_path / "c.pt").write_bytes(content)
        with pytest.raises(NetworkError, match=r"c.pt' cannot be read .*: delete it to start again"):
            driver().run(tmp_path / "c.pt")


class TestBadInput:
    def batches(self, x, y):
        """A loader of plain lists: nothing checks what is in it."""

        class Loader(list):
            dataset = range(sum(len(labels) for labels in y))

        return Loader(zip(x, y, strict=True))

    def good(self):
        x, y = (list(part) for part in zip(*data(shuffle=False), strict=True))
        return x, y

    @pytest.mark.parametrize("bad", [float("nan"), float("inf")])
    def test_values_that_are_not_finite(self, bad):
        x, y = self.good()
        x[2][0, 0, 0, :2] = bad
        d = driver(loader=self.batches(x, y), net=network().eval())
        with pytest.raises(DataError, match=r"minibatch 3 holds 2 values of 576 that are NaN or infinite: clean"):
            d.run()

    @pytest.mark.parametrize(
        ("label", "range_"), [(3, "from 0 to 3"), (-1, "from -1 to 2"), (255, "from 0 to 255")]
    )
    @pytest.mark.parametrize("validation", [True, False])
    def test_labels_out_of_range(self, label, range_, validation):
        x, y = self.good()
        y[1] = y[1].clone()
        y[1][4] = label
        pyro.enable_validation(validation)  # python -O switches it off
        with pytest.raises(DataError, match=rf"labels in minibatch \d run {range_}, but .* has 3 classes"):
            driver(loader=self.batches(x, y)).run()

    def test_a_loader_that_is_shorter_than_it_says(self):
        class Short(list):
            dataset = range(96)

            def __len__(self):
                return 6

        loader = Short(list(data(shuffle=False))[:4])
        with pytest.raises(DataError, match=r"ended after 4 of 6 minibatches in epoch 1: its length must be"):
            driver(loader=loader).run()

    def test_a_learning_rate_that_is_too_high(self):
        with pytest.raises(DivergenceError, match=r"not finite at step \d+ of .*: lower learning_rate \(10.0\)"):
            driver({"learning_rate": 10.0, "momentum": 0.99, "kl_weight": 1000.0, "epochs": 40}).run()

    def test_a_programming_error_of_the_user_is_not_explained_away(self):
        class Broken(nn.Linear):
            def forward(self, x):
                raise KeyError("my own mistake")

        with pytest.raises(KeyError, match="my own mistake"):
            driver(net=nn.Sequential(nn.Flatten(), Broken(36, 3))).run()

    @pytest.mark.parametrize("kind", [ValueError, IndexError, RuntimeError])
    @pytest.mark.parametrize("label", [2, 7])
    def test_nor_is_one_that_could_be_mistaken_for_bad_labels(self, kind, label):
        mine = kind("my own index is out of bounds")

        class Broken(nn.Linear):
            def forward(self, x):
                raise mine

        x, y = self.good()
        loader = self.batches(x, [torch.full_like(labels, label) for labels in y])
        with pytest.raises(kind) as raised:
            driver(loader=loader, net=nn.Sequential(nn.Flatten(), Broken(36, 3))).run()
        assert mine in (raised.value, raised.value.__cause__)  # Pyro adds shapes to some
        assert type(raised.value) is kind and str(raised.value).startswith(str(mine))

    def test_integers_that_are_no_labels_are_not_called_so(self):
        def shapes_that_do_not_fit(output):
            return torch.distributions.Poisson(output.exp()).expand((7, 7))

        d = driver()
        d.model.likelihood = shapes_that_do_not_fit
        with pytest.raises(RuntimeError, match="expand"):
            d.run()

    @pytest.mark.parametrize(
        ("recipe", "sentence"),
        [
            ({"freeze_start": 0.4}, r"freeze_start \(0.4\) after coding_start \(0.5\)"),
            ({"pruning": {"start": 0.5, "end": 0.4}}, r"end \(0.4\) is after its start \(0.5\)"),
            ({"pruning": {"end": 0.9}}, r"pruning.end \(0.9\) not after freeze_start \(0.8\)"),
        ],
    )
    def test_stages_out_of_order(self, recipe, sentence):
        from sqs_pyro.recipes import parse

        with pytest.raises(RecipeError, match=sentence):
            parse(CompressionRecipe, recipe, "compression")


def test_the_models_network_keeps_its_compressed_weights():
    net = network()
    before = copy.deepcopy(net.state_dict())
    driver(net=net).run()
    assert all(torch.equal(net.state_dict()[name], before[name]) for name in ("0.weight", "6.weight"))
    assert not torch.equal(net.state_dict()["6.bias"], before["6.bias"])  # leftovers are learned in place


@pytest.mark.parametrize(
    ("labels", "expected"), [("pixels", 16.0), ("ignored", 12.0), ("one hot", 16.0), ("one", 1.0)]
)
def test_a_step_does_not_grow_with_the_labels_of_an_example(labels, expected):
    y = torch.randint(3, (20, 4, 4), generator=torch.Generator().manual_seed(0))
    if labels == "ignored":
        y[:, 0] = -100
    if labels == "one hot":
        y = F.one_hot(y, 3).movedim(-1, 1)
    if labels == "one":
        y = y[:, 0, 0]
    net = nn.Sequential(nn.Conv2d(1, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 3, 3, padding=1))
    net = nn.Sequential(net, nn.Flatten(), nn.Linear(48, 3)) if labels == "one" else net
    loader = DataLoader(TensorDataset(torch.randn(20, 1, 4, 4), y), 5)
    assert try_first_minibatch(net, loader, categorical).labels == expected
    if labels != "one":
        # As many pixels again, the same ones: learning is the same, step by step, up to rounding.
        doubled = DataLoader(TensorDataset(*(torch.cat([each, each], -1) for each in loader.dataset.tensors)), 5)
        recipe = {"epochs": 2, "num_components": 4, "nonzero_rate": 0.9, "kl_weight": 0, "learning_rate": 0.1}
        narrow = nn.Sequential(nn.Conv2d(1, 6, 1), nn.ReLU(), nn.Conv2d(6, 3, 1))  # no pixel sees its neighbours
        losses = [[record.nll for record in compress(narrow, each, recipe).history] for each in (loader, doubled)]
        assert losses[1] == pytest.approx([2 * nll for nll in losses[0]], rel=1e-3)
