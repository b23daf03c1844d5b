"""The points of a search, how they are sampled, and what its study keeps."""
import math
import random
import threading
from collections import Counter

import numpy as np
import pytest
import torch

optuna = pytest.importorskip("optuna")

from experiments.plans.paper import _thetas as PAPER
from experiments.search import study as search_study
from experiments.search.report import importances, plan_text, rows_of
from experiments.search.space import LEVELS, Space, indices_of, swapped, theta_of
from experiments.search.study import Search, begin, counted, make_pruner, make_sampler, open_study
from structured import STRUCTURES, Sizes, Theta, linear

pytestmark = pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning",
                                        "ignore:Heartbeat of storage")
NAMED = {name: theta for name, theta in STRUCTURES.items() if theta is not None}
SETTINGS = dict(n_layer=3, n_head=4, block_size=128, batch_size=16, gradient_accumulation_steps=1,
                dataset="d", seed=1, decay_lr=False)


def make_space(**changes):
    options = dict(dense_width=96, flops=1e13, widths=tuple(range(32, 513, 4)), tolerance=0.05,
                   learning_rates=(3e-3,), experts=(0,), top_ks=(2,), max_nu=1.0, evals=8, settings=SETTINGS,
                   vocab_size=96)
    return Space(**options | changes)


SPACE = make_space()    # it remembers its points


def random_thetas(count, seed=0):
    rng = random.Random(seed)
    return [theta_of(*(rng.randrange(len(levels)) for levels in LEVELS.values())) for _ in range(count)]


def make_study(kind="random", seed=0, **options):
    return optuna.create_study(sampler=make_sampler(kind, seed), **options)


class Untrained(Search):
    """A search that does not train its points, but asks value(trial, point) for their losses."""
    def train(self, trial, point):
        trial.set_user_attr("run", dict(settings=dict(learning_rate=1e-3), flops=1e13, ms_per_iter=1,
                                        iterations=1))
        return self.value(trial, point)


def searched(study, space, trials, value, tmp_path):
    search = Untrained(study, space, str(tmp_path), trials)
    search.value = value
    search.run()
    return counted(study)


# ---- The space ---------------------------------------------------------------------------------------------

def test_all_structures_of_the_paper_are_in_the_space():
    """Exactly, or with their cores exchanged."""
    for theta in (*NAMED.values(), *(Theta(*t) for t in PAPER.values())):
        again = theta_of(**indices_of(theta))
        assert any(again == pytest.approx(same, abs=1e-12) for same in (theta, swapped(theta))), theta
    with pytest.raises(ValueError, match="between the levels"):
        indices_of(Theta(0.9, 0, 0.1, 0, 1, 0, 0))


def test_edges_have_a_probability_of_their_own():
    thetas = random_thetas(2000)
    assert all(theta.alpha >= theta.beta - 1e-12 for theta in thetas)
    for letter in ("beta", "gamma", "delta", "epsilon", "phi", "rho"):
        assert sum(getattr(theta, letter) == 0 for theta in thetas) > 200, letter


def test_points_have_the_requested_compute_and_an_allowed_width():
    """By the FLOPs that a model counts itself."""
    import torch
    from model import GPT, GPTConfig
    space = make_space(settings=SETTINGS | dict(n_layer=2), experts=(0, 4), top_ks=(1, 2),
                       widths=tuple(range(32, 513, 8)))
    checked = 0
    dense = GPT(GPTConfig(block_size=128, vocab_size=96, n_layer=2, n_head=4, n_embd=96))
    assert space.flops_per_token == 3 * dense.flops_per_token()
    for i, theta in enumerate((*NAMED.values(), *random_thetas(30))):
        try:
            point = space.point(theta, *((0, 0), (4, 1), (4, 2))[i % 3])
        except ValueError:
            continue
        with torch.device("meta"):
            model = GPT(GPTConfig(block_size=128, vocab_size=96, n_layer=2, n_head=4, n_embd=point.width,
                                  struct="einsum", rank=point.rank, theta=tuple(point.theta),
                                  num_experts=point.num_experts, top_k=max(1, point.top_k)))
        assert point.flops_per_token == 3 * model.flops_per_token()
        assert abs(point.flops_per_token / space.flops_per_token - 1) <= 0.05 and point.width in space.widths
        exact = point.width ** theta.rho
        assert point.rank == max(1, round(exact)) or exact / 1.26 < point.rank < exact * 1.26
        checked += 1
    assert checked > 10


