"""Is a subspace shared at all? A fitted one against its negative controls.

Explained variance alone says little: a basis of P directions explains much of any few adapters. So
everything is set beside the same for adapters that share nothing (``controls.unrelated``), and
above all: how well an adapter is reconstructed that the fit has not seen.
"""

import dataclasses
import functools
import os
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from lora_fused.adapters import AdapterBank
from lora_fused.checks import check_whole, invalid
from lora_fused.methods.basis import Directions, SharedBasis
from lora_fused.methods.clusters import similarity
from lora_fused.methods.controls import regauged, unrelated
from lora_fused.methods.cores import cores_of_bank
from lora_fused.methods.eigenlorax import fit_subspace, leave_one_out
from lora_fused.methods.initialisations import shared_initialisations
from lora_fused.methods.products import Updates, norms
from lora_fused.methods.progress import show
from lora_fused.methods.subspace import FitOptions, Subspace
from lora_fused.methods.subspace_errors import SubspaceErrors
from lora_fused.methods.subspace_verdict import Verdict, verdict_of

_OP = "subspace_report"
_GAUGE = 1e-4  # what rounding may change
_SAMPLE = 100  # adapters left out, at the most
_MAPPED = 200  # adapters in the map: more could not be told apart, and cost their square


@dataclasses.dataclass(frozen=True)
class Scree:
    """Shares of a module's energy along each direction, of inputs (a) and outputs (b)."""

    a: list[float]
    b: list[float]
    null_a: list[float]
    null_b: list[float]


@dataclasses.dataclass(frozen=True)
class MeanCheck:
    """Errors with less than the whole basis.

    Attributes:
        alone: with the mean's direction of either side and nothing else.
        null_alone: the same, of adapters that share nothing.
        dropped: with the mean subtracted and not kept, as the released code of the paper does;
            None where the fit does not centre, or drops it itself.
    """

    alone: float
    null_alone: float
    dropped: float | None


@dataclasses.dataclass(frozen=True)
class GaugeCheck:
    """What changes if every (A, B) is written as (M A, M^-T B), the same update.

    Attributes:
        error: of the fit to these.
        spectrum: the largest change of a singular value, of the largest in its module.
        invariant: neither changes by more than 1e-4.
    """

    error: float
    spectrum: float
    invariant: bool


