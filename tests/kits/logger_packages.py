"""Stand-ins for the packages that loggers write to: what we call of them, and what they keep, as plain Python."""

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any


class Events:
    """Of TensorBoard: scalars by directory and tag; a writer's ``purge_step`` hides what was there from it on."""

    def __init__(self) -> None:
        self.scalars: dict[str, dict[str, dict[int, float]]] = {}
        self.texts: dict[str, str] = {}
        self.open: set[str] = set()

    def module(self) -> Any:
        events = self

        class SummaryWriter:
            def __init__(self, log_dir: str, *, purge_step: int, flush_secs: int) -> None:
                self.directory = log_dir
                events.open.add(log_dir)
                curves = events.scalars.setdefault(log_dir, {})
                for tag, points in curves.items():
                    curves[tag] = {step: value for step, value in points.items() if step < purge_step}

            def add_scalar(self, tag: str, value: float, step: int) -> None:
                events.scalars[self.directory].setdefault(tag, {})[step] = value

            def add_text(self, tag: str, text: str, step: int) -> None:
                events.texts[tag] = text

            def close(self) -> None:
                events.open.discard(self.directory)

        return SimpleNamespace(SummaryWriter=SummaryWriter)


@dataclass
class Run:
    """Of MLflow or wandb: what is kept of a run."""

    name: str | None
    status: Any = "RUNNING"
    said: dict[str, Any] = field(default_factory=dict)
    metrics: list[tuple[str, float, int]] = field(default_factory=list)
    summary: dict[str, float] = field(default_factory=dict)


class Tracking:
    """Of MLflow: runs by ID, in a store each."""

    def __init__(self) -> None:
        self.stores: dict[str, dict[str, Run]] = {}
        self.experiments: list[str] = []

    def module(self) -> Any:
        tracking = self

        class MlflowClient:
            def __init__(self, tracking_uri: str) -> None:
                self.runs = tracking.stores.setdefault(tracking_uri, {})

            def get_experiment_by_name(self, name: str) -> Any:
                there = name in tracking.experiments
                return SimpleNamespace(experiment_id=str(tracking.experiments.index(name))) if there else None

            def create_experiment(self, name: str) -> str:
                tracking.experiments.append(name)
                return str(len(tracking.experiments) - 1)

            def create_run(self, experiment_id: str, run_name: str | None) -> Any:
                assert int(experiment_id) < len(tracking.experiments)
                self.runs[f"id{len(self.runs)}"] = Run(run_name)
                return SimpleNamespace(info=SimpleNamespace(run_id=f"id{len(self.runs) - 1}"))

            def update_run(self, run_id: str, status: str) -> None:
                self.runs[run_id].status = status

            set_terminated = update_run

            def log_batch(self, run_id: str, metrics: Any = (), params: Any = ()) -> None:
                assert len(metrics) <= 1000 and len(params) <= 100  # which is what MLflow takes
                self.runs[run_id].metrics += [(each.key, each.value, each.step) for each in metrics]
                self.runs[run_id].said |= {each.key: each.value for each in params}

        entities = SimpleNamespace(
            Metric=lambda key, value, timestamp, step: SimpleNamespace(key=key, value=value, step=step),
            Param=lambda key, value: SimpleNamespace(key=key, value=value),
        )
        return SimpleNamespace(MlflowClient=MlflowClient, entities=entities)


class Cloud:
    """Of wandb: runs by ID; those of an ID go on."""

    def __init__(self) -> None:
        self.runs: dict[str, Run] = {}
        self.called: list[dict[str, Any]] = []

    def module(self) -> Any:
        def init(*, id: str, name: str | None, config: dict[str, Any], **options: Any) -> Any:
            self.called.append({"id": id, **options})
            run = self.runs.setdefault(id, Run(name))
            run.status, run.said = None, config
            axes: dict[str, str] = {}

            def log(values: dict[str, float]) -> None:
                for key, value in values.items():
                    axis = axes[f"{key.partition('/')[0]}/*"]
                    if key != axis:
                        run.metrics.append((key, value, int(values[axis])))

            return SimpleNamespace(
                define_metric=lambda pattern, step_metric: axes.update({pattern: step_metric}),
                log=log,
                summary=run.summary,
                finish=lambda exit_code: setattr(run, "status", exit_code),
            )

        return SimpleNamespace(init=init, Settings=lambda **settings: settings)
