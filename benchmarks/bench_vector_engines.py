"""Vector engines for a library of adapters, on 10^3, 10^5 and 10^6 vectors of 384.

    pip install lancedb faiss-cpu usearch qdrant-client pymilvus milvus-lite
    pip install pgserver psycopg[binary] pgvector
    python -m benchmarks.bench_vector_engines --csv benchmarks/results/vector_engines.csv --work DIR

Data: K vectors around sqrt(K) centres. Centres and what scatters around them are normal, the
coordinate i of either times (i + 1)^-0.3 and then all rotated, so that dimensions are correlated as
those of features are; scatter 0.8 times the centres' size; unit length. Queries are drawn alike,
and are not rows. Real features may differ. Each row has one of 20 tags, at random.

An engine and index is built in one process and searched by others, each pinned to one CPU, which
holds every thread pool to it: one thread. The 10 nearest by squared L2 of 200 queries, one by one,
in three rounds in which all engines of a size take turns, in another order each; then 50 of
them among the rows of one tag. A round of more than --pass-seconds stops where it is. What would
be built beyond --build-seconds, by its time at the size before, is recorded as skipped.

In the rows K is the number of vectors, E their size, J the neighbours; effort is what an index
probes (partitions) or keeps (candidates), 0 for all; first_ms opens and searches once, the imports
done (import_s); cpu_ms is the time of all threads per query, of the client alone where there is a
server; recall is the part of the 10 true nearest found; disk_mib is what lies in the folder;
memory_mib the searching process's peak, mapped files included. A cell that is in the CSV is not
measured again; a step that was done is not done again while --work is kept.
"""

import argparse
import csv
import datetime
import importlib.metadata
import json
import math
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from benchmarks import memory
from benchmarks.peers.vector_engines import ENGINES, NEAREST, Engine, facts

SIZES, E, QUERIES, FILTERED, TAGS, ROUNDS, SEED = (10**3, 10**5, 10**6), 384, 200, 50, 20, 3, 0
BLOCK = 20_000
FIELDS = (
    *("op", "impl", "index", "effort", "K", "E", "J", "ms_p50", "ms_p20", "ms_p80", "ms_p99"),
    *("cpu_ms", "recall", "filter_ms_p50", "filter_recall", "first_ms", "import_s", "insert_s"),
    *("index_s", "disk_mib", "memory_mib", "impl_version", "device", "version", "commit", "date"),
    *("threads", "machine", "clock", "rounds", "queries", "status", "reason"),
)
KEY = ("impl", "index", "effort", "K", "machine")


class Data:
    """Vectors, tags, queries and the true neighbours of a size; made once, kept in a folder."""

    def __init__(self, folder: Path, count: int):
        self.folder, self.count = folder / f"data{count}", count
        if not (self.folder / "truth.npy").exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            self._make()
        for name in ("vectors", "tags", "queries", "truth", "filtered"):
            lazily = "r" if name == "vectors" else None
            setattr(self, name, np.load(self.folder / f"{name}.npy", mmap_mode=lazily))

    def _make(self) -> None:
        chance = np.random.default_rng(SEED)
        scale = np.arange(1, E + 1, dtype="f4") ** -0.3
        turn = np.linalg.qr(chance.standard_normal((E, E)))[0].astype("f4")
        centres = chance.standard_normal((math.isqrt(self.count), E), dtype="f4") * scale

        def draw(count: int) -> np.ndarray:
            own = centres[chance.integers(len(centres), size=count)]
            own = (own + 0.8 * scale * chance.standard_normal((count, E), dtype="f4")) @ turn
            return own / np.linalg.norm(own, axis=1, keepdims=True)

        queries, tags = draw(QUERIES), chance.integers(TAGS, size=self.count).astype("i4")
        place = self.folder / "vectors.npy"
        vectors = np.lib.format.open_memmap(place, "w+", "f4", (self.count, E))
        best = [Nearest(QUERIES), Nearest(FILTERED)]
        for i in range(0, self.count, BLOCK):
            part = vectors[i : i + BLOCK] = draw(min(BLOCK, self.count - i))
            away = 2 - 2 * queries @ part.T
            best[0].meet(away, i)
            other = tags[i : i + BLOCK] != np.arange(FILTERED)[:, None] % TAGS
            best[1].meet(np.where(other, np.inf, away[:FILTERED]), i)
        vectors.flush()
        found = {"tags": tags, "queries": queries, "filtered": best[1].ids, "truth": best[0].ids}
        for name, content in found.items():
            np.save(self.folder / f"{name}.npy", content)


class Nearest:
    """The nearest rows of those met so far."""

    def __init__(self, queries: int):
        self.far = np.full((queries, NEAREST), np.inf, "f4")
        self.ids = np.full((queries, NEAREST), -1, "i8")

    def meet(self, away: np.ndarray, first: int) -> None:
        ids = np.broadcast_to(np.arange(first, first + away.shape[1]), away.shape)
        away, ids = np.hstack([self.far, away]), np.hstack([self.ids, ids])
        kept = np.argpartition(away, NEAREST, axis=1)[:, :NEAREST]
        self.far, self.ids = (np.take_along_axis(t, kept, 1) for t in (away, ids))


