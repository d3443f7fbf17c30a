"""What natural images have in common: terms that keep inverted images from being noise."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lora_fused.checks import invalid
from lora_fused.methods.recycle.runs import fitted

_OP = "FeatureStatistics"


class Prior:
    """A term of each teacher's loss; subclass it to add another.

    ``invert`` enters ``watch`` once, then for each step calls ``reset``, runs the model, and calls
    the prior with the images and how many of them, in succession, are each teacher's.
    """

    @contextlib.contextmanager
    def watch(self, model: nn.Module) -> Iterator[None]:
        """Capture what the prior needs of the forwards of ``model`` inside the with block."""
        yield

    def reset(self) -> None:
        """Forget what was captured."""

    def tensors(self) -> list[Tensor]:
        """What decides the prior's values: a resumed run must find the same."""
        return []

    def __call__(self, images: Tensor, counts: Sequence[int]) -> Tensor:
        """One value per teacher, ``[T]``, of ``images [N, C, H, W]`` in runs of ``counts``."""
        raise NotImplementedError


class NoPrior(Prior):
    """0 for every teacher."""

    def __call__(self, images: Tensor, counts: Sequence[int]) -> Tensor:
        return images.new_zeros(len(counts))


class TotalVariation(Prior):
    """The mean absolute difference of neighbouring pixels, rows plus columns."""

    def __call__(self, images: Tensor, counts: Sequence[int]) -> Tensor:
        down = images.diff(dim=2).abs().mean((1, 2, 3))
        across = images.diff(dim=3).abs().mean((1, 2, 3))
        return torch.stack([part.mean() for part in (down + across).split(list(counts))])


class Weighted(Prior):
    """A sum of priors, each times its weight: ``Weighted([(statistics, 1), (variation, 10)])``."""

    def __init__(self, priors: Iterable[tuple[Prior, float]]):
        self.priors = [(prior, float(weight)) for prior, weight in priors]

    @contextlib.contextmanager
    def watch(self, model: nn.Module) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for prior, _ in self.priors:
                stack.enter_context(prior.watch(model))
            yield

    def reset(self) -> None:
        for prior, _ in self.priors:
            prior.reset()

    def tensors(self) -> list[Tensor]:
        weights = torch.tensor([weight for _, weight in self.priors])
        return [weights, *(t for prior, _ in self.priors for t in prior.tensors())]

    def __call__(self, images: Tensor, counts: Sequence[int]) -> Tensor:
        return sum(weight * prior(images, counts) for prior, weight in self.priors)


class Statistics(NamedTuple):
    """Mean and variance ``[C]`` of a module's inputs, C along ``axis``, over all other axes."""

    mean: Tensor
    variance: Tensor
    axis: int


