"""What the calibration says of embedding and head, against enumeration over the vocabulary and autograd."""

import pytest
import torch
from torch import nn

from sqs_pyro.compression.blockwise.importance import output_importance
from sqs_pyro.compression.blockwise.laplace import LayerLikelihood
from sqs_pyro.compression.blockwise.token_fisher import embedding_likelihood, expected_counts, head_fisher
from sqs_pyro.errors import NetworkError

transformers = pytest.importorskip("transformers")
NOTHING = 1e-9  # as good as no prior


def exact_rows(head, inputs):
    """Fisher information of each row of a head by enumeration: ``[V, D, D]``, summed over inputs ``[n, D]``."""
    total = torch.zeros(len(head.weight), head.in_features, head.in_features, dtype=torch.float64)
    for x in inputs:
        said = head(x).log_softmax(-1)
        for y, log_p in enumerate(said):
            (gradient,) = torch.autograd.grad(said[y], head.weight, retain_graph=True)
            total += float(log_p.detach().exp()) * torch.einsum("vi,vj->vij", gradient, gradient).double()
    return total


class TestFrequencies:
    def test_are_the_dirichlet_posteriors_mean(self):
        counts = torch.tensor([7.0, 0.0, 1.0, 12.0])
        drawn = torch.distributions.Dirichlet(counts + 0.5).mean
        torch.testing.assert_close(expected_counts(counts, 0.5).float(), 20 * drawn)

    def test_what_was_never_read_is_not_thrown_away(self):
        found = expected_counts(torch.tensor([100.0, 1.0, 0.0]), 0.5)
        assert float(found.sum()) == pytest.approx(101.0)
        assert float(found[1] / found[2]) == pytest.approx(3.0)


class TestHead:
    def test_rows_and_their_sum_are_those_of_enumeration(self):
        torch.manual_seed(0)
        head, inputs = nn.Linear(5, 7), torch.randn(6, 5)
        own = head_fisher(head, [(part, part) for part in inputs.split(4)]).likelihood(head.weight, NOTHING)
        exact = exact_rows(head, inputs)
        together = float(own.importance.sum()) * own.curvature
        torch.testing.assert_close(together.double(), exact.sum(0), rtol=1e-4, atol=1e-5)
        p = head(inputs).softmax(-1)
        torch.testing.assert_close(own.importance, (p * (1 - p)).mean(0).detach(), rtol=1e-4, atol=1e-6)

    def test_each_row_is_exact_where_one_input_comes_again_and_again(self):
        torch.manual_seed(0)
        head, inputs = nn.Linear(4, 6, bias=False), torch.randn(1, 4).expand(3, 4)
        own = head_fisher(head, [(inputs, inputs)]).likelihood(head.weight, NOTHING)
        found = own.importance[:, None, None] * own.curvature
        torch.testing.assert_close(found.double(), exact_rows(head, inputs), rtol=1e-4, atol=1e-6)

    def test_excess_is_what_is_lost_in_nats(self):
        torch.manual_seed(0)
        head, inputs = nn.Linear(16, 12), torch.randn(400, 16)
        own = head_fisher(head, [(inputs, inputs)]).likelihood(head.weight, NOTHING)
        other = nn.Linear(16, 12)
        with torch.no_grad():
            # Rows that move independently: what they have in common, which softmax takes away, is not modelled.
            other.weight.copy_(head.weight + 0.02 * torch.randn_like(head.weight))
            other.bias.copy_(head.bias)
            said, now = head(inputs).log_softmax(-1), other(inputs).log_softmax(-1)
            lost = float((said.exp() * (said - now)).sum())
        assert own.excess(other.weight.detach()) == pytest.approx(lost, rel=0.2)

    def test_the_prior_keeps_rows_that_are_never_said(self):
        head = nn.Linear(2, 3)
        with torch.no_grad():
            head.weight.zero_()
            head.bias.copy_(torch.tensor([0.0, 0.0, -200.0]))
        found = head_fisher(head, [(x := torch.randn(8, 2), x)])
        assert float(found.rows[2]) == 0
        own = found.likelihood(head.weight, 0.5)
        assert float(own.importance[0] / own.importance[2]) == pytest.approx((8 * 0.25 + 0.25) / 0.25)
        assert float(own.importance.sum()) == pytest.approx(0.5)

    def test_a_network_that_is_sure_leaves_finite_numbers(self):
        head = nn.Linear(2, 2)
        with torch.no_grad():
            head.bias.copy_(torch.tensor([1e4, -1e4]))
        own = head_fisher(head, [(x := torch.randn(3, 2), x)]).likelihood(head.weight, 0.5)
        assert bool(own.importance.gt(0).all()) and bool(own.curvature.isfinite().all())

    def test_needs_inputs(self):
        with pytest.raises(NetworkError, match="at least one minibatch"):
            head_fisher(nn.Linear(2, 2), [])


