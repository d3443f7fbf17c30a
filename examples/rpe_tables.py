"""What the rows of rpe_leave_one_out.py say: figures, and tables in Markdown."""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from composition_few_shot_tables import better, grid, points
from resumable import interval
from rpe_ensembles import RETRIEVED, Way, way

_DISTANCES = {"raw features": "distance", "unit length": "unit_distance"}
Values = Mapping[str, float]  # task -> a number
NUMBERS = (
    *("accuracy", "adapters", "negative_mass"),
    *("distance", "unit_distance", "hull", "warned"),
)
# (of whom, the paper's claim or our control, one, another): the first is to be better.
CLAIMS = (
    *(("others", one, "l1", one) for one in ("base", "nearest", "uniform", "similarity", "linear")),
    ("others", "all's mean beats base", "uniform-all", "base"),
    ("others", "own", "own", "l1"),
    ("others", "nearest beats base", "nearest", "base"),
    ("others", "nearest beats a random one (control)", "nearest", "random"),
    ("others", "l1 beats a random one (control)", "l1", "random"),
    ("others", "all's mean beats null-uniform (control)", "uniform-all", "null-uniform"),
    ("others", "simplex beats null-simplex (control)", "simplex", "null-simplex"),
    ("others", "l1 beats all's mean", "l1", "uniform-all"),
    ("others", "the best single beats l1", "best*", "l1"),
    ("all", "own", "l1", "own"),
    ("all", "nearest", "l1", "nearest"),
)


class Found(NamedTuple):
    """The finished cells, a task's seeds averaged.

    Attributes:
        names: all tasks with an adapter.
        k: neighbours of the main table.
        numbers: column -> way -> task -> value.
        told: way of "explain" -> task -> the first seed's row.
    """

    names: list[str]
    k: int
    numbers: dict[str, dict[Way, dict[str, float]]]
    told: dict[Way, dict[str, dict]]

    def of(self, how: Way, column: str = "accuracy") -> Values:
        return self.numbers[column].get(how, {})


def found(rows: Iterable[dict], names: Sequence[str], k: int) -> Found:
    """Collect the cells of a recipe."""
    held: dict[str, dict[Way, dict[str, list]]] = {column: {} for column in NUMBERS}
    told: dict[Way, dict[str, dict]] = {}
    for row in rows:
        how = _way(row)
        if how.method == "explain":
            told.setdefault(how, {}).setdefault(row["task"], row)
        for column in NUMBERS:
            if row[column]:
                values = held[column].setdefault(how, {}).setdefault(row["task"], [])
                values.append(float(row[column]))
    numbers = {
        column: {
            how: {task: statistics.fmean(values[task]) for task in names if task in values}
            for how, values in ways.items()
        }
        for column, ways in held.items()
    }
    return Found(list(names), k, numbers, told)


def _way(row: dict) -> Way:
    how = Way(**{field: row[field] for field in Way._fields})
    value = float(how.value) if how.value else ""
    return how._replace(k=int(how.k) if how.k else "", value=value)


def methods(data: Found, pool: str) -> dict[str, Values]:
    """Accuracies by task, of the columns of the main table."""
    singles = {name: data.of(Way("single", adapter=name)) for name in data.names}

    def of_singles(task: str) -> list[float]:
        names = [name for name in data.names if pool == "all" or name != task]
        return [singles[name][task] for name in names if task in singles[name]]

    whole = len(data.names) - (pool == "others")
    tasks = [task for task in data.names if len(of_singles(task)) == whole]
    nulls = {"null-uniform": whole, "null-simplex": data.k} if pool == "others" else {}
    return {
        "base": data.of(Way("base")),
        **{m: data.of(way(m, count)) for m, count in nulls.items()},
        # What one drawn at random gives on average: no draw, no luck.
        "random": {task: statistics.fmean(of_singles(task)) for task in tasks},
        "nearest": data.of(way("nearest", 1, pool)),
        "uniform-all": data.of(way("uniform", whole, pool)),
        **{method: data.of(way(method, data.k, pool)) for method in RETRIEVED},
        "best*": {task: max(of_singles(task)) for task in tasks},
        "own": {name: values[name] for name, values in singles.items() if name in values},
    }


def difference(one: Values, other: Values) -> tuple[list | None, int]:
    """Mean of one minus other with its 95 % interval over the tasks of both, and how many."""
    pairs = [one[task] - other[task] for task in one if task in other]
    return interval(pairs), len(pairs)


