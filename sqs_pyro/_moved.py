"""Modules that have moved still import by their old names, with a warning that says the new one."""

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import warnings
from collections.abc import Sequence
from types import ModuleType

#: Old name within the package -> new name, for modules of version 0.1.0 (two that were divided, runs.network and
#: runs.output, have no one place). To be removed in 0.3.0.
MOVED = {
    "network_io": "networks.calling",
    "weights": "networks.state",
    "registry": "networks.registry",
    "language_models": "networks.tokens",
    "models.sites": "networks.sites",
    "models.architectures": "networks.architectures",
    "models.block_stack": "networks.block_stack",
    "models.residency": "networks.residency",
    "models.digits": "networks.digits",
    "models.resnet_cifar": "networks.resnet_cifar",
    "models.resnet_torchvision": "networks.resnet_torchvision",
    "models.task_networks": "networks.task_networks",
    "recipe": "recipes",
    "inference.export": "shipping.pack",
    "inference.evaluate": "evaluation.classification",
    "inference.perplexity": "evaluation.perplexity",
    "inference.calibration": "evaluation.calibration",
    "inference.input_checks": "evaluation.input_checks",
    "inference.averaging": "evaluation.averaging",
    "inference.baseline": "compression.baseline",
    "inference.checkpoint": "compression.checkpoint",
    "inference.interruption": "compression.interruption",
    "inference.recipe": "compression.finetune.recipe",
    "inference.driver": "compression.finetune.loop",
    "inference.allocation": "compression.finetune.allocation",
    "inference.rate_distortion": "compression.finetune.rate_distortion",
    "inference.optimizers": "compression.finetune.optimizers",
    "inference.input_scales": "compression.finetune.input_scales",
    "transformer_compression": "compression.blockwise.call",
    "inference.blockwise": "compression.blockwise.blocks",
    "inference.blockwise_recipe": "compression.blockwise.recipe",
    "inference.block_store": "compression.blockwise.store",
    "inference.block_training": "compression.blockwise.training",
    "inference.laplace": "compression.blockwise.laplace",
    "inference.sequential_coding": "compression.blockwise.sequential_coding",
    "inference.bit_budget": "compression.blockwise.bit_budget",
    "inference.channel_scales": "compression.blockwise.channel_scales",
    "inference.importance": "compression.blockwise.importance",
    "memory_plan": "compression.blockwise.memory_plan",
    "checkpoint_compression": "integrations.checkpoint",
    "runs.pretrained": "integrations.pretrained",
    "runs.pretrained_recipe": "integrations.pretrained_recipe",
    "runs.bench": "bench.report",
    "runs.bench_gpu_peers": "bench.gpu_peers",
    "runs.bench_kernels": "bench.kernels",
    "runs.bench_model": "bench.model",
    "runs.bench_networks": "bench.networks",
    "runs.product_timer": "bench.product_timer",
    "runs.study": "studies.study",
    "runs.study_recipe": "studies.recipe",
    "runs.processes": "studies.processes",
    "runs.pipeline": "runs.images",
    "runs.packed_files": "runs.files",
    "data.split": "data.splits",
    "inference.kmeans": "distributions.kmeans",
    "packing.module": "packing.stored",
    "runs.averaging": "runs.posterior",
    "runs.bounds": "runs.posterior",
    "runs.language_texts": "runs.language_model_recipe",
    "runs.machine": "runs.bookkeeping",
    "runs.memory": "runs.language_model",
    "runs.pictures": "runs.measured",
    "runs.progress": "runs.bookkeeping",
    "inference.guide": "inference.guides.spike_gmm",
    "inference.site_guide": "inference.guides.site",
    "inference.guide_checks": "inference.guides.checks",
    "inference.guide_progress": "inference.guides.progress",
    "inference.inclusion_guide": "inference.guides.inclusion",
    "inference.windows": "inference.guides.windows",
}


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Find a moved module under its old name, and give the module itself: there is one of it, not two."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        package, _, name = fullname.partition(".")
        return importlib.util.spec_from_loader(fullname, self) if package == "sqs_pyro" and name in MOVED else None

    def exec_module(self, module: ModuleType) -> None:
        old = module.__name__
        new = f"sqs_pyro.{MOVED[old.partition('.')[2]]}"
        warnings.warn(f"{old} is {new} now: the old name goes with 0.3.0.", FutureWarning, stacklevel=2)
        # What an import gives is what stands in sys.modules when its loader is done.
        sys.modules[old] = importlib.import_module(new)


sys.meta_path.append(_Finder())