def build(engine: Engine, data: Data) -> dict:
    """In a process of its own: store, index, and say how long that took."""
    engine.load()
    engine.start()
    vectors = np.array(data.vectors)  # read before the clock starts
    start = time.perf_counter()
    engine.insert(vectors, data.tags)
    middle = time.perf_counter()
    engine.train(vectors, math.isqrt(data.count))
    return {"insert_s": middle - start, "index_s": time.perf_counter() - middle}


def search(engine: Engine, data: Data, most: float) -> dict:
    """In a process of its own: open, and time every query at every effort."""
    start = time.perf_counter()
    engine.load()
    found = {"import_s": time.perf_counter() - start, "efforts": {}}
    start = time.perf_counter()
    engine.open(data.tags)
    efforts = engine.indexes[engine.index]
    engine.search(data.queries[-1], efforts[0], None)
    found["first_ms"] = 1e3 * (time.perf_counter() - start)
    for effort in efforts:
        tags: list[int | None] = [None] * QUERIES
        part = timed(engine, data.queries, tags, data.truth, effort, most)
        if engine.filters:
            tags = [i % TAGS for i in range(FILTERED)]
            among = timed(engine, data.queries, tags, data.filtered, effort, most / 2)
            part |= {"filter_ms": among["ms"], "filter_recall": among["recall"]}
        found["efforts"][effort] = part
    engine.close()
    return found | {"memory_mib": memory.peak() / 2**20}


def timed(engine: Engine, queries, tags: list, truth, effort: int, most: float) -> dict:
    """Milliseconds of each query, and what was found of the true neighbours."""
    ms, hits, until = [], 0, time.perf_counter() + most
    cpu = time.process_time()
    for query, tag, true in zip(queries, tags, truth, strict=False):
        start = time.perf_counter()
        found = engine.search(query, effort, tag)
        ms.append(1e3 * (time.perf_counter() - start))
        hits += len(set(found) & set(true[true >= 0].tolist()))
        if time.perf_counter() > until:
            break
    cpu = 1e3 * (time.process_time() - cpu) / len(ms)
    wanted = int((truth[: len(ms)] >= 0).sum())
    return {"ms": ms, "cpu_ms": cpu, "recall": hits / wanted}


