"""Loading takes about the memory of what stays: no dense network, nor all codes of an embedding as bytes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.slow,  # a process of its own, which imports transformers
    pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="memory is read from Linux's /proc"),
]

PROGRAM = """
import json, sys
import sqs_pyro, torch
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM
from sqs_pyro.integrations import save_pretrained
from sqs_pyro.kernels import packed_network
from sqs_pyro.packing import CodedTensor

def network(vocabulary):
    config = LlamaConfig(hidden_size=256, intermediate_size=256, num_hidden_layers=2, num_attention_heads=2,
                         num_key_value_heads=2, vocab_size=vocabulary, tie_word_embeddings=True)
    with torch.device("meta"):
        net = LlamaForCausalLM(config)
    net.model.rotary_emb = type(net.model.rotary_emb)(config)  # buffers are in no file
    net.tie_weights()
    return net

def write(vocabulary, directory):
    net = network(vocabulary).to_empty(device="cpu")
    net.model.rotary_emb = network(8).model.rotary_emb
    net.tie_weights()  # again, for to_empty has undone it
    for parameter in net.parameters():
        torch.nn.init.ones_(parameter)
    coded = {}
    for name, value in net.named_parameters():
        if value.dim() == 2:
            codes = torch.randint(0, 8, value.shape, dtype=torch.uint8)
            mask = torch.ones_like(codes, dtype=torch.bool)
            coded[name] = CodedTensor(codes, mask, torch.linspace(-1, 1, 8)[None])
    packed = packed_network(net, coded, layout=sys.argv[2])
    save_pretrained(packed, directory)
    sqs_pyro.save(packed, directory / "packed.sqs")

def status(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) * 1024

def load(way, vocabulary, directory):
    loaded = sqs_pyro.from_pretrained(directory) if way == "checkpoint" else sqs_pyro.load(
        directory / "packed.sqs", network(vocabulary))
    with torch.inference_mode():
        loaded(torch.arange(4)[None])
    return loaded

directory, large, small = Path(sys.argv[1]), 60000, 64
if len(sys.argv) == 3:
    write(small, directory / "small"); write(large, directory)
else:
    way = sys.argv[3]
    load(way, small, directory / "small")  # libraries and kernels are there
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    net = load(way, large, directory)
    print(json.dumps([status("VmHWM") - before, sum(t.nbytes for t in [*net.buffers(), *net.parameters()])]))
"""


def run(*arguments):
    done = subprocess.run([sys.executable, "-c", PROGRAM, *map(str, arguments)], capture_output=True, text=True)
    assert not done.returncode, done.stderr
    return done.stdout


@pytest.mark.parametrize("layout", ["dense", "entropy"])
def test_peak_of_a_load(layout, tmp_path):
    run(tmp_path, layout)
    for way in ("checkpoint", "file"):
        peak, packed = json.loads(run(tmp_path, layout, way).splitlines()[-1])
        assert packed > 5e6
        # The large tensor's stored bytes, the coder's copy and its codes are there at once: three times its size.
        # Its codes as bytes and their mask would be 31 MB, as numbers 61 MB.
        assert peak < 3 * packed + 8e6, (way, peak, packed)
