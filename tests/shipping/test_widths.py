"""A packed file that says how wide its posterior is: kept, read, drawn from, refused where it is wrong."""

import pytest
import torch
from torch import nn

import sqs_pyro
from sqs_pyro.compression.finetune.call import compress
from sqs_pyro.errors import NetworkError, PackedFileError, RecipeError
from sqs_pyro.evaluation.averaging import average_of_packed, averaged_network
from sqs_pyro.kernels.network import dense_state
from sqs_pyro.shipping.widths import WIDTHS, widths_of

RECIPE = {
    "epochs": 4,
    "num_components": 4,
    "allocation": "rate_distortion",
    "prior": {"kind": "learned"},
    "kl_weight": 0.001,
    "estimator": "one_hot",
}


@pytest.fixture(scope="module")
def result():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))
    x = torch.randn(256, 6)
    data = torch.utils.data.TensorDataset(x, x[:, :3].argmax(1))
    return compress(net, torch.utils.data.DataLoader(data, batch_size=32), RECIPE)


def test_the_file_keeps_the_guides_width(result, tmp_path):
    sqs_pyro.save(result.network, tmp_path / "packed.safetensors")
    loaded = sqs_pyro.load(tmp_path / "packed.safetensors", result.hard)
    for name, site in result.guide.site_guides().items():
        assert widths_of(loaded)[name] == pytest.approx(float(site.scale[0, 0]), rel=1e-3)


def test_draws_spread_by_it_around_the_network(result):
    average = average_of_packed(result.network, 2000, temperature=4.0, seed=0)
    widths, dense = widths_of(result.network), dense_state(result.network)
    for name, draws in average.draws().items():
        kept = dense[name] != 0
        assert kept.any() and not draws[:, ~kept].any()
        torch.testing.assert_close(draws.mean(0)[kept], dense[name][kept], atol=0.3 * widths[name], rtol=0)
        assert float(draws.std(0)[kept].mean()) == pytest.approx(2 * widths[name], rel=0.02)


def test_it_averages_as_draws_of_the_guide_do(result):
    x = torch.randn(50, 6)
    of_file = average_of_packed(result.network, 400, seed=1)(x)
    of_guide = averaged_network(result.hard, result.guide, 400, seed=2)(x)
    torch.testing.assert_close(of_file.exp(), of_guide.exp(), atol=0.02, rtol=0)
    assert not torch.equal(of_file, result.network(x).log_softmax(1))


def test_the_packed_network_is_left_as_it_is(result):
    x = torch.randn(5, 6)
    before = result.network(x)
    average_of_packed(result.network, 2)(x)
    assert torch.equal(result.network(x), before)


def test_an_ensemble_has_draws_instead(result):
    assert WIDTHS not in sqs_pyro.pack_ensemble(result, 2).packed_metadata


def test_packing_the_guide_keeps_widths_too(result):
    assert widths_of(sqs_pyro.pack(result.guide)) == pytest.approx(widths_of(result.network))


def test_a_file_without_widths_cannot_be_drawn_from(result):
    plain = sqs_pyro.pack(result, metadata={WIDTHS: None})
    assert widths_of(plain) is None
    with pytest.raises(NetworkError, match="no widths to draw by: compress with allocation 'rate_distortion'"):
        average_of_packed(plain)


@pytest.mark.parametrize("said", [0, -1.0, "wide", {"0.weight": 0.1}, float("inf"), True])
def test_wrong_widths_are_refused(result, said):
    with pytest.raises(PackedFileError, match="must be one positive number, or one for each"):
        wrong = sqs_pyro.pack(result)
        before, wrong.packed_metadata = wrong.packed_metadata, {**wrong.packed_metadata, WIDTHS: said}
        try:
            widths_of(wrong)
        finally:
            wrong.packed_metadata = before


def test_other_metadata_stay(result):
    with pytest.raises(NetworkError, match="metadata is a str"):
        sqs_pyro.pack(result.guide, metadata="mine")
    packed = sqs_pyro.pack(result.guide, metadata={"widths": [6, 16, 3]})
    assert packed.packed_metadata["widths"] == [6, 16, 3]
    assert widths_of(packed) is not None


def test_only_an_e_step_can_set_them():
    with pytest.raises(RecipeError, match="allocation 'rate_distortion' beside estimator 'one_hot'"):
        compress(nn.Linear(4, 2), [], {"estimator": "one_hot"})
