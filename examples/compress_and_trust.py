"""A compressed classifier whose confidence can be trusted: accuracy, NLL and calibration error.

The packed network is the most probable one of a posterior (MAP). An average over networks drawn from the
posterior, and the MAP network with its confidence scaled by one temperature, are the two ways to honest
probabilities. What both need is chosen on digits that neither training nor the table uses.

    python examples/compress_and_trust.py
"""

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import sqs_pyro
from sqs_pyro.data.digits import load_digits
from sqs_pyro.evaluation.averaging import averaged_network, choose_temperature
from sqs_pyro.evaluation.calibration import TemperatureScaled, fit_temperature
from sqs_pyro.evaluation.classification import evaluate

torch.manual_seed(0)
digits = load_digits()
x, y = digits.train_images.flatten(1), digits.train_labels
train = DataLoader(TensorDataset(x[300:], y[300:]), 64, shuffle=True)
validation = DataLoader(TensorDataset(x[:300], y[:300]), 300)
test = DataLoader(TensorDataset(digits.test_images.flatten(1), digits.test_labels), 500)

net = nn.Sequential(nn.Linear(64, 100), nn.ReLU(), nn.Linear(100, 10))
adam = torch.optim.Adam(net.parameters(), 0.005)
for _ in range(20):
    for inputs, labels in train:
        adam.zero_grad()
        nn.functional.cross_entropy(net(inputs), labels).backward()
        adam.step()

recipe = {"epochs": 10, "nonzero_rate": 0.3, "num_components": 8}
result = sqs_pyro.compress(net, train, recipe, validation=validation)
size = sqs_pyro.size_report(result.network)
print(f"{size.fp32_bytes:,} bytes of the trained network are {size.total:,} in one file")

with torch.no_grad():
    of_map = fit_temperature(result.network(x[:300]), y[:300])
of_draws = choose_temperature(result.hard, result.guide, validation, (0.1, 0.2, 0.5, 1.0))
predictions = {
    "trained, float32": net,
    "MAP": result.network,
    "MAP, scaled": TemperatureScaled(result.network, of_map),
    "average of 20": averaged_network(result.hard, result.guide, 20, temperature=of_draws),
}
print(f"{'':<20}{'accuracy':>10}{'NLL':>8}{'ECE':>8}")
for name, predictor in predictions.items():
    found = evaluate(predictor, test)
    print(f"{name:<20}{found.accuracy:>10.1%}{found.nll:>8.3f}{found.ece:>8.1%}")