class Bench:
    """All engines on one size after another; a row per engine, index and effort."""

    def __init__(self, options: argparse.Namespace):
        from benchmarks import machine

        self.options, self.machine = options, machine
        self.path, self.work = options.csv, options.work
        self.rows: dict[tuple, dict] = {}
        if self.path.exists():
            with self.path.open(newline="") as file:
                for row in csv.DictReader(file):
                    self.rows[tuple(row[field] for field in KEY)] = row

    def run(self) -> None:
        for size in self.options.sizes:
            cells = [c for c in self.cells() if not self.has(*c, size)]
            if not cells:
                continue
            data = Data(self.work, size)
            built = [cell for cell in cells if self.build(*cell, data)]
            chance = random.Random(SEED)
            for i in range(ROUNDS):
                for cell in chance.sample(built, len(built)):
                    self.step(f"search{i}", *cell, data, self.options.pass_seconds * 6 + 60)
            for cell in built:
                self.record(*cell, size)
            if not self.options.keep:
                shutil.rmtree(self.work / f"data{size}")
                for cell in cells:
                    shutil.rmtree(self.place(*cell, size) / "files", ignore_errors=True)

    def cells(self) -> list[tuple[str, str]]:
        chosen = self.options.engines or ENGINES
        return [(name, index) for name in chosen for index in ENGINES[name].indexes]

    def has(self, name: str, index: str, size: int) -> bool:
        """Whether a row, of any effort, is there."""
        wanted = (name, index, str(size), self.machine.cpu_model())
        return any((k[0], k[1], k[3], k[4]) == wanted for k in self.rows)

    def place(self, name: str, index: str, size: int) -> Path:
        return self.work / f"{name} {index} {size}".replace(" ", "_")

    def build(self, name: str, index: str, data: Data) -> bool:
        most = self.options.build_seconds
        before = [k for k in SIZES if k < data.count]
        known = facts(self.place(name, index, before[-1]), "build") if before else None
        if known is not None and "reason" not in known:
            took = known["insert_s"] + known["index_s"]
            # Of sqrt(K) centres, the time of an index grows faster than K.
            guess = took * data.count / before[-1]
            if took > 5 and guess > most:
                reason = f"{before[-1]} vectors took {took:.0f} s, so these would take longer"
                return self.skip(name, index, data.count, f"{reason} than {most:.0f} s")
        elif known is not None:
            return self.skip(name, index, data.count, f"not built at {before[-1]} either")
        found = self.step("build", name, index, data, most)
        return "reason" not in found or self.skip(name, index, data.count, found["reason"])

    def step(self, kind: str, name: str, index: str, data: Data, limit: float) -> dict:
        """Build or search in a fresh process, once; its result, or the reason why there is none."""
        place = self.place(name, index, data.count)
        if (known := facts(place, kind)) is not None:
            return known
        files = place / "files"
        if kind == "build":
            shutil.rmtree(files, ignore_errors=True)
            files.mkdir(parents=True)
        command = [sys.executable, "-m", "benchmarks.bench_vector_engines", "--worker", kind]
        command += [name, index, str(data.count), str(self.work), str(self.options.pass_seconds)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=limit)
        except subprocess.TimeoutExpired:
            return facts(place, kind, {"reason": f"took longer than {limit:.0f} s"})
        if done.returncode:
            told = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
            return facts(place, kind, {"reason": told[:300]})
        found = json.loads(done.stdout.strip().splitlines()[-1])
        print(f"{name} {index} {data.count}: {kind} {_short(found)}", flush=True)
        return facts(place, kind, found)

    def skip(self, name: str, index: str, size: int, reason: str) -> bool:
        print(f"{name} {index} {size} skipped: {reason}", flush=True)
        facts(self.place(name, index, size), "build", {"reason": reason})
        self.put(name, index, 0, size, {"status": "skipped", "reason": reason})
        return False

    def record(self, name: str, index: str, size: int) -> None:
        place = self.place(name, index, size)
        rounds = [facts(place, f"search{i}") for i in range(ROUNDS)]
        done = [part for part in rounds if part is not None and "reason" not in part]
        if not done:
            self.skip(name, index, size, rounds[0]["reason"])
            return
        middle = {key: np.median([p[key] for p in done]) for key in ("import_s", "first_ms")}
        middle["memory_mib"] = max(part["memory_mib"] for part in done)
        files = [p for p in (place / "files").rglob("*") if p.is_file()]
        middle["disk_mib"] = sum(p.stat().st_size for p in files) / 2**20
        for effort in ENGINES[name].indexes[index]:
            parts = [part["efforts"][str(effort)] for part in done]
            ms = [value for part in parts for value in part["ms"]]
            row = dict(zip(("ms_p50", "ms_p20", "ms_p80", "ms_p99"), _quantiles(ms), strict=True))
            row |= {key: np.mean([p[key] for p in parts]) for key in ("cpu_ms", "recall")}
            if "filter_ms" in parts[0]:
                row["filter_ms_p50"] = np.median([v for p in parts for v in p["filter_ms"]])
                row["filter_recall"] = np.mean([p["filter_recall"] for p in parts])
            row |= middle | facts(place, "build")
            row |= {"rounds": len(done), "queries": len(ms), "status": "timed"}
            self.put(name, index, effort, size, row)

    def put(self, name: str, index: str, effort: int, size: int, found: dict) -> None:
        """Add a row and write the file, whole or not at all."""
        versions = self.machine.versions()
        row = dict.fromkeys(FIELDS, "") | {
            **{"op": "vector_search", "impl": name, "index": index, "effort": effort},
            **{"K": size, "E": E, "J": NEAREST, "device": "cpu", "threads": 1, "clock": "wall"},
            "impl_version": importlib.metadata.version(ENGINES[name].distribution),
            "version": versions["version"],
            "commit": versions["commit"],
            "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%MZ"),
            "machine": self.machine.cpu_model(),
        }
        row |= {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in found.items()}
        self.rows[tuple(str(row[field]) for field in KEY)] = row
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_name(self.path.name + ".partial")
        with partial.open("w", newline="") as file:
            writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(self.rows.values())
        os.replace(partial, self.path)


def _quantiles(ms: list[float]) -> list[float]:
    return [float(np.quantile(ms, q)) for q in (0.5, 0.2, 0.8, 0.99)]


def _short(found: dict) -> str:
    told = [f"{k} {v:.3g}" for k, v in found.items() if isinstance(v, float)]
    for effort, part in found.get("efforts", {}).items():
        told.append(f"[{effort}: {np.median(part['ms']):.3g} ms, recall {part['recall']:.3f}]")
    return ", ".join(told)


def work(kind: str, name: str, index: str, size: str, folder: str, most: str) -> None:
    """A child's job: its result as the last line of stdout."""
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    data = Data(Path(folder), int(size))
    files = Path(folder) / f"{name} {index} {size}".replace(" ", "_") / "files"
    engine = ENGINES[name](files, index)
    found = build(engine, data) if kind == "build" else search(engine, data, float(most))
    print("\n" + json.dumps(found), flush=True)
    os._exit(0)  # without waiting for threads that an engine may have left


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        work(*sys.argv[2:])
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--csv", type=Path, required=True, help="where rows go")
    parser.add_argument("--work", type=Path, required=True, help="a folder for data and tables")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    parser.add_argument("--engines", nargs="+", choices=ENGINES)
    parser.add_argument("--build-seconds", type=float, default=420)
    parser.add_argument("--pass-seconds", type=float, default=10)
    parser.add_argument("--keep", action="store_true", help="data and tables stay in --work")
    Bench(parser.parse_args()).run()


if __name__ == "__main__":
    main()
