"""Train the small ViT of small_vit.py from nothing, with EfficientNet-Lite0 as its teacher.

    python examples/train_small_vit.py --out small_vit.safetensors --minutes 50

16,000 images of 160 Tiny-ImageNet classes at 32 x 32; it learns their labels and, by its layer
``distill``, 128 random directions of the teacher's features at 96 x 96. An epoch takes about two
CPU minutes (6.7 ms an image), the teacher's features three once, so 14 epochs about half an hour.
A stopped run goes on from its last epoch, to the same bits. The other 40 classes are not looked at
but in the few-shot accuracy that is printed at the end.
"""

import argparse
import hashlib
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from recycle_bases import TRAIN, VALIDATION, Images, load_efficientnet
from resumable import DATA
from safetensors.torch import save_file
from small_vit import SIZE, SmallViT
from torch import Tensor, nn

from lora_fused.cli.console import Reporter
from lora_fused.io import Checkpoint
from lora_fused.methods.recycle import draw_episodes, score_episodes
from lora_fused.methods.recycle.runs import load_optimizer, optimizer_state

TEACHER_SIZE = 96
SHIFT = 4  # pixels that an image is moved by at most


def teacher_targets(net: nn.Module, images: Images, classes: list[int], each: int, to: int):
    """Standardised features of the teacher in ``to`` random directions, ``[N, to]``.

    Class by class: all images at 96 x 96 would take 1.8 GB.
    """
    parts = []
    with torch.no_grad():
        for one in classes:
            parts.append(net(images.of(TRAIN, [one], each)[0]))
    found = torch.cat(parts)
    found = (found - found.mean(0)) / found.std(0).clamp_min(1e-3)
    generator = torch.Generator().manual_seed(0)
    directions = torch.linalg.qr(torch.randn(found.shape[1], to, generator=generator)).Q
    return found @ directions


def moved(images: Tensor, generator: torch.Generator) -> Tensor:
    """A batch, each image shifted by up to SHIFT pixels (its edge repeated), half flipped."""
    count, _, height, width = images.shape
    padded = F.pad(images, (SHIFT,) * 4, mode="replicate")
    down, right = torch.randint(0, 2 * SHIFT + 1, (2, count, 1, 1, 1), generator=generator)
    flip = torch.randint(0, 2, (count, 1, 1, 1), generator=generator).bool()
    rows = (down + torch.arange(height)[:, None]).expand(-1, 3, -1, padded.shape[3])
    columns = (right + torch.arange(width)).expand(-1, 3, height, -1)
    cut = padded.gather(2, rows).gather(3, columns)
    return torch.where(flip, cut.flip(3), cut)