def test_a_point_has_a_run_of_the_requested_cost_for_each_rate(python_text, tmp_path):
    space = make_space(settings=SETTINGS | dict(dataset=str(python_text)), learning_rates=(1e-3, 2e-3))
    for name in ("dense", "btt", "low_rank"):
        point = space.point(NAMED[name])
        runs = space.runs(point, str(tmp_path))
        assert [run.settings["learning_rate"] for run in runs] == [1e-3, 2e-3]
        assert len({run.folder for run in runs}) == 2
        for run in runs:
            assert abs(run.flops / 1e13 - 1) < 0.05 and run.max_iters == 8 * run.settings["eval_interval"]
            assert run.settings["n_embd"] == point.width
            if name == "dense":     # with weight norm, which all others have: the better one
                assert run.settings["struct"] == "dense" and "theta" not in run.settings
                assert run.settings["weight_norm"] is True
            else:
                assert run.settings["struct"] == "einsum" and run.settings["theta"] == tuple(NAMED[name])


@pytest.mark.parametrize("settings", [dict(ffn_experts=4), dict(layers="mlp"), dict(dropout=1.5)])
def test_settings_that_change_the_cost_or_make_no_model_are_refused(python_text, tmp_path, settings):
    space = make_space(settings=SETTINGS | dict(dataset=str(python_text)) | settings)
    with pytest.raises(ValueError, match="would cost|dropout"):
        space.runs(space.point(NAMED["btt"]), str(tmp_path))


def exchanged(s):
    """What has the same name: the sizes and, where heads do not tell them apart, those of exchanged cores."""
    return frozenset((s, s.swapped()) if 1 in s[:2] and 1 in s[3:5] else (s,))


def test_points_have_the_same_name_if_their_models_are_the_same():
    for name in ("dense", "low_rank", "monarch", "btt"):
        assert SPACE.point(NAMED[name]).name == SPACE.point(swapped(NAMED[name])).name
    assert len({SPACE.point(theta).name for theta in NAMED.values()}) == len(NAMED)
    # many θ come to the same sizes
    narrow, by_sizes = make_space(widths=(16,), dense_width=16, tolerance=3.0), {}
    for theta in set(t for t in random_thetas(150) if t.nu <= 1):
        point = narrow.point(theta)
        by_sizes.setdefault(tuple(map(exchanged, point.sizes)), []).append(point.name)
    assert all(len(set(names)) == 1 for names in by_sizes.values()) and max(map(len, by_sizes.values())) > 1
    assert len({names[0] for names in by_sizes.values()}) == len(by_sizes) > 20


def test_exchanged_cores_are_another_model_where_heads_see_it():
    """A head is a slice of y[φ, ε, δ]: of 72 rows, whose rank exchanging ε and δ changes here."""
    one = Sizes(16, 18, 1, 72, 4, 1, 1)
    ranks, names = [], []
    for sizes in (one, one.swapped()):
        layer = linear("einsum", 288, 288, sizes=sizes, weight_norm=False).double()
        heads = layer.to_dense().detach().view(4, 72, 288)
        ranks.append(torch.linalg.matrix_rank(heads).tolist())
        names.append(SPACE.point(NAMED["dense"])._replace(sizes=(sizes,) * 3).name)
    assert ranks == [[16] * 4, [64] * 4] and names[0] != names[1]


