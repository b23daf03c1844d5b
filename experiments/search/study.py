"""What search.py asks of Optuna, and keeps in its study: sampler, pruner, storage, and the next point to be trained.

A trial's user attributes: `named`, where a structure was asked for before the sampler had a say; `point`, the name of its
model (search_space.Point.name), `label`, `structure` and `theta`; or `rejected`, why it has none. `same_as`: the trial
that had its point before. `surplus`: one too many. What came of its runs: `run`, `settings`, `params` ..., or `why` it
failed. `again`: the failed trial whose point it takes up, which then counts no more.
"""
import math
import os
import re
import time

from configurator import fail, show
from experiments.search.space import Space, places_of
from structured import STRUCTURES

try:
    import optuna
    import sqlalchemy   # Optuna's
    from optuna.trial import TrialState
except ImportError:
    fail("the search needs optuna: pip install -r requirements-search.txt")

JOURNAL = "study.journal"
ATTEMPTS = 2000     # θ that a sampler may ask for in vain
ATTEMPTS_TO_OPEN = 5


def make_sampler(kind: str, seed: int | None = None) -> optuna.samplers.BaseSampler:
    """Optuna's. TPE looks at all parameters together, since ω and ψ depend on sums of them, and takes trials that others
    are at for bad ones, so that two processes do not ask for the same."""
    if kind == "random":
        return optuna.samplers.RandomSampler(seed=seed)
    return optuna.samplers.TPESampler(seed=seed, multivariate=True, constant_liar=True, n_startup_trials=12)


def make_pruner(kind: str, first_rung: int, reduction: int, evals: int) -> optuna.pruners.BasePruner:
    """Optuna's; resources are evaluations."""
    if kind == "halving":
        return optuna.pruners.SuccessiveHalvingPruner(min_resource=first_rung, reduction_factor=reduction)
    if kind == "hyperband":
        return optuna.pruners.HyperbandPruner(min_resource=first_rung, max_resource=evals, reduction_factor=reduction)
    return optuna.pruners.NopPruner()


def open_study(storage: str | None, name: str, folder: str, sampler=None, pruner=None) -> optuna.Study:
    """The study in its storage, a journal in the folder or a database; with a sampler it is made where it is not there.
    Ends in one sentence where it cannot be had."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    place = storage or os.path.join(folder, JOURNAL)
    shown = re.sub(r"(//[^:/@]*):[^@/]*@", r"\1:***@", place)     # a URL's password stays out of logs
    try:
        if storage is None:
            if sampler:
                os.makedirs(folder, exist_ok=True)
            elif not os.path.exists(place):
                fail(f"there is no study {place!r}: search first, or name another folder with --out")
            backend = optuna.storages.journal.JournalFileBackend(place, lock_of(place))
            if sampler:
                mend(place)
            storage = optuna.storages.JournalStorage(backend)
        for attempt in range(ATTEMPTS_TO_OPEN if sampler else 0):
            try:
                return optuna.create_study(storage=storage, study_name=name, sampler=sampler, pruner=pruner,
                                           load_if_exists=True)
            except sqlalchemy.exc.DBAPIError:   # several processes make the tables of a new database at the same time
                if attempt + 1 == ATTEMPTS_TO_OPEN:
                    raise
                time.sleep(0.5 + attempt)
        return optuna.load_study(study_name=name, storage=storage)
    except KeyError:
        fail(f"there is no study {name!r} in {shown!r}")
    except Exception as e:      # whatever a database driver raises
        why = (str(e).replace(place, shown) or type(e).__name__).splitlines()[0]
        fail(f"the storage {shown!r} cannot be opened: {why}")


def lock_of(journal: str) -> optuna.storages.journal.JournalFileOpenLock:
    """A file rather than Optuna's usual link, which a relative path would leave dangling, and a stale one is then waited for
    for ever. One that stays untouched for 30 s was left by a process that died, and is removed."""
    return optuna.storages.journal.JournalFileOpenLock(os.path.abspath(journal))


def mend(journal: str) -> None:
    """Cut half a line, left by a full disk or a power cut, off the end: Optuna would append to it, and read no further."""
    lock = lock_of(journal)
    lock.acquire()
    try:
        with open(journal, "rb+") as f:
            f.truncate(f.read().rfind(b"\n") + 1)
    finally:
        lock.release()


def begin(study: optuna.Study, space: Space, named: bool, first_rung: int) -> None:
    """A study keeps what it was asked for, and goes on with the same alone. The named structures may come first.

    The request is written last: until it is there, a study has not begun.
    """
    asked, kept = space.request(), study.user_attrs.get("request")
    if kept is None:
        for name, theta in STRUCTURES.items():
            if named and theta is not None:
                options = (("num_experts", sorted(space.experts)), ("top_k", space.top_ks))
                choices = {key: values[0] for key, values in options if len(values) > 1}
                study.enqueue_trial(places_of(theta) | choices, user_attrs=dict(named=name), skip_if_exists=True)
        study.set_user_attr("first_rung", first_rung)
        study.set_user_attr("request", asked)
    elif kept != asked:
        kept, asked = ({k: v for k, v in r.items() if k != "settings"} | r["settings"] for r in (kept, asked))
        key = next(k for k in asked | kept if kept.get(k) != asked.get(k))
        fail(f"the study was begun with {key} = {show(kept.get(key))}, not {show(asked.get(key))}: give the same, or "
             "another --out")


def trained(study: optuna.Study) -> list:
    """The trials that count: not those without a point, those that repeat another's, and those that were begun again."""
    trials = study.get_trials(deepcopy=False)
    again = {t.user_attrs.get("again") for t in trials}
    return [t for t in trials if "point" in t.user_attrs and not t.user_attrs.keys() & {"same_as", "surplus"}
            and t.number not in again]