@dataclasses.dataclass(frozen=True)
class SubspaceReport:
    """A subspace against its controls; errors are relative Frobenius norms of the products.

    Attributes:
        options: how the subspace was fitted, and its controls with it.
        fitted: of the subspace itself, on the adapters that it was fitted to.
        null_fitted: the same of each draw of adapters that share nothing.
        held_out: of each adapter left out (its ``names``) in a basis fitted to the others.
        null_held_out: the same of each draw.
        at_once: how many were left out of one fit: 1, or 1 % of many.
        scree: module -> Scree, of the modules that some adapter changes.
        mean, gauge: see MeanCheck and GaugeCheck.
        shared_a: groups of adapters whose A's descend from one random initialisation.
        similarity: cosines of the updates ``[n, n]`` of the adapters ``mapped``.
        mapped: 200 of ``fitted.names`` at the most.
        skipped: adapters that only the bank or only the subspace has.
    """

    options: FitOptions
    fitted: SubspaceErrors
    null_fitted: tuple[SubspaceErrors, ...]
    held_out: SubspaceErrors
    null_held_out: tuple[SubspaceErrors, ...]
    at_once: int
    scree: dict[str, Scree]
    mean: MeanCheck
    gauge: GaugeCheck
    shared_a: list[dict]
    similarity: Tensor
    mapped: tuple[str, ...]
    skipped: list[str]

    @property
    def verdict(self) -> Verdict:
        return verdict_of(self)

    @property
    def sampled(self) -> str:
        """What stands for all adapters where there are many, in words; else nothing."""
        count, told = len(self.fitted.names), []
        if len(self.held_out.names) < count:
            several = f", {self.at_once} at a time" if self.at_once > 1 else ""
            told.append(f"{len(self.held_out.names)} of {count} adapters were left out{several}")
        if len(self.mapped) < count:
            told.append(f"{len(self.mapped)} of {count} adapters are in the map")
        return "; ".join(told)

    def __str__(self) -> str:
        figures = [f"{name}: {figure}" for name, figure in self.figures()]
        return "\n".join([*self.verdict.sentences, "", *figures, *filter(None, [self.sampled])])

    def figures(self) -> list[tuple[str, str]]:
        """The headline figures, each with what it is."""
        null = _span([e.overall for e in self.null_fitted])
        found = [("error of adapters in the fit", f"{self.fitted.overall:.3f}, null {null}")]
        null = _span([e.overall for e in self.null_held_out])
        told = f"{self.held_out.overall:.3f}, null {null}"
        found.append(("error of an adapter left out of the fit", told))
        told = f"{self.mean.alone:.3f}, null {self.mean.null_alone:.3f}"
        found.append(("error with the mean's direction alone", told))
        if self.mean.dropped is not None:
            found.append(("error with the mean dropped", f"{self.mean.dropped:.3f}"))
        told = f"{self.gauge.error:.3f}, spectrum by {self.gauge.spectrum:.2g}: "
        told += "unchanged" if self.gauge.invariant else "the result depends on the gauge"
        found.append(("error after a random change of gauge", told))
        return found

    def modules(self) -> list[dict]:
        """Per module: shares of energy kept by the products, and errors; each with its null."""
        found = []
        sides = [e.by_module for e in (self.fitted, self.held_out)]
        nulls = [[e.by_module for e in part] for part in (self.null_fitted, self.null_held_out)]
        for module, scree in self.scree.items():
            error, left_out = (side[module] for side in sides)
            null, null_left_out = ([e[module] for e in part] for part in nulls)
            found.append(
                {
                    "module": module,
                    "kept": 1 - error**2,
                    "null_kept": 1 - statistics.fmean(null) ** 2,
                    "explained_a": sum(scree.a),
                    "null_explained_a": sum(scree.null_a),
                    "explained_b": sum(scree.b),
                    "null_explained_b": sum(scree.null_b),
                    "held_out": left_out,
                    "null_held_out": null_left_out,
                }
            )
        return found

    def adapters(self) -> list[dict]:
        """Per adapter: its errors in the fit and, if it was, left out of it; each with its null."""
        fitted, held_out = self.fitted.adapters, self.held_out.adapters
        null = [e.adapters for e in self.null_fitted]
        null_held_out = [e.adapters for e in self.null_held_out]

        def entry(name: str) -> dict:
            left = name in held_out
            return {
                "adapter": name,
                "error": fitted[name],
                "null_error": statistics.fmean(e[name] for e in null),
                "held_out": held_out[name] if left else None,
                "null_held_out": statistics.fmean(e[name] for e in null_held_out) if left else None,
            }

        return [entry(name) for name in self.fitted.names]

    def to_dict(self) -> dict:
        """Everything, as JSON can hold it."""
        return {
            "verdict": dataclasses.asdict(self.verdict),
            "options": dataclasses.asdict(self.options),
            "error": self.fitted.overall,
            "null_error": [e.overall for e in self.null_fitted],
            "held_out": self.held_out.overall,
            "null_held_out": [e.overall for e in self.null_held_out],
            "left_out": list(self.held_out.names),
            "left_out_at_once": self.at_once,
            "mean": dataclasses.asdict(self.mean),
            "gauge": dataclasses.asdict(self.gauge),
            "shared_a": self.shared_a,
            "adapters": self.adapters(),
            "modules": self.modules(),
            "scree": {m: dataclasses.asdict(s) for m, s in self.scree.items()},
            "similarity": self.similarity.tolist(),
            "mapped": list(self.mapped),
            "skipped": self.skipped,
        }

    def to_html(self) -> str:
        """One page with everything in it: plots, tables, the verdict first."""
        from lora_fused.methods.subspace_page import html

        return html(self)

    def save_html(self, path: str | os.PathLike) -> Path:
        """Write ``to_html()``; the folder must exist."""
        from lora_fused.report import save

        return save(self.to_html(), path)