@pytest.mark.parametrize("changes, theta, words", [
    ({}, Theta(1, 0, 0, 1, 0, 0, 1/2), "ν = 1.5"), ({}, NAMED["monarch"], "no width"),
    # a prime
    (dict(widths=(127,), tolerance=0.5, settings=SETTINGS | dict(n_head=1)), NAMED["monarch"], "no width")])
def test_a_theta_without_a_model_has_no_point(changes, theta, words):
    with pytest.raises(ValueError, match=words):
        make_space(**dict(widths=(96,)) | changes).point(theta)


# ---- Which points are trained ------------------------------------------------------------------------------

def test_a_theta_without_a_model_is_asked_for_but_never_trained(tmp_path):
    trained = []
    study, space = make_study(), make_space(widths=(96, 160, 240))
    trials = searched(study, space, 12, lambda _, point: trained.append(point) or 1.0, tmp_path)
    assert len(trained) == 12 == len(trials)
    for point in trained:
        assert point.theta.nu <= 1 and abs(point.flops_per_token / space.flops_per_token - 1) <= 0.05
        assert point.width in (96, 160, 240)
    rejected = [t for t in study.trials if "rejected" in t.user_attrs]
    assert len(rejected) > 10 and all(t.state.name == "FAIL" for t in rejected)
    assert searched(study, space, 12, None, tmp_path) == trials


def test_a_space_without_another_point_ends_the_search(tmp_path, monkeypatch):
    monkeypatch.setattr(search_study, "ATTEMPTS", 20)
    study = make_study()
    with pytest.raises(ValueError, match="exhausted"):
        searched(study, make_space(widths=(32,)), 12, None, tmp_path)
    assert len(study.trials) == 20


def test_a_point_is_trained_once_and_other_thetas_get_its_value(tmp_path):
    """But the very same θ gets none."""
    def value(trial, point):
        trial.report(2.0 + trial.number, 1)
        if trial.number % 2:
            raise optuna.TrialPruned
        return 2.0 + trial.number

    study, kinds = make_study(), Counter()
    trials = searched(study, make_space(widths=(16,), dense_width=16, tolerance=3.0), 160, value, tmp_path)
    assert len({t.user_attrs["model"]["point"] for t in trials}) == 160
    for trial in study.trials:
        if "same_as" in trial.user_attrs:
            first = study.trials[trial.user_attrs["same_as"]]
            same = trial.params == first.params
            kinds[same, first.state.name] += 1
            assert trial.state.name == ("FAIL" if same else first.state.name)
            assert same or trial.value == first.value
            assert same or trial.intermediate_values == first.intermediate_values
    assert all(kinds[same, state] for same in (True, False) for state in ("COMPLETE", "PRUNED")), kinds


def test_a_point_that_a_running_trial_has_is_not_trained(tmp_path):
    """A trial that is one too many is not trained either; a named structure is queued again then."""
    study, monarch = make_study(), indices_of(NAMED["monarch"])
    search = Untrained(study, SPACE, str(tmp_path), 1)
    search.value = lambda *_: pytest.fail("it was trained")
    dense = indices_of(NAMED["dense"])
    study.enqueue_trial(dense)
    first = study.ask()
    first.set_user_attr("model", dict(point=SPACE.point(NAMED["dense"]).name))
    study.enqueue_trial(dense)
    study.enqueue_trial(monarch, user_attrs=dict(named="monarch"))
    for _ in range(2):
        study.optimize(search, n_trials=1, catch=search_study.Unfinished, callbacks=[search.after_trial])
    same, surplus, again = study.trials[1:]
    assert same.state.name == surplus.state.name == "FAIL" and counted(study)[0].number == first.number
    assert same.user_attrs["same_as"] == first.number and surplus.user_attrs["surplus"]
    assert again.user_attrs["named"] == "monarch" and again.system_attrs["fixed_params"] == monarch


