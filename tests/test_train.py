"""train.py from the outside: small runs of the whole program, read by what they leave in out_dir."""
import json
import math
import os
import time

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import lib.device
import lib.evaluation
import model
from data.batches import Batches
from lib.log import Logger
from tests.conftest import SMALL, TINY
from tests.runs import assert_same_checkpoint, cross_entropy, in_float64, load, losses, read_log, untimed

STRUCTURES = ["dense", "low_rank", "kronecker", "monarch", "tt", "btt", "btt_moe", "moe", "einsum", "dyad"]
UNIFORM = math.log(96)  # loss of a model that gives every character the same probability, in nats per token


# The ten structures. Dropout shows that the random numbers of a resumed run go on where they stopped.

@pytest.mark.parametrize("config", STRUCTURES)
def test_loss_falls_from_uniform(config, trained):
    steps, evals = losses(trained(config, dropout=0.1))
    assert steps[0] == pytest.approx(UNIFORM, rel=0.01) and evals[0] == pytest.approx(UNIFORM, rel=0.01)
    assert max(list(steps.values())[-5:]) < 0.85 * UNIFORM and evals[20] < 0.85 * UNIFORM


@pytest.mark.parametrize("config", ["btt", "dyad", "btt_moe", "moe"])  # one of each class of layers
def test_stopped_and_resumed_is_bitwise_one_run(config, trained, train, tmp_path):
    out = train(tmp_path / "out", config, dropout=0.1, max_iters=10, lr_decay_iters=20)
    train(out, config, dropout=0.1, init_from="resume")
    assert_same_checkpoint(trained(config, dropout=0.1), out)
    assert untimed(trained(config, dropout=0.1)) == untimed(out)


@pytest.mark.parametrize("config", STRUCTURES)
def test_sample_continues_a_prompt(config, trained, run):
    out = trained(config, dropout=0.1)
    done = run("sample.py", f"--out_dir={out}", "--start=def ", "--max_new_tokens=40", "--device=cpu")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("def ") and len(done.stdout) == 4 + 40 + 1


# The order of the data

def record_batches():
    """Writes what the model is given to one file a process: [whether it trains, inputs, targets, seed of
    dropout]."""
    forward = model.GPT.forward

    def recorded(self, idx, targets=None, **options):
        with open(f"{os.environ['BATCHES']}.{os.environ.get('RANK', 0)}", "a") as f:
            f.write(json.dumps([self.training, idx.tolist(), targets.tolist(), torch.initial_seed()]) + "\n")
        return forward(self, idx, targets, **options)
    model.GPT.forward = recorded


WIDE = SMALL | TINY | dict(block_size=32, batch_size=16, gradient_accumulation_steps=4, max_iters=20,
                           eval_interval=10, eval_iters=2)


@pytest.fixture
def places(run, alphabet, tmp_path):
    """places(batch_size=4, ...) -> (places of the training windows, of the evaluation windows), in the order
    of the global batch."""
    runs = iter(range(100))

    def places(processes=1, out=None, **settings):
        file = tmp_path / f"batches{next(runs)}"
        settings = WIDE | dict(dataset=alphabet, out_dir=out or f"{file}.out") | settings
        done = run("train.py", "config/dense.py", *(f"--{k}={v}" for k, v in settings.items()),
                   processes=processes, before=record_batches, BATCHES=str(file))
        assert done.returncode == 0, done.stderr
        by_rank = [[json.loads(line) for line in open(f"{file}.{rank}")] for rank in range(processes)]
        found = []
        for training in (True, False):
            batches = [[b for b in batches if b[0] == training] for batches in by_rank]
            found.append([x[0] for turn in zip(*batches, strict=True) for batch in turn for x in batch[1]])
            for _, inputs, targets, _ in sum(batches, []):
                assert inputs == [list(range(x[0], x[0] + 32)) for x in inputs]
                assert targets == [[i + 1 for i in x] for x in inputs]
        seeds = {b[3] for batches in by_rank for b in batches if b[0]}
        assert len(seeds) == processes * len(found[0]) // 64, "each iteration and process has its own seed"
        return found
    return places


