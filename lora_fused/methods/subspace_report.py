"""Is a subspace shared at all? A fitted one against its negative controls.

Explained variance alone says little: a basis of P directions explains much of any few adapters. So
everything is set beside the same for adapters that share nothing (``controls.unrelated``), and
above all: how well an adapter is reconstructed that the fit has not seen.
"""

import dataclasses
import math
import os
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from lora_fused.adapters import AdapterBank
from lora_fused.checks import invalid
from lora_fused.methods.basis import Directions, SharedBasis
from lora_fused.methods.clusters import similarity
from lora_fused.methods.controls import regauged, unrelated
from lora_fused.methods.cores import cores_of_bank
from lora_fused.methods.eigenlorax import fit_subspace, leave_one_out
from lora_fused.methods.initialisations import shared_initialisations
from lora_fused.methods.products import Updates, norms
from lora_fused.methods.subspace import FitOptions, Subspace
from lora_fused.methods.subspace_errors import SubspaceErrors

_OP = "subspace_report"
# Less than this of the energy is nothing, however significant; more than so many standard errors is
# hardly chance: of 240 small banks that share nothing, 3 came out as "hardly shared".
_LEAST, _SIGNIFICANT = 0.01, 3.0
_GAUGE = 1e-4  # what rounding may change


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
class Verdict:
    """What the figures say.

    Attributes:
        label: "shared", "partly shared", "hardly shared", "not shared" or "undecided".
        gain: what the basis holds of an unseen adapter's energy beyond the null, as a share of what
            the null leaves over: 0 nothing, 1 all.
        sentences: in words, the label first.
    """

    label: str
    gain: float
    sentences: list[str]


@dataclasses.dataclass(frozen=True)
class SubspaceReport:
    """A subspace against its controls; errors are relative Frobenius norms of the products.

    Attributes:
        options: how the subspace was fitted, and its controls with it.
        fitted: of the subspace itself, on the adapters that it was fitted to.
        null_fitted: the same of each draw of adapters that share nothing.
        held_out: of every adapter in a basis fitted to the others.
        null_held_out: the same of each draw.
        scree: module -> Scree, of the modules that some adapter changes.
        mean, gauge: see MeanCheck and GaugeCheck.
        shared_a: groups of adapters whose A's descend from one random initialisation.
        similarity: cosines of the updates ``[K, K]``, in the order of ``fitted.names``.
        skipped: adapters that only the bank or only the subspace has.
    """

    options: FitOptions
    fitted: SubspaceErrors
    null_fitted: tuple[SubspaceErrors, ...]
    held_out: SubspaceErrors
    null_held_out: tuple[SubspaceErrors, ...]
    scree: dict[str, Scree]
    mean: MeanCheck
    gauge: GaugeCheck
    shared_a: list[dict]
    similarity: Tensor
    skipped: list[str]

    @property
    def verdict(self) -> Verdict:
        return _verdict(self)

    def __str__(self) -> str:
        return "\n".join([*self.verdict.sentences, "", *(f"{k}: {v}" for k, v in self.figures())])

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
        """Per adapter: its errors in the fit and left out of it, each with its null."""
        null = [e.adapters for e in self.null_fitted]
        null_left_out = [e.adapters for e in self.null_held_out]
        return [
            {
                "adapter": name,
                "error": self.fitted.adapters[name],
                "null_error": statistics.fmean(e[name] for e in null),
                "held_out": self.held_out.adapters[name],
                "null_held_out": statistics.fmean(e[name] for e in null_left_out),
            }
            for name in self.fitted.names
        ]

    def to_dict(self) -> dict:
        """Everything, as JSON can hold it."""
        return {
            "verdict": dataclasses.asdict(self.verdict),
            "options": dataclasses.asdict(self.options),
            "error": self.fitted.overall,
            "null_error": [e.overall for e in self.null_fitted],
            "held_out": self.held_out.overall,
            "null_held_out": [e.overall for e in self.null_held_out],
            "mean": dataclasses.asdict(self.mean),
            "gauge": dataclasses.asdict(self.gauge),
            "shared_a": self.shared_a,
            "adapters": self.adapters(),
            "modules": self.modules(),
            "scree": {m: dataclasses.asdict(s) for m, s in self.scree.items()},
            "similarity": self.similarity.tolist(),
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
    seed: int = 0,
    progress: bool | Callable[[int, int], None] = True,
) -> SubspaceReport:
    """Say how much of a subspace is shared by its adapters, and how much any basis would give.

    Args:
        subspace: Fitted to the bank.
        bank: The adapters themselves. What only one of the two has is left out, and named.
        null_draws: How many times adapters that share nothing are drawn, fitted and left out.
        seed: Of the draws.
        progress: True: a line on stderr where that is a terminal; or called as
            progress(done, total).

    Returns:
        SubspaceReport: prints in words; ``to_dict()``, ``save_html(path)``.

    Raises:
        ValueError: fewer than two adapters in common, or modules that do not fit.

    Cost:
        (1 + null_draws) (K + 1) fits of the bank's size, for K adapters.

    Example:
        >>> report = subspace_report(subspace, bank)
        >>> print(report)
        >>> report.save_html("report.html")
    """
    bank, skipped = _common(subspace, bank)
    if not isinstance(null_draws, int) or isinstance(null_draws, bool) or null_draws < 1:
        raise invalid(_OP, "null_draws", "be an integer of at least 1", repr(null_draws))
    options, names = subspace.options, bank.names
    step = _counter(progress, (1 + null_draws) * (len(bank) + 1))
    nulls = [unrelated(bank, seed=seed + draw) for draw in range(null_draws)]
    held_out = leave_one_out(bank, options, progress=step)
    gauge = _gauge_check(subspace, bank, seed)
    step()
    null_fits, null_held_out = [], []
    for null in nulls:
        null_fits.append(_fit(null, options))
        step()
        null_held_out.append(leave_one_out(null, options, progress=step))
    return SubspaceReport(
        options=options,
        fitted=subspace.errors(bank, names),
        null_fitted=tuple(f.errors(n) for f, n in zip(null_fits, nulls, strict=True)),
        held_out=held_out,
        null_held_out=tuple(null_held_out),
        scree={m: _scree(subspace, null_fits, m) for m in _changed(bank)},
        mean=_mean_check(bank, nulls, options),
        gauge=gauge,
        shared_a=shared_initialisations([bank.adapter(name) for name in names]),
        similarity=similarity(bank).cpu(),
        skipped=skipped,
    )


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
        if callable(progress):
            progress(done, total)
        elif progress and sys.stderr.isatty():
            end = "\n" if done == total else ""
            print(f"\r{_OP}: {done} of {total}", end=end, file=sys.stderr, flush=True)

    return step


