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
from .disk import of_the_disk, refuse_network

SCHEMA = 1
BUSY_SECONDS = 30.0  # how long a writer waits for another
KINDS = ("machine", "toolchain", "kernel", "problem", "config")
# "ok" was verified and measured. "confirmed" is besides, measured afresh, no slower than any other config: it alone is served.
MEASURED = ("ok", "confirmed")
# What a config did once it may do at other sizes too; the rest is of the problem it was tried on.
BROKEN = ("wrong", "crashed", "hung")
STATUSES = (*MEASURED, *BROKEN, "out of memory", "not compiled", "illegal")
SERVED = ("confirmed", *BROKEN)  # all that lookups go by
EXCERPT = ("at", "default", "default_ms", "relative", "space", "why")  # details that are kept without samples
TABLES = (*KINDS, "trial")
CREATE = [
    "CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID",
    *(f"CREATE TABLE {kind} (id TEXT PRIMARY KEY, body TEXT NOT NULL) WITHOUT ROWID" for kind in KINDS),
    "CREATE TABLE trial (id TEXT PRIMARY KEY, "
    + "".join(f"{kind} TEXT NOT NULL REFERENCES {kind} DEFERRABLE INITIALLY DEFERRED, " for kind in KINDS)
    + "status TEXT NOT NULL, median REAL, body TEXT NOT NULL) WITHOUT ROWID",
    "CREATE INDEX trial_of ON trial (kernel, machine, problem, toolchain)",
]


@dataclasses.dataclass(frozen=True)
class Row:
    """A config on a problem, on one machine with one toolchain."""

    machine_id: str
    toolchain_id: str
    config_id: str
    machine: dict
    kernel: dict
    problem: dict
    config: dict
    ms: float | None  # the least median; None where a trial was not of MEASURED
    confirmed: float | None  # the same of confirmed trials alone
    broken: bool  # whether a trial was one of BROKEN


@dataclasses.dataclass(frozen=True)
class Trial:
    """One trial as it was added."""

    id: str
    bodies: dict[str, dict]  # by kind
    status: str
    median: float | None  # milliseconds
    details: dict


class NewerDatabase(RuntimeError):
    """A file was written by a later version of sbkernels; it is left as it is."""


