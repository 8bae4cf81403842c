"""Contract kit: any kind of runs inherits these tests by its name, and says what its smallest run is.

What a run measured is what its file gives, and the file's network is the recipe's; doing a run again, after an
interruption and over a finished one, ends in the same bytes; and what a kind cannot do it says in one sentence.
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import pytest
import torch
import yaml
from torch import nn

from sqs_pyro import load
from sqs_pyro.bench.networks import bench_networks
from sqs_pyro.errors import OutputError, RecipeError
from sqs_pyro.networks.calling import call_arguments, predictions, tensors_in
from sqs_pyro.runs.directory import CHECKPOINT, METRICS, PACKED
from sqs_pyro.runs.files import evaluate_file, file_network, opened
from sqs_pyro.runs.kinds import RunKind, kind_of, load_any_recipe
from sqs_pyro.studies.recipe import StudyRecipe, cells


@dataclass(frozen=True)
class Again:
    """A finished run that was done again, with an interruption.

    Attributes:
        refusal: what was said without ``overwrite``.
        between: the packed file's bytes after the interruption.
        left: names beside the run after the interruption.
        seconds: of the compression until then, as the checkpoint says; None: it says them by block.
        after: the packed file's bytes at the end.
        names: of all files at the end.
        metrics: of the second run.
    """

    refusal: str
    between: bytes
    left: set[str]
    seconds: float | None
    after: bytes
    names: set[str]
    metrics: dict[str, Any]


#: A recipe, and the directory of its finished run.
Finished: TypeAlias = tuple[Any, Path]


class RunKindContract:
    """Inherit it with a fixture ``finished`` (recipe and directory of a finished run), and the attributes below.

    Attributes:
        kind: class under test.
        stage: of progress, in whose second half the second run is interrupted.
        checkpoint: from which it then goes on, in its directory.
    """

    kind: type[RunKind[Any]]
    stage = "compression"
    checkpoint = CHECKPOINT

    def constructed(self, recipe: Any) -> nn.Module:
        """The recipe's network by its own constructor, whatever its weights."""
        raise NotImplementedError

    @classmethod
    def options(cls, directory: Path) -> dict[str, Any]:
        """What the second run is called with, so that nothing is trained twice."""
        return {}

    def figures(self, document: dict[str, Any]) -> dict[str, Any]:
        """What an evaluation and the ``compressed`` of ``metrics.json`` must agree in."""
        return document

    @pytest.fixture(scope="class")
    @classmethod
    def again(cls, finished: Finished, tmp_path_factory: pytest.TempPathFactory) -> Again:
        """The finished run, refused, interrupted, and done again."""
        recipe, directory = finished
        out = tmp_path_factory.mktemp("again") / "run"
        shutil.copytree(directory, out)
        kind, options = kind_of(recipe), cls.options(directory)
        with pytest.raises(OutputError) as refused:
            kind.run(recipe, out, **options)

        def interrupt(stage: str, done: int, total: int, text: str) -> None:
            if stage == cls.stage and done > 0 and 2 * done >= total:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            kind.run(recipe, out, overwrite=True, progress=interrupt, **options)
        between, left = (out / PACKED).read_bytes(), {path.name for path in out.parent.iterdir()}
        kept = torch.load(out.with_name("run.partial") / cls.checkpoint, weights_only=True)["seconds"]
        seconds = kept if isinstance(kept, float) else None
        kind.run(recipe, out, overwrite=True, **options)
        metrics = json.loads((out / METRICS).read_text())
        names = {path.name for path in out.iterdir()}
        assert [path.name for path in out.parent.iterdir()] == ["run"]
        return Again(str(refused.value), between, left, seconds, (out / PACKED).read_bytes(), names, metrics)

    def test_its_recipe_tells_its_kind(self, finished: Finished, tmp_path: Path) -> None:
        recipe, _ = finished
        document = yaml.safe_load(recipe.as_yaml())
        assert type(kind_of(recipe)) is type(kind_of(document)) is self.kind
        (tmp_path / "recipe.yaml").write_text(recipe.as_yaml())
        assert load_any_recipe(tmp_path / "recipe.yaml") == recipe == kind_of(document).parse(document)

    def test_a_wrong_key_is_named(self, finished: Finished) -> None:
        document = finished[0].model_dump(mode="json")
        with pytest.raises(RecipeError, match=r"Recipe key 'base\.nonsense' is unknown: allowed here are"):
            kind_of(document).parse({**document, "nonsense": 1}, "base")

    def test_run_twice_it_ends_in_the_same_bytes(self, finished: Finished, again: Again) -> None:
        assert again.after == (finished[1] / PACKED).read_bytes()
        first = json.loads((finished[1] / METRICS).read_text())
        timed = {"seconds", "stage_seconds", "blocks", "vocabulary", "latency"}
        assert {k: v for k, v in first.items() if k not in timed} == {
            k: v for k, v in again.metrics.items() if k not in timed
        }

    def test_interrupted_it_goes_on(self, again: Again) -> None:
        assert again.left == {"run", "run.partial"}
        assert again.metrics["seconds"] == again.metrics["stage_seconds"]["compression"] > (again.seconds or 0)
        assert again.seconds is None or again.seconds > 0

    def test_a_finished_run_is_replaced_when_asked_at_the_end(self, finished: Finished, again: Again) -> None:
        assert "already holds a finished run: choose another output directory" in again.refusal
        assert again.between == (finished[1] / PACKED).read_bytes()
        assert again.names == {path.name for path in finished[1].iterdir()}

    def test_the_file_alone_is_evaluated_to_what_the_run_measured(self, finished: Finished) -> None:
        evaluation = evaluate_file(finished[1] / PACKED)
        measured = json.loads((finished[1] / METRICS).read_text())["compressed"]
        expected = self.figures(measured)
        found = self.figures(evaluation.get("perplexity", evaluation))
        assert expected and {key: found[key] for key in expected} == pytest.approx(expected)
        assert evaluation["size"]["file_bytes"] == (finished[1] / PACKED).stat().st_size

    @torch.no_grad()
    def test_its_network_is_that_of_the_constructor(self, finished: Finished) -> None:
        recipe, file = finished[0], finished[1] / PACKED
        found, expected = file_network(file), load(file, self.constructed(recipe))
        inputs, said = kind_of(recipe).example(found, opened(file))
        assert said and len(tensors_in(inputs)[0]) >= 2
        args, kwargs = call_arguments(inputs)
        for one, other in zip(
            tensors_in(found(*args, **kwargs)), tensors_in(expected(*args, **kwargs)), strict=True
        ):
            assert torch.equal(one, other) and bool(one.isfinite().all())

    @torch.no_grad()
    def test_it_can_be_timed(self, finished: Finished) -> None:
        (bench,) = bench_networks(str(finished[1] / PACKED), (4,), None, (5, 1))
        for shape in bench.shapes:
            assert len(predictions(bench.network, bench.inputs(shape, 2, torch.float32))) == 2

    def test_its_memory_is_planned_or_refused_in_a_sentence(self, finished: Finished) -> None:
        try:
            plan = kind_of(finished[0]).plan(finished[0])
        except RecipeError as error:
            assert "plan" in str(error) and "\n" not in str(error)
        else:
            assert plan["peak"] == max(sum(parts.values()) for parts in plan["moments"].values()) > 0

    def test_studies_take_it_or_refuse_it_in_a_sentence(self, finished: Finished) -> None:
        study = StudyRecipe(name="study", base=finished[0].model_dump(mode="json", exclude={"seed", "name"}))
        kind = kind_of(finished[0])
        if not kind.in_studies:
            with pytest.raises(RecipeError, match=f"is {kind.said}, which studies do not take: run each"):
                cells(study)
            return
        (cell,) = cells(study)
        assert cell.kind is kind and kind.made_of(cell.recipe) and kind.baseline_key(cell.recipe)