def _fit(bank: AdapterBank, options: FitOptions) -> Subspace:
    return fit_subspace(bank, **dataclasses.asdict(options), progress=False)


def _scree(subspace: Subspace, nulls: list[Subspace], module: str) -> Scree:
    real = subspace.bases[module]
    others = [null.bases[module] for null in nulls]
    drawn = [[_shares(getattr(o, side)) for o in others] for side in "ab"]
    # With energy= in place of rank= the draws may differ in length.
    null_a, null_b = (list(map(statistics.fmean, zip(*part, strict=False))) for part in drawn)
    return Scree(_shares(real.a), _shares(real.b), null_a, null_b)


def _shares(side: Directions) -> list[float]:
    if side.total <= 0:
        return [0.0] * len(side)
    return (side.spectrum.double().square() / side.total).tolist()


def _mean_check(bank: AdapterBank, nulls: list[AdapterBank], options: FitOptions) -> MeanCheck:
    dropped = None
    if options.method == "eigenlorax" and options.center and options.keep_mean:
        dropped = _fit(bank, dataclasses.replace(options, keep_mean=False)).errors(bank).overall
    null = statistics.fmean(_mean_alone(null, options) for null in nulls)
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


def _verdict(report: SubspaceReport) -> Verdict:
    held = 1 - report.held_out.overall**2
    null = 1 - statistics.fmean(e.overall**2 for e in report.null_held_out)
    gain = (held - null) / max(1 - null, 1e-12)
    error, null_error = report.held_out.overall, math.sqrt(max(1 - null, 0.0))
    figures = f"error {error:.2f}, against {null_error:.2f} for adapters that share nothing"
    if null > 0.9:
        label = "undecided"
        said = f"the basis is so large that it holds anything ({figures}); fit fewer directions"
    elif held - null <= max(_LEAST, _SIGNIFICANT * _standard_error(report)):
        label = "not shared"
        said = "an adapter left out of the fit is reconstructed no better than one that shares "
        said += f"nothing with the rest ({figures}). The basis describes these adapters alone"
    else:
        label = "shared" if gain >= 0.75 else "partly shared" if gain >= 0.25 else "hardly shared"
        lost = 100 * error**2
        said = f"an adapter left out of the fit loses {lost:.0f} % of its energy ({figures})"
    sentences = [f"Subspace {label}: {said}."]
    if label != "undecided":
        sentences += _remarks(report, label)
    return Verdict(label, gain, sentences)


def _remarks(report: SubspaceReport, label: str) -> list[str]:
    kept = 100 * (1 - report.fitted.overall**2)
    null = 100 * (1 - statistics.fmean(e.overall**2 for e in report.null_fitted))
    said = f"The basis holds {kept:.0f} % of the energy of the adapters that it was fitted to, "
    found = [said + f"and {null:.0f} % where nothing is shared."]
    if label in ("hardly shared", "not shared"):
        found.append("It stores these adapters; a new one will hardly lie in it.")
    for group in report.shared_a:
        size, count = len(group["adapters"]), len(report.fitted.names)
        said = f"{size} of {count} adapters share one random A (median |cosine| "
        said += f"{group['median_cosine']:.2f}): part of what looks shared is their seed."
        if label in ("shared", "partly shared"):
            said += " Train some from other seeds before you believe it."
        found.append(said)
    if not report.gauge.invariant:
        said = f"The result depends on how A and B share an update ({report.fitted.overall:.3f} "
        said += f"becomes {report.gauge.error:.3f}); hosvd and hooi do not."
        found.append(said)
    return found


def _standard_error(report: SubspaceReport) -> float:
    """Of the energy held of unseen adapters less its null, were nothing shared.

    From the draws alone: that real adapters differ among themselves is no sign of chance. Twice
    the variance of independent adapters: where two are alike by chance, both gain.
    """
    weight = report.held_out.norms.square().sum(1)
    weight = (weight / weight.sum().clamp_min(1e-300)).square().sum().item()
    draws = report.null_held_out
    held = [1 - error**2 for draw in draws for error in draw.adapters.values() if error < math.inf]
    variance = 2 * weight * statistics.variance(held)
    if len(draws) > 1:
        variance = max(variance, statistics.variance([1 - e.overall**2 for e in draws]))
    return math.sqrt(variance * (1 + 1 / len(draws)))


def _span(values: list[float]) -> str:
    low, high = f"{min(values):.3f}", f"{max(values):.3f}"
    return low if low == high else f"{low} to {high}"