def test_a_retried_trial_of_another_model_begins_anew(tmp_path, capsys):
    """One that an earlier version made of the same θ."""
    study = make_study()
    search = Untrained(study, SPACE, str(tmp_path), 9)
    search.value = lambda *_: 1.0
    study.enqueue_trial(indices_of(NAMED["monarch"]), user_attrs=dict(model=dict(point="d88-a11g8e11f8")))
    study.optimize(search, n_trials=1)
    assert study.trials[0].user_attrs["model"]["point"] == SPACE.point(NAMED["monarch"]).name
    assert "goes on" not in capsys.readouterr().out


def test_dense_with_experts_is_not_dense(tmp_path):
    study, space = make_study(), make_space(experts=(0, 4))
    begin(study, space, False, 2)
    for experts in (0, 4):
        study.enqueue_trial(indices_of(NAMED["dense"]) | dict(num_experts=experts))
    searched(study, space, 2, lambda *_: 1.0, tmp_path)
    assert [row["name"] for row in rows_of(study)] == ["dense", "dense, 4 experts, top 2"]


def test_btt_moe_comes_after_the_named_structures_where_experts_are_a_choice(python_text, tmp_path):
    """The model of config/btt_moe.py, not aligned with heads: the same sizes, experts and FLOPs per token."""
    import torch
    from model import GPT, GPTConfig
    settings = SETTINGS | dict(dataset=str(python_text))
    study, space = make_study(), make_space(experts=(16, 0, 8), top_ks=(2, 1), settings=settings)
    begin(study, space, True, 2)
    queued = [trial.user_attrs["named"] for trial in study.trials]
    assert queued == [*NAMED, "btt_moe"] == list(space.named())
    params = [trial.system_attrs["fixed_params"] for trial in study.trials]
    assert [(p["num_experts"], p["top_k"]) for p in params] == [(0, 2)] * len(NAMED) + [(8, 2)]
    point = space.named()["btt_moe"]
    run, = space.runs(point, str(tmp_path))
    configs = (dict(struct="btt", num_experts=8, top_k=2, head_aligned=False),
               {key: run.settings[key] for key in ("struct", "theta", "num_experts", "top_k")})
    with torch.device("meta"):
        models = [GPT(GPTConfig(block_size=128, vocab_size=96, n_layer=3, n_head=4, n_embd=point.width,
                                **config)) for config in configs]
    shapes = [{name: p.shape for name, p in model.named_parameters()} for model in models]
    assert shapes[0] == shapes[1] and 3 * models[0].flops_per_token() == point.flops_per_token
    for experts in ((0,), (8,)):
        assert list(make_space(experts=experts).named()) == list(NAMED)


def test_btt_moe_and_dense_with_weight_norm_are_in_the_plan_of_the_best(tmp_path):
    study, space = make_study(), make_space(experts=(0, 8))
    begin(study, space, True, 2)
    searched(study, space, 12, lambda trial, point: 9.0 if point.num_experts else 1.0 + trial.number / 99,
             tmp_path)
    rows = rows_of(study)
    settings = {row["trial"]: dict(struct=row["structure"], batch_size=16, n_embd=row["width"],
                                   learning_rate=1e-3) for row in rows}
    dense, = (row["trial"] for row in rows if row["name"] == "dense")
    settings[dense]["weight_norm"] = True
    plan = {}
    exec(plan_text(rows, settings, space.request(), 3, (1, 2), 4.0), plan)
    best = [row["structure"] for row in rows if row["name"] != "dense"][:3]
    btt_moe, = (row["structure"] for row in rows if row["named"] == "btt_moe")
    assert list(plan["structures"]) == [*best, btt_moe, "dense"]
    width = space.named()["btt_moe"].width
    assert plan["structures"][btt_moe] == dict(struct=btt_moe, n_embd=width, learning_rate=1e-3)
    assert plan["structures"]["dense"] == dict(n_embd=96, weight_norm=True, learning_rate=1e-3)
    del settings[dense]     # without its trial
    exec(plan_text(rows, settings, space.request(), 3, (1, 2), 4.0), plan)
    assert plan["structures"]["dense"] == dict(n_embd=96, weight_norm=True, learning_rate=[3e-3])
    assert plan["flops"] == 4e13 and plan["seed"] == [1, 2]


