"""The images of an inversion: their start, their views, and the best of each."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lora_fused.checks import invalid
from lora_fused.methods.recycle.runs import generator_of


class Images:
    """Pixels under optimisation, in runs of one teacher each, with random numbers for each run.

    Args:
        names: Of the runs.
        counts: Images of each.
        size: C, H, W.
        seed: With a run's name decides its random numbers.
        bounds: Least and largest pixel values, ``[C, 1, 1]`` or ``[1, 1, 1]``.

    Attributes:
        pixels: ``[N, C, H, W]``, a leaf that requires grad.
        best: ``[N, C, H, W]`` copies of the views with the lowest losses seen: a view is what the
            loss was measured on, and its pixels moved back may not have it.
        losses: ``[N]`` those losses.
    """

    def __init__(
        self,
        names: Sequence[str],
        counts: Sequence[int],
        size: tuple[int, int, int],
        seed: int,
        bounds: tuple[Tensor, Tensor],
    ):
        self._counts, self._bounds = list(counts), bounds
        self._generators = [generator_of(seed, name) for name in names]
        start = [
            torch.randn(count, *size, generator=generator)
            for count, generator in zip(counts, self._generators, strict=True)
        ]
        self.pixels = torch.cat(start).to(bounds[0]).clamp(*bounds).requires_grad_()
        self.best = self.pixels.detach().clone()
        self.losses = torch.full(self.pixels.shape[:1], torch.inf).to(self.best)

    def views(self, jitter: int) -> Tensor:
        """The images, each teacher's rolled by up to ``jitter`` pixels and perhaps flipped."""
        views = []
        for part, generator in zip(self.pixels.split(self._counts), self._generators, strict=True):
            draw = torch.randint(-jitter, jitter + 1, (2,), generator=generator).tolist()
            flip = torch.randint(0, 2, (), generator=generator)
            part = torch.roll(part, draw, (2, 3))
            views.append(part.flip(3) if flip else part)
        return torch.cat(views)

    @torch.no_grad()
    def keep(self, views: Tensor, losses: Tensor) -> None:
        """Copy the views whose losses are the lowest so far."""
        better = losses < self.losses
        self.losses = torch.where(better, losses, self.losses)
        self.best = torch.where(better[:, None, None, None], views, self.best)

    @torch.no_grad()
    def clamp(self) -> None:
        """Put pixels back into their range."""
        self.pixels.clamp_(*self._bounds)

    def forget(self) -> None:
        """Begin to look for the best anew: from here on losses mean something else."""
        self.losses = torch.full_like(self.losses, torch.inf)

    def tensors(self) -> dict[str, Tensor]:
        """The state, for a checkpoint."""
        states = torch.stack([generator.get_state() for generator in self._generators])
        tensors = {"pixels": self.pixels.detach().clone(), "best": self.best}
        return tensors | {"losses": self.losses, "generators": states}

    @torch.no_grad()
    def load(self, tensors: dict[str, Tensor]) -> None:
        self.pixels.copy_(tensors["pixels"])
        self.best = tensors["best"].to(self.best)
        self.losses = tensors["losses"].to(self.losses)
        for generator, state in zip(self._generators, tensors["generators"], strict=True):
            generator.set_state(state.clone())  # of a view, torch reads past the end


def pixel_bounds(
    op: str, pixel_range: Sequence[float | Sequence[float]], channels: int, like: Tensor
) -> tuple[Tensor, Tensor]:
    """Least and largest pixel values, ``[C, 1, 1]`` or ``[1, 1, 1]``."""
    rule = f"be two finite numbers, or two lists of {channels}, the lower first"
    try:
        low, high = (torch.tensor(end, dtype=torch.float64) for end in pixel_range)
    except (TypeError, ValueError):
        raise invalid(op, "pixel_range", rule, repr(pixel_range)) from None
    fits = low.shape == high.shape and low.shape in ((), (channels,))
    if not fits or not (low < high).all() or not (high - low).isfinite().all():
        raise invalid(op, "pixel_range", rule, repr(pixel_range))
    return low.reshape(-1, 1, 1).to(like), high.reshape(-1, 1, 1).to(like)
