"""The database of measurements: SQLite, append-only, one short transaction a trial.

Machines, toolchains, kernels, problems and configs are rows named by the digest of what they hold (keys.py), and so are trials:
writing one twice changes nothing, and merging two files gives the same whichever comes first. The best config is not stored but
asked for (`measured`).

Source of the layout: SQLite's documentation of WAL mode and of quick_check.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import pathlib
import sqlite3
import time

from . import keys

SCHEMA = 1
BUSY_SECONDS = 30.0  # how long a writer waits for another
KINDS = ("machine", "toolchain", "kernel", "problem", "config")
# What a config did once it may do at other sizes too; the rest is of the problem it was tried on.
BROKEN = ("wrong", "crashed", "hung")
STATUSES = ("ok", *BROKEN, "out of memory", "not compiled", "illegal")
TABLES = (*KINDS, "trial")
CREATE = [
    "CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID",
    *(f"CREATE TABLE {kind} (id TEXT PRIMARY KEY, body TEXT NOT NULL) WITHOUT ROWID" for kind in KINDS),
    "CREATE TABLE trial (id TEXT PRIMARY KEY, "
    + "".join(f"{kind} TEXT NOT NULL REFERENCES {kind} DEFERRABLE INITIALLY DEFERRED, " for kind in KINDS)
    + "status TEXT NOT NULL, median REAL, body TEXT NOT NULL) WITHOUT ROWID",
    "CREATE INDEX trial_of ON trial (kernel, machine, problem, toolchain)",
]


# What SQLite says where the file is not at fault.
OF_THE_DISK = ("unable to open", "readonly", "locked", "disk i/o error", "is full", "busy")


def _of_the_disk(error: BaseException) -> bool:
    return isinstance(error, sqlite3.OperationalError) and any(words in str(error).lower() for words in OF_THE_DISK)


@dataclasses.dataclass(frozen=True)
class Row:
    """A config on a problem, on one machine with one toolchain."""

    machine_id: str
    toolchain_id: str
    machine: dict
    kernel: dict
    problem: dict
    config: dict
    ms: float | None  # the least median; None where a trial was not ok
    broken: bool  # whether a trial was one of BROKEN


class NewerDatabase(RuntimeError):
    """A file was written by a later version of sbkernels; it is left as it is."""


class Store:
    """One database file, made if it is not there. Use as a context manager, or close().

    A damaged file is renamed to "...damaged-TIME" and rebuilt from its last export (same name, .json) where there is one; `mended`
    then says so. NewerDatabase for a later schema; OSError, naming the file, where it cannot be opened or written.
    """

    def __init__(self, path):
        self.path, self.mended = pathlib.Path(path), None
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._connection = self._open()
        except (sqlite3.Error, UnicodeDecodeError) as error:
            if _of_the_disk(error):
                raise OSError(f"cannot open the tuning database {self.path}: {error}") from error
            self._set_aside(str(error))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self) -> None:
        self._connection.close()

    @property
    def export_path(self) -> pathlib.Path:
        return self.path.with_suffix(".json")

    def add(self, bodies: dict[str, dict], status: str, median: float | None = None, **details) -> str:
        """Store one trial, committed when this returns; its id.

        bodies: what it was of, by kind (KINDS), as keys.py makes them. status: one of STATUSES. median: milliseconds, for "ok".
        details: plain values (samples, errors, clocks, session, ...). ValueError for an unknown status or kind.
        """
        if status not in STATUSES:
            raise ValueError(f"status={status!r}: expected one of {', '.join(STATUSES)}")
        if set(bodies) != set(KINDS):
            raise ValueError(f"bodies of {', '.join(bodies)}: expected {', '.join(KINDS)}")
        if (median is None) == (status == "ok"):
            raise ValueError(f"median={median} with status={status!r}: expected a median of trials that are ok, and of no others")
        parts = {kind: (keys.digest(body), keys.canonical(body)) for kind, body in bodies.items()}
        names = {kind: name for kind, (name, _) in parts.items()}
        body = keys.canonical(details)
        trial = keys.digest([names, status, median, details])
        with self._transaction():
            for kind, row in parts.items():
                self._connection.execute(f"INSERT OR IGNORE INTO {kind} VALUES (?, ?)", row)
            row = (trial, *(names[kind] for kind in KINDS), status, median, body)
            self._connection.execute("INSERT OR IGNORE INTO trial VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", row)
        return trial

    def measured(self, kernel: dict | None = None) -> list[Row]:
        """What was measured, of one kernel or of all: a row for each config of each problem, by machine and toolchain."""
        broken = ", ".join(f"'{status}'" for status in BROKEN)
        rows = self._connection.execute(
            "SELECT trial.machine, trial.toolchain, machine.body, kernel.body, problem.body, config.body, min(median), "
            f"sum(status != 'ok'), sum(status IN ({broken})) FROM trial JOIN machine ON machine.id = trial.machine "
            "JOIN kernel ON kernel.id = trial.kernel JOIN problem ON problem.id = trial.problem "
            "JOIN config ON config.id = trial.config WHERE ?1 IS NULL OR trial.kernel = ?1 "
            "GROUP BY trial.machine, trial.toolchain, trial.kernel, trial.problem, trial.config "
            "ORDER BY trial.machine, trial.toolchain, trial.kernel, trial.problem, trial.config",
            [None if kernel is None else keys.digest(kernel)],
        )
        return [
            Row(machine, toolchain, *map(json.loads, bodies), ms if not failed else None, bool(broken))
            for machine, toolchain, *bodies, ms, failed, broken in rows
        ]

    def count(self) -> int:
        """How many trials there are."""
        return self._connection.execute("SELECT count(*) FROM trial").fetchone()[0]

    def export(self, path=None) -> pathlib.Path:
        """Write all rows as text, a line each and in order, so that files can be compared; where to, by default export_path."""
        path = self.export_path if path is None else pathlib.Path(path)
        lines = [json.dumps({"schema": SCHEMA})]
        for table in TABLES:
            cursor = self._connection.execute(f"SELECT * FROM {table} ORDER BY id")
            lines += [json.dumps([table, *row]) for row in cursor]
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
        temporary.replace(path)
        return path

    def take_in(self, path) -> int:
        """Add the rows of an export that are not there yet, all or none; how many trials were new.

        ValueError for what is no export, NewerDatabase for one of a later version.
        """
        before = self.count()
        try:
            first, *lines = pathlib.Path(path).read_text(encoding="utf-8").splitlines()
            schema = json.loads(first)["schema"]
            rows = [json.loads(line) for line in lines]
            if schema > SCHEMA:
                raise NewerDatabase(f"{path} has schema {schema}, this version of sbkernels knows {SCHEMA}: upgrade it")
            with self._transaction():
                for table, *row in rows:
                    if table not in TABLES:
                        raise ValueError(f"unknown table {table!r}")
                    self._connection.execute(f"INSERT OR IGNORE INTO {table} VALUES ({', '.join('?' * len(row))})", row)
        except (ValueError, KeyError, TypeError, UnicodeDecodeError, sqlite3.Error) as error:
            raise ValueError(f"{path} is no export of a tuning database: {error}") from error
        return self.count() - before

    @contextlib.contextmanager
    def _transaction(self):
        try:
            self._connection.execute("BEGIN IMMEDIATE")
            yield
            self._connection.execute("COMMIT")
        except BaseException as error:
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")
            if _of_the_disk(error):
                raise OSError(f"cannot write the tuning database {self.path}: {error}") from error
            raise

    def _open(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self.path, timeout=BUSY_SECONDS, isolation_level=None)
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = NORMAL")
            connection.execute("PRAGMA foreign_keys = ON")
            found = connection.execute("PRAGMA quick_check").fetchone()[0]
            if found != "ok":
                raise sqlite3.DatabaseError(found)
            connection.execute("BEGIN IMMEDIATE")
            version = connection.execute("PRAGMA user_version").fetchone()[0]
            if version > SCHEMA:
                raise NewerDatabase(f"{self.path} has schema {version}, this version of sbkernels knows {SCHEMA}: upgrade it")
            if version == 0:
                for statement in CREATE:
                    connection.execute(statement)
                connection.execute("INSERT INTO meta VALUES ('made', ?)", (time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),))
                connection.execute(f"PRAGMA user_version = {SCHEMA}")
            connection.execute("COMMIT")
            connection.execute("SELECT count(*) FROM trial").fetchone()
        except BaseException:
            connection.close()
            raise
        return connection

    def _set_aside(self, why: str) -> None:
        aside = self.path.with_name(f"{self.path.name}.damaged-{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}")
        self.path.replace(aside)
        for suffix in ("-wal", "-shm"):
            self.path.with_name(self.path.name + suffix).unlink(missing_ok=True)
        self._connection = self._open()
        self.mended = f"{self.path} was damaged ({why}) and is kept as {aside.name}"
        if self.export_path.exists():
            self.mended += f"; {self.take_in(self.export_path)} trials were taken from {self.export_path.name}"