def test_data_order_depends_on_seed_and_iteration_alone(places, tmp_path):
    """Not on how the global batch is split into micro-batches or over processes, nor on a resume."""
    training, evaluation = places()
    assert len(training) == 20 * 64 and set(training) == set(range(96 - 32))
    assert len({tuple(training[i:i + 64]) for i in range(0, len(training), 64)}) == 20

    assert places(batch_size=32, gradient_accumulation_steps=2, eval_iters=1) == [training, evaluation]
    assert places(processes=2) == [training, evaluation]
    first = places(out=tmp_path / "out", max_iters=7)[0]
    second = places(out=tmp_path / "out", init_from="resume")[0]
    assert first + second == training
    assert places(seed=8, max_iters=1)[0] != training[:64]


def test_evaluation_windows_are_fixed_and_spread(places):
    """All that fit may be among them, and after each new one no gap is much wider than the mean gap."""
    evaluation = places()[1]
    assert evaluation == 3 * evaluation[:32] and max(evaluation) < 96 - 32
    for n in range(1, 33):
        sorted_places = sorted(evaluation[:n])
        gaps = [b - a for a, b in zip(sorted_places, sorted_places[1:] + [sorted_places[0] + 64])]
        assert max(gaps) <= 2.62 * 64 / n + 1, n  # two successive golden sections of an interval


def test_evaluation_windows_depend_on_their_number_alone(places):
    """Not on how they are batched, the last batch of fewer included; more windows begin with the same."""
    settings = dict(max_iters=1, eval_tokens=20 * 32 - 5)  # 20 windows
    windows = places(**settings)[1]
    assert windows == 2 * windows[:20] and len(windows) == 40
    assert places(**settings | dict(batch_size=8, gradient_accumulation_steps=8, eval_iters=7))[1] == windows
    assert places(max_iters=1)[1][:20] == windows[:20]