def rank_correlation(one: Values, other: Values) -> tuple[list | None, int]:
    """Spearman's, with the ends of its 95 % interval by Fisher's z, and of how many tasks."""
    tasks = [task for task in one if task in other]
    ranks = [_ranks([values[task] for task in tasks]) for values in (one, other)]
    if len(tasks) < 5 or any(len(set(r)) == 1 for r in ranks):
        return None, len(tasks)
    rho = statistics.correlation(*ranks)
    # The variance of z for ranks, by Fieller, Hartley and Pearson.
    half, z = 1.96 * math.sqrt(1.06 / (len(tasks) - 3)), math.atanh(min(max(rho, -0.9999), 0.9999))
    return [rho, math.tanh(z - half), math.tanh(z + half)], len(tasks)


def _ranks(values: Sequence[float]) -> list[float]:
    """From 1 on; equal values share the mean of theirs."""
    return [
        sum(other < value for other in values) + (sum(other == value for other in values) + 1) / 2
        for value in values
    ]


def tables(rows: Iterable[dict], names: Sequence[str], k: int) -> str:
    """Everything, in Markdown."""
    data = found(rows, names, k)
    parts = [
        _by_task(data, "others"),
        _by_task(data, "all"),
        _differences(data, "others"),
        _differences(data, "all"),
        _claims(data),
        _by_k(data),
        _by_strength(data),
        _by_input(data),
        _by_features(data),
        _by_distance(data),
        _correlations(data),
    ]
    return "\n\n".join(parts)


def _by_task(data: Found, pool: str) -> str:
    columns = methods(data, pool)
    if pool == "all":
        del columns["random"]
    rows = [[task, *(_number(v.get(task)) for v in columns.values())] for task in data.names]
    rows.append(["mean", *(_number(_mean(v)) for v in columns.values())])
    rows.append(["±", *(_half(interval(list(v.values()))) for v in columns.values())])
    told = "left out" if pool == "others" else "in the pool"
    title = f"Accuracy by task, the own adapter {told} (* chosen with test labels)"
    return _table(title, ["task", *columns], rows)


def _differences(data: Found, pool: str) -> str:
    columns = methods(data, pool)
    against = ("base", "nearest", "uniform-all", "own")
    rows = []
    for name, values in columns.items():
        if name not in ("base", *(["random"] if pool == "all" else [])):
            spans = [difference(values, columns[other])[0] for other in against]
            cells = ("" if name == o else points(s) for s, o in zip(spans, against, strict=True))
            ahead = [t for t in values if t in columns["base"]]
            won = sum(values[t] > columns["base"][t] for t in ahead)
            lost = sum(values[t] < columns["base"][t] for t in ahead)
            rows.append([name, *cells, f"{won} / {lost}"])
    told = "left out" if pool == "others" else "in the pool"
    title = f"Differences in points, 95 % interval over tasks, the own adapter {told}"
    return _table(title, ["", *(f"minus {o}" for o in against), "above / below base"], rows)


def _claims(data: Found) -> str:
    rows = []
    for pool, claim, one, other in CLAIMS:
        columns = methods(data, pool)
        told = claim if "beat" in claim else f"{one} beats {other}"
        told += " (own in the pool)" if pool == "all" else ""
        span, count = difference(columns[one], columns[other])
        rows.append([told, points(span), str(count), better(span)])
    return _table("Claims", ["claim", "points", "tasks", "holds"], rows)


def _by_k(data: Found) -> str:
    every = {how.k for how in data.numbers["accuracy"] if _plain(how)}
    ks = sorted(k for k in every if k != "")
    base, rows = data.of(Way("base")), []
    for method in RETRIEVED:
        spans = [difference(data.of(way(method, k)), base)[0] for k in ks]
        rows.append([method, *map(points, spans)])
    title = "Points above the base by k, the own adapter left out, strength 1 in raw units"
    return _table(title, ["", *map(str, ks)], rows)


def _plain(how: Way) -> bool:
    return how == way(how.method, how.k or 1) and how.method in RETRIEVED


def _by_strength(data: Found) -> str:
    base, rows = data.of(Way("base")), []
    ways = {
        how
        for how in data.numbers["accuracy"]
        if how.units and (how.of, how.pool, how.k) == ("task", "others", data.k)
    }
    for how in sorted(ways, key=lambda how: (how.method, how.units == "median", how.value)):
        name = "temperature" if how.method == "similarity" else "l1"
        negative, count = (_mean(data.of(how, c)) for c in ("negative_mass", "adapters"))
        span, _ = difference(data.of(how), base)
        cells = [f"{how.value:g}", points(span), f"{count:.1f}", f"{negative:.3f}"]
        rows.append([name, how.units, *cells])
    title = f"Points above the base by strength, k = {data.k}, the own adapter left out"
    columns = ["", "units", "value", "minus base", "adapters", "negative mass"]
    return _table(title, columns, rows)


