"""The runs of a plan, a Python file that sets keys of train.py and the others that __main__.py names."""
import itertools
import os
import runpy
import types

import configurator
from configurator import HERE, Key, nearest, show
from experiments.launcher import TRAIN_KEYS, Run, make_run

REPLACES = dict(head_size="n_head", flops="max_iters", evals="eval_interval")   # a plan's key: what it sets
POSITIVE = (("above", 0), ("below", 1e30))
KEYS = TRAIN_KEYS | {name: Key(name, float, False, (), POSITIVE, None, "", "") for name in REPLACES}
del KEYS["out_dir"], KEYS["init_from"]
KEYS["max_iters"] = KEYS["max_iters"]._replace(limits=configurator.PositiveInt.__metadata__)


def expand(path: str, flags: list[str], root: str) -> list[Run]:
    """The runs of a plan, each in a folder below root, the cheapest first. flags: of train.py, for all runs.
    Later ones win: config/<label>.py, the plan, a structure's own keys, the flags. Raises ValueError."""
    for_all = dict(configurator.read_flag(flag, KEYS) for flag in flags)
    found: dict[str, Run] = {}
    for label, values in structures_of(path).items():
        where = f"{path}, {label}"
        values = override(values, for_all, "the command line")
        axes = {key: value for key, value in values.items() if isinstance(value, list)}
        for point in (dict(zip(axes, choice)) for choice in itertools.product(*axes.values())):
            try:
                run = make_run(label, values | point, root)
            except ValueError as e:
                shown = ", ".join([where, *(f"{k} = {v}" for k, v in point.items())])
                raise ValueError(f"{shown}: {e}") from e
            if run.name not in found or run.max_iters > found[run.name].max_iters:
                found[run.name] = run   # at a constant rate a longer run contains the shorter ones
    return sorted(found.values(), key=lambda run: run.flops)


def structures_of(path: str) -> dict[str, dict]:
    """{label: all that config/<label>.py, a plan and the structure's own keys set}. Raises ValueError."""
    path, plan = read_plan(path)
    structures = plan.pop("structures")
    plan, found = check_values(path, plan), {}
    for label, own in structures.items():
        where, has_config = f"{path}, {label}", os.path.exists(os.path.join(HERE, "config", f"{label}.py"))
        if not has_config and "struct" not in own:
            raise ValueError(f"{where}: there is no config/{label}.py, so the plan must set its struct")
        values = override(configurator.structure_config(label) if has_config else {}, plan, path)
        found[label] = override(values, check_values(where, own), where)
    return found


def read_plan(path: str) -> tuple[str, dict]:
    """(path of a plan, from the working directory or the clone's root, what it sets). Raises ValueError."""
    found = next(filter(os.path.isfile, (path, os.path.join(HERE, path))), None)
    if found is None:
        names = os.listdir(os.path.join(HERE, "experiments", "plans"))
        hint = nearest(os.path.basename(path), names, "experiments/plans/")
        raise ValueError(f"there is no plan {show(path)}: {hint}")
    try:
        values = runpy.run_path(found)
    except (Exception, SystemExit) as e:
        raise ValueError(f"{found}{configurator.describe(e, found)}") from e
    plan = {name: value for name, value in values.items()
            if not (name.startswith("_") or callable(value) or isinstance(value, types.ModuleType))}
    structures = plan.get("structures")
    if not isinstance(structures, dict) or not structures:
        raise ValueError(f"{found}: structures must be a dictionary {{label: {{keys of its own}}}}; "
                         f"got {show(structures)}")
    for label, own in structures.items():
        if not isinstance(own, dict):
            raise ValueError(f"{found}: structures[{label!r}] must be a dictionary of keys; got {show(own)}")
    return found, plan


def check_values(where: str, values: dict) -> dict:
    """The values, each in its key's type, lists and budgets element by element. Raises ValueError."""
    def check(name: str, value: object) -> object:
        if name not in KEYS:
            raise ValueError(f"unknown key {show(name)}: {nearest(name, [*KEYS, 'structures'])}")
        if isinstance(value, list):
            if not value:
                raise ValueError(f"{name} is an empty list: a grid needs at least one value of it")
            return [check_one(name, one) for one in value]
        return check_one(name, value)

    def check_one(name: str, value: object) -> object:
        if isinstance(value, dict) and name == "flops":
            return {width: configurator.coerce(KEYS[name], budget) for width, budget in value.items()}
        return configurator.coerce(KEYS[name], value)

    try:
        return {name: check(name, value) for name, value in values.items()}
    except ValueError as e:
        raise ValueError(f"{where}: {e}") from e


def override(values: dict, more: dict, where: str) -> dict:
    """The values, overridden by `more`: a key there also removes the key that decides it, or that it decides.
    Raises ValueError if `more` has both of such a pair."""
    for key, decided in REPLACES.items():
        if key in more and decided in more:
            raise ValueError(f"{where}: {key} and {decided} decide the same: set one of them")
        if key in more or decided in more:
            values = {k: v for k, v in values.items() if k not in (key, decided)}
    return values | more