class FeatureStatistics(Prior):
    """sum over modules of ||mean - target mean||_2 + ||variance - target variance||_2.

    Means and variances are those of a module's inputs over one teacher's images and positions: a
    teacher's term does not depend on whose images share the batch.

    Args:
        network: A network in eval mode. The model that is inverted, or a part of it: inputs are
            captured in the model's own forward. Any other: it runs on the images besides.
        targets: Module of the network -> the statistics its inputs should have.
        transform: Of the images, before another network: other pixel scaling, another size.
    """

    def __init__(
        self,
        network: nn.Module,
        targets: Mapping[str, Statistics],
        *,
        transform: Callable[[Tensor], Tensor] | None = None,
    ):
        modules = dict(network.named_modules())
        unknown = [name for name in targets if name not in modules]
        if unknown or not targets:
            rule = "name modules of the network"
            raise invalid(_OP, "targets", rule, unknown[:5] or "none")
        if network.training:
            raise invalid(_OP, "network", "be in eval mode (network.eval())", "train mode")
        self.network, self.targets, self.transform = network, dict(targets), transform
        self._inside = False
        self._captured: list[tuple[str, Tensor]] = []

    @classmethod
    def of_batchnorm(
        cls, network: nn.Module, *, transform: Callable[[Tensor], Tensor] | None = None
    ) -> "FeatureStatistics":
        """Every BatchNorm2d's input should have its running mean and variance (DeepInversion)."""
        targets = {
            name: Statistics(module.running_mean.clone(), module.running_var.clone(), 1)
            for name, module in network.named_modules()
            if isinstance(module, nn.BatchNorm2d) and module.running_mean is not None
        }
        if not targets:
            rule = "have BatchNorm2d modules with running statistics"
            raise invalid(_OP, "network", rule, type(network).__name__)
        return cls(network, targets, transform=transform)

    @classmethod
    @torch.no_grad()
    def of_tokens(
        cls,
        model: nn.Module,
        images: Tensor,
        *,
        modules: Sequence[str] | None = None,
        batch_size: int = 64,
    ) -> "FeatureStatistics":
        """A vision transformer's own: of the inputs of its LayerNorms on ``images``.

        A transformer stores no statistics of its training images, so some images must give them:
        any natural ones, unlabelled, of other data than the teachers'. Then the inversion knows
        those images' statistics, and should be reported so. Of noise from N(0, 1) nothing can be
        learned this way: its statistics are those of the start, and hold the images there. Under
        pruning, blocks behind a drop see the kept tokens alone, and the targets are those of all.

        Args:
            model: In eval mode, without a mixture in force.
            images: ``[N, C, H, W]``, as the model takes them.
            modules: Whose inputs. Default: every nn.LayerNorm.
            batch_size: Images of one forward.
        """
        if modules is None:
            modules = [n for n, m in model.named_modules() if isinstance(m, nn.LayerNorm)]
        blank = Statistics(torch.zeros(()), torch.zeros(()), -1)
        sums: dict[str, list] = {}
        prior = cls(model, dict.fromkeys(modules, blank))
        with prior.watch(model):
            for part in images.split(batch_size):
                prior.reset()
                model(part)
                for name, x in prior._captured:
                    x = x.double().flatten(0, -2)
                    found = [x.sum(0), x.square().sum(0), len(x)]
                    held = sums.get(name, (0, 0, 0))
                    sums[name] = [a + b for a, b in zip(held, found, strict=True)]
        silent = [name for name in modules if name not in sums]
        if silent:
            raise invalid(_OP, "modules", "run in the model's forward", silent[:5])
        dtype = images.dtype
        for name, (total, squares, count) in sums.items():
            mean = total / count
            variance = (squares / count - mean.square()).clamp_min(0)
            prior.targets[name] = Statistics(mean.to(dtype), variance.to(dtype), -1)
        return prior

    def tensors(self) -> list[Tensor]:
        return [t for target in self.targets.values() for t in target[:2]]

    @contextlib.contextmanager
    def watch(self, model: nn.Module) -> Iterator[None]:
        self._inside = any(module is self.network for module in model.modules())
        hooks = []
        try:
            for name in self.targets:
                module = self.network.get_submodule(name)
                hooks.append(module.register_forward_pre_hook(self._capture(name)))
            yield
        finally:
            for hook in hooks:
                hook.remove()
            self.reset()

    def _capture(self, name: str) -> Callable:
        def hook(module: nn.Module, args: tuple) -> None:
            self._captured.append((name, args[0]))

        return hook

    def reset(self) -> None:
        self._captured.clear()

    def __call__(self, images: Tensor, counts: Sequence[int]) -> Tensor:
        if not self._inside:
            images = images if self.transform is None else self.transform(images)
            self.network(fitted(images, self.network))
        silent = self.targets.keys() - {name for name, _ in self._captured}
        if silent:
            raise invalid(_OP, "targets", "run in every forward", sorted(silent)[:5])
        total = 0
        for name, x in self._captured:
            target = self.targets[name]
            rows = x.movedim(target.axis, -1).reshape(len(x), -1, x.shape[target.axis])
            if len(rows) != sum(counts):
                rule = f"take inputs whose first axis is the batch, {sum(counts)}"
                raise invalid(_OP, f"module {name!r}", rule, len(rows))
            total = total + torch.stack([_gap(part, target) for part in rows.split(list(counts))])
        return total


def _gap(rows: Tensor, target: Statistics) -> Tensor:
    variance, mean = torch.var_mean(rows, (0, 1), correction=0)
    off = (mean - target.mean.to(mean)).norm() + (variance - target.variance.to(mean)).norm()
    return off