def test_batches_of_an_evaluation_do_not_change_its_loss(trained, python_text):
    """7 windows in batches of 4, 8 or 2: the mean over windows, of the weights and of the experts' load."""
    runs = [trained("btt_moe", n_layer=1, max_iters=1, eval_tokens=7 * 32, batch_size=size, before=in_float64,
                    gradient_accumulation_steps=8 // size, aux_loss_weight=0) for size in (4, 8, 2)]
    first, *others = (read_log(out)[2][0] for out in runs)
    for other in others:
        assert other["val_loss"] == pytest.approx(first["val_loss"], abs=1e-9)
        assert np.allclose(other["router_load"], first["router_load"], rtol=0, atol=1e-9)


# Waiting for the device

def count_waits():
    """Notes in the file WAITS, with each line of the log, how often the host has read a tensor so far."""
    aten, reads = torch.ops.aten, []
    log = Logger.log

    class Operators(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.overloadpacket in (aten._local_scalar_dense, aten.nonzero, aten.equal, aten.multinomial):
                reads.append(func)
            return func(*args, **kwargs or {})

    class Methods(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            if func in (torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.cpu):
                reads.append(func)
            before, result = len(reads), func(*args, **kwargs or {})
            if func is torch.nn.functional.one_hot:  # it checks its classes, but for those on a GPU
                del reads[before:]
            return result

    def noted(self, **point):
        log(self, **point)
        with open(os.environ["WAITS"], "a") as f:
            f.write(json.dumps([point["type"], point.get("iter"), len(reads)]) + "\n")
    Logger.log = noted
    Operators().__enter__(), Methods().__enter__()


@pytest.mark.parametrize("config, dtype", [("dense", "bfloat16"), ("btt_moe", "float32"), ("btt", "float16")])
def test_training_waits_once_for_each_line_of_the_log(config, dtype, run, flags, tmp_path):
    """On a GPU every read of a tensor waits for all that the GPU has to do."""
    done = run("train.py", *flags(config, log_interval=4, eval_interval=20, dtype=dtype), before=count_waits,
               WAITS=str(tmp_path / "waits"))
    assert done.returncode == 0, done.stderr
    points = [json.loads(line) for line in open(tmp_path / "waits")]
    assert [iteration for kind, iteration, _ in points if kind == "train"] == [0, 4, 8, 12, 16]
    counts = [count for kind, _, count in points if kind == "train"]
    assert [b - a for a, b in zip(counts, counts[1:])] == [1, 1, 1, 1]


def test_a_warmup_that_does_not_end_is_told(run, flags):
    for iterations in (0, 4, 5):
        done = run("train.py", *flags(**TINY | dict(max_iters=iterations, warmup_iters=5)))
        line = f"  the warmup does not end: warmup_iters = 5 is more than max_iters = {iterations}\n"
        assert done.returncode == 0 and done.stdout.count(line) == (iterations == 4), done.stderr


# Evaluation and losses

@pytest.mark.parametrize("config", ["dense", "btt_moe"])
def test_reported_losses_are_cross_entropy_alone(config, trained, python_text):
    """However heavy the losses of the routers: val_loss is what the checkpoint's weights give on the fixed
    windows."""
    out = trained(config, dropout=0.1, aux_loss_weight=100, before=in_float64)
    steps, evals = losses(out)
    assert steps[0] == pytest.approx(UNIFORM, abs=1e-4) and evals[0] == pytest.approx(UNIFORM, abs=1e-4)
    expected = cross_entropy(load(out / "ckpt.pt"), (python_text / "val.bin").read_bytes())
    assert evals[20] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("config", ["btt_moe", "moe"])
def test_router_losses_even_out_the_load(config, trained):
    """With a heavy weight the tokens are spread more evenly over the experts than with none."""
    def unevenness(out):
        load = np.array(read_log(out)[2][20]["router_load"])
        assert np.allclose(load.sum(-1), 1, atol=1e-5) and load.shape == (6 if config == "btt_moe" else 1, 8)
        return load.std(-1).mean()

    even, uneven = (trained(config, aux_loss_weight=weight, n_layer=1, before=in_float64)
                    for weight in (3.0, 0.0))
    assert unevenness(even) < 0.8 * unevenness(uneven)


PROJECTIONS = ("attn.q", "attn.k", "attn.v", "attn.o", "mlp.up", "mlp.down")


@pytest.mark.parametrize("config, routers", [
    ("btt_moe", [f"blocks.{i}.{part}" for i in (0, 1) for part in PROJECTIONS]),
    ("moe", ["blocks.0.mlp", "blocks.1.mlp"])])
def test_biases_balance_the_routers(config, routers, trained):
    """From the first evaluation on. Without them the load is uneven, and they stay zero."""
    balanced, free = (trained(config, eval_iters=16, router_balance_rate=rate) for rate in (0.1, 0))
    [run], _, evals = read_log(balanced)
    assert run["routers"] == routers
    for p in evals.values():
        reports = zip(p["router_load"], p["router_entropy"], p["router_max_load"], strict=True)
        for shares, entropy, most in reports:
            assert entropy == pytest.approx(-sum(s * math.log(s) for s in shares if s), abs=1e-4)
            assert most == pytest.approx(8 * max(shares), abs=1e-4)
    free_evals = read_log(free)[2]
    excess, free_excess = (max(e[0]["router_max_load"]) - 1 for e in (evals, free_evals))
    assert 0 <= excess < 0.5 * free_excess
    assert np.mean(evals[20]["router_max_load"]) < np.mean(free_evals[20]["router_max_load"])
    biases, without = ({name: b for name, b in load(out / "ckpt.pt")["model"].items()
                        if name.endswith(".balance")} for out in (balanced, free))
    assert biases.keys() == {f"{name}.balance" for name in routers} and all(b.any() for b in biases.values())
    assert not any(b.any() for b in without.values())


# Checkpoints and log.jsonl

@pytest.mark.parametrize("settings", [{}, dict(processes=2, batch_size=2, gradient_accumulation_steps=4)],
                         ids=["one process", "two processes"])
def test_checkpoint_holds_the_plain_model_and_its_tokenizer(settings, trained):
    checkpoint = load(trained(**settings) / "ckpt.pt")
    gpt = model.GPT(model.GPTConfig(**checkpoint["model_args"]))
    assert checkpoint["model"].keys() == gpt.state_dict().keys()
    assert checkpoint["tokenizer"] == {"name": "char", "characters": "\n" + bytes(range(32, 127)).decode()}
    assert checkpoint["iteration"] == 20 and checkpoint["config"]["n_embd"] == 32


def test_log_describes_the_run_and_its_points(trained):
    """The numbers are those of a count by hand: L blocks of width d, T tokens in sight, V characters."""
    out = trained(log_interval=3, eval_interval=8)
    [run], steps, evals = read_log(out)
    L, d, T, V = 2, 32, 32, 96
    block = 12 * d * d + 2 * d + 2 * 16  # projections, two norms, norms of queries and keys
    assert run["params"] == run["active_params"] == V * d + T * d + L * block + d + V * d
    per_token = 3 * 2 * (L * (12 * d * d + 2 * T * d) + d * V)  # forward, twice that backward
    assert run["flops_per_token"] == per_token
    assert run["flops_per_token_without_output_layer"] == per_token - 3 * 2 * d * V
    assert run["config"]["n_embd"] == 32 and run["torch"] == torch.__version__
    assert run["model_args"]["vocab_size"] == 96 and run["tokens_per_iter"] == 4 * 2 * 32

    assert list(steps) == [0, 3, 6, 9, 12, 15, 18] and list(evals) == [0, 8, 16, 20]
    best = math.inf
    for i, p in evals.items():
        best = min(best, p["val_loss"])
        assert (p["tokens"], p["flops"], p["best_val_loss"]) == (i * 256, i * 256 * per_token, best)
    for i, p in steps.items():
        assert (p["tokens"], p["flops"]) == ((i + 1) * 256, (i + 1) * 256 * per_token)
        assert p["tokens_per_s"] * p["ms_per_iter"] == pytest.approx(256 * 1000)
        assert p["utilization"] is None  # no CPU has a data sheet
        assert p["grad_norm"] > 0


def device_with_a_data_sheet():
    lib.device.peak_flops = lambda device, dtype, count: (count * 1e12, "its data sheet")


@pytest.mark.parametrize("known", [True, False])
def test_utilization_is_shown_where_the_peak_is_known(known, run, flags, tmp_path):
    """It is the share of FLOPs a second that the processes have together."""
    done = run("train.py", *flags(**TINY, batch_size=2), processes=1 + known,
               before=device_with_a_data_sheet if known else None)
    assert done.returncode == 0, done.stderr
    [run_point], steps, _ = read_log(tmp_path / "out")
    source = "its data sheet" if known else None
    assert (run_point["peak_flops"], run_point["peak_flops_from"]) == (2e12 if known else None, source)
    assert [line.startswith("iter ") and "utilization" in line for line in done.stdout.splitlines()].count(
        True) == (len(steps) if known else 0)
    assert ("utilization of 2 TFLOP/s (its data sheet)" in done.stdout) == known
    for p in steps.values():
        share = p["tokens_per_s"] * run_point["flops_per_token"] / 2e12
        assert p["utilization"] == (pytest.approx(share) if known else None)


def test_learning_rate_rises_linearly_and_falls_as_a_cosine(trained):
    """To a tenth by default.

    Half a cosine has fallen by 1/4, 1/2 and 3/4 after 1/3, 1/2 and 2/3 of its way.
    """
    out = trained(learning_rate=1e-2, warmup_iters=5, lr_decay_iters=17)
    lr = [p["lr"] for p in read_log(out)[1].values()]
    assert lr[:6] == pytest.approx([1e-2 * share / 6 for share in range(1, 7)])
    assert [lr[i] for i in (5, 9, 11, 13, 17)] == pytest.approx([10e-3, 7.75e-3, 5.5e-3, 3.25e-3, 1e-3])
    assert lr[5:18] == sorted(lr[5:18], reverse=True) and lr[18:] == pytest.approx([1e-3, 1e-3])
    for group in load(out / "ckpt.pt")["optimizer"]["param_groups"]:
        assert group["lr"] == pytest.approx(1e-3 * group["lr_multiplier"])


def test_learning_rate_is_constant_without_decay(trained):
    lr = [p["lr"] for p in read_log(trained(**TINY | {"max_iters": 8}, decay_lr=False))[1].values()]
    assert lr[5:] == pytest.approx([3e-3] * 3)


@pytest.mark.parametrize("config", ["btt_moe", "moe"])
def test_active_parameters_are_those_of_two_of_eight_experts(config, trained):
    out = trained(config, dropout=0.1)
    weights, [run] = load(out / "ckpt.pt")["model"], read_log(out)[0]
    experts = sum(w.numel() for name, w in weights.items() if ".experts." in name)
    total = sum(w.numel() for name, w in weights.items() if not name.endswith(".balance"))  # buffers
    assert experts > 0 and run["params"] == total and run["active_params"] == total - experts * 6 / 8


def test_one_iteration_by_hand(train, python_text, tmp_path):
    """Adam's moments after it are those of the clipped mean gradient of both losses over two micro-batches,
    and each matrix decays by the learning rate · weight_decay."""
    settings = TINY | dict(max_iters=1, grad_clip=0.01, beta1=0.8, beta2=0.9, weight_decay=0.3,
                           aux_loss_weight=0.5, num_experts=4, n_embd=16, seed=3, before=in_float64)
    out = train(tmp_path / "out", "btt_moe", **settings)
    end, [_, steps, _] = load(out / "ckpt.pt"), read_log(out)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        torch.manual_seed(3)
        gpt = model.GPT(model.GPTConfig(**end["model_args"]))
    finally:
        torch.set_default_dtype(default)
    ids = {split: np.fromfile(python_text / f"{split}.bin", np.uint8) for split in ("train", "val")}
    batches = Batches(ids, block_size=16, batch_size=4, sequences=8, seed=3, val_windows=1, device="cpu")
    for first in (0, 4):
        _, loss, aux = gpt(*batches.train(0, first, first + 4), return_aux=True)
        ((loss + 0.5 * aux.loss) / 2).backward()
    optimizer = gpt.configure_optimizers(0.3, 3e-3, (0.8, 0.9), "cpu", 128)
    norm = torch.cat([p.grad.flatten() for p in gpt.parameters()]).norm().item()
    assert steps[0]["grad_norm"] == pytest.approx(norm, rel=1e-5) and norm > 0.1
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for p, state in zip(params, end["optimizer"]["state"].values(), strict=True):
        g = p.grad * 0.01 / norm
        torch.testing.assert_close(state["exp_avg"].double(), 0.2 * g, rtol=1e-4, atol=1e-10)
        torch.testing.assert_close(state["exp_avg_sq"].double(), 0.1 * g ** 2, rtol=1e-4, atol=1e-14)
    for group in end["optimizer"]["param_groups"]:
        decay = group["weight_decay"] * group["lr_multiplier"]
        assert decay == 0 or decay == pytest.approx(0.3)


def test_the_seed_decides_the_initial_weights(train, tmp_path):
    outs = [train(tmp_path / str(i), **TINY | dict(max_iters=0, seed=s)) for i, s in enumerate((1, 2, 1))]
    one, two, again = (load(out / "ckpt.pt")["model"]["blocks.0.attn.q.A"] for out in outs)
    assert torch.equal(one, again) and not torch.equal(one, two)


def test_without_mup_all_groups_learn_alike(train, tmp_path):
    groups = load(train(tmp_path / "out", "btt", **TINY | dict(max_iters=0, mup=False)) / "ckpt.pt")
    assert {group["lr_multiplier"] for group in groups["optimizer"]["param_groups"]} == {1.0}


def evaluations_take_1000_seconds():
    evaluate, clock, taken = lib.evaluation.evaluate, time.perf_counter, []
    time.perf_counter = lambda: clock() + 1000 * len(taken)
    lib.evaluation.evaluate = lambda *args: taken.append(1) or evaluate(*args)


def test_iterations_are_timed_without_evaluations(train, tmp_path):
    out = train(tmp_path / "out", **TINY | dict(max_iters=3, eval_interval=1),
                before=evaluations_take_1000_seconds)
    steps = read_log(out)[1]
    assert len(steps) == 3 and all(p["ms_per_iter"] < 500_000 for p in steps.values())
