"""scikit-learn's handwritten digits (1,797 images of 8 x 8 pixels, in the installed package) and their fixed split."""

import gzip
from importlib.metadata import PackageNotFoundError
from importlib.metadata import distribution

import numpy
import torch
from torch import Tensor
from torch.nn import functional

from esper.errors import DataUnavailable

Split = tuple[Tensor, Tensor]

SPLIT_SEED = 0
TRAIN_IMAGES = 1000
VALIDATION_IMAGES = 500
PACKAGE = "scikit-learn"
FILE = "sklearn/datasets/data/digits.csv.gz"


def load_digits_splits() -> tuple[Split, Split, Split]:
    """Train, validation and test as (images, labels): float32 (rows, 1, 8, 8) in [0, 1], int64 (rows,).

    A fixed permutation gives 1,000 images to train on, 500 to validate and 297 to test. Only the training images
    are repeated, each with its nine shifts of -1..1 pixels (zeros move in): 9,000 rows.
    """
    table = torch.from_numpy(_read())
    x = table[:, :-1].to(torch.float32).div(16.0).reshape(-1, 1, 8, 8)
    y = table[:, -1].to(torch.int64)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(SPLIT_SEED))
    x, y = x[order], y[order]
    end = TRAIN_IMAGES + VALIDATION_IMAGES
    shifted = all_shifts(x[:TRAIN_IMAGES])
    train = shifted, y[:TRAIN_IMAGES].repeat(len(shifted) // TRAIN_IMAGES)
    return train, (x[TRAIN_IMAGES:end], y[TRAIN_IMAGES:end]), (x[end:], y[end:])


def all_shifts(images: Tensor) -> Tensor:
    """(rows, 1, height, width) -> (9 * rows, 1, height, width): every shift of -1..1 pixels, zeros moving in."""
    height, width = images.shape[-2:]
    padded = functional.pad(images, (1, 1, 1, 1))
    return torch.cat(
        [padded[:, :, down : down + height, right : right + width] for down in range(3) for right in range(3)]
    )


def _read() -> numpy.ndarray[tuple[int, int], numpy.dtype[numpy.float64]]:
    """The file's rows: 64 pixels of 0..16, then the label. Read as it lies: importing scikit-learn takes seconds."""
    hint = f"Install the package {PACKAGE} (`pip install {PACKAGE}`)"
    try:
        path = distribution(PACKAGE).locate_file(FILE)
        with gzip.open(str(path), "rt", encoding="ascii") as file:
            table = numpy.loadtxt(file, delimiter=",", dtype=numpy.float64, ndmin=2)
    except (PackageNotFoundError, OSError, ValueError) as error:
        raise DataUnavailable("ESP-207", f"digits: {FILE} of {PACKAGE} cannot be read: {error}", hint=hint) from error
    if table.shape != (1797, 65):
        raise DataUnavailable("ESP-207", f"digits: {FILE} is {table.shape}, not (1797, 65)", hint=hint)
    return table
