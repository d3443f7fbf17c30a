"""What a subspace's figures come to, in words."""

import dataclasses
import math
import statistics

# Less than this of the energy is nothing, however significant; more than so many standard errors is
# hardly chance: of 240 small banks that share nothing, 3 came out as "hardly shared".
_LEAST, _SIGNIFICANT = 0.01, 3.0


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


def verdict_of(report) -> Verdict:
    """The verdict on a SubspaceReport: what is held of adapters left out, against the null."""
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


def _remarks(report, label: str) -> list[str]:
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


def _standard_error(report) -> float:
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
