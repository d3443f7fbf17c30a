"""Vector engines that a library of adapters could stand on, behind one small interface.

An ``Engine`` is made for a folder. ``load`` imports what it needs; ``build`` writes vectors with an
integer tag each and an index over them; ``open`` reads what another process has built, and
``search`` finds the nearest ids, of all rows or of those with one tag. ``effort`` is the index's
own: partitions to probe, or candidates to keep; 0 where there is none. One CPU is all they get:
the caller pins the process, which every thread pool honours.
"""

import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import ClassVar

import numpy as np

NEAREST, BATCH, CANDIDATES = 10, 10_000, 10
NOBODY = 65534


class Engine:
    """What all have; ``version`` is of the distribution that is named."""

    distribution = ""
    indexes: ClassVar[dict[str, tuple[int, ...]]] = {}  # index -> efforts
    filters = True

    def __init__(self, folder: Path, index: str):
        self.folder, self.index = folder, index

    def load(self) -> None:
        """Import everything, for the time of it to be seen."""

    def start(self) -> None:
        """Bring up the server, where there is one."""

    def insert(self, vectors: np.ndarray, tags: np.ndarray) -> None:
        """Store all rows, durably where the engine can."""

    def train(self, vectors: np.ndarray, partitions: int) -> None:
        """Build the index over what is stored."""

    def open(self, tags: np.ndarray) -> None:
        """Make ready to search."""

    def search(self, query: np.ndarray, effort: int, tag: int | None) -> list[int]:
        raise NotImplementedError

    def close(self) -> None:
        """Let go of files and servers."""