# ---- Sampler, pruner and importances -----------------------------------------------------------------------

def synthetic(theta):
    """What the paper says, and of what is left some ν is the best: 1.5 at ω = 0, ψ = 1, ν = 2/3."""
    return 1.5 + 0.5 * theta.omega + 0.5 * (1 - theta.psi) + 0.4 * abs(theta.nu - 2 / 3)


@pytest.mark.parametrize("seed", [0, 1])
def test_the_sampler_finds_the_best_region_more_often_than_random_search(tmp_path, seed):
    """The region: ω = 0, ψ = 1 and ν within 1/8 of the best. Losses are measured with noise."""
    in_region = {}
    for kind in ("tpe", "random"):
        rng = np.random.default_rng(seed)
        trials = searched(make_study(kind, seed), SPACE, 50,
                          lambda _, point: synthetic(point.theta) + 0.02 * rng.standard_normal(), tmp_path)
        losses = [synthetic(Theta(*t.user_attrs["model"]["theta"]))
                  for t in sorted(trials, key=lambda t: t.value)]
        in_region[kind] = [loss <= 1.5 + 0.4 / 8 + 1e-9 for loss in losses]
    assert in_region["tpe"][0] and sum(in_region["tpe"]) > sum(in_region["random"]), in_region


def test_importances_say_which_parameter_decides():
    study, rng = make_study(), random.Random(0)
    for _ in range(60):
        trial = study.ask()
        places = {name: trial.suggest_int(name, 0, len(levels) - 1) for name, levels in LEVELS.items()}
        study.tell(trial, abs(places["phi"] - 2) + 0.1 * rng.random())
    shares = importances(study, {t.number: t.value for t in study.trials})
    assert sorted(shares.values())[-1] == shares["phi"] > 2 * sorted(shares.values())[-2]
    assert importances(study, {0: 1.0}) == {}


@pytest.mark.parametrize("kind", ["halving", "none"])
def test_pruners_decide_at_the_rungs(kind):
    """Successive halving: one in `reduction` goes on at 2, 4, 8 ... evaluations."""
    study, ends = make_study(pruner=make_pruner(kind, 2, 2)), Counter()
    for i in range(32):
        trial = study.ask()
        for step in range(1, 9):
            trial.report((i * 7) % 32, step)
            if trial.should_prune():
                ends[step] += 1
                break
        else:
            ends["end"] += 1
        study.tell(trial, i if step == 8 else None,
                   state=None if step == 8 else optuna.trial.TrialState.PRUNED)
    assert set(ends) <= {2, 4, 8, "end"}
    if kind == "halving":
        assert 10 <= ends[2] <= 20 and ends[2] > ends[4] > 0
    assert (ends["end"] == 32) == (kind == "none")


@pytest.mark.parametrize("interrupts", [0, 1, 3])
def test_a_trial_that_is_queued_again_counts_once_at_a_rung(interrupts):
    """3.2 is the second best of four, and goes on, however often the best one was interrupted."""
    study = make_study(pruner=make_pruner("halving", 1, 2))
    trial, pruned = study.ask(), []
    for loss in (3.0, 3.4, 3.3, 3.2):
        trial.report(loss, 1)
        pruned.append(trial.should_prune())
        for _ in range(interrupts if loss == 3.0 else 0):
            search_study.queue_copy(study, study.tell(trial, state=optuna.trial.TrialState.FAIL))
            trial = study.ask()
        study.tell(trial, loss)
        trial = study.ask()
    assert pruned == [False, True, True, False]


