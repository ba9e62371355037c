"""Images a second of a training loop as usually written: workers augment image by image."""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from model.network import MultiExitNet, build
from model.table import markdown_table

CLASSES = 100
SIDE = 32
FILL = 128
HOLE = 16
TEMPERATURE = 3.0
SHARE = 0.3
"""Of distillation in an exit's loss."""
MEAN, STD = (0.5071, 0.4866, 0.4409), (0.2673, 0.2564, 0.2762)
WARM_UP = 20
WARM_UP_A_WORKER = 4
"""More batches than a worker has ready when the card is first warm: these would flatter it."""

Transform = Callable[[Image.Image], Tensor]
Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True, slots=True)
class Measured:
    """One number of workers."""

    workers: int | None
    """None where one batch is trained on again and again, which no loader can outrun."""
    images_per_second: float

    def as_dict(self) -> dict[str, Any]:
        """The figures."""
        return asdict(self)


class Noise(Dataset[tuple[Tensor, int]]):
    """Random images as CIFAR's are kept in memory, each augmented when it is asked for.

    Args:
        images: how many.
        transform: of each.
    """

    def __init__(self, images: int, transform: Transform) -> None:
        generator = torch.Generator().manual_seed(0)
        shape = (images, SIDE, SIDE, 3)
        pixels = torch.randint(256, shape, generator=generator, dtype=torch.uint8)
        self.pixels, self.transform = pixels.numpy(), transform

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.pixels[index])), index % CLASSES


def cutout(x: Tensor) -> Tensor:
    """Blacken one square of an image `[3, H, W]`, centred anywhere, in place."""
    height, width = x.shape[1:]
    row, column = (int(torch.randint(n, ())) for n in (height, width))
    rows, columns = (slice(max(0, c - HOLE // 2), c + HOLE // 2) for c in (row, column))
    x[:, rows, columns] = 0
    return x


def authors_transform() -> Transform:
    """What Self-Distillation's authors do to an image.

    Raises:
        RuntimeError: torchvision is missing.
    """
    try:
        from torchvision import transforms as do
    except ImportError:
        raise RuntimeError("this takes torchvision, which is not installed") from None
    policy = do.AutoAugmentPolicy.CIFAR10
    chain: Transform = do.Compose(
        [
            do.RandomCrop(SIDE, padding=4, fill=FILL),
            do.RandomHorizontalFlip(),
            do.AutoAugment(policy, fill=[FILL] * 3),
            do.ToTensor(),
            cutout,
            do.Normalize(MEAN, STD),
        ]
    )
    return chain


def measure(
    architecture: str,
    width: int,
    workers: Sequence[int],
    batch_size: int,
    steps: int,
    transform: Transform,
    device: torch.device,
) -> list[Measured]:
    """Train a fresh network for so many steps with each number of workers, then with no loader."""
    torch.backends.cudnn.benchmark = True
    rows = []
    for count in (*workers, None):
        print(f"workers: {count}", file=sys.stderr, flush=True)
        net = build(architecture, CLASSES, width=width).to(device).train()
        before = WARM_UP + WARM_UP_A_WORKER * (count or 0)
        if count is None:
            batches: Iterable[Batch] = itertools.repeat(_resident(batch_size, device))
        else:
            images = Noise((before + steps) * batch_size, transform)
            batches = loader(images, batch_size, count)
        seconds = train(net, iter(batches), before, steps, device)
        rows.append(Measured(count, steps * batch_size / seconds))
    return rows


def loader(images: Dataset[Any], batch_size: int, workers: int) -> DataLoader[Any]:
    """As the authors load CIFAR."""
    return DataLoader(
        images, batch_size, shuffle=True, num_workers=workers, pin_memory=torch.cuda.is_available()
    )


def train(
    net: MultiExitNet, batches: Iterator[Batch], before: int, steps: int, device: torch.device
) -> float:
    """Seconds of so many steps in fp32, after some that do not count."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    began = 0.0
    for step, (x, class_ids) in enumerate(itertools.islice(batches, before + steps)):
        if step == before:
            began = time.perf_counter()
        x, class_ids = x.to(device, non_blocking=True), class_ids.to(device, non_blocking=True)
        loss = self_distillation(net(x), class_ids)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss.item()  # as the authors' loop does; so a step ends before the clock is read
    return time.perf_counter() - began


def self_distillation(logits: Sequence[Tensor], class_ids: Tensor) -> Tensor:
    """The authors' loss but for its feature term, which takes no time to speak of."""
    *shallow, deepest = logits
    teacher = F.softmax(deepest.detach() / TEMPERATURE, dim=1)
    loss = F.cross_entropy(deepest, class_ids)
    for x in shallow:
        loss = loss + (1 - SHARE) * F.cross_entropy(x, class_ids)
        loss = loss + SHARE * F.cross_entropy(x / TEMPERATURE, teacher)
    return loss


def table(rows: Sequence[Measured]) -> str:
    """Markdown."""
    cells = [
        ("no loader" if r.workers is None else r.workers, f"{r.images_per_second:.0f}")
        for r in rows
    ]
    return markdown_table(["workers", "images a second"], cells, right={1})


def _resident(batch_size: int, device: torch.device) -> Batch:
    ids = torch.arange(batch_size, device=device) % CLASSES
    return torch.randn(batch_size, 3, SIDE, SIDE, device=device), ids
