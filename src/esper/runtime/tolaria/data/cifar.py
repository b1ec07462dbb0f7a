"""CIFAR-10 and CIFAR-100 in their binary version, from a folder that the user names (Krizhevsky, 2009)."""

from dataclasses import dataclass
from pathlib import Path

import numpy
import torch
from torch import Tensor

from esper.errors import DataUnavailable

Split = tuple[Tensor, Tensor]

PIXELS = 3 * 32 * 32
SPLIT_SEED = 0
VALIDATION_IMAGES = 5000


@dataclass(frozen=True)
class CifarForm:
    """How one of the two data sets lies on disk: `label_bytes` before each image, the last of which is its class."""

    name: str
    classes: int
    label_bytes: int
    folder: str
    train_files: tuple[str, ...]
    test_file: str
    images_per_file: int
    test_images: int
    source: str


CIFAR10 = CifarForm(
    name="CIFAR-10",
    classes=10,
    label_bytes=1,
    folder="cifar-10-batches-bin",
    train_files=tuple(f"data_batch_{number}.bin" for number in range(1, 6)),
    test_file="test_batch.bin",
    images_per_file=10_000,
    test_images=10_000,
    source="https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
)
CIFAR100 = CifarForm(
    name="CIFAR-100",
    classes=100,
    label_bytes=2,
    folder="cifar-100-binary",
    train_files=("train.bin",),
    test_file="test.bin",
    images_per_file=50_000,
    test_images=10_000,
    source="https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz",
)


def load_cifar(form: CifarForm, folder: Path | None) -> tuple[Split, Split, Split]:
    """Train, validation and test as (images, labels): uint8 (rows, 3, 32, 32), int64 (rows,).

    A fixed permutation sets 5,000 training images aside to validate. `folder` holds the files, or the unpacked
    archive. Raises `DataUnavailable` (ESP-207), naming the file and where to get it.
    """
    hint = f"Get {form.source}, unpack it, and name the folder with --set task.path=FOLDER"
    if folder is None:
        raise DataUnavailable("ESP-207", f"{form.name}: task.path is not set, and the data is not packaged", hint=hint)
    folder = folder.expanduser()
    if not folder.is_dir():
        raise DataUnavailable("ESP-207", f"{form.name}: there is no folder {str(folder)!r}", hint=hint)
    if not (folder / form.test_file).exists() and (folder / form.folder).is_dir():
        folder = folder / form.folder
    parts = [_read(form, folder / name, form.images_per_file, hint) for name in form.train_files]
    images = torch.cat([part[0] for part in parts])
    labels = torch.cat([part[1] for part in parts])
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(SPLIT_SEED))
    images, labels = images[order], labels[order]
    train = images[VALIDATION_IMAGES:], labels[VALIDATION_IMAGES:]
    validation = images[:VALIDATION_IMAGES], labels[:VALIDATION_IMAGES]
    return train, validation, _read(form, folder / form.test_file, form.test_images, hint)


def _read(form: CifarForm, file: Path, rows: int, hint: str) -> Split:
    try:
        data = numpy.fromfile(file, dtype=numpy.uint8)
    except OSError as error:
        reason = error.strerror or str(error)
        raise DataUnavailable("ESP-207", f"{form.name}: {str(file)!r}: {reason}", hint=hint) from error
    row = form.label_bytes + PIXELS
    if data.size != rows * row:
        raise DataUnavailable(
            "ESP-207",
            f"{form.name}: {str(file)!r} has {data.size} bytes, the binary version has {rows} x {row} = {rows * row}",
            hint=hint,
        )
    table = torch.from_numpy(data).reshape(rows, row)
    labels = table[:, form.label_bytes - 1].to(torch.int64)
    worst = int(labels.max())
    if worst >= form.classes:
        first = int((labels >= form.classes).nonzero()[0])
        raise DataUnavailable(
            "ESP-207",
            f"{form.name}: {str(file)!r} row {first} has class {int(labels[first])} of 0..{form.classes - 1}",
            hint=hint,
        )
    return table[:, form.label_bytes :].reshape(rows, 3, 32, 32).contiguous(), labels
