"""Networks of torchvision, timm and users: built by name, and rebuilt from a packed file, unless that ran code."""

import inspect
from functools import partial

import pytest
import torch
from kits.tiny_transformers import code_matrices
from torch import nn

import sqs_pyro
from sqs_pyro.errors import PackedFileError, RecipeError
from sqs_pyro.kernels import packed_network
from sqs_pyro.networks import elsewhere
from sqs_pyro.networks.registry import INITIAL_WEIGHTS, build_network, network_options

torchvision = pytest.importorskip("torchvision")

OWN = """
from torch import nn

def line(size=3, num_classes=2):
    return nn.Sequential(nn.Linear(size, 8), nn.ReLU(), nn.Linear(8, num_classes))

def number():
    return 3
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    (tmp_path / "lines.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    return "lines.py:line"


def same_parameters(net, other):
    assert [(n, p.shape) for n, p in net.named_parameters()] == [(n, p.shape) for n, p in other.named_parameters()]


def test_torchvision_by_name_or_with_its_library():
    expected = torchvision.models.mobilenet_v3_small(num_classes=7)
    for name in ("mobilenet_v3_small", "torchvision/mobilenet_v3_small"):
        net = build_network(name, num_classes=7)
        same_parameters(net, expected)
        assert net.network_spec == {"name": "torchvision/mobilenet_v3_small", "options": {"num_classes": 7}}


def test_timm_by_name_or_with_its_library():
    timm = pytest.importorskip("timm")
    expected = timm.create_model("test_resnet", num_classes=7, in_chans=1)
    for name in ("test_resnet", "timm/test_resnet", "timm/test_resnet.r160_in1k"):
        net = build_network(name, num_classes=7, in_chans=1)
        same_parameters(net, expected)
        assert net.network_spec["name"] == (name if "/" in name else f"timm/{name}")


def test_the_registry_comes_first_then_torchvision():
    assert build_network("resnet18").network_spec["name"] == "resnet18"
    found = elsewhere.constructor_elsewhere("vgg11")  # both libraries have it
    assert found[0] == "torchvision/vgg11"


def test_a_trained_backbone_is_not_fetched_unasked():
    name, constructor = elsewhere.constructor_elsewhere("deeplabv3_resnet50")
    assert name == "torchvision/deeplabv3_resnet50"
    assert isinstance(constructor, partial) and constructor.keywords == {"weights_backbone": None}


def test_where_weights_come_from_is_not_kept(own):
    net = build_network("torchvision/mobilenet_v3_small", weights=None, num_classes=2)
    assert net.network_spec["options"] == {"num_classes": 2}
    timm_options = inspect.signature(pytest.importorskip("timm").create_model).parameters
    assert INITIAL_WEIGHTS & timm_options.keys() >= {"pretrained", "pretrained_cfg", "checkpoint_path"}


def test_options_are_known_where_a_function_says_them(own):
    assert network_options(own) == {"size": 3, "num_classes": 2}
    assert network_options("torchvision/vgg11") is None


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("torchvision/mobilenet_v3_smal", "torchvision has no network .* did you mean 'mobilenet_v3_small'"),
        ("timm/zzzzzzz", r"timm has no network 'zzzzzzz': timm's list_models\(\) has all"),
        ("lines.py:lime", "did you mean 'line'"),
        ("lines.py:number", "is a function that returns 3: let it return an nn.Module"),
        ("mobilenet_v3_smal", "is unknown: allowed networks are .*torchvision/NAME, timm/NAME, module:function"),
    ],
)
def test_what_is_refused(own, name, sentence):
    with pytest.raises(RecipeError, match=sentence):
        build_network(name)


def packed(net, path):
    sqs_pyro.save(packed_network(net, code_matrices(net), layout="entropy"), path)
    return path


@torch.no_grad()
def test_a_file_rebuilds_a_librarys_network(tmp_path):
    torch.manual_seed(0)
    net = build_network("torchvision/mobilenet_v3_small", num_classes=4).eval()
    file, x = packed(net, tmp_path / "net.safetensors"), torch.randn(2, 3, 32, 32)
    assert torch.equal(sqs_pyro.load(file)(x), sqs_pyro.load(file, net)(x))


def test_a_file_alone_never_makes_code_run(own, tmp_path):
    net = build_network(own, size=5)
    file = packed(net, tmp_path / "net.safetensors")
    (tmp_path / "lines.py").write_text("raise SystemExit('code has run')\n")
    with pytest.raises(
        PackedFileError, match=r"built by code of its user, 'lines.py:line': give load the network"
    ):
        sqs_pyro.load(file)
    assert isinstance(sqs_pyro.load(file, net), nn.Sequential)


def test_a_file_cannot_cause_a_download(tmp_path):
    net = build_network("torchvision/mobilenet_v3_small", num_classes=4)
    for option in sorted(INITIAL_WEIGHTS):
        net.network_spec = {"name": "timm/test_resnet", "options": {option: True}}
        file = packed(net, tmp_path / f"{option}.safetensors")
        with pytest.raises(PackedFileError, match="which is no name with options"):
            sqs_pyro.load(file)