@torch.no_grad()
def subspace_report(
    subspace: Subspace,
    bank: AdapterBank,
    *,
    null_draws: int = 3,
    sample: int = _SAMPLE,
    names: Sequence[str] | None = None,
    seed: int = 0,
    progress: bool | Callable[[int, int], None] = True,
) -> SubspaceReport:
    """Say how much of a subspace is shared by its adapters, and how much any basis would give.

    Args:
        subspace: Fitted to the bank.
        bank: The adapters themselves. What only one of the two has is left out, and named.
        null_draws: How many times adapters that share nothing are drawn, fitted and left out.
        sample: Of more adapters than these, so many are drawn and left out, from 200 adapters on
            1 % of all at a time; and 200 are drawn for the map. The report says so.
        names: The adapters to leave out, in place of a sample.
        seed: Of all that is drawn.
        progress: True: a line on stderr where that is a terminal; or called as
            progress(done, total).

    Returns:
        SubspaceReport: prints in words; ``to_dict()``, ``save_html(path)``.

    Raises:
        ValueError: fewer than two adapters in common, or modules that do not fit.

    Cost:
        (1 + null_draws) (n + 1) fits of the bank's size and three more, where n is the number of
        adapters for up to 100 of them, and 10 for 1000.

    Example:
        >>> report = subspace_report(subspace, bank)
        >>> print(report)
        >>> report.save_html("report.html")
    """
    bank, skipped = _common(subspace, bank)
    check_whole(_OP, "null_draws", null_draws)
    check_whole(_OP, "sample", sample, least=2)
    left, mapped = _drawn(bank.names, names, sample, seed)
    at_once = max(1, len(bank) // _SAMPLE)
    step = _counter(progress, (1 + null_draws) * (-(-len(left) // at_once) + 1))
    leave = functools.partial(
        leave_one_out, options=subspace.options, names=left, at_once=at_once, progress=step
    )
    held_out, gauge = leave(bank), _gauge_check(subspace, bank, seed)
    step()
    nulls = [
        _null(unrelated(bank, seed=seed + k), subspace, leave, step) for k in range(null_draws)
    ]
    return SubspaceReport(
        options=subspace.options,
        fitted=subspace.errors(bank, bank.names),
        null_fitted=tuple(null.fitted for null in nulls),
        held_out=held_out,
        null_held_out=tuple(null.held_out for null in nulls),
        at_once=at_once,
        scree={m: _scree(subspace, nulls, m) for m in _changed(bank)},
        mean=_mean_check(bank, nulls, subspace.options),
        gauge=gauge,
        shared_a=shared_initialisations([bank.adapter(name) for name in bank.names]),
        similarity=similarity(bank.subset(mapped)).cpu(),
        mapped=tuple(mapped),
        skipped=skipped,
    )


@dataclasses.dataclass(frozen=True)
class _Null:
    """What is kept of a draw, whose bank is as large as the real one."""

    fitted: SubspaceErrors
    held_out: SubspaceErrors
    shares: dict[str, dict[str, list[float]]]
    mean_alone: float


def _null(bank: AdapterBank, subspace: Subspace, leave: Callable, step: Callable) -> _Null:
    fit = _fit(bank, subspace.options)
    step()
    shares = {m: {s: _shares(getattr(b, s)) for s in "ab"} for m, b in fit.bases.items()}
    errors = fit.errors(bank)
    return _Null(errors, leave(bank), shares, _mean_alone(bank, subspace.options))


def _drawn(
    known: list[str], names: Sequence[str] | None, sample: int, seed: int
) -> tuple[list[str], list[str]]:
    """The adapters to leave out and those for the map, in the order of the bank."""
    generator = torch.Generator().manual_seed(seed)
    order = [known[k] for k in torch.randperm(len(known), generator=generator).tolist()]
    if names is None:
        left = set(order[:sample])
    else:
        left = set(names)
        unknown = sorted(left.difference(known))
        if unknown or len(left) < 2:
            rule = "be two or more adapters of both bank and subspace"
            raise invalid(_OP, "names", rule, unknown or list(names))
        order.sort(key=lambda name: name not in left)
    shown = set(order[:_MAPPED])
    return [name for name in known if name in left], [name for name in known if name in shown]


def _common(subspace: Subspace, bank: AdapterBank) -> tuple[AdapterBank, list[str]]:
    if not isinstance(subspace, Subspace):
        raise invalid(_OP, "subspace", "be a Subspace", type(subspace).__name__)
    if not isinstance(bank, AdapterBank):
        raise invalid(_OP, "bank", "be an AdapterBank", type(bank).__name__)
    names = [name for name in bank.names if name in subspace]
    if len(names) < 2:
        rule = "share at least two adapters with the subspace"
        raise invalid(_OP, "bank", rule, f"{len(names)} of {len(subspace)}")
    common = bank.subset(names)
    for module, stack in common.stacks.items():
        basis = subspace.bases.get(module)
        sizes = basis and (basis.basis_a.shape[1], basis.basis_b.shape[1])
        if sizes != (stack.in_features, stack.out_features):
            rule = f"fit the subspace's sizes (I, O) = {sizes} at {module!r}"
            raise invalid(_OP, "bank", rule, (stack.in_features, stack.out_features))
    return common, sorted(set(bank.names) ^ set(subspace.names))


def _changed(bank: AdapterBank) -> list[str]:
    """Modules with an update that is not zero."""
    return [module for module, stack in bank.stacks.items() if norms(stack).any()]


def _counter(progress, total: int) -> Callable:
    """A function that counts one more step, whatever it is called with."""
    done = 0

    def step(*_) -> None:
        nonlocal done
        done += 1
        show(progress, done, total, f"{_OP}: {done} of {total}")

    return step


def _fit(bank: AdapterBank, options: FitOptions) -> Subspace:
    return fit_subspace(bank, **dataclasses.asdict(options), progress=False)


def _scree(subspace: Subspace, nulls: list[_Null], module: str) -> Scree:
    real = subspace.bases[module]
    drawn = [[null.shares[module][side] for null in nulls] for side in "ab"]
    # With energy= in place of rank= the draws may differ in length.
    null_a, null_b = (list(map(statistics.fmean, zip(*part, strict=False))) for part in drawn)
    return Scree(_shares(real.a), _shares(real.b), null_a, null_b)


def _shares(side: Directions) -> list[float]:
    if side.total <= 0:
        return [0.0] * len(side)
    return (side.spectrum.double().square() / side.total).tolist()


def _mean_check(bank: AdapterBank, nulls: list[_Null], options: FitOptions) -> MeanCheck:
    dropped = None
    if options.method == "eigenlorax" and options.center and options.keep_mean:
        dropped = _fit(bank, dataclasses.replace(options, keep_mean=False)).errors(bank).overall
    null = statistics.fmean(null.mean_alone for null in nulls)
    return MeanCheck(_mean_alone(bank, options), null, dropped)


def _mean_alone(bank: AdapterBank, options: FitOptions) -> float:
    bases = {}
    for module, stack in bank.stacks.items():
        updates = Updates(stack, equal=options.weighting == "equal")
        rows = [updates.weighted_rows(side, options.weighting).mean(0) for side in "ab"]
        rows = [torch.nn.functional.normalize(row[None], dim=1) for row in rows]
        sides = [Directions(row, row.new_ones(1), 1.0) for row in rows]
        bases[module] = SharedBasis(*sides, embedding=stack.embedding)
    cores = cores_of_bank(bank, bases, diagonal=False)
    return Subspace(bases, cores, FitOptions(rank=1)).errors(bank).overall


def _gauge_check(subspace: Subspace, bank: AdapterBank, seed: int) -> GaugeCheck:
    """Both fitted anew: the subspace may have had adapters added, or more of them."""
    fits = [_fit(b, subspace.options) for b in (bank, regauged(bank, seed=seed))]
    before, after = (fit.errors(bank).overall for fit in fits)
    changes = []
    for one, other in zip(*(fit.bases.values() for fit in fits), strict=True):
        for side in "ab":
            old, new = (getattr(basis, side).spectrum.double() for basis in (one, other))
            shared = min(len(old), len(new))
            largest = max(float(old.max()), 1e-300)
            changes.append(float((old[:shared] - new[:shared]).abs().max()) / largest)
    change = max(changes)
    return GaugeCheck(after, change, max(change, abs(after - before)) <= _GAUGE)


def _span(values: list[float]) -> str:
    low, high = f"{min(values):.3f}", f"{max(values):.3f}"
    return low if low == high else f"{low} to {high}"