class Lance(Engine):
    distribution = "lancedb"
    indexes: ClassVar = {"flat": (0,), "ivf_flat": (8, 32), "ivf_pq": (8, 32)}

    def load(self) -> None:
        import lancedb
        import pyarrow

        self.lance, self.arrow = lancedb, pyarrow

    def insert(self, vectors, tags) -> None:
        pa, size = self.arrow, vectors.shape[1]
        table = None
        for i in range(0, len(vectors), BATCH):
            part = pa.array(vectors[i : i + BATCH].ravel())
            columns = {
                "id": pa.array(np.arange(i, i + len(part) // size)),
                "tag": pa.array(tags[i : i + BATCH]),
                "vector": pa.FixedSizeListArray.from_arrays(part, size),
            }
            rows = pa.table(columns)
            if table is None:
                table = self.lance.connect(self.folder).create_table("rows", rows)
            else:
                table.add(rows)
        table.optimize()

    def train(self, vectors, partitions) -> None:
        if self.index == "flat":
            return
        table = self.lance.connect(self.folder).open_table("rows")
        options = {"num_sub_vectors": vectors.shape[1] // 4} if self.index == "ivf_pq" else {}
        table.create_index(
            metric="l2",
            vector_column_name="vector",
            index_type=self.index.upper(),
            num_partitions=partitions,
            **options,
        )

    def open(self, tags) -> None:
        self.table = self.lance.connect(self.folder).open_table("rows")

    def search(self, query, effort, tag) -> list[int]:
        asked = self.table.search(query).limit(NEAREST).select(["id"])
        if effort:
            asked = asked.nprobes(effort)
        if self.index == "ivf_pq":
            asked = asked.refine_factor(CANDIDATES)
        if tag is not None:
            asked = asked.where(f"tag = {tag}", prefilter=True)
        return asked.to_arrow()["id"].to_pylist()


class Faiss(Engine):
    distribution = "faiss-cpu"
    indexes: ClassVar = {"flat": (0,), "ivf_flat": (8, 32)}

    def load(self) -> None:
        import faiss

        self.faiss = faiss

    def insert(self, vectors, tags) -> None:
        """Faiss keeps nothing before its index is there."""

    def train(self, vectors, partitions) -> None:
        size = vectors.shape[1]
        made = self.faiss.IndexFlatL2(size)
        if self.index == "ivf_flat":
            self.coarse = made
            made = self.faiss.IndexIVFFlat(made, size, partitions)
            made.train(vectors)
        for i in range(0, len(vectors), BATCH):
            made.add(vectors[i : i + BATCH])
        self.faiss.write_index(made, str(self.folder / "index.faiss"))

    def open(self, tags) -> None:
        self.held = self.faiss.read_index(str(self.folder / "index.faiss"))
        # Which rows have a tag is for the user to know.
        chosen = {tag: np.flatnonzero(tags == tag) for tag in np.unique(tags).tolist()}
        self.selectors = {tag: self.faiss.IDSelectorBatch(ids) for tag, ids in chosen.items()}

    def search(self, query, effort, tag) -> list[int]:
        options = {} if tag is None else {"sel": self.selectors[tag]}
        if effort:
            asked = self.faiss.SearchParametersIVF(nprobe=effort, **options)
        else:
            asked = self.faiss.SearchParameters(**options)
        return self.held.search(query[None], NEAREST, params=asked)[1][0].tolist()


class Usearch(Engine):
    distribution = "usearch"
    indexes: ClassVar = {"hnsw": (64, 256)}
    filters = False

    def load(self) -> None:
        import usearch.index

        self.usearch = usearch.index

    def train(self, vectors, partitions) -> None:
        made = self.usearch.Index(ndim=vectors.shape[1], metric="l2sq", dtype="f32")
        for i in range(0, len(vectors), BATCH):
            part = vectors[i : i + BATCH]
            made.add(np.arange(i, i + len(part)), part, threads=1)
        made.save(str(self.folder / "index.usearch"))

    def open(self, tags) -> None:
        self.held = self.usearch.Index.restore(str(self.folder / "index.usearch"), view=True)

    def search(self, query, effort, tag) -> list[int]:
        self.held.expansion_search = effort
        return self.held.search(query, NEAREST, threads=1).keys.tolist()


class Qdrant(Engine):
    distribution = "qdrant-client"
    indexes: ClassVar = {"flat": (0,)}

    def load(self) -> None:
        import qdrant_client

        self.qdrant, self.models = qdrant_client, qdrant_client.models

    def insert(self, vectors, tags) -> None:
        client = self.qdrant.QdrantClient(path=str(self.folder))
        shape = self.models.VectorParams(
            size=vectors.shape[1], distance=self.models.Distance.EUCLID
        )
        client.create_collection("rows", vectors_config=shape)
        payload = [{"tag": int(tag)} for tag in tags]
        client.upload_collection("rows", vectors, payload, ids=range(len(vectors)))
        client.close()

    def open(self, tags) -> None:
        self.client = self.qdrant.QdrantClient(path=str(self.folder))

    def search(self, query, effort, tag) -> list[int]:
        models, wanted = self.models, None
        if tag is not None:
            match = models.FieldCondition(key="tag", match=models.MatchValue(value=tag))
            wanted = models.Filter(must=[match])
        found = self.client.query_points("rows", query=query, limit=NEAREST, query_filter=wanted)
        return [point.id for point in found.points]

    def close(self) -> None:
        self.client.close()


class MilvusLite(Engine):
    distribution = "milvus-lite"
    indexes: ClassVar = {"flat": (0,), "ivf_flat": (8, 32)}

    def load(self) -> None:
        import milvus_lite  # noqa: F401
        import pymilvus

        self.milvus = pymilvus

    def _client(self):
        return self.milvus.MilvusClient(str(self.folder / "rows.db"))

    def insert(self, vectors, tags) -> None:
        self.client, kinds = self._client(), self.milvus.DataType
        schema = self.client.create_schema(auto_id=False)
        schema.add_field("id", kinds.INT64, is_primary=True)
        schema.add_field("tag", kinds.INT64)
        schema.add_field("vector", kinds.FLOAT_VECTOR, dim=vectors.shape[1])
        self.client.create_collection("rows", schema=schema)
        step = BATCH // 4  # of a message's largest size
        for i in range(0, len(vectors), step):
            parts = zip(vectors[i : i + step], tags[i : i + step].tolist(), strict=True)
            rows = [{"id": i + n, "tag": tag, "vector": v} for n, (v, tag) in enumerate(parts)]
            self.client.insert("rows", rows)

    def train(self, vectors, partitions) -> None:
        options = {"nlist": partitions} if self.index == "ivf_flat" else {}
        asked = self.client.prepare_index_params()
        asked.add_index("vector", index_type=self.index.upper(), metric_type="L2", params=options)
        self.client.create_index("rows", asked)
        self.client.load_collection("rows")
        self.client.close()

    def open(self, tags) -> None:
        self.client = self._client()
        self.client.load_collection("rows")

    def search(self, query, effort, tag) -> list[int]:
        wanted = "" if tag is None else f"tag == {tag}"
        options = {"params": {"nprobe": effort} if effort else {}}
        found = self.client.search(
            "rows", [query], filter=wanted, limit=NEAREST, search_params=options
        )
        return [hit["id"] for hit in found[0]]

    def close(self) -> None:
        self.client.close()


class Pgvector(Engine):
    distribution = "pgserver"  # PostgreSQL 16.2 with pgvector 0.6.2, in a wheel
    indexes: ClassVar = {"flat": (0,), "ivf_flat": (8, 32)}

    def load(self) -> None:
        import pgvector.psycopg
        import psycopg

        self.psycopg, self.pgvector = psycopg, pgvector.psycopg
        (where,) = importlib.util.find_spec("pgserver").submodule_search_locations
        self.programs, self.server = Path(where) / "pginstall" / "bin", None

    def start(self) -> None:
        """Start a server on a socket in the folder, and a session on it."""
        # PostgreSQL refuses to run as root.
        options = {"user": NOBODY, "group": NOBODY, "cwd": self.folder} if not os.geteuid() else {}
        options |= {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        folder = self.folder / "pg"
        if not folder.exists():
            folder.mkdir(mode=0o700)
            if not os.geteuid():
                os.chown(folder, NOBODY, NOBODY)
            made = [self.programs / "initdb", "-D", folder, "-U", "postgres"]
            subprocess.run(made, check=True, **options)
        run = [self.programs / "postgres", "-D", folder, "-k", folder, "-c", "listen_addresses="]
        self.server = subprocess.Popen(run, **options)
        asked = f"host={folder} user=postgres dbname=postgres"
        for _ in range(200):
            try:
                self.link = self.psycopg.connect(asked, autocommit=True)
                break
            except self.psycopg.OperationalError:
                time.sleep(0.05)
        self.link.execute("CREATE EXTENSION IF NOT EXISTS vector")
        self.pgvector.register_vector(self.link)

    def insert(self, vectors, tags) -> None:
        size = vectors.shape[1]
        self.link.execute(f"CREATE TABLE rows (id bigint PRIMARY KEY, tag int, v vector({size}))")
        # The binary format of COPY: of each field its length, then its bytes, the most
        # significant first.
        fields = [("fields", ">i2"), ("id_bytes", ">i4"), ("id", ">i8"), ("tag_bytes", ">i4")]
        fields += [("tag", ">i4"), ("vector_bytes", ">i4"), ("size", ">i2"), ("unused", ">i2")]
        row = np.dtype([*fields, ("v", ">f4", size)])
        with self.link.cursor().copy("COPY rows FROM STDIN (FORMAT BINARY)") as copy:
            copy.write(b"PGCOPY\n\xff\r\n\0" + bytes(8))
            for i in range(0, len(vectors), BATCH):
                part = np.zeros(len(vectors[i : i + BATCH]), row)
                part["fields"], part["id_bytes"], part["tag_bytes"] = 3, 8, 4
                part["vector_bytes"], part["size"] = 4 + 4 * size, size
                part["id"] = np.arange(i, i + len(part))
                part["tag"], part["v"] = tags[i : i + BATCH], vectors[i : i + BATCH]
                copy.write(part.tobytes())
            copy.write(b"\xff\xff")

    def train(self, vectors, partitions) -> None:
        if self.index == "ivf_flat":
            self.link.execute("SET maintenance_work_mem = '2GB'")
            with_lists = f"WITH (lists = {partitions})"
            self.link.execute(f"CREATE INDEX ON rows USING ivfflat (v vector_l2_ops) {with_lists}")
        self.link.execute("ANALYZE rows")
        self.close()

    def open(self, tags) -> None:
        self.start()
        self.link.execute("SET max_parallel_workers_per_gather = 0")

    def search(self, query, effort, tag) -> list[int]:
        if effort:
            self.link.execute(f"SET ivfflat.probes = {effort}")
        where = "" if tag is None else f"WHERE tag = {tag} "
        asked = f"SELECT id FROM rows {where}ORDER BY v <-> %s LIMIT {NEAREST}"
        return [i for (i,) in self.link.execute(asked, (query,), binary=True).fetchall()]

    def close(self) -> None:
        self.link.close()
        self.server.send_signal(signal.SIGINT)  # a fast shutdown
        self.server.wait()


ENGINES: dict[str, type[Engine]] = {
    "lancedb": Lance,
    "faiss": Faiss,
    "usearch": Usearch,
    "qdrant local": Qdrant,
    "milvus lite": MilvusLite,
    "pgvector": Pgvector,
}


def facts(folder: Path, name: str, content: dict | None = None) -> dict | None:
    """Write what a step found beside its folder, or read it; None where it was not done."""
    path = folder / f"{name}.json"
    if content is not None:
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content))
        return content
    with contextlib.suppress(FileNotFoundError):
        return json.loads(path.read_text())
    return None