class Training:
    """Epochs of AdamW with a warm-up and a cosine; its state is whole after each.

    Args:
        targets: ``[N, distilled]`` of the teacher.
        weight: Of the distillation beside the labels' cross-entropy.
    """

    def __init__(
        self,
        model: nn.Module,
        data: tuple[Tensor, Tensor, Tensor],
        *,
        epochs: int,
        batch: int = 128,
        rate: float = 1e-3,
        weight: float = 1.0,
    ):
        self.model, self.epochs, self.batch = model, epochs, batch
        self.rate, self.weight = rate, weight
        self.images, self.labels, self.targets = data
        self.optimizer = torch.optim.AdamW(model.parameters(), rate, weight_decay=0.05)
        self.each = -(-len(self.labels) // batch)

    def epoch(self, number: int) -> float:
        """Train on every image once; the mean loss. Random numbers are the epoch's own."""
        generator, total = torch.Generator().manual_seed(number), 0.0
        order = torch.randperm(len(self.labels), generator=generator)
        for step, rows in enumerate(order.split(self.batch)):
            self._set_rate(number * self.each + step)
            features = self.model(moved(self.images[rows], generator))
            loss = F.cross_entropy(self.model.head(features), self.labels[rows])
            off = F.mse_loss(self.model.distill(features), self.targets[rows])
            loss = loss + self.weight * off
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            total += float(loss.detach()) * len(rows)
        return total / len(order)

    def _set_rate(self, step: int) -> None:
        whole = self.epochs * self.each
        warm = min(1.0, (step + 1) / max(1, whole // 20))
        self.optimizer.param_groups[0]["lr"] = (
            self.rate * warm * (1 + math.cos(math.pi * step / whole)) / 2
        )

    def run(self, checkpoint: Checkpoint, run: str, go_on: Callable[[], bool], say) -> bool:
        """The epochs that are missing; False: out of time before the last."""
        done = self._load(checkpoint, run)
        for number in range(done, self.epochs):
            if not go_on():
                return False
            start = time.process_time()
            loss = self.epoch(number)
            state = {f"model.{k}": t for k, t in self.model.state_dict().items()}
            facts = {"run": run, "epoch": str(number + 1)}
            checkpoint.write(state | optimizer_state(self.optimizer), facts)
            seconds = time.process_time() - start
            say(f"epoch {number + 1} of {self.epochs}: loss {loss:.4f}, {seconds:.0f} CPU s")
        return True

    def _load(self, checkpoint: Checkpoint, run: str) -> int:
        found = checkpoint.read()
        if found is None:
            return 0
        tensors, facts = found
        if facts.get("run") != run:
            raise ValueError(f"{checkpoint}: it must be of the same options, got another run's")
        values = {k.removeprefix("model."): t for k, t in tensors.items() if "model." in k}
        self.model.load_state_dict(values)
        load_optimizer(self.optimizer, tensors)
        return int(facts["epoch"])


@torch.no_grad()
def few_shot(model: nn.Module, images: Images, shots: int) -> str:
    """Accuracy of nearest class means on the unseen classes."""
    pixels, labels = images.of(VALIDATION, images.unseen, 50)
    features = torch.cat([model(part) for part in pixels.split(256)])
    options = {"ways": 5, "shots": shots, "queries": 15, "count": 600, "seed": 0}
    found = score_episodes(features, draw_episodes(labels, **options), shots)
    return f"5-way {shots}-shot on unseen classes: {found.accuracy:.3f} ± {found.interval:.3f}"


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="the weights, float16")
    parser.add_argument("--cache", type=Path, default=Path(".cache/small_vit"))
    parser.add_argument("--data", type=Path, default=DATA, help="in place of LORA_FUSED_DATA")
    parser.add_argument("--epochs", type=int, default=14)
    parser.add_argument("--images", type=int, default=100, help="of each class")
    parser.add_argument("--minutes", type=float, default=math.inf, help="no epoch begins after")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quiet", "-q", action="store_true")
    return parser.parse_args(argv)


def main(
    argv: list[str] | None = None,
    student: Callable[..., nn.Module] = SmallViT,
    teacher: Callable[[Path], nn.Module] = load_efficientnet,
) -> int:
    options = arguments(argv)
    deadline = time.monotonic() + 60 * options.minutes
    torch.set_num_threads(options.threads)
    say, folder = Reporter(options.quiet).say, options.data / "vision"
    small, large = (Images(folder, size, 0, 0) for size in (SIZE, TEACHER_SIZE))
    torch.manual_seed(0)
    model = student(classes=len(small.base))
    told = f"{options.epochs} {options.images} {model}"
    run = hashlib.sha256(told.encode()).hexdigest()[:16]
    held = Checkpoint(options.cache / f"targets-{options.images}.safetensors")
    known = held.read()
    if known is None:
        say("the teacher's features")
        what = small.base, options.images, model.distill.out_features
        known = {"targets": teacher_targets(teacher(folder), large, *what)}, {}
        held.write(*known)
    data = *small.of(TRAIN, small.base, options.images), known[0]["targets"]
    training = Training(model, data, epochs=options.epochs)
    path = options.cache / "training.safetensors"
    if not training.run(Checkpoint(path), run, lambda: time.monotonic() < deadline, say):
        say(f"stopped after {options.minutes:g} minutes; run again to go on")
        return 0
    options.out.parent.mkdir(parents=True, exist_ok=True)
    save_file({k: t.half().contiguous() for k, t in model.state_dict().items()}, options.out)
    for shots in (1, 5):
        print(few_shot(model.eval(), small, shots))
    return 0


if __name__ == "__main__":
    sys.exit(main())