class TestEmbedding:
    def test_rows_are_those_of_brute_force(self):
        """One token a sequence: what follows depends on its row alone, so that autograd gives the whole truth."""
        torch.manual_seed(0)
        config = transformers.LlamaConfig(
            vocab_size=5,
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            initializer_range=0.3,
        )
        net = transformers.LlamaForCausalLM(config).eval()
        table = net.model.embed_tokens
        tokens = torch.tensor([0, 1, 1, 3]).repeat(800)[:, None]
        exact = torch.zeros(8, 8)
        for token, share in ((0, 0.25), (1, 0.5), (3, 0.25)):
            said = net(input_ids=torch.tensor([[token]])).logits[0, 0].log_softmax(-1)
            for y, log_p in enumerate(said):
                row = torch.autograd.grad(said[y], table.weight, retain_graph=True)[0][token]
                exact += share * float(log_p.detach().exp()) * torch.outer(row, row)
        arguments = net, {"table": table}, [{"input_ids": tokens}]
        found = output_importance(*arguments, whole=["table"])["table"]
        assert float((found - exact).norm() / exact.norm()) < 0.1
        torch.testing.assert_close(found.diagonal(), output_importance(*arguments)["table"], rtol=1e-4, atol=1e-4)
        own = embedding_likelihood(table.weight, torch.tensor([1.0, 2, 0, 1, 0]), 0.5, found)
        assert own.curvature is not None and torch.equal(
            own.importance.argsort(descending=True)[:1], torch.tensor([1])
        )
        assert float(own.importance.sum()) == pytest.approx(4.0)

    def test_without_gradients_outputs_have_noise_of_their_size(self):
        weight = torch.tensor([[3.0, 4.0], [0.0, 1.0]])
        own = embedding_likelihood(weight, torch.tensor([5.0, 0.0]), NOTHING)
        # All reads are of a row whose elements have the mean square 12.5: a row of zeros loses 5/2 D nats.
        assert own.excess(torch.zeros(2, 2)) == pytest.approx(5 / 2 * 2, rel=1e-4)


class TestSum:
    def make(self, seed, importance):
        root = torch.randn(3, 8, generator=torch.Generator().manual_seed(seed))
        return LayerLikelihood(torch.zeros(4, 3), root @ root.T, torch.tensor(importance))

    def test_is_exact_where_both_weigh_rows_alike(self):
        one, other = self.make(0, [1.0, 2.0, 3.0, 4.0]), self.make(1, [10.0, 20.0, 30.0, 40.0])
        weight = torch.randn(4, 3, generator=torch.Generator().manual_seed(2))
        expected = one.excess(weight) + other.excess(weight)
        assert one.plus(other).excess(weight) == pytest.approx(expected, rel=1e-4)

    def test_is_the_nearest_gaussian_row_by_row(self):
        one, other = self.make(0, [1.0, 2.0, 3.0, 4.0]), self.make(1, [9.0, 0.1, 1.0, 1.0])
        found = one.plus(other)
        rows = [
            g * one.curvature + h * other.curvature for g, h in zip(one.importance, other.importance, strict=True)
        ]
        torch.testing.assert_close(found.curvature, sum(rows))

        def divergence(scale, row):
            """KL of a zero-mean Gaussian of precision ``scale`` times the shared one to the row's own."""
            near = torch.distributions.MultivariateNormal(torch.zeros(3), precision_matrix=scale * found.curvature)
            exact = torch.distributions.MultivariateNormal(torch.zeros(3), precision_matrix=row)
            return float(torch.distributions.kl_divergence(near, exact))

        for scale, row in zip(found.importance, rows, strict=True):
            best = divergence(scale, row)
            assert best < min(divergence(0.95 * scale, row), divergence(1.05 * scale, row))
