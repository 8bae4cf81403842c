"""scikit-learn's handwritten digits: 1,797 images of 8x8 pixels, embedded in the library."""

import torch

from sqs_pyro.data.array_loader import Augmentation
from sqs_pyro.data.arrays import ImageArrays
from sqs_pyro.data.splits import stratified_split
from sqs_pyro.extras import needed_for

TEST_SIZE = 500
_TEST_SEED = 0  # the test set never changes


def load_digits() -> ImageArrays:
    """Return 1,297 training and 500 test images [N, 1, 8, 8] with values from 0 to 1 in steps of 1/16."""
    with needed_for("The digits"):
        from sklearn import datasets  # heavy, and only needed here

    digits = datasets.load_digits()
    images = torch.from_numpy(digits.images).float().unsqueeze(1) / 16
    labels = torch.from_numpy(digits.target).long()
    train, test = stratified_split(labels, TEST_SIZE, _TEST_SEED)
    return ImageArrays(
        images[train],
        labels[train],
        images[test],
        labels[test],
        num_classes=10,
        mean=(0.3060,),
        std=(0.3762,),
        augmentation=Augmentation(padding=1, flip=False),
    )
