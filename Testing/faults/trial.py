"""A trial: a folder as the user has it, one fault, what is left, and the command once more.

`Bench` prepares each job once: its folder, what an undisturbed run makes of it, its steps and its time.
"""

from __future__ import annotations

import random
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from faults import judge
from faults.engine import Ended, ctseg, has_happened, run
from faults.jobs import JOBS, Job
from faults.steps import At, Tap


@dataclass
class Row:
    """One line of the table: what was done to what, how often, and what came of it."""

    what: str
    outcomes: Counter[str] = field(default_factory=Counter)
    lost: int = 0

    def add(self, outcome: str, troubles: Sequence[str], where: str) -> None:
        """Counts one fault; `where` says at which point it was made."""
        self.outcomes[outcome] += 1
        if troubles:
            self.lost += 1
            for trouble in troubles:
                sys.stderr.write(f"{self.what} | {where} | {outcome}: {trouble}\n")

    def as_table(self) -> dict[str, Any]:
        """The row for the JSON file."""
        outcomes = dict(sorted(self.outcomes.items()))
        tried = self.outcomes.total()
        return {"what": self.what, "tried": tried, "outcomes": outcomes, "lost": self.lost}


@dataclass(frozen=True, kw_only=True)
class Ready:
    """A job, prepared.

    Attributes:
        home: the folder it starts from.
        before: SHA-256 of the files there.
        goal: what each file says after an undisturbed run.
        steps: that it takes, in order; seconds: it takes.
        largest: bytes of the largest file it writes.
    """

    job: Job
    home: Path
    before: Mapping[str, str]
    goal: Mapping[str, str]
    steps: tuple[str, ...]
    seconds: float
    largest: int


class Bench:
    """Prepared jobs and the place for their copies."""

    def __init__(self, folder: Path, share: float = 1.0, jobs: Sequence[str] = tuple(JOBS)) -> None:
        self.folder, self.share, self.jobs = folder, share, jobs
        self.count = 0
        self._ready: dict[str, Ready] = {}

    def some(self, count: int) -> int:
        """How many of `count` faults are made in this run: all, or a share of them, at least one."""
        return max(1, round(count * self.share))

    def picked(self, things: Iterable[Any], count: int, seed: str) -> list[Any]:
        """At most `some(count)` of the things, chosen by a seed, in their order."""
        pool = list(things)
        chosen = random.Random(seed).sample(range(len(pool)), min(self.some(count), len(pool)))
        return [pool[n] for n in sorted(chosen)]

    def fresh(self, ready: Ready, name: str = "") -> Path:
        """A new copy of a job's folder."""
        self.count += 1
        folder = self.folder / (name or f"t{self.count}")
        shutil.copytree(ready.home, folder, symlinks=True)
        return folder

    def ready(self, job: Job) -> Ready:
        """The job, prepared once."""
        if job.name not in self._ready:
            self._ready[job.name] = self._prepared(job)
        return self._ready[job.name]

    def _prepared(self, job: Job) -> Ready:
        home = self.folder / f"home-{job.name}".replace(" ", "-")
        home.mkdir()

        def build() -> int:
            job.build(home)
            return 0

        _must(run(home, build), f"the folder of {job.name}")
        (home / "home").mkdir(exist_ok=True)
        before = judge.bytes_of(home)
        goals = []
        for n in range(2):
            folder, note = self.folder / f"{job.name}-{n}", self.folder / f"{job.name}-{n}.steps"
            shutil.copytree(home, folder)
            tap = Tap(folder, note=note)
            ended = run(folder, ctseg(*job.arguments), inject=tap.install)
            _must(ended, job.name)
            goals.append(judge.meanings_of(folder))
        if goals[0] != goals[1]:
            differing = [n for n in goals[0] if goals[0][n] != goals[1].get(n)]
            message = f"two undisturbed runs of {job.name} differ: {differing}"
            raise AssertionError(message)
        sizes = [p.stat().st_size for n, p in judge.files_of(folder).items() if n not in before]
        sizes += [p.stat().st_size for n, p in judge.files_of(folder).items() if n in job.old]
        ready = Ready(
            job=job,
            home=home,
            before=before,
            goal=goals[0],
            steps=tuple(note.read_text(encoding="utf-8").splitlines()),
            seconds=ended.seconds,
            largest=max(sizes, default=1),
        )
        for n in range(2):
            shutil.rmtree(self.folder / f"{job.name}-{n}")
        return ready

    def trial(
        self,
        row: Row,
        ready: Ready,
        where: str,
        *,
        at: At | None = None,
        inject: Callable[[Path], object] | None = None,
        kill_after: float | None = None,
        arguments: Sequence[str] | None = None,
        again: Sequence[str] | None = None,
        heal: Callable[[Path], object] | None = None,
        names: str = "",
        right: Sequence[int] = (),
    ) -> Ended:
        """Makes one fault, looks at what is left, repeats the command, and counts it all in `row`; a fault
        that was not reached is not counted.

        Args:
            row: of the table.
            ready: the job.
            where: the fault's point in words.
            at: a step of the process and what happens there.
            inject: sets another trap, in the child, for the folder.
            kill_after: seconds.
            arguments, again: in place of the job's own.
            heal: undoes outside damage (a truncated file is copied again) before the repetition.
            names: of the folder, when it matters.
            right: exit codes that a command which survives may have; all that are documented when empty.
        """
        folder = self.fresh(ready, names)
        job = ready.job

        def trap() -> None:
            if at is not None:
                Tap(folder, at).install()
            if inject is not None:
                inject(folder)

        has_happened()
        ended = run(folder, ctseg(*(arguments or job.arguments)), inject=trap, kill_after=kill_after)
        trapped = at is not None or inject is not None or kill_after is not None
        if trapped and not (has_happened() or ended.code):
            shutil.rmtree(folder)
            return ended  # it was over before its fault: nothing was tried
        if heal is not None:
            heal(folder)
        troubles = judge.spoken(ended) + judge.whole(job, folder, ready.before, ready.goal)
        if right and ended.code >= 0 and ended.code not in right:
            troubles.append(f"exit code {ended.code} instead of {right}: {ended.err[-300:]}")
        if ended.code == 0:
            troubles += judge.reached(folder, ready.before, ready.goal, job)
        repeated = run(folder, ctseg(*(again or job.again)))
        if repeated.code != 0:
            troubles.append(f"repeated, it ends with {repeated.code}: {repeated.err[-300:]}")
        else:
            troubles += judge.reached(folder, ready.before, ready.goal, job)
        row.add(judge.outcome_of(ended), troubles, where)
        shutil.rmtree(folder)
        return ended


def _must(ended: Ended, what: str) -> None:
    if ended.code != 0:
        message = f"{what} failed undisturbed ({ended.code}): {ended.err[-2000:]}"
        raise AssertionError(message)
