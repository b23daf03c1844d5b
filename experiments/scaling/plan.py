"""From a plan, a Python file that sets keys of train.py and what else __main__.py names, to its runs."""
import difflib
import functools
import itertools
import math
import os
import runpy
import types

import configurator
from configurator import HERE, show
from experiments.launcher import TRAIN, Run, make_run, train_defaults

REPLACES = dict(head_size="n_head", flops="max_iters", evals="eval_interval")   # a plan's key: what it sets


def expand(path: str, flags: list[str], root: str) -> list[Run]:
    """The runs of a plan, each in a folder below root, the cheapest first. flags: of train.py, for all runs.
    Later ones win: config/<label>.py, the plan, a structure's own keys, the flags. Raises ValueError."""
    keys, defaults = configurator.read_keys(TRAIN), train_defaults()
    path, plan = read_plan(path)
    structures = plan.pop("structures")
    plan = check_values(path, plan, keys)
    by_name = dict(configurator.split_flag(flag, keys) for flag in flags)
    for_all = {name: configurator.parse(keys[name], text) for name, text in by_name.items()}
    found: dict[str, Run] = {}
    for label, own in structures.items():
        where, has_config = f"{path}, {label}", os.path.exists(os.path.join(HERE, "config", f"{label}.py"))
        if not has_config and "struct" not in own:
            raise ValueError(f"{where}: there is no config/{label}.py, so the plan must set its struct")
        values = override(configurator.structure_config(label) if has_config else {}, plan, path)
        values = override(values, check_values(where, own, keys), where)
        values = override(values, for_all, "the command line")
        axes = {key: value for key, value in values.items() if isinstance(value, list)}
        for point in (dict(zip(axes, choice)) for choice in itertools.product(*axes.values())):
            try:
                run = make_run(label, values | point, defaults, root)
            except ValueError as e:
                raise ValueError(f"{where}, {', '.join(f'{k} = {v}' for k, v in point.items())}: {e}") from e
            if run.name not in found or run.max_iters > found[run.name].max_iters:
                found[run.name] = run   # at a constant rate a longer run holds the shorter ones
    return sorted(found.values(), key=lambda run: run.flops)


def find_plan(path: str) -> str:
    """The path of a plan, from the working directory or the clone's root. Raises ValueError."""
    for found in (path, os.path.join(HERE, path)):
        if os.path.isfile(found):
            return found
    names = os.listdir(os.path.join(HERE, "experiments", "plans"))
    near = difflib.get_close_matches(os.path.basename(path), names, n=1)
    hint = f"did you mean experiments/plans/{near[0]}?" if near else "some are in experiments/plans/"
    raise ValueError(f"there is no plan {show(path)}: {hint}")


def read_plan(path: str) -> tuple[str, dict]:
    """(path of a plan file, what it sets). Raises ValueError for a file that is no plan."""
    path = find_plan(path)
    try:
        values = runpy.run_path(path)
    except (Exception, SystemExit) as e:
        raise ValueError(f"{path}{configurator.describe(e, path)}") from e
    plan = {name: value for name, value in values.items()
            if not (name.startswith("_") or callable(value) or isinstance(value, types.ModuleType))}
    structures = plan.get("structures")
    if not isinstance(structures, dict) or not structures:
        raise ValueError(f"{path}: structures must be a dictionary {{label: {{keys of its own}}}}; "
                         f"got {show(structures)}")
    for label, own in structures.items():
        if not isinstance(own, dict):
            raise ValueError(f"{path}: structures[{label!r}] must be a dictionary of keys; got {show(own)}")
    return path, plan


def check_values(where: str, values: dict, keys: dict) -> dict:
    """The values, each in its key's type, lists element by element. Raises ValueError."""
    checked = {}
    for name, value in values.items():
        try:
            if name in REPLACES:
                checked[name] = value
                numbers = list(value.values()) if isinstance(value, dict) and name == "flops" else value
                for number in numbers if isinstance(numbers, list) else [numbers]:
                    if type(number) not in (int, float) or not 0 < number < math.inf:
                        raise ValueError(f"{name} takes positive numbers, not {show(value)}")
            elif name not in keys or name in ("out_dir", "init_from"):
                known = [*keys, *REPLACES, "structures"]
                raise ValueError(f"unknown key {show(name)}: {configurator.nearest(name, known)}")
            else:
                coerce = functools.partial(configurator.coerce, keys[name])
                checked[name] = [coerce(v) for v in value] if isinstance(value, list) else coerce(value)
        except ValueError as e:
            raise ValueError(f"{where}: {e}") from e
    return checked


def override(values: dict, more: dict, where: str) -> dict:
    """The values, with `more` over them: a key there also overrides what decides it, or what it decides.
    Raises ValueError where `more` holds both of such a pair."""
    for key, decided in REPLACES.items():
        if key in more and decided in more:
            raise ValueError(f"{where}: {key} and {decided} decide the same: set one of them")
        if key in more or decided in more:
            values = {k: v for k, v in values.items() if k not in (key, decided)}
    return values | more
