"""train.py from the outside: small runs of the whole program, read by what they leave in out_dir."""
import json
import math
import os
import shutil
import subprocess
import sys
import types

import numpy as np
import pytest
import torch

import model
from tests.conftest import ROOT, SMALL, TINY, Hostile, write_ids
from tests.runs import assert_one_sentence, assert_same_checkpoint, assert_same_course, load, losses, read_log, untimed

STRUCTURES = ["dense", "low_rank", "kronecker", "monarch", "tt", "btt", "btt_moe", "moe", "einsum", "dyad"]
UNIFORM = math.log(96)  # the loss of a model that knows nothing, nats per token


def load_model(out):
    return load(out / "ckpt.pt")["model"]


def cross_entropy(checkpoint, ids, count):
    """Cross-entropy alone, in float64, over `count` windows spread evenly over ids, the first and the last included."""
    gpt = model.GPT(model.GPTConfig(**checkpoint["model_args"]))
    gpt.load_state_dict(checkpoint["model"])
    gpt.double().eval()
    block = gpt.config.block_size
    starts = [j * (len(ids) - block - 1) // (count - 1) for j in range(count)]
    windows = torch.tensor([list(ids[s:s + block + 1]) for s in starts])
    with torch.no_grad():
        logits, _ = gpt(windows[:, :-1], windows[:, 1:])
    return -logits.double().log_softmax(-1).gather(-1, windows[:, 1:, None]).mean().item()


# Ten structures

@pytest.mark.parametrize("config", STRUCTURES)
def test_learns_and_resumes_exactly(config, trained, train, tmp_path, run):
    """From ln 96 down; stopped at 10 and resumed to 20 it ends, dropout and all, as it does in one go; it talks."""
    whole = trained(config, dropout=0.1)
    steps, evals = losses(whole)
    assert steps[0] == pytest.approx(UNIFORM, rel=0.01) and evals[0] == pytest.approx(UNIFORM, rel=0.01)
    assert max(list(steps.values())[-5:]) < 0.85 * UNIFORM and evals[20] < 0.85 * UNIFORM

    parts = train(tmp_path / "parts", config, dropout=0.1, max_iters=10, lr_decay_iters=20)
    train(parts, config, dropout=0.1, init_from="resume")
    assert_same_checkpoint(whole, parts)
    assert untimed(whole) == untimed(parts)

    done = run("sample.py", f"--out_dir={parts}", "--start=def ", "--max_new_tokens=40", "--device=cpu")
    assert done.returncode == 0 and done.stdout.startswith("def ") and len(done.stdout) == 4 + 40 + 1, done.stderr


# Resume

def test_resume_from_between_two_evaluations(trained, train, tmp_path):
    """A run that ended at 13 evaluated there; resumed, it has no trace of that."""
    out = train(tmp_path / "out", max_iters=13, lr_decay_iters=20)
    train(out, init_from="resume")
    assert untimed(out) == untimed(trained())
    assert_same_checkpoint(out, trained())


def die_in_the_third_save():
    """The power goes while a checkpoint is half written."""
    save, calls = torch.save, []

    def half_save(contents, f):
        calls.append(f)
        if len(calls) < 3:
            return save(contents, f)
        f.write(b"half a checkpoint")
        f.flush()
        os._exit(9)
    torch.save = half_save


def test_a_killed_run_goes_on_from_its_last_checkpoint(trained, train, tmp_path):
    out = train(tmp_path / "out", before=die_in_the_third_save, code=9)
    assert load(out / "ckpt.pt")["iteration"] == 5 and 9 in read_log(out)[1]
    with open(out / "log.jsonl", "a") as log:
        log.write('{"type": "train", "iter": 1')
    train(out, init_from="resume")
    assert untimed(out) == untimed(trained())
    assert_same_checkpoint(out, trained())
    assert sorted(os.listdir(out)) == ["ckpt.pt", "ckpt_best.pt", "log.jsonl"]


@pytest.mark.parametrize("before, after", [(0.1, 0.3), (0.0, 0.3)])
def test_resume_takes_new_hyperparameters(before, after, train, tmp_path):
    """The optimizer of a resumed run has the groups of a run started with its hyperparameters."""
    out = train(tmp_path / "out", "btt", max_iters=1, weight_decay=before)
    train(out, "btt", max_iters=2, init_from="resume", weight_decay=after, beta1=0.8, learning_rate=1e-3)
    scratch = train(tmp_path / "scratch", "btt", max_iters=2, weight_decay=after, beta1=0.8, learning_rate=1e-3)
    groups = [load(folder / "ckpt.pt")["optimizer"]["param_groups"] for folder in (out, scratch)]
    for resumed, fresh in zip(*groups, strict=True):
        for key in ("weight_decay", "betas", "lr", "lr_multiplier"):
            assert resumed[key] == pytest.approx(fresh[key]), key


# The order of the data

def record_batches():
    """Writes what the model is given to a file of the process: [whether it trains, inputs, targets, seed of dropout]."""
    forward = model.GPT.forward

    def recorded(self, idx, targets=None, **options):
        with open(f"{os.environ['BATCHES']}.{os.environ.get('RANK', 0)}", "a") as f:
            f.write(json.dumps([self.training, idx.tolist(), targets.tolist(), torch.initial_seed()]) + "\n")
        return forward(self, idx, targets, **options)
    model.GPT.forward = recorded


WIDE = dict(block_size=32, batch_size=16, gradient_accumulation_steps=4, max_iters=20, eval_interval=10, eval_iters=2)


@pytest.fixture
def places(run, alphabet, tmp_path, monkeypatch):
    """places(batch_size=4, ...) -> the places of the windows, in the order of the global batch: (training, evaluation)."""
    runs = iter(range(100))

    def places(processes=1, out=None, **settings):
        file, settings = tmp_path / f"batches{next(runs)}", SMALL | TINY | WIDE | settings
        flags = [f"--{k}={v}" for k, v in ({"dataset": alphabet, "out_dir": out or f"{file}.out"} | settings).items()]
        done = run("train.py", "config/dense.py", *flags, processes=processes, before=record_batches, BATCHES=str(file))
        assert done.returncode == 0, done.stderr
        by_rank = [[json.loads(line) for line in open(f"{file}.{rank}")] for rank in range(processes)]
        found = []
        for training in (True, False):
            batches = [[b for b in batches if b[0] == training] for batches in by_rank]
            found.append([x[0] for turn in zip(*batches, strict=True) for batch in turn for x in batch[1]])
            for _, X, Y, _ in sum(batches, []):
                assert X == [list(range(x[0], x[0] + 32)) for x in X] and Y == [[i + 1 for i in x] for x in X]
        dropout = {b[3] for batches in by_rank for b in batches if b[0]}
        assert len(dropout) == processes * len(found[0]) // 64  # another in each iteration and process
        return found
    return places


def test_data_order(places, tmp_path):
    """A function of seed, iteration and place in the global batch: not of how the batch is split, nor of a resume."""
    training, evaluation = places()
    assert len(training) == 20 * 64 and set(training) == set(range(96 - 32))
    assert len({tuple(training[i:i + 64]) for i in range(0, len(training), 64)}) == 20
    assert evaluation == 3 * [j * 63 // 31 for j in range(32)]

    assert places(batch_size=32, gradient_accumulation_steps=2, eval_iters=1) == [training, evaluation]
    assert places(processes=2) == [training, evaluation]
    first = places(out=tmp_path / "out", max_iters=7)[0]
    second = places(out=tmp_path / "out", init_from="resume")[0]
    assert first + second == training
    assert places(seed=8, max_iters=1)[0] != training[:64]


def test_split_of_the_batch_does_not_matter(trained):
    """1 x 8, 2 x 4 and 8 x 1 sequences: the same losses and gradients over 20 iterations."""
    a, b, c = (trained(batch_size=size, gradient_accumulation_steps=8 // size, eval_iters=16 // size) for size in (8, 4, 1))
    for other in (b, c):
        assert_same_course(a, other)


# Several processes

@pytest.mark.parametrize("config, settings", [
    ("dense", {}),
    ("btt_moe", {}),
    ("moe", {}),
    # 4 tokens for 8 experts: most have no gradient; and one batch to evaluate, none for the second process
    ("btt_moe", dict(block_size=2, batch_size=2, top_k=1, eval_iters=1, max_iters=10)),
], ids=["dense", "btt_moe", "moe", "starved experts"])
def test_two_processes_train_as_one(config, settings, trained):
    settings = {"gradient_accumulation_steps": 4, "batch_size": 2} | settings
    one, two = trained(config, **settings), trained(config, processes=2, **settings)
    assert_same_course(one, two)
    assert read_log(two)[0][0]["processes"] == 2
    weights = load(two / "ckpt.pt")["model"]
    for name, weight in load(one / "ckpt.pt")["model"].items():
        assert torch.allclose(weight, weights[name], atol=1e-3), name


@pytest.mark.parametrize("start", [[], ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]],
                         ids=["python", "torchrun"])
def test_the_documented_command(start, trained, python_text, tmp_path):
    """As a user types it, from another folder: the same losses; by default out-<config files>; a sample at the end."""
    flags = [f"--{k}={v}" for k, v in (SMALL | {"dataset": python_text, "sample_tokens": 30}).items()]
    command = [sys.executable, *start, ROOT / "train.py", "config/dense.py", "config/quickstart.py", *flags]
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True,
                          text=True, timeout=6000)
    assert done.returncode == 0, done.stderr
    assert os.listdir(tmp_path) == ["out-dense-quickstart"]
    assert_same_course(tmp_path / "out-dense-quickstart", trained())
    assert done.stdout.count("a sample of 30 tokens") == done.stdout.count("best val loss") == 1


# torch.compile

def compile_without_code():
    """torch.compile traces and differentiates the graph as always, and runs it without making C++ of it."""
    whole = torch.compile
    torch.compile = lambda m, **options: whole(m, **options | {"backend": "aot_eager"})


@pytest.mark.parametrize("config", ["dense", "btt", "btt_moe"])
def test_compiled_as_eager(config, trained):
    """The same losses, and a checkpoint without a trace of it."""
    eager, compiled = trained(config, **TINY), trained(config, before=compile_without_code, compile=True, **TINY)
    assert read_log(compiled)[0][0]["compile"] is True
    assert_same_course(eager, compiled)
    keys = load(eager / "ckpt.pt")["model"].keys()
    assert load(compiled / "ckpt.pt")["model"].keys() == keys


# Evaluation and losses

@pytest.mark.parametrize("config", ["dense", "btt_moe"])
def test_val_loss_is_the_cross_entropy_of_fixed_windows(config, trained, python_text):
    """However heavy the routers' losses: what is reported is cross-entropy, the same as computed from the weights."""
    out = trained(config, dropout=0.1, aux_loss_weight=100)
    steps, evals = losses(out)
    assert steps[0] == pytest.approx(UNIFORM, abs=1e-4) and evals[0] == pytest.approx(UNIFORM, abs=1e-4)
    checkpoint, val = load(out / "ckpt.pt"), (python_text / "val.bin").read_bytes()
    assert evals[20] == pytest.approx(cross_entropy(checkpoint, val, 4 * 4), abs=1e-5)


@pytest.mark.parametrize("config", ["btt_moe", "moe"])
def test_the_routers_losses_are_weighted(config, trained):
    """Heavy, they spread tokens more evenly over the experts than without them."""
    def unevenness(out):
        load = np.array(read_log(out)[2][20]["router_load"])
        assert np.allclose(load.sum(-1), 1, atol=1e-5) and load.shape == (12 if config == "btt_moe" else 2, 8)
        return load.std(-1).mean()

    even, uneven = (trained(config, aux_loss_weight=weight, router_balance_rate=0) for weight in (1.0, 0.0))
    assert unevenness(even) < 0.8 * unevenness(uneven)


@pytest.mark.parametrize("config, routers", [("btt_moe", [f"blocks.{i}.{part}" for i in (0, 1) for part in (
    "attn.q", "attn.k", "attn.v", "attn.o", "mlp.up", "mlp.down")]), ("moe", ["blocks.0.mlp", "blocks.1.mlp"])])
def test_routers_are_balanced(config, routers, trained):
    """From the first evaluation on, by biases that are learned from the load; without them the load is another."""
    settings = dict(eval_iters=16, max_iters=40)
    balanced, free = trained(config, **settings), trained(config, **settings, router_balance_rate=0)
    (run,), _, evals = read_log(balanced)
    assert run["routers"] == routers
    for p in evals.values():
        for shares, entropy, largest in zip(p["router_load"], p["router_entropy"], p["router_max_load"], strict=True):
            assert entropy == pytest.approx(-sum(share * math.log(share) for share in shares if share), abs=1e-4)
            assert largest == pytest.approx(8 * max(shares), abs=1e-4)
    assert max(evals[0]["router_max_load"]) < 1.5 < max(read_log(free)[2][0]["router_max_load"])
    assert np.mean(evals[40]["router_max_load"]) < np.mean(read_log(free)[2][40]["router_max_load"])
    biases = {name: b for name, b in load_model(balanced).items() if name.endswith(".balance")}
    assert biases.keys() == {f"{name}.balance" for name in routers} and all(b.any() for b in biases.values())
    assert not any(b.any() for name, b in load_model(free).items() if name.endswith(".balance"))


# Checkpoints

def test_checkpoint_holds_the_plain_model_and_its_tokenizer(trained):
    for out in (trained(), trained(processes=2, batch_size=2, gradient_accumulation_steps=4)):
        checkpoint = load(out / "ckpt.pt")
        gpt = model.GPT(model.GPTConfig(**checkpoint["model_args"]))
        assert checkpoint["model"].keys() == gpt.state_dict().keys()
        assert checkpoint["tokenizer"] == {"name": "char", "characters": "\n" + bytes(range(32, 127)).decode()}
        assert checkpoint["iteration"] == 20 and checkpoint["config"]["n_embd"] == 32


def test_the_best_checkpoint_stays(trained, train, python_text, tmp_path):
    """A run resumed to go wild: ckpt_best.pt holds the weights of the least val loss ever evaluated."""
    out = tmp_path / "out"
    shutil.copytree(trained(), out)
    for end in (25, 30):  # the second resume starts from worse than the best
        train(out, init_from="resume", max_iters=end, learning_rate=1, decay_lr=False)
    evals = losses(out)[1]
    best, last = load(out / "ckpt_best.pt"), load(out / "ckpt.pt")
    assert best["iteration"] == min(evals, key=evals.get) < 30 == last["iteration"]
    assert best["best_val_loss"] == last["best_val_loss"] == min(evals.values()) < evals[30] - 0.5
    val = (python_text / "val.bin").read_bytes()
    assert cross_entropy(best, val, 4 * 4) == pytest.approx(min(evals.values()), abs=1e-5)


# log.jsonl

def test_log_of_a_run(trained):
    """The first line describes the run; the points' numbers are those of closed formulas."""
    out = trained(log_interval=3, eval_interval=8, learning_rate=1e-2, lr_decay_iters=15)
    [run], steps, evals = read_log(out)
    L, d, T, V = 2, 32, 32, 96
    assert run["params"] == run["active_params"] == V * d + T * d + L * (12 * d * d + 2 * d + 2 * 16) + d + V * d
    per_token = 3 * 2 * (L * (12 * d * d + 2 * T * d) + d * V)  # forward and twice backward, 2 per multiply-add
    assert run["flops_per_token"] == per_token
    assert run["flops_per_token_without_output_layer"] == per_token - 3 * 2 * d * V
    assert run["config"]["learning_rate"] == 1e-2 and run["torch"] == torch.__version__
    assert run["model_args"]["vocab_size"] == 96 and run["tokens_per_iter"] == 4 * 2 * 32

    assert list(steps) == [0, 3, 6, 9, 12, 15, 18] and list(evals) == [0, 8, 16, 20]
    best = math.inf
    for i, p in evals.items():
        best = min(best, p["val_loss"])
        assert (p["tokens"], p["flops"], p["best_val_loss"]) == (i * 256, i * 256 * per_token, best)
    for i, p in steps.items():
        assert (p["tokens"], p["flops"]) == ((i + 1) * 256, (i + 1) * 256 * per_token)
        decayed = 1e-3 + 9e-3 * (1 + math.cos(math.pi * min(1, (i - 5) / 10))) / 2
        assert p["lr"] == pytest.approx(1e-2 * (i + 1) / 6 if i < 5 else decayed)
        assert p["tokens_per_s"] * p["ms_per_iter"] == pytest.approx(256 * 1000)
        assert p["utilization"] == pytest.approx(p["tokens_per_s"] * per_token / run["peak_flops"])
        assert p["grad_norm"] > 0
    for group in load(out / "ckpt.pt")["optimizer"]["param_groups"]:
        assert group["lr"] == pytest.approx(1e-3 * group["lr_multiplier"])  # past lr_decay_iters


@pytest.mark.parametrize("config, part", [("btt_moe", 2 / 8), ("moe", 2 / 8)])
def test_active_parameters_of_experts(config, part, trained):
    """Two of eight experts are active: of a model that differs in 6 experts alone, as many parameters are there."""
    checkpoint, [run] = load(trained(config) / "ckpt.pt"), read_log(trained(config))[0]
    experts = sum(w.numel() for name, w in checkpoint["model"].items() if ".experts." in name)
    total = sum(w.numel() for name, w in checkpoint["model"].items() if not name.endswith(".balance"))  # no parameters
    assert experts > 0 and run["params"] == total and run["active_params"] == total - experts * (1 - part)


# wandb

def wandb_is_missing():
    sys.modules["wandb"] = None


def wandb_is_offline():
    def init(**options):
        raise ConnectionError("no network")
    sys.modules["wandb"] = types.SimpleNamespace(init=init)


def wandb_writes_a_file():
    class Run:
        def __init__(self, config, **options):
            self.path = config["out_dir"] + ".wandb"

        def log(self, point, step):
            with open(self.path, "a") as f:
                f.write(json.dumps([point, step]) + "\n")

        def finish(self):
            self.log("finished", None)
    sys.modules["wandb"] = types.SimpleNamespace(init=Run)


@pytest.mark.parametrize("before", [wandb_is_missing, wandb_is_offline])
def test_training_does_not_depend_on_wandb(before, train, trained, tmp_path):
    out = train(tmp_path / "out", wandb_log=True, before=before, **TINY)
    assert untimed(out) == untimed(trained(**TINY))


def test_wandb_gets_the_numbers_of_the_log(train, tmp_path):
    out = train(tmp_path / "out", wandb_log=True, before=wandb_writes_a_file, **TINY)
    *sent, last = [json.loads(line) for line in open(tmp_path / "out.wandb")]
    assert last == ["finished", None]
    assert sent == [[p, p["iter"]] for p in map(json.loads, open(out / "log.jsonl")) if "iter" in p]


# What a user can get wrong

MISTAKES = {
    "unknown key": ("--learning_rte=1", "learning_rte", "learning_rate"),
    "wrong type": ("--n_layer=two", "n_layer", "two"),
    "no such config file": ("config/bt.py", "config/bt.py", "config/btt.py"),
    "dataset not prepared": ("--dataset=python_char", "python_char", "python data/python_char/prepare.py"),
    "no such dataset": ("--dataset=tolstoy", "tolstoy", "data/*/prepare.py"),
    "heads": ("--n_head=5", "n_head = 5", "n_embd = 32"),
    "too few experts": ("--num_experts=4 --top_k=5", "top_k", "num_experts = 4", "got 5"),
    "one expert": ("--ffn_experts=1", "ffn_experts", "1"),
    "both kinds of experts": ("--ffn_experts=4 --num_experts=4", "num_experts", "ffn_experts"),
    "no checkpoint": ("--init_from=resume", "ckpt.pt", "scratch"),
    "init_from": ("--init_from=gpt2", "gpt2", "resume"),
    "prime width": ("config/monarch.py --n_embd=97 --n_head=1", "97"),
    "unknown struct": ("--struct=btx", "btx", "btt"),
    "theta without einsum": ("--struct=btt --theta=(1,0,0,1,0,0,0)", "theta", "einsum"),
    "einsum without theta": ("--struct=einsum", "theta", "einsum"),
    "rank of monarch": ("--struct=monarch --rank=2", "rank", "monarch"),
    "layers": ("--layers=some", "layers", "some"),
    "negative learning rate": ("--learning_rate=-1e-3", "learning_rate", "-0.001"),
    "no batch": ("--batch_size=0", "batch_size", "0"),
    "no width": ("--n_embd=0", "n_embd", "0"),
    "beta": ("--beta2=1", "beta2", "1.0"),
    "dropout": ("--dropout=1", "dropout", "1.0"),
    "dtype": ("--dtype=float8", "dtype", "float8"),
    "device": ("--device=abacus", "abacus"),
    "block_size": ("--block_size=20000", "val.bin", "20000"),
}


@pytest.fixture
def attempt(run, python_text, tmp_path):
    """attempt("--n_head=5", ...) -> the finished process; nothing may have been written."""
    def attempt(*arguments, dataset=python_text, **options):
        flags = [f"--{k}={v}" for k, v in (SMALL | {"dataset": dataset, "out_dir": tmp_path / "out"}).items()]
        done = run("train.py", "config/dense.py", "config/quickstart.py", *flags, *arguments, **options)
        assert not (tmp_path / "out").exists()
        return done
    return attempt


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_sentence(mistake, attempt):
    arguments, *words = MISTAKES[mistake]
    if "python_char" in words and (ROOT / "data" / "python_char" / "meta.json").exists():
        pytest.skip("python_char is prepared here")
    assert_one_sentence(attempt(*arguments.split()), *words)


def test_accumulation_that_processes_do_not_divide(attempt):
    done = attempt("--gradient_accumulation_steps=3", WORLD_SIZE="2", RANK="0", LOCAL_RANK="0")
    assert_one_sentence(done, "gradient_accumulation_steps = 3", "2 processes")


def test_a_mistake_at_a_real_start(python_text, tmp_path):
    """Also when torch is imported afresh, with all that it may print."""
    command = [sys.executable, ROOT / "train.py", f"--dataset={python_text}", "--n_head=5", f"--out_dir={tmp_path / 'out'}"]
    assert_one_sentence(subprocess.run(command, capture_output=True, text=True, timeout=600), "n_head = 5")
    assert not (tmp_path / "out").exists()


def change_meta(folder, **changes):
    meta = json.loads((folder / "meta.json").read_text()) | changes
    (folder / "meta.json").write_text(json.dumps({k: v for k, v in meta.items() if v is not None}))


DAMAGES = {
    "not JSON": lambda folder: (folder / "meta.json").write_text('{"dtype": "uint8",'),
    "not an object": lambda folder: (folder / "meta.json").write_text("[1, 2]"),
    "empty": lambda folder: (folder / "meta.json").write_text("{}"),
    "no dtype": lambda folder: change_meta(folder, dtype=None),
    "unknown dtype": lambda folder: change_meta(folder, dtype="float32"),
    "no count": lambda folder: change_meta(folder, train_tokens=None),
    "count of text": lambda folder: change_meta(folder, val_tokens="many"),
    "vocabulary of text": lambda folder: change_meta(folder, vocab_size="96"),
    "unknown tokenizer": lambda folder: change_meta(folder, tokenizer={"name": "runes"}),
    "no tokenizer": lambda folder: change_meta(folder, tokenizer=None),
    "short train.bin": lambda folder: os.truncate(folder / "train.bin", 500),
    "no val.bin": lambda folder: os.remove(folder / "val.bin"),
    "empty train.bin": lambda folder: os.truncate(folder / "train.bin", 0),
    "one byte more of val.bin": lambda folder: (folder / "val.bin").write_bytes(b"\1" * 301),
    "a folder as val.bin": lambda folder: (os.remove(folder / "val.bin"), os.mkdir(folder / "val.bin")),
    "uint16": lambda folder: change_meta(folder, dtype="uint16"),
    "another vocabulary": lambda folder: change_meta(folder, vocab_size=97),
    "fraction of a count": lambda folder: change_meta(folder, train_tokens=600.0),
    "infinite count": lambda folder: change_meta(folder, train_tokens=float("inf")),
    "not UTF-8": lambda folder: (folder / "meta.json").write_bytes(b"\xff{}"),
    "nested": lambda folder: (folder / "meta.json").write_text("[" * 100_000),
    "no meta.json": lambda folder: os.remove(folder / "meta.json"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_dataset_is_one_sentence(damage, attempt, tmp_path):
    folder = write_ids(tmp_path / "data", [1, 2, 3] * 200, [1, 2, 3] * 100)
    DAMAGES[damage](folder)
    assert_one_sentence(attempt(dataset=folder), str(folder), ".bin" if ".bin" in damage or damage == "uint16" else "meta.json")


def test_an_id_beyond_the_vocabulary_is_one_sentence(run, tmp_path):
    flags = [f"--{k}={v}" for k, v in (SMALL | {"dataset": write_ids(tmp_path / "data", [200] * 600, [200] * 600)}).items()]
    assert_one_sentence(run("train.py", *flags, f"--out_dir={tmp_path / 'out'}"), "200", "95")


def test_resume_of_another_model_names_both(run, trained, python_text):
    """And leaves the run as it was."""
    out = trained("btt", **TINY)
    before = {name: (out / name).read_bytes() for name in os.listdir(out)}
    flags = [f"--{k}={v}" for k, v in (SMALL | TINY | {"dataset": python_text, "out_dir": out, "n_embd": 64}).items()]
    done = run("train.py", "config/monarch.py", *flags, "--init_from=resume")
    assert_one_sentence(done, "n_embd", "16", "64", "'btt'", "'monarch'")
    assert {name: (out / name).read_bytes() for name in os.listdir(out)} == before


@pytest.mark.parametrize("flag, values", [("--mup=False", ("True", "False")), ("--mup_base_width=32", ("128", "32"))])
def test_resume_keeps_learning_rate_factors(flag, values, run, trained, python_text):
    out = trained("btt", **TINY)
    before = {name: (out / name).read_bytes() for name in os.listdir(out)}
    flags = [f"--{k}={v}" for k, v in (SMALL | TINY | {"dataset": python_text, "out_dir": out}).items()]
    assert_one_sentence(run("train.py", "config/btt.py", *flags, "--init_from=resume", flag), "mup", *values)
    assert {name: (out / name).read_bytes() for name in os.listdir(out)} == before


def test_resume_from_what_is_no_checkpoint(run, trained, python_text, tmp_path):
    """Empty, garbage, or of one who wants code to be run."""
    ckpt, made = tmp_path / "ckpt.pt", tmp_path / "made"
    hostile = load(trained(**TINY) / "ckpt.pt") | {"config": Hostile(str(made))}
    flags = [f"--{k}={v}" for k, v in (SMALL | TINY | {"dataset": python_text, "out_dir": tmp_path}).items()]
    for write in (lambda: ckpt.write_bytes(b""), lambda: ckpt.write_bytes(b"garbage"), lambda: torch.save(hostile, ckpt)):
        write()
        assert_one_sentence(run("train.py", *flags, "--init_from=resume"), str(ckpt))
    assert not made.exists()


def test_out_dir_that_is_a_file(run, python_text, tmp_path):
    (tmp_path / "out").write_text("mine")
    flags = [f"--{k}={v}" for k, v in (SMALL | {"dataset": python_text, "out_dir": tmp_path / "out"}).items()]
    assert_one_sentence(run("train.py", *flags), str(tmp_path / "out"))
    assert (tmp_path / "out").read_text() == "mine"
