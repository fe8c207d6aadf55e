"""Finds the fastest config of a backend for a problem, among those that compute what they should.

Each config has one trial: it is compiled by other processes meanwhile, verified against float64, timed beside the default config
until it is known to be slower than the best or to WELL_KNOWN, checked on the inputs it was timed on, and stored at once. The best
few then race the default in turns, afresh; one that is not faster beyond noise is a tie, and the default stays.

Whatever is stored already is not measured again: a run that was killed goes on where it was.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import math
import os
import statistics
from collections.abc import Callable

from .. import config as configs
from ..problem import Problem
from . import keys, race
from .session import Clock, Outcome, Session, now
from .store import BROKEN, MEASURED, Store, Trial
from .strategies import STRATEGIES
from .trial import Result, Subject

LEAST_TURNS = 3  # of the race, before anything is concluded


class OutOfTime(Exception):
    """The budget is used up."""


def frozen(config) -> tuple[tuple[str, object], ...]:
    """A config, or its dict with the fields in any order, as Subject has it."""
    return tuple(sorted((config if isinstance(config, dict) else configs.to_dict(config)).items()))


class Tuner:
    """Tunes one backend for one problem with one bench; `run` gives the Outcome.

    store: where trials are written. bench: one of benches. compilers: benches.Compilers, or None where the bench compiles by
    itself. clock: when to stop. notify(outcome): called after each trial.
    """

    def __init__(
        self, backend, problem: Problem, session: Session, store: Store, bench, *, compilers=None, clock=None, notify=None
    ):
        self.backend, self.problem, self.session, self.store = backend, problem, session, store
        self.bench, self.compilers, self.clock = bench, compilers, clock or Clock()
        self.notify: Callable = notify or (lambda outcome: None)
        self.bodies = {
            "machine": keys.machine(problem.device), "toolchain": keys.toolchain(backend, problem.device),
            "kernel": keys.kernel(backend, problem.direction), "problem": keys.problem(problem),
        }  # fmt: skip
        legal, _ = backend.candidates(problem)
        self.space = list(dict.fromkeys(map(frozen, [backend.default_config(problem), *legal])))
        self.default = self.space[0]
        self.outcome = Outcome(backend.name, problem, len(self.space))
        self.ratios: dict[tuple, list[float]] = {}  # by config: its samples over the canary's beside them

    def run(self) -> Outcome:
        """Try what the strategy proposes, as long as there is time; then confirm the best, unless it is and nothing is new."""
        confirmed = self._recall()
        with contextlib.suppress(OutOfTime):
            self._try_all()
        if confirmed is not None and not self.outcome.tried:
            self._report(frozen(confirmed.bodies["config"]), confirmed.median, confirmed.details)
        else:
            self._confirm()
        return self.outcome

    # ---- What is known ----

    def _recall(self) -> Trial | None:
        """Take over what was stored of these kernels here: this problem's trials, and what is broken or verified at any size.

        The last confirmed trial of the problem, if there is one of a config that is not broken.
        """
        self.verified, self.broken, confirmed = set(), {}, None
        same = {kind: self.bodies[kind] for kind in ("machine", "toolchain", "kernel")}
        for trial in self.store.trials(**same):
            config, problem = frozen(trial.bodies["config"]), trial.bodies["problem"]
            if problem["exact"] != self.bodies["problem"]["exact"]:
                continue
            if trial.status in BROKEN:
                self.broken[config] = trial.status
            if trial.status in MEASURED:
                self.verified.add(config)
            if problem == self.bodies["problem"] and "ratios" in trial.details:
                self.ratios[config] = trial.details["ratios"]
            elif problem == self.bodies["problem"] and trial.status not in MEASURED:
                self.broken.setdefault(config, trial.status)
            if problem == self.bodies["problem"] and trial.status == "confirmed":
                confirmed = trial
        for config in self.broken.keys() & self.ratios.keys():
            del self.ratios[config]
        self.outcome.known = len(self.ratios) + len(self.broken.keys() & set(self.space))
        return confirmed if confirmed is None or frozen(confirmed.bodies["config"]) in self.ratios else None

    def _hints(self) -> list[int]:
        """Configs that were measured for the nearest other sizes, fastest first: with any sources of these kernels, anywhere."""
        found, wanted = [], self.bodies["problem"]
        for row in self.store.measured():
            alike = row.kernel["backend"] == self.backend.name and row.problem["exact"] == wanted["exact"]
            other = row.problem["sizes"] != wanted["sizes"]
            if alike and other and row.ms is not None and frozen(row.config) in self.space:
                apart = sum(abs(math.log2(row.problem["sizes"][name] / size)) for name, size in wanted["sizes"].items())
                found.append((apart, keys.canonical(row.problem), row.ms, self.space.index(frozen(row.config))))
        nearest = min(found)[:2] if found else None
        return [number for apart, where, _, number in sorted(found) if (apart, where) == nearest]

    def _subject(self, config) -> Subject:
        return Subject(self.backend.name, self.problem, config)

    # ---- Trials ----

    def _try_all(self) -> None:
        space = [dict(config) for config in self.space]
        strategy = STRATEGIES[self.session.strategy](space, self.session.seed, self._hints())
        ahead = collections.deque()
        while True:
            while len(ahead) < (2 * os.cpu_count() if self.compilers else 1):
                number = strategy.ask()
                if number is None:
                    break
                config = self.space[number]
                if config in self.ratios or config in self.broken:
                    strategy.tell(number, self._estimate(config))
                    continue
                if self.compilers:
                    self.compilers.put(self._subject(config))
                ahead.append((number, config))
            if not ahead:
                return
            number, config = self._compiled(ahead)
            self._check_time()
            self._trial(config)
            if self.default in self.broken:
                return
            strategy.tell(number, self._estimate(config))
            self.outcome.tried += 1
            self.notify(self.outcome)

    def _compiled(self, ahead: collections.deque) -> tuple[int, tuple]:
        """Take the first of those ahead that is compiled; the default before all others. What did not compile is stored."""
        if not self.compilers:
            return ahead.popleft()
        while True:
            for each in list(ahead)[: 1 if ahead[0][1] == self.default else None]:
                result = self.compilers.done(self._subject(each[1]), wait=0.05)
                if result is not None:
                    ahead.remove(each)
                    if result.status != "ok":
                        self._fail(each[1], result)
                    return each
                self._check_time()

    def _check_time(self) -> None:
        """OutOfTime once the budget is used up, but never before the default config has been tried."""
        if self.clock.left() <= 0 and (self.default in self.ratios or self.default in self.broken):
            raise OutOfTime

    def _estimate(self, config) -> float | None:
        """A config's time over the canary's beside it; None where it failed."""
        return statistics.median(self.ratios[config]) if config in self.ratios else None

    def _trial(self, config) -> None:
        """Verify, time, check, store."""
        if config in self.broken:
            return
        worst = None
        if config not in self.verified:
            result = self.bench.act("verify", self._subject(config), self.session.seed + 1)
            if result.status != "ok":
                return self._fail(config, result)
            worst = result.values["worst"]
        timed = self._time(config)
        if isinstance(timed, Result):
            return self._fail(config, timed)
        samples, canary = timed
        result = self.bench.act("check", self._subject(config))
        if result.status != "ok":
            return self._fail(config, result)
        kept = race.quiet(canary)
        self.ratios[config] = [samples[i] / canary[i] for i in kept]
        self.verified.add(config)
        median = statistics.median(samples[i] for i in kept)
        self._store(
            config, "ok", median, samples=samples, canary=canary, ratios=self.ratios[config], relative=self._estimate(config),
            worst=max(result.values["worst"], worst or 0.0), discarded=len(samples) - len(kept),
        )  # fmt: skip

    def _time(self, config) -> tuple[list[float], list[float]] | Result:
        """(samples, the canary's beside them); the Result of what failed."""
        best = min(self.ratios.values(), key=statistics.median, default=None)
        policy, samples, canary = self.session.policy, [], []
        for turn in range(policy.trial_turns):
            beside = None if config == self.default else self.default
            result = self.bench.act("time", self._subject(config), (policy.samples, beside))
            if result.status != "ok":
                return result
            samples += result.values["samples"]
            canary += result.values["canary" if beside else "samples"]
            ratios = [samples[i] / canary[i] for i in race.quiet(canary)]
            slower = best is not None and race.behind(ratios, best)
            if slower or (turn and race.known(ratios)) or self.clock.left() <= 0:
                break
        return samples, canary

    def _fail(self, config, result: Result) -> None:
        self.broken[config] = result.status
        self.outcome.failed[result.status] += 1
        self._store(config, result.status, why=result.why)

    def _store(self, config, status: str, median: float | None = None, **details) -> None:
        session = dataclasses.asdict(self.session)
        details |= {"at": now(), "session": session, "default": config == self.default, "space": len(self.space)}
        self.store.add(self.bodies | {"config": dict(config)}, status, median, **details)

    # ---- The race at the end ----

    def _confirm(self) -> None:
        """Store as confirmed the config that is fastest when measured afresh beside the default; the default itself in a tie."""
        if self.compilers:
            self.compilers.drop()
        while True:
            ranked = sorted(self.ratios, key=lambda config: statistics.median(self.ratios[config]))
            if self.default not in self.ratios or self.default in self.broken:
                default = self.broken.get(self.default)
                self.outcome.why = f"the default config: {default}" if default else "no time for the default config"
                return
            best = self.ratios[ranked[0]]
            close = [config for config in ranked if not race.behind(self.ratios[config], best)]
            finalists = list(dict.fromkeys([*close[: self.session.policy.finalists], self.default]))
            samples, lost = self._race(finalists)
            if lost is not None:
                self._fail(*lost)
                del self.ratios[lost[0]]
                continue
            winner = min(samples, key=lambda config: statistics.median(samples[config]))
            ties = [config for config in samples if not race.behind(samples[config], samples[winner])]
            if self.default in ties:
                winner = self.default
            if self._holds(winner):
                break
        details = {
            "samples": samples[winner], "default_ms": statistics.median(samples[self.default]),
            "ties": [dict(config) for config in ties if config != winner],
        }  # fmt: skip
        median = statistics.median(samples[winner])
        self._store(winner, "confirmed", median, **details)
        self._report(winner, median, details)
        self.notify(self.outcome)

    def _report(self, winner, median: float, details: dict) -> None:
        self.outcome.best, self.outcome.ms = dict(winner), median
        self.outcome.default_ms, self.outcome.ties = details["default_ms"], details["ties"]

    def _race(self, finalists: list) -> tuple[dict, tuple | None]:
        """({config: samples}, None) measured in turns until the fastest is known well; or ({}, (config, Result)) of what failed."""
        policy, samples = self.session.policy, {config: [] for config in finalists}
        running = list(finalists)
        for turn in range(policy.race_turns):
            for config in running:
                result = self.bench.act("time", self._subject(config), (policy.race_samples, None))
                if result.status != "ok":
                    return {}, (config, result)
                samples[config] += result.values["samples"]
            if turn + 1 < LEAST_TURNS:
                continue
            kept = race.quiet(samples[self.default])
            now_kept = {config: [samples[config][i] for i in kept if i < len(samples[config])] for config in finalists}
            leader = min(running, key=lambda config: statistics.median(now_kept[config]))
            running = [c for c in running if c == self.default or not race.behind(now_kept[c], now_kept[leader])]
            if race.known(now_kept[leader]) or self.clock.left() <= 0:
                break
        return now_kept, None

    def _holds(self, config) -> bool:
        """Whether a config is still right on inputs it has not seen, and on the timed problem; it is out if not."""
        for action, argument in (("verify", self.session.seed + 2), ("check", None)):
            result = self.bench.act(action, self._subject(config), argument)
            if result.status != "ok":
                self._fail(config, result)
                del self.ratios[config]
                return False
        return True
