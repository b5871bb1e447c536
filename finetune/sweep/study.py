"""A sweep's book: sweep.json says what is tried, Optuna's journal.log which trials there are and how they do.

Trial N is the run in OUT/trials/N. It is written into the journal once, with all its settings, before it starts. So a
sweep that is killed at any moment finds every trial that it began, and begins none twice. Any number of processes may
write to the journal, also from other machines: Optuna's lock is a file beside it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from typing_extensions import TypedDict

from finetune.sweep.space import distributions, draw
from nano3.cli import UserError
from nano3.documents import Count, Name, Text, as_json, check, closed, parse_json_line, read_json
from nano3.outputs import fresh_file

if TYPE_CHECKING:
    import optuna
    from optuna.trial import FrozenTrial

KIND = "sweep"
FILE, JOURNAL, TRIALS = "sweep.json", "journal.log", "trials"
NAME = "sweep"
"""Of the one study in a journal."""
FIRST_WHOLE = 4
"""Trials that run to their end whatever they are, before any is measured by their median."""
_REMEDY = "restore the file, or begin another sweep with another --out"


@closed
class PlanFile(TypedDict):
    """sweep.json."""

    tries: dict[Name, Text]
    sampler: Name
    seed: Count
    prune_after: Count | None
    common: dict[Name, Any]


class JournalLine(TypedDict):
    """What every line of journal.log has."""

    op_code: Count
    worker_id: Name


@dataclass(frozen=True)
class Plan:
    """What makes two attempts the same sweep."""

    tries: Mapping[str, str]
    """Setting -> its choices or its range (`finetune.sweep.space`)."""
    sampler: str
    seed: int
    prune_after: int | None
    """Steps that every trial may take before it can be given up; None: none is given up."""
    common: Mapping[str, Any]
    """What all trials share: every setting, by its key, and model, data, validation and recipe."""


class Study:
    """The book of the sweep in `folder`, which exists."""

    def __init__(self, folder: Path, plan: Plan) -> None:
        self.folder, self.plan = folder, plan

    @classmethod
    def begin(cls, folder: Path, plan: Plan) -> Study:
        """Opens the sweep in `folder`, or writes its sweep.json. Raises `UserError` for another sweep's."""
        file = folder / FILE
        if not file.exists():
            with fresh_file(file) as temporary:
                temporary.write_text(json.dumps(asdict(plan), indent=1) + "\n")
        study, asked = cls.read(folder), as_json(asdict(plan))
        there = asdict(study.plan)
        for name in ("tries", "sampler", "seed", "prune_after"):
            if there[name] != asked[name]:
                raise UserError(f"{file}: the sweep there has {name} {there[name]}, not {asked[name]}; {_OTHER}")
        old, new = there["common"], asked["common"]
        for key in sorted({*old, *new}):
            if old.get(key) != new.get(key):
                raise UserError(f"{file}: the sweep there has {key}={old.get(key)}, not {new.get(key)}; {_OTHER}")
        return study

    @classmethod
    def read(cls, folder: Path) -> Study:
        """The sweep that lies in `folder`. Raises `UserError` where there is none, or its file is damaged."""
        return cls(folder, Plan(**read_json(folder / FILE, PlanFile, _REMEDY)))

    @cached_property
    def space(self) -> dict[str, Any]:
        """Setting -> Optuna's distribution."""
        return distributions(self.plan.tries, self.plan.common)

    @cached_property
    def _storage(self) -> optuna.storages.BaseStorage:
        return open_journal(self.folder)

    @cached_property
    def _optuna(self) -> optuna.Study:
        import optuna

        pruner: optuna.pruners.BasePruner = optuna.pruners.NopPruner()
        if self.plan.prune_after is not None:
            pruner = optuna.pruners.MedianPruner(n_startup_trials=FIRST_WHOLE, n_warmup_steps=self.plan.prune_after)
        return optuna.create_study(
            storage=self._storage, study_name=NAME, direction="minimize", load_if_exists=True, pruner=pruner
        )

    def trials(self) -> list[FrozenTrial]:
        """All trials, by number; those without a result are `RUNNING`, whether or not a process works on them."""
        return self._optuna.get_trials(deepcopy=False)

    def unfinished(self) -> list[int]:
        """Numbers of the trials that were begun and have no result."""
        return [one.number for one in self.trials() if not one.state.is_finished()]

    def propose(self) -> int:
        """Writes one more trial into the journal, whole; its number. Raises `UserError` when the space is used up.

        One process may propose at a time; the sweep's own command holds the folder's lock.
        """
        from optuna.trial import TrialState, create_trial

        trials = self.trials()
        params = draw(self.space, self.plan.sampler, self.plan.seed, len(trials), trials)
        self._optuna.add_trial(create_trial(state=TrialState.RUNNING, params=params, distributions=self.space))
        return len(trials)

    def finish(self, number: int, loss: float) -> None:
        """Records the validation loss of a trial that ran to its end."""
        self._optuna.tell(number, loss)

    def fail(self, number: int) -> None:
        """Records that a trial has no result and will have none."""
        from optuna.trial import TrialState

        self._optuna.tell(number, state=TrialState.FAIL)

    def folder_of(self, number: int | str) -> Path:
        """Where the run of a trial lies."""
        return self.folder / TRIALS / str(number)

    def gives_up(self, number: int, step: int, loss: float, last: bool) -> bool:
        """Records a trial's validation loss after so many steps; whether the trial ends here, which is recorded then.

        It ends when its best loss so far is worse than the median of the finished trials after as many steps, unless
        these are fewer than `FIRST_WHOLE`. At its `last` step a trial has all that it can have, and is kept.
        """
        from optuna.trial import TrialState

        study, storage = self._optuna, self._storage
        if not self.trials()[number].state.is_finished():
            book = storage.get_study_id_from_name(NAME)
            storage.set_trial_intermediate_value(
                storage.get_trial_id_from_study_id_trial_number(book, number), step, loss
            )
            if last or not study.pruner.prune(study, self.trials()[number]):
                return False
            study.tell(number, state=TrialState.PRUNED)
        return self.trials()[number].state == TrialState.PRUNED


_OTHER = "give what it was begun with, or another --out"


def open_journal(folder: Path) -> optuna.storages.BaseStorage:
    """The journal in `folder`, begun where there is none.

    Raises:
        UserError: a line of it is none of Optuna's.
    """
    import optuna
    from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    path = (folder / JOURNAL).resolve()
    lock = JournalFileOpenLock(str(path))
    if path.exists():
        _mend(path, lock)
        whole = path.read_bytes().split(b"\n")[:-1]  # what comes behind the last end of a line, somebody is writing now
        for number, line in enumerate(whole, 1):
            where = f"{path}:{number}"
            check(parse_json_line(line, where), JournalLine, where, _REMEDY)  # type: ignore[arg-type]
    return optuna.storages.JournalStorage(JournalFileBackend(str(path), lock))


def _mend(path: Path, lock: Any) -> None:
    """Takes off the half line that a process killed while it wrote has left: Optuna would write on behind it."""
    lock.acquire()
    try:
        text = path.read_bytes()
        whole = text.rfind(b"\n") + 1
        if whole < len(text):
            with path.open("r+b") as file:
                file.truncate(whole)
    finally:
        lock.release()
