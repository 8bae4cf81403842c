"""Hugging Face directories of classifiers of images: read as transformers does, rebuilt from a file alone."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from kits.tiny_transformers import code_matrices, tiny
from safetensors.torch import load_file, save_file

import sqs_pyro
from sqs_pyro.errors import NetworkError, PackedFileError, RecipeError, SQSError
from sqs_pyro.integrations.image_directory import (
    check_class_order,
    image_network,
    is_directory,
    is_of_images,
    preprocessing,
    weights_digest,
)
from sqs_pyro.kernels import packed_network
from sqs_pyro.networks.calling import predictions
from sqs_pyro.networks.registry import build_network

transformers = pytest.importorskip("transformers")

CLASSES = 3
_BLOCKS = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
_STAGES = {"hidden_sizes": [8, 16], "depths": [1, 1]}
CONFIGS = {
    "vit": ("ViTConfig", {**_BLOCKS, "image_size": 32, "patch_size": 8}),
    "resnet": ("ResNetConfig", {**_STAGES, "embedding_size": 8, "layer_type": "basic"}),
    "convnext": ("ConvNextConfig", {**_STAGES, "num_stages": 2}),
    "mobilenet_v2": ("MobileNetV2Config", {"depth_multiplier": 0.25, "image_size": 32}),
    "swin": ("SwinConfig", {"embed_dim": 8, "depths": [1], "num_heads": [2], "image_size": 32, "window_size": 4}),
}
X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def made(kind):
    name, options = CONFIGS[kind]
    torch.manual_seed(0)
    config = getattr(transformers, name)(num_labels=CLASSES, initializer_range=0.2, **options)
    return transformers.AutoModelForImageClassification.from_config(config).eval()


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    root = tmp_path_factory.mktemp("hub")
    for kind in CONFIGS:
        made(kind).save_pretrained(root / kind)
    return root


@pytest.fixture
def vit(directories, tmp_path):
    """A directory to break."""
    return Path(shutil.copytree(directories / "vit", tmp_path / "vit"))


def change(directory, **values):
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize("kind", CONFIGS)
@torch.no_grad()
def test_read_as_transformers_does_and_rebuilt_without_the_directory(kind, directories, tmp_path):
    directory = Path(shutil.copytree(directories / kind, tmp_path / kind))
    net = image_network(str(directory), complete=True)
    expected = transformers.AutoModelForImageClassification.from_pretrained(directory)
    assert type(net) is type(expected)
    torch.testing.assert_close(predictions(net, X), expected(X).logits)

    packed = packed_network(net, code_matrices(net))
    sqs_pyro.save(packed, tmp_path / "packed.safetensors")
    shutil.rmtree(directory)
    loaded = sqs_pyro.load(tmp_path / "packed.safetensors")
    assert torch.equal(predictions(loaded, X), predictions(packed, X))
    assert (loaded.config.id2label, loaded.config.label2id) == (net.config.id2label, net.config.label2id)


def test_a_new_head_where_it_is_said(vit):
    def built():
        torch.manual_seed(3)
        return image_network(str(vit), {"num_classes": 5}).state_dict()

    kept, state, again = made("vit").state_dict(), built(), built()
    assert state["classifier.weight"].shape == (5, 16)
    assert all(torch.equal(state[name], again[name]) for name in state)
    assert all(torch.equal(state[name], kept[name]) for name in state if not name.startswith("classifier."))
    # The number that it has already is no new head.
    assert torch.equal(
        image_network(str(vit), {"num_classes": 3}, complete=True).classifier.weight, kept["classifier.weight"]
    )


def test_a_base_model_gets_a_head_where_it_is_said(vit):
    made("vit").vit.save_pretrained(vit)
    with pytest.raises(NetworkError, match=r"lacks 2 weights .*'classifier.bias' first: say how many classes"):
        image_network(str(vit))
    net = image_network(str(vit), {"num_classes": 4})
    assert torch.equal(net.vit.embeddings.cls_token, made("vit").vit.embeddings.cls_token)


def test_a_configuration_alone_is_a_network_without_weights(vit):
    (vit / "model.safetensors").unlink()
    assert image_network(str(vit)).classifier.weight.shape == (CLASSES, 16)
    with pytest.raises(NetworkError, match=r"has no weights .*: add them, or train it first"):
        image_network(str(vit), complete=True)


def test_what_names_a_directory(directories, tmp_path):
    assert is_directory(str(directories / "vit")) and is_directory(str(tmp_path))
    assert not is_directory("resnet18") and not is_directory("torchvision/vgg11")
    assert is_of_images(directories / "vit")
    tiny("llama").config.save_pretrained(tmp_path)
    assert not is_of_images(tmp_path)


def test_digests_tell_weights_apart(vit):
    before = weights_digest(vit)
    assert weights_digest(vit) == before
    state = load_file(vit / "model.safetensors")
    state["classifier.bias"][0] += 1
    save_file(state, vit / "model.safetensors", {"format": "pt"})
    assert weights_digest(vit) != before


def _lacking(directory):
    state = load_file(directory / "model.safetensors")
    del state["vit.embeddings.cls_token"]
    save_file(state, directory / "model.safetensors", {"format": "pt"})


def _not_finite(directory):
    state = load_file(directory / "model.safetensors")
    state["classifier.bias"][0] = torch.nan
    save_file(state, directory / "model.safetensors", {"format": "pt"})


def _damaged(directory):
    (directory / "model.safetensors").write_bytes(b"none")


def _wants(**values):
    return lambda directory: change(directory, **values)


@pytest.mark.parametrize(
    ("breaks", "options", "sentence"),
    [
        (None, {"width": 2}, "has no option 'width': .* num_classes alone can be given"),
        (None, {"num_classes": True}, "num_classes of network .* is True, but should be a number from 1"),
        (_lacking, {"num_classes": 9}, r"lacks 3 weights .*'vit.embeddings.cls_token' first: give a complete"),
        (_not_finite, {}, "values of 'classifier.bias' that are not finite"),
        (_damaged, {}, r"cannot be loaded \(.*\): complete the directory"),
        (_wants(hidden_size=18), {}, r"lacks \d+ weights .* or has them in another shape"),
        (_wants(hidden_size="many"), {}, r"cannot be loaded \(.*\): complete the directory"),
        (_wants(num_hidden_layers=10**6), {}, "more than 20000 parts is described"),
        (_wants(quantization_config={"quant_method": "sqs"}), {}, "are packed already: give a network in"),
        (_wants(quantization_config={"quant_method": "gptq"}), {}, "are quantized already: give a network in"),
        (_wants(model_type="bert"), {}, "of model_type 'bert', which is no classifier of images"),
        (_wants(model_type=["vit"]), {}, r"of model_type \['vit'\], which is no classifier of images"),
        (_wants(model_type="timm_wrapper", architecture="hf-hub:a/b"), {}, "says 'architecture': .* timm/NAME"),
        (lambda directory: (directory / "config.json").unlink(), {}, "has no config.json: give the Hugging Face"),
    ],
)
def test_what_is_refused(breaks, options, sentence, vit):
    if breaks is not None:
        breaks(vit)
    with pytest.raises(SQSError, match=sentence) as refused:
        image_network(str(vit), options)
    assert "\n" not in str(refused.value)


def test_who_keeps_the_weights_gets_no_new_head(vit):
    with pytest.raises(NetworkError, match=r"The head of .* is new, 'classifier.bias' say: train it first"):
        image_network(str(vit), {"num_classes": 9}, complete=True)


def test_classes_in_another_order(vit):
    change(vit, id2label={"0": "dog", "1": "cat", "2": "cow"}, label2id={"dog": 0, "cat": 1, "cow": 2})
    net = image_network(str(vit))
    with pytest.raises(NetworkError, match="Class 'cat' is number 0 in the data, but 1 in"):
        check_class_order(str(vit), net, ["cat", "cow", "dog"])
    for names in (["dog", "cat", "cow"], ["a", "b", "c"], []):  # of other names nothing can be told
        check_class_order(str(vit), net, names)


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (None, {"image_size": 32}),
        ({"size": {"height": 48, "width": 48}}, {"image_size": 48}),
        ({"size": 256, "crop_size": {"height": 40}, "do_center_crop": True}, {"image_size": 40}),
        ({"size": {"shortest_edge": 20}, "crop_size": 16}, {"image_size": 20}),
        ({"image_mean": [0.5] * 3, "image_std": [0.2] * 3}, {"mean": [0.5] * 3, "std": [0.2] * 3}),
        ({"do_normalize": False, "image_mean": [0.5] * 3}, {"mean": [0.0], "std": [1.0]}),
    ],
)
def test_how_its_images_are_prepared(said, expected, vit):
    if said is not None:
        (vit / "preprocessor_config.json").write_text(json.dumps(said))
    assert preprocessing(vit) == {"image_size": 32, **expected}


def test_a_file_reads_no_directory_and_asks_no_hub(vit, tmp_path):
    net = image_network(str(vit))
    file = tmp_path / "packed.safetensors"
    config = net.network_spec["options"]["config"]
    timm = {"model_type": "timm_wrapper", "architecture": "hf-hub:somebody/something"}
    for spec, error, sentence in (
        ({"name": str(vit), "options": {}}, RecipeError, "is unknown: allowed networks"),
        ({"options": {"task": "image_classification", "config": timm}}, NetworkError, "might fetch it"),
        ({"options": {"task": "embedding", "config": {**config, "x": {"backbone": "y"}}}}, NetworkError, "fetch"),
        ({"options": {"task": "image_classification", "config": {"id2label": 3}}}, SQSError, "cannot build"),
    ):
        net.network_spec = {"name": "transformers_network", **spec}
        sqs_pyro.save(packed_network(net, code_matrices(net)), file)
        with pytest.raises((error, PackedFileError), match=sentence):
            sqs_pyro.load(file)
    with pytest.raises(RecipeError, match="is unknown"):
        build_network(str(vit))