class Store:
    """One database file, made if it is not there. Use as a context manager, or close().

    A damaged file is renamed to "...damaged-TIME" and rebuilt from its last export (same name, .json) where there is one; `mended`
    then says so. With writable=False the file is read as it is: for folders that cannot be written. NewerDatabase for a later
    schema; OSError, naming the file, where it cannot be opened or written, and on network file systems, whose locks do not hold.
    """

    def __init__(self, path, writable: bool = True):
        self.path, self.writable, self.mended = pathlib.Path(path), writable, None
        try:
            if writable:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                refuse_network(self.path)
            self._connection = self._open()
        except (sqlite3.Error, UnicodeDecodeError) as error:
            if not writable or of_the_disk(error):
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

        bodies: what it was of, by kind (KINDS), as keys.py makes them. status: one of STATUSES. median: milliseconds, of MEASURED.
        details: plain values (samples, errors, clocks, session, ...). ValueError for an unknown status or kind.
        """
        if status not in STATUSES:
            raise ValueError(f"status={status!r}: expected one of {', '.join(STATUSES)}")
        if set(bodies) != set(KINDS):
            raise ValueError(f"bodies of {', '.join(bodies)}: expected {', '.join(KINDS)}")
        if (median is None) == (status in MEASURED):
            raise ValueError(
                f"median={median} with status={status!r}: expected one with {' and '.join(MEASURED)}, with others none"
            )
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
        rows = self._connection.execute(
            "SELECT trial.machine, trial.toolchain, trial.config, machine.body, kernel.body, problem.body, config.body, "
            "min(median), min(CASE status WHEN 'confirmed' THEN median END), "
            f"sum(status NOT IN {MEASURED}), sum(status IN {BROKEN}) "
            "FROM trial JOIN machine ON machine.id = trial.machine "
            "JOIN kernel ON kernel.id = trial.kernel JOIN problem ON problem.id = trial.problem "
            "JOIN config ON config.id = trial.config WHERE ?1 IS NULL OR trial.kernel = ?1 "
            "GROUP BY trial.machine, trial.toolchain, trial.kernel, trial.problem, trial.config "
            "ORDER BY trial.machine, trial.toolchain, trial.kernel, trial.problem, trial.config",
            [None if kernel is None else keys.digest(kernel)],
        )
        return [
            Row(*ids, *map(json.loads, bodies), *(None if failed else ms for ms in medians), bool(broken))
            for *all_of_it, least, confirmed, failed, broken in rows
            for ids, bodies in [(all_of_it[:3], all_of_it[3:])]
            for medians in [(least, confirmed)]
        ]

    def trials(self, **of: dict) -> list[Trial]:
        """All trials of some bodies, given by kind, in the order in which they were added here."""
        where = " AND ".join(f"trial.{kind} = ?" for kind in of) or "true"
        rows = self._connection.execute(
            f"SELECT trial.id, {', '.join(f'{kind}.body' for kind in KINDS)}, status, median, trial.body FROM trial "
            + " ".join(f"JOIN {kind} ON {kind}.id = trial.{kind}" for kind in KINDS)
            + f" WHERE {where} ORDER BY json_extract(trial.body, '$.at'), trial.id",
            [keys.digest(body) for body in of.values()],
        )
        return [
            Trial(name, dict(zip(KINDS, map(json.loads, bodies), strict=True)), status, median, json.loads(details))
            for name, *bodies, status, median, details in rows
        ]

    def prune(self, current: list[dict]) -> int:
        """Remove the trials of all kernels but the current ones, and what nothing refers to then; how many."""
        names = [keys.digest(kernel) for kernel in current]
        before = self.count()
        with self._transaction():
            self._connection.execute(f"DELETE FROM trial WHERE kernel NOT IN ({', '.join('?' * len(names))})", names)
            for kind in KINDS:
                self._connection.execute(f"DELETE FROM {kind} WHERE id NOT IN (SELECT {kind} FROM trial)")
        return before - self.count()

    def faults(self) -> list[str]:
        """Rows whose name is not the digest of what they hold, and rows that refer to none; empty of a sound database."""
        found = []
        for kind in KINDS:
            for name, body in self._connection.execute(f"SELECT id, body FROM {kind} ORDER BY id"):
                if keys.digest(json.loads(body)) != name:
                    found.append(f"{kind} {name} holds something else")
        for trial in self._connection.execute(
            "SELECT id, machine, toolchain, kernel, problem, config, status, median, body FROM trial"
        ):
            name, *parts, status, median, details = trial
            if keys.digest([dict(zip(KINDS, parts, strict=True)), status, median, json.loads(details)]) != name:
                found.append(f"trial {name} holds something else")
        found += [
            f"a row of {table} refers to a missing {of}" for table, _, of, _ in self._connection.execute("PRAGMA foreign_key_check")
        ]
        return found

    def count(self) -> int:
        """How many trials there are."""
        return self._connection.execute("SELECT count(*) FROM trial").fetchone()[0]

    def excerpt(self, statuses: tuple[str, ...] = STATUSES) -> Store:
        """A database in memory with the trials of some statuses, without samples: what lookups and replays need."""
        made = Store(":memory:")
        for trial in self.trials():
            if trial.status in statuses:
                details = {name: value for name, value in trial.details.items() if name in EXCERPT}
                made.add(trial.bodies, trial.status, trial.median, **details)
        return made

    def text(self) -> str:
        """All rows, a line each and in order, so that texts can be compared."""
        lines = [json.dumps({"schema": SCHEMA})]
        for table in TABLES:
            cursor = self._connection.execute(f"SELECT * FROM {table} ORDER BY id")
            lines += [json.dumps([table, *row]) for row in cursor]
        return "\n".join(lines) + "\n"

    def export(self, path=None) -> pathlib.Path:
        """Write text() to a file, whole or not at all; where to, by default export_path."""
        path = self.export_path if path is None else pathlib.Path(path)
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_text(self.text(), encoding="utf-8")
        temporary.replace(path)
        return path

    def take_in(self, path) -> int:
        """Add the rows of an export that are not there yet, all or none; how many trials were new.

        ValueError for what is no export, NewerDatabase for one of a later version.
        """
        try:
            text = pathlib.Path(path).read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is no export of a tuning database: {error}") from error
        return self.take_in_text(text, str(path))

    def take_in_text(self, text: str, source: str) -> int:
        """As take_in, of an export's text; source names it in messages."""
        before = self.count()
        try:
            first, *lines = text.splitlines()
            schema = json.loads(first)["schema"]
            rows = [json.loads(line) for line in lines]
            if schema > SCHEMA:
                raise NewerDatabase(f"{source} has schema {schema}, this version of sbkernels knows {SCHEMA}: upgrade it")
            with self._transaction():
                for table, *row in rows:
                    if table not in TABLES:
                        raise ValueError(f"unknown table {table!r}")
                    self._connection.execute(f"INSERT OR IGNORE INTO {table} VALUES ({', '.join('?' * len(row))})", row)
        except (ValueError, KeyError, TypeError, sqlite3.Error) as error:
            raise ValueError(f"{source} is no export of a tuning database: {error}") from error
        return self.count() - before

    def merge(self, path) -> int:
        """Add the trials of another database that are not there yet; how many. Either order of files gives the same rows."""
        with Store(path, writable=False) as other:
            return self.take_in_text(other.text(), str(path))

    @contextlib.contextmanager
    def _transaction(self):
        try:
            self._connection.execute("BEGIN IMMEDIATE")
            yield
            self._connection.execute("COMMIT")
        except BaseException as error:
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")
            if of_the_disk(error):
                raise OSError(f"cannot write the tuning database {self.path}: {error}") from error
            raise

    def _open(self) -> sqlite3.Connection:
        if self.writable:
            return self._connected(self.path)
        uri = self.path.absolute().as_uri()
        try:
            return self._connected(f"{uri}?mode=ro")
        except sqlite3.OperationalError:  # WAL's shared memory cannot be made in a folder that cannot be written
            return self._connected(f"{uri}?immutable=1")

    def _connected(self, where) -> sqlite3.Connection:
        connection = sqlite3.connect(where, timeout=BUSY_SECONDS, isolation_level=None, uri=not self.writable)
        try:
            if self.writable:
                connection.execute("PRAGMA journal_mode = WAL")
                connection.execute("PRAGMA synchronous = NORMAL")
            connection.execute("PRAGMA foreign_keys = ON")
            found = connection.execute("PRAGMA quick_check").fetchone()[0]
            if found != "ok":
                raise sqlite3.DatabaseError(found)
            version = connection.execute("PRAGMA user_version").fetchone()[0]
            if version > SCHEMA:
                raise NewerDatabase(f"{self.path} has schema {version}, this version of sbkernels knows {SCHEMA}: upgrade it")
            if version == 0:
                self._create(connection)
            connection.execute("SELECT count(*) FROM trial").fetchone()
        except BaseException:
            connection.close()
            raise
        return connection

    def _create(self, connection: sqlite3.Connection) -> None:
        connection.execute("BEGIN IMMEDIATE")
        if connection.execute("PRAGMA user_version").fetchone()[0] == 0:  # nobody else did meanwhile
            for statement in CREATE:
                connection.execute(statement)
            connection.execute("INSERT INTO meta VALUES ('made', ?)", (time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),))
            connection.execute(f"PRAGMA user_version = {SCHEMA}")
        connection.execute("COMMIT")

    def _set_aside(self, why: str) -> None:
        aside = self.path.with_name(f"{self.path.name}.damaged-{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}")
        self.path.replace(aside)
        for suffix in ("-wal", "-shm"):
            self.path.with_name(self.path.name + suffix).unlink(missing_ok=True)
        self._connection = self._open()
        self.mended = f"{self.path} was damaged ({why}) and is kept as {aside.name}"
        if self.export_path.exists():
            self.mended += f"; {self.take_in(self.export_path)} trials were taken from {self.export_path.name}"