def _by_input(data: Found) -> str:
    base, rows = data.of(Way("base")), []
    ways = [how for how in data.numbers["accuracy"] if how.of == "input"]
    for how in sorted(ways, key=lambda how: (how.pool != "others", how.k, how.method)):
        task = data.of(how._replace(of="task"))
        spans = [difference(values, base)[0] for values in (task, data.of(how))]
        spans.append(difference(data.of(how), task)[0])
        count = _mean(data.of(how, "adapters"))
        label = how.method if how.method == "nearest" else f"{how.method}, k = {how.k}"
        pool = "left out" if how.pool == "others" else "in the pool"
        rows.append([label, pool, *map(points, spans), f"{count:.1f}"])
    title = "An ensemble for each test row against one for the task, in points"
    columns = ["", "own adapter", "per task", "per input", "input minus task", "adapters"]
    return _table(title, columns, rows)


def gains(data: Found) -> dict[str, Values]:
    """What a method gives above the base, by task."""
    columns = methods(data, "others")
    wanted = ("nearest", "uniform-all", "simplex", "best*", "own")
    base = columns["base"]
    return {m: {t: v - base[t] for t, v in columns[m].items() if t in base} for m in wanted}


def places(data: Found) -> dict[str, Values]:
    """How far a task is from the library of the others, in several ways."""
    how = Way("explain", "others", data.k, features="raw")
    numbers = {column: data.of(how, column) for column in ("distance", "hull", "warned")}
    parts = {t: row["place"].split("/") for t, row in data.told.get(how, {}).items()}
    place = {t: int(nearer) / max(int(of), 1) for t, (nearer, of) in parts.items()}
    return {**numbers, "place": place}


def _by_distance(data: Found) -> str:
    gained, how = gains(data), Way("explain", "others", data.k, features="raw")
    own, rows = data.of(how._replace(pool="all"), "warned"), []
    for task in sorted(data.told.get(how, {}), key=lambda t: data.of(how, "hull")[t]):
        row = data.told[how][task]
        facts = [f"{float(row[c]):.2f}" for c in ("distance", "hull")]
        warned = [f"{data.of(how, 'warned')[task]:.0%}", f"{own[task]:.0%}" if task in own else ""]
        told = [points([v[task], None]) if task in v else "" for v in gained.values()]
        yes = {"True": "yes", "False": "no"}.get(row["outside"], "")
        rows.append([task, row["nearest"], *facts, row["place"], yes, *warned, *told])
    title = "How far each task is from the others, and points above the base"
    columns = ["task", "nearest", "distance", "to hull", "place", "warned", "rows warned"]
    return _table(title, [*columns, "... own in", *gained], rows)


def _correlations(data: Found) -> str:
    gained, rows = gains(data), []
    for label, values in places(data).items():
        cells = [_correlation(*rank_correlation(values, gained[m])) for m in gained]
        rows.append([label, *cells])
    title = "Rank correlations over tasks with points above the base (95 % interval; tasks)"
    near = [f"{label}: {_within(data, c)}" for label, c in _DISTANCES.items()]
    told = "Rank correlation of distance with accuracy over a task's other adapters, mean over"
    return "\n\n".join([_table(title, ["", *gained], rows), f"{told} tasks: {'; '.join(near)}"])


def _within(data: Found, column: str) -> str:
    """Below 0 where nearer adapters are better ones."""
    found = []
    for task in data.names:
        ways = {n: Way("single", adapter=n) for n in data.names if n != task}
        near, right = (
            {n: data.of(w, c)[task] for n, w in ways.items() if task in data.of(w, c)}
            for c in (column, "accuracy")
        )
        rho, _ = rank_correlation(near, right)
        found += [] if rho is None else [rho[0]]
    span = interval(found)
    return "none" if span is None else f"{span[0]:+.2f} ± {_half(span)} ({len(found)} tasks)"


def _by_features(data: Found) -> str:
    base, rows = data.of(Way("base")), []
    for method in ("nearest", "linear", "simplex"):
        raw, unit = (
            data.of(way(method, data.k, features=features)) for features in ("raw", "unit")
        )
        spans = (difference(raw, base), difference(unit, base), difference(unit, raw))
        rows.append([method, *(points(span) for span, _ in spans)])
    columns = ["", "raw minus base", "unit minus base", "unit minus raw"]
    return _table("Features of unit length in place of raw ones, in points", columns, rows)


def _correlation(rho: Sequence[float] | None, count: int) -> str:
    return "" if rho is None else f"{rho[0]:+.2f} ({rho[1]:+.2f} to {rho[2]:+.2f}; {count})"


def _mean(values: Values) -> float | None:
    return statistics.fmean(values.values()) if values else None


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _half(pair: Sequence[float | None] | None) -> str:
    return "" if pair is None or pair[1] is None else f"{pair[1]:.3f}"


def _table(title: str, columns: list[str], rows: list[list[str]]) -> str:
    return f"**{title}**\n\n{grid(columns, rows)}"
