"""The commands that a run proposes at its end, by running them."""
import shlex
import shutil

import pytest

import configurator
from configurator import structure_config
from lib.commands import default_out_dir, flag_of, next_commands
from model import GPT, GPTConfig
from tests.conftest import ROOT, SMALL, TINY
from tests.runs import load, read_log

KEYS = configurator.read_keys(str(ROOT / "train.py"))


def proposed(stdout):
    """{what for: words of the command}, from the last lines of a run."""
    return {line.split(":")[0]: shlex.split(line.split(":", 1)[1]) for line in stdout.splitlines()
            if ": " in line and ":" in line[:27] and line.split(":", 1)[1].strip().startswith("python ")}


def commands(arguments, **config):
    """The lines after a run of 100 iterations with a quarter of the FLOPs of dense."""
    used = dict(out_dir="out", init_from="scratch", max_iters=100, lr_decay_iters=100, warmup_iters=0)
    return next_commands(arguments, used | config, {}, 0.25)


def test_the_proposed_dense_run_has_the_same_model_data_and_flops(run, flags, tmp_path):
    done = run("train.py", *flags("btt_moe", **TINY | dict(n_embd=64, max_iters=60, num_experts=4)))
    commands = proposed(done.stdout)
    assert commands["sample more"] == ["python", "sample.py", f"--out_dir={tmp_path / 'out'}"]
    python, script, *arguments = commands["dense, for as many FLOPs"]
    assert (python, script) == ("python", "train.py")
    again = run(script, *arguments)
    assert again.returncode == 0, again.stderr
    one, dense = tmp_path / "out", tmp_path / "out-dense"
    assert commands["the losses, drawn"] == ["python", "-m", "tools.compare", str(one), str(dense)]
    assert run("tools.compare", str(one), str(dense), f"--out={tmp_path / 'figure'}").returncode == 0
    mine, other = load(one / "ckpt.pt"), load(dense / "ckpt.pt")
    iteration = other["flops"] / other["iteration"]
    assert abs(mine["flops"] - other["flops"]) <= iteration / 2 and other["iteration"] < mine["iteration"]
    differ = {key for key in mine["config"] if mine["config"][key] != other["config"][key]}
    assert differ == {"struct", "num_experts", "weight_norm", "max_iters", "lr_decay_iters", "out_dir"}
    assert (other["config"]["struct"], other["config"]["num_experts"]) == ("dense", 0)
    assert read_log(dense)[0][0]["params"] == read_log(dense)[0][0]["active_params"]
    assert "dense, for as many FLOPs" not in proposed(again.stdout)


@pytest.mark.parametrize("name", ["dense", "low_rank", "kronecker", "monarch", "tt", "btt", "einsum", "dyad",
                                  "btt_moe", "moe"])
def test_flops_ratio_to_dense_of_each_structure_config(name):
    """In a model of any structure the linear maps of dense have 24 · n_layer · n_embd² FLOPs, attention 4 ·
    n_layer · block_size · n_embd, the output layer 2 · vocab_size · n_embd."""
    size = dict(n_layer=2, n_head=4, n_embd=64, block_size=32, vocab_size=96)
    model = GPT(GPTConfig(**size, **structure_config(name)))
    dense = 24 * 2 * 64 ** 2 + 4 * 2 * 32 * 64 + 2 * 96 * 64
    assert model.flops_ratio_to_dense() == pytest.approx(model.flops_per_token() / dense, rel=1e-12)


@pytest.mark.parametrize("arguments, out_dir, command", [  # out_dir: None for that of the arguments
    (["config/btt_moe.py", "config/quickstart.py"], None,
     "python train.py config/dense.py config/quickstart.py --max_iters=25"),
    (["config/moe.py", "--max_iters=100", "--init_from=auto", "--top_k=1", "--ffn_experts=4", "--seed=3"],
     None,
     "python train.py config/dense.py --seed=3 --max_iters=25"),
    (["--struct=btt", "--head_aligned=True", "--out_dir=a b"], "a b",
     "python train.py --max_iters=25 '--out_dir=a b-dense'"),
    (["--struct=btt", "--num-experts=8", "--weight-norm=True", "--out-dir=c"], "c",  # a - in a key is a _
     "python train.py --max_iters=25 --out_dir=c-dense"),
    (["results/search/best.py", "--seed=3"], None,  # which sets sizes and data too
     "python train.py results/search/best.py --seed=3 --struct=dense --theta=None --max_iters=25 "
     "--out_dir=out-best-dense"),
    (["config/btt.py"], "set by a file",
     "python train.py config/dense.py --max_iters=25 '--out_dir=set by a file-dense'"),
    (["--struct=btt"], None, "python train.py --max_iters=25 --out_dir=out-dense")])