def try_again(study: optuna.Study) -> int:
    """Ask once more for the trials whose runs have ended with an error, whatever that was; returns how many. A loss that was
    not finite would be so again."""
    failed = [t for t in trained(study) if t.state == TrialState.FAIL and t.user_attrs.get("why", "").startswith("ended")]
    for trial in failed:
        study.enqueue_trial(trial.params, user_attrs=dict(again=trial.number) | {
            key: trial.user_attrs[key] for key in ("named",) if key in trial.user_attrs})
    return len(failed)


def propose(study: optuna.Study, space: Space, trials: int):
    """(trial, its point), or None when there are so many trials already.

    What the sampler asks for and cannot be trained, or need not be, is told as such and does not count: the next is asked
    for. Raises ValueError where it asks for nothing else.
    """
    for _ in range(ATTEMPTS):
        if len(trained(study)) >= trials:
            return None
        trial = study.ask()
        try:
            point = space.point(*space.suggest(trial))
        except ValueError as e:
            trial.set_user_attr("rejected", str(e))
            study.tell(trial, state=TrialState.FAIL)
            continue
        facts = dict(label=point.label, structure=point.structure, theta=list(point.theta), point=point.name)
        for key, value in facts.items():
            trial.set_user_attr(key, value)
        if not settled(study, trial, point.name, trials):
            return trial, point
    raise ValueError(f"in {ATTEMPTS:,} attempts the sampler found nothing that is not trained yet: the space may be "
                     "exhausted; widen --widths or --tolerance, or ask for fewer --trials")


def settled(study: optuna.Study, trial, name: str, trials: float = math.inf) -> bool:
    """Tell a trial whose point another one has, or which is beyond the number of trials; True if it was one.

    A θ whose matrices are those of another gets its values. The very same θ is told without: more of the same would only
    draw the sampler to where it has been.
    """
    try:
        return _settle(study, trial, name, trials)
    except optuna.exceptions.UpdateFinishedTrialError:  # another process has told it in the meantime
        return True


def _settle(study: optuna.Study, trial, name: str, trials: float) -> bool:
    everyone = study.get_trials(deepcopy=False)
    others = [t for t in trained(study) if t.number != trial.number]
    same = [t for t in others if t.user_attrs["point"] == name and (t.state.is_finished() or t.number < trial.number)]
    if not same:
        surplus = len(others) >= trials     # of two at the same moment, both may go: the next is asked for
        if surplus:
            trial.set_user_attr("surplus", True)
            study.tell(trial, state=TrialState.FAIL, skip_if_finished=True)
        return surplus
    first = min(same, key=lambda t: (not t.state.is_finished(), t.number))
    trial.set_user_attr("same_as", first.number)
    mine, state, value = everyone[trial.number], TrialState.FAIL, None
    if first.params != mine.params and first.state in (TrialState.COMPLETE, TrialState.PRUNED):
        for step in sorted(first.intermediate_values.keys() - mine.intermediate_values.keys()):
            trial.report(first.intermediate_values[step], step)
        state, value = first.state, first.value if first.state == TrialState.COMPLETE else None
    study.tell(trial, value, state=state, skip_if_finished=True)
    return True
