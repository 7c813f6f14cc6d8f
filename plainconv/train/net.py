"""The small CNN of the idea: four 3x3 convolutions, two max-pools, two linear layers.

x [n, 1, 28, 28]
conv1, relu   [n, 3, 26, 26]      conv3, relu   [n, 6, 10, 10]
conv2, relu   [n, 3, 24, 24]      conv4, relu   [n, 6, 8, 8]
pool          [n, 3, 12, 12]      pool          [n, 6, 4, 4]
dropout, linear 96 -> 30, relu, dropout, linear 30 -> 10, log-softmax
"""

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn

from plainconv.files import InputError
from plainconv.nn import Conv2d

Layer = Callable[[int, int, int], nn.Module]
LAYERS = ("ours", "torch", "both")
DROPOUT = 0.2


def layers(which: str = "both", algorithm: str = "auto") -> dict[str, Layer]:
    """Name -> what makes a convolution layer: plainconv's, with the algorithm named, torch's, or both.

    Raises:
        InputError: `which` is none of LAYERS.
    """
    if which not in LAYERS:
        raise InputError(f"unknown layer {which!r}; layers are {', '.join(LAYERS)}")
    both: dict[str, Layer] = {"plainconv": partial(Conv2d, algorithm=algorithm), "torch": nn.Conv2d}
    return both if which == "both" else {name: both[name] for name in both if (name == "torch") == (which == "torch")}


class Net(nn.Module):
    """A classifier of 28x28 pictures into 10 classes.

    Args:
        conv: what makes a convolution layer from (in_channels, out_channels, kernel_size): torch.nn.Conv2d,
            plainconv.nn.Conv2d, or one of them with more arguments bound.
        dropout: share of the numbers that each of the two dropouts leaves out.
    """

    def __init__(self, conv: Layer, dropout: float = DROPOUT) -> None:
        super().__init__()
        self.conv1 = conv(1, 3, 3)
        self.conv2 = conv(3, 3, 3)
        self.conv3 = conv(3, 6, 3)
        self.conv4 = conv(6, 6, 3)
        self.fc1 = nn.Linear(96, 30)
        self.fc2 = nn.Linear(30, 10)
        self.relu = nn.ReLU()
        self.pool = nn.MaxPool2d(2)
        self.dropout = nn.Dropout(dropout)
        self.log_softmax = nn.LogSoftmax(dim=1)

    def forward(self, x: Tensor) -> Tensor:
        """x float [n, 1, 28, 28] -> logarithms of the ten probabilities [n, 10]."""
        x = self.relu(self.conv1(x))
        x = self.pool(self.relu(self.conv2(x)))
        x = self.relu(self.conv3(x))
        x = self.pool(self.relu(self.conv4(x)))
        x = self.dropout(x.flatten(1))
        x = self.dropout(self.relu(self.fc1(x)))
        return self.log_softmax(self.fc2(x))