@pytest.mark.parametrize("folder", [ROOT, ROOT / "config"])  # config files are found from other folders too
def test_dense_takes_the_place_of_the_structure_alone(arguments, out_dir, command, folder, monkeypatch):
    monkeypatch.chdir(folder)
    assert f" {command}\n" in commands(arguments, out_dir=out_dir or default_out_dir(arguments))


@pytest.mark.parametrize("world, here, launcher", [
    ("4", "4", "torchrun --nproc_per_node=4"), ("1", "1", "python"),
    ("8", "4", "python")])  # of two nodes, one cannot start the other
def test_the_dense_run_has_as_many_processes(world, here, launcher, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", world)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", here)
    text = commands(["config/btt_moe.py"], out_dir="out-btt_moe")
    assert f" {launcher} train.py config/dense.py --max_iters=25\n" in text
    assert proposed(text)["sample more"][:2] == ["python", "sample.py"]


@pytest.mark.parametrize("init_from, proposes", [("scratch", True), ("auto", True), ("resume", True),
                                                 ("gpt2", False), ("out/ckpt.pt", False)])
def test_no_dense_run_beside_one_from_other_weights(init_from, proposes):
    """It would begin at random ones, and compare two beginnings instead of two structures."""
    assert ("dense" in commands([f"--init_from={init_from}"], init_from=init_from)) == proposes


@pytest.mark.parametrize("set_by", ["flag", "file"])
@pytest.mark.parametrize("decay, warmup, expected", [(100, 9, 25), (60, 9, 15), (200, 9, 50), (40, 12, 12)])
def test_the_dense_run_has_the_same_schedule(set_by, decay, warmup, expected, tmp_path):
    """The rate decays at the same share of its iterations, but not before the warmup ends, which train.py
    refuses."""
    (tmp_path / "rate.py").write_text(f"lr_decay_iters = {decay}\n")
    argument = f"--lr_decay_iters={decay}" if set_by == "flag" else str(tmp_path / "rate.py")
    text = commands(["--struct=btt", argument], lr_decay_iters=decay, warmup_iters=warmup)
    kept = [] if set_by == "flag" else [argument]
    words = ["python", "train.py", *kept, "--max_iters=25", f"--lr_decay_iters={expected}"]
    assert proposed(text)["dense, for as many FLOPs"] == [*words, "--out_dir=out-dense"]


@pytest.mark.parametrize("arguments, config, schedule", [
    (["--warmup_iters=12"], dict(warmup_iters=12), ["--warmup_iters=12", "--max_iters=25"]),
    (["--warmup_iters=40"], dict(warmup_iters=40),
     ["--warmup_iters=40", "--max_iters=25", "--warmup_iters=10"]),  # the last one counts
    (["--lr_decay_iters=60"], dict(warmup_iters=40, lr_decay_iters=60),
     ["--max_iters=25", "--warmup_iters=10", "--lr_decay_iters=15"])])
def test_a_warmup_that_would_hardly_end_is_as_much_shorter_as_the_dense_run(arguments, config, schedule):
    words = proposed(commands(["--struct=btt", *arguments], **config))["dense, for as many FLOPs"]
    assert words == ["python", "train.py", *schedule, "--out_dir=out-dense"]


def test_the_dense_run_has_the_sizes_of_a_resumed_checkpoint(run, trained, python_text, tmp_path):
    """Which the command that resumes it does not name."""
    shutil.copytree(trained("btt", **TINY), tmp_path / "out")
    settings = SMALL | dict(dataset=python_text, out_dir=tmp_path / "out", max_iters=5, init_from="resume")
    sizes = ("n_layer", "n_head", "n_embd", "block_size")
    done = run("train.py", *(f"--{key}={value}" for key, value in settings.items() if key not in sizes))
    assert done.returncode == 0, done.stderr
    python, script, *arguments = proposed(done.stdout)["dense, for as many FLOPs"]
    assert not [word for word in arguments if word.startswith(("--bias", "--mup", "--dropout"))]  # defaults
    again = run(script, *arguments)
    assert again.returncode == 0, again.stderr
    mine, dense = (load(tmp_path / name / "ckpt.pt")["config"] for name in ("out", "out-dense"))
    assert [mine[key] for key in sizes] == [dense[key] for key in sizes] and dense["struct"] == "dense"


@pytest.mark.parametrize("key, value", [
    ("theta", (0.5, 0, 0.5, 0, 0.5, 0.5, 0.25)), ("n_layer", 3), ("out_dir", "a folder"), ("bias", True),
    ("weight_norm", None), ("learning_rate", 1e-3)])
def test_a_flag_is_read_as_it_was_written(key, value):
    flag = flag_of(key, value)
    name, _, text = flag.partition("=")
    assert name == f"--{key}" and configurator.parse(KEYS[key], text) == value
    assert key == "out_dir" or shlex.quote(flag) == flag  # no quotes needed
