"""Plain checkpoints: the original network loads them, strictly, where there is no sqs_pyro."""

import pytest
import torch
from kits.exported import run_without_us
from kits.packed_exports import INPUTS, packed
from safetensors.torch import load_file

from sqs_pyro.errors import NetworkError
from sqs_pyro.exporting import export_dense
from sqs_pyro.kernels import packed_network

SCRIPT = """
import torch
from safetensors.torch import load_file
from kits.exported import Residual, Words

_, kind, file, inputs, outputs = sys.argv
net = {"residual": Residual, "words": Words}[kind]().eval()
net.load_state_dict(load_file(file), strict=True)
with torch.no_grad():
    torch.save(net(torch.load(inputs)), outputs)
"""


@pytest.mark.parametrize(
    ("kind", "codes"),
    [("residual", "codebooks of channels"), ("residual", "256 values and zeros"), ("words", "scales of parts")],
)
def test_the_original_network_loads_it_without_us(kind, codes, tmp_path):
    net = packed(kind, codes)
    export_dense(net, tmp_path / "dense.safetensors")
    torch.save(INPUTS[kind], tmp_path / "x.pt")
    run_without_us(SCRIPT, kind, tmp_path / "dense.safetensors", tmp_path / "x.pt", tmp_path / "y.pt")
    torch.testing.assert_close(torch.load(tmp_path / "y.pt"), net(INPUTS[kind]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtypes(dtype, tmp_path):
    net = packed("residual", "4 bits")
    export_dense(net, tmp_path / "dense", dtype)
    state = load_file(tmp_path / "dense")
    assert {value.dtype for value in state.values()} == {getattr(torch, dtype), torch.int64}  # batches are counted
    weight = net.blocks[0].packed_weight.coded().dense()
    assert torch.equal(state["blocks.0.weight"], weight.to(getattr(torch, dtype)))


def test_shared_tensors_stand_under_every_name(tmp_path):
    net = packed("words", "4 bits")
    exported = export_dense(net, tmp_path / "dense")
    state = load_file(tmp_path / "dense")
    assert torch.equal(state["words.weight"], state["head.weight"])
    assert "words.weight" in exported.decoded and "head.weight" not in exported.decoded and not exported.packed
    tied = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    tied[1].bias = tied[0].bias  # shared, and not compressed
    export_dense(packed_network(tied, {}), tmp_path / "tied")
    assert torch.equal(load_file(tmp_path / "tied")["1.bias"], tied[0].bias.half().float())


def test_what_cannot_be_exported(tmp_path):
    with pytest.raises(NetworkError, match="dtype is 'int4', but should be one of float32, bfloat16, float16"):
        export_dense(packed("residual", "4 bits"), tmp_path / "dense", "int4")
    with pytest.raises(NetworkError, match="A packed network is needed"):
        export_dense(torch.nn.Linear(2, 2), tmp_path / "dense")
    assert not list(tmp_path.iterdir())