def in_threads(count, function):
    threads = [threading.Thread(target=function) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


# ---- The study in its database -----------------------------------------------------------------------------

@pytest.mark.parametrize("calls", range(len(NAMED) + 2))
def test_a_study_that_was_killed_while_it_began_begins_again(tmp_path, monkeypatch, calls):
    """After any of its writes: all named structures are queued once, and the request is there."""
    def open_again():
        return open_study(None, "s", str(tmp_path), create=True, sampler=make_sampler("random"))

    with monkeypatch.context() as patch:
        left = [None] * calls
        for name in ("enqueue_trial", "set_user_attr"):
            def limited(*args, method=getattr(optuna.Study, name), **options):
                left.pop()      # IndexError where the process is killed
                return method(*args, **options)
            patch.setattr(optuna.Study, name, limited)
        with pytest.raises(IndexError):
            begin(open_again(), SPACE, True, 3)
    begin(open_again(), SPACE, True, 3)
    with pytest.raises(ValueError, match="begun with reduction = 2, not 3"):
        begin(open_again(), SPACE, True, 3, reduction=3)
    study = open_again()
    assert Counter(t.user_attrs["named"] for t in study.trials) == Counter(NAMED.keys())
    assert study.user_attrs["request"] == SPACE.request() and study.user_attrs["first_rung"] == 3


def test_processes_and_threads_that_begin_at_once_open_the_same_study(tmp_path):
    """A new database gets its tables and its study once."""
    studies, start = [], threading.Barrier(4)

    def open_and_begin():
        start.wait()
        with search_study.study_lock(str(tmp_path)):
            study = open_study(None, "s", str(tmp_path), create=True)
            begin(study, SPACE, True, 3)
        studies.append(study)
    in_threads(4, open_and_begin)
    assert len(studies) == 4 and {len(study.trials) for study in studies} == {len(NAMED)}


def test_a_waiting_trial_is_taken_by_one_worker_only(tmp_path):
    for i in range(3):
        study = open_study(None, f"s{i}", str(tmp_path), create=True)
        study.add_trials([optuna.trial.create_trial(state=optuna.trial.TrialState.WAITING)] * 8)
        numbers, start = [], threading.Barrier(8)

        def ask():
            start.wait()
            numbers.append(study.ask().number)
        in_threads(8, ask)
        assert sorted(numbers) == list(range(8))


def test_a_request_is_the_same_after_it_was_stored(tmp_path):
    """Tuples among the settings become lists in a database."""
    space = make_space(settings=SETTINGS | dict(a_tuple=(1, 2)))
    for _ in range(2):
        begin(open_study(None, "s", str(tmp_path), create=True), space, False, 2)
    with pytest.raises(ValueError, match=r"with a_tuple = \[1, 2\], not None"):
        begin(open_study(None, "s", str(tmp_path)), SPACE, False, 2)


def test_a_point_has_the_sizes_nearest_to_its_theta():
    """Of all widths and ranks whose FLOPs are within the tolerance, by brute force."""
    def distance(theta, d, sizes):
        return sum((math.log(size) - e * math.log(width)) ** 2
                   for s, (d_in, d_out) in zip(sizes, ((d, d), (d, 4 * d), (4 * d, d)))
                   for size, e, width in zip(s, theta, (d_in,) * 3 + (d_out,) * 3 + (d,)))
    checked = 0
    for theta in (NAMED["btt"], NAMED["low_rank"], *random_thetas(12)):
        try:
            point = SPACE.point(theta)
        except ValueError:
            continue
        found = []
        for d in SPACE.widths:
            for rank in {max(1, round(d ** theta.rho)), *range(math.ceil(d ** theta.rho / 1.25),
                                                               math.floor(d ** theta.rho * 1.25) + 1)}:
                try:
                    sizes = [theta.sizes(*maps, rank) for maps in ((d, d), (d, 4 * d), (4 * d, d))]
                except ValueError:
                    continue
                if abs(SPACE.flops_of(sizes, d) / SPACE.flops_per_token - 1) <= 0.05:
                    found.append(distance(theta, d, sizes))
        assert distance(theta, point.width, point.sizes) == pytest.approx(min(found), abs=1e-5)
        checked += 1
    assert checked > 4
