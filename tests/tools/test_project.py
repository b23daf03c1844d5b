"""python -m tools.project on small dense checkpoints, against matrices and losses made from both files."""
import dataclasses
import re

import numpy as np
import pytest
import torch

from data.batches import Batches
from data.common import open_dataset
from lib.checkpoint import save_checkpoint
from lib.nearest import matrix_of, nearest_einsum, relative_error
from model import GPT, GPTConfig
from structured import Dyad, Einsum, linear
from tests.conftest import SMALL
from tests.runs import cross_entropy, load, read_log
from tools import project

SHAPE = dict(n_layer=2, n_head=2, n_embd=24, block_size=16, vocab_size=96, bias=True)


def write_dense(folder, dataset, tokenizer, **options):
    """A checkpoint of a random model, all of whose parameters differ from 0."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(**SHAPE | options))
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn_like(p)
    config = SMALL | dataclasses.asdict(model.config) | dict(dataset=str(dataset), learning_rate=3e-3,
                                                             lr_decay_iters=20, min_lr=3e-4)
    folder.mkdir(parents=True)
    save_checkpoint(str(folder / "ckpt.pt"), dict(
        model=model.state_dict(), optimizer={}, scaler={}, model_args=dataclasses.asdict(model.config),
        config=config, tokenizer=tokenizer, iteration=7, tokens=1, flops=1.0, best_val_loss=1.0), None)
    return folder


@pytest.fixture
def tokenizer(python_text):
    return open_dataset(str(python_text))[0]["tokenizer"]


@pytest.fixture
def dense(tmp_path, python_text, tokenizer):
    return write_dense(tmp_path / "dense", python_text, tokenizer)


@pytest.fixture
def projected(capsys):
    """projected(folder, struct="btt", ...) -> (rows of the table, all that is printed), in this process."""
    def projected(folder, **options):
        options = dict(device="cpu", eval_tokens=0, out_dir=folder.parent / "new") | options
        project.main([str(folder), *(f"--{key}={value}" for key, value in options.items())])
        text = capsys.readouterr().out
        rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if "|" in line]
        return rows[2:], text
    return projected


def open_model(path):
    checkpoint = load(path)
    model = GPT(GPTConfig(**checkpoint["model_args"]))
    model.load_state_dict(checkpoint["model"])
    return model


@pytest.mark.parametrize("options", [
    dict(struct="btt", rank=2), dict(struct="low_rank"), dict(struct="kronecker"), dict(struct="tt"),
    dict(struct="monarch", head_aligned=False), dict(struct="dyad", dyad_variant="ot"),
    dict(struct="einsum", theta="0.1,0.6,0.3,0.6,0.1,0.3,0.25"), dict(struct="btt", layers="mlp")],
    ids=lambda options: "-".join(map(str, options.values())))
def test_the_table_says_what_the_checkpoints_hold(dense, projected, options):
    """Errors, parameters and FLOPs, from both files; everything else is as it was, biases too."""
    rows, _ = projected(dense, **options)
    before, after = open_model(dense / "ckpt.pt"), open_model(dense.parent / "new" / "ckpt.pt")
    names = [f"{i}.{name}" for i in (0, 1) for name in ("attn.q", "attn.k", "attn.v", "attn.o", "mlp.up",
                                                        "mlp.down")
             if options.get("layers") != "mlp" or "mlp" in name]
    assert [row[0] for row in rows] == [*names, "all"]
    cores = set()
    for name, row in zip(names, rows):
        old, new = (model.get_submodule(f"blocks.{name}") for model in (before, after))
        assert isinstance(new, Dyad if options["struct"] == "dyad" else Einsum) and not new.weight_norm
        W, M = (layer.to_dense().detach() for layer in (old, new))
        if isinstance(new, Einsum):  # the module's own layout of the cores makes the nearest matrix
            nearest = matrix_of(*nearest_einsum(W, new.sizes)[:2])
            torch.testing.assert_close(M.double(), nearest, rtol=1e-4, atol=1e-6)
        assert 0 < relative_error(W, M) < 1
        assert float(row[2]) == pytest.approx(relative_error(W, M), abs=1e-6)
        assert row[3] == f"{sum(getattr(new, core).numel() for core in new.fans()):,}"
        assert row[5] == f"{new.flops_per_token():,}"
        with torch.no_grad():
            x = torch.randn(3, W.shape[1])
            torch.testing.assert_close(new(x), x @ M.T + old.bias, rtol=1e-4, atol=1e-5)
        cores |= {f"blocks.{name}.{core}" for core in (*new.fans(), *old.fans())}
    kept = [name for name in before.state_dict() if name not in cores]
    assert len(kept) > 20
    for name in kept:
        assert torch.equal(before.state_dict()[name], after.state_dict()[name]), name


@pytest.mark.parametrize("options", [dict(struct="dense"), dict(struct="low_rank", rank=24),
                                     dict(struct="btt", rank=24)], ids=lambda options: options["struct"])
def test_at_full_rank_the_loss_stays(dense, projected, options, python_text):
    _, text = projected(dense, **options, eval_tokens=256)
    ids = open_dataset(str(python_text))[1]["val"]
    ids = ids[:len(ids)].astype("int64")
    before, after = (cross_entropy(load(dense.parent / name / "ckpt.pt"), ids, 16)
                     for name in ("dense", "new"))
    assert after == pytest.approx(before, abs=1e-5)
    printed = re.search(r"([\d.]+) before, ([\d.]+) after projection", text).groups()
    assert [*map(float, printed)] == pytest.approx([before, after], abs=1e-4)


def test_a_model_of_gpt2s_kind_stays_one(tmp_path, projected, python_text, tokenizer):
    """Tied embeddings, tanh GELU, no QK norm and scales of its own; at full rank the logits stay."""
    kind = dict(qk_norm=False, gelu="tanh", tie_embeddings=True, branch_scale=1.0, attention_scale=0.3)
    folder = write_dense(tmp_path / "gpt2", python_text, tokenizer, **kind)
    projected(folder, struct="low_rank", rank=24)
    before, after = (open_model(tmp_path / name / "ckpt.pt") for name in ("gpt2", "new"))
    assert {key: getattr(after.config, key) for key in kind} == kind and after.config.struct == "low_rank"
    x = torch.randint(96, (2, 16))
    with torch.no_grad():
        torch.testing.assert_close(before(x, x)[0], after(x, x)[0], rtol=1e-4, atol=1e-5)


def test_weights_by_inputs_lower_the_weighted_error(dense, projected):
    """Both tables measure in both norms; the plain solution's weighted error is computed here."""
    plain, _ = projected(dense, struct="btt", rank=2)
    weighted, _ = projected(dense, struct="btt", rank=2, calibration_tokens=2048, tolerance=1e-3,
                            out_dir=dense.parent / "weighted")
    for a, b in zip(plain[:-1], weighted[:-1]):
        assert float(b[2]) > float(a[2])  # by the plain norm it is farther
    # by the mean square of the outputs, on other tokens, it is nearer
    models = [open_model(dense.parent / name / "ckpt.pt") for name in ("dense", "new", "weighted")]
    inputs = {}
    for name, layer in project.projections(models[0]).items():
        layer.register_forward_pre_hook(lambda _, x, name=name: inputs.update({name: x[0]}))
    with torch.no_grad():
        models[0](torch.randint(96, (64, 16)))
        for name, x in inputs.items():
            y, near, nearer = (model.get_submodule(name)(x) for model in models)
            assert (y - nearer).norm() < (y - near).norm(), name


def test_a_weight_norm_of_the_dense_model_is_taken_in(tmp_path, projected, python_text, tokenizer):
    """Where projections stay dense too."""
    folder = write_dense(tmp_path / "normed", python_text, tokenizer, weight_norm=True)
    projected(folder, struct="low_rank", rank=24, layers="attn")
    x = torch.randint(96, (2, 16))
    with torch.no_grad():
        torch.testing.assert_close(*(open_model(tmp_path / name / "ckpt.pt")(x, x)[0]
                                     for name in ("normed", "new")), rtol=1e-4, atol=1e-5)


def test_branches_of_zeros_can_learn(tmp_path, projected, python_text, tokenizer):
    """A matrix of zeros becomes one core of zeros, and the other one as at a start."""
    folder = write_dense(tmp_path / "zeros", python_text, tokenizer)
    checkpoint = load(folder / "ckpt.pt")
    checkpoint["model"]["blocks.0.attn.o.A"].zero_()
    torch.save(checkpoint, folder / "ckpt.pt")
    projected(folder, struct="btt")
    layer = open_model(tmp_path / "new" / "ckpt.pt").blocks[0].attn.o
    assert [bool(getattr(layer, name).any()) for name in layer.order] == [True, False]


def test_it_trains_on_and_is_sampled_from(dense, projected, run, monkeypatch):
    """--finetune_iters runs train.py, which starts from the loss after projection; sample.py reads both."""
    def start(command):
        return run("train.py", *command[2:])
    monkeypatch.setattr(project.subprocess, "run", start)
    _, text = projected(dense, struct="btt", rank=2, eval_tokens=256, finetune_iters=4)
    tuned = dense.parent / "new-finetuned"
    [start], steps, evals = read_log(tuned)
    after = float(text.split(" before, ")[-1].split()[0])
    assert evals[0]["val_loss"] == pytest.approx(after, abs=1e-4) and max(evals) == 4
    assert f"{evals[4]['val_loss']:.4f} after 4 iterations" in text
    assert start["model_args"]["struct"] == "btt" and start["config"]["learning_rate"] == 1e-3
    done = run("sample.py", f"--out_dir={dense.parent / 'new'}", "--device=cpu", "--max_new_tokens=5")
    assert done.returncode == 0 and done.stderr == "" and done.stdout
    # a second start would overwrite the result, and the result is no dense model
    for arguments, words in (([dense, f"--out_dir={dense.parent / 'new'}"], "exists"),
                             ([dense.parent / "new"], "only a dense model")):
        with pytest.raises(SystemExit):
            project.main([str(a) for a in arguments])


@pytest.mark.parametrize("options, words", [
    (dict(struct="butterfly"), "struct must be one of"),
    (dict(struct="low_rank", rank=25), "rank must be between"),
    (dict(struct="monarch", rank=2), "has no rank to set"),
    (dict(struct="einsum"), "needs theta"),
    (dict(struct="dyad", dyad_blocks=7), "must divide both widths"),
    (dict(dataset="nowhere", eval_tokens=9), "there is no dataset")],
    ids=lambda value: value if isinstance(value, str) else "")
def test_bad_input_is_one_sentence_and_writes_nothing(dense, options, words, capsys):
    out = dense.parent / "new"
    options = dict(eval_tokens=0, out_dir=out, device="cpu") | options
    with pytest.raises(SystemExit) as stop:
        project.main([str(dense), *(f"--{key}={value}" for key, value in options.items())])
    [line] = capsys.readouterr().err.splitlines()
    assert stop.value.code == 1 and line.startswith("error: ") and words in line and not out.exists()


def test_weights_that_are_not_finite_are_one_sentence(dense, capsys):
    checkpoint = load(dense / "ckpt.pt")
    checkpoint["model"]["blocks.0.attn.v.A"].view(-1)[0] = float("nan")
    torch.save(checkpoint, dense / "ckpt.pt")
    with pytest.raises(SystemExit):
        project.main([str(dense), f"--out_dir={dense.parent / 'new'}", "--struct=btt", "--eval_tokens=0"])
    [line] = capsys.readouterr().err.splitlines()
    assert "blocks.0.attn.v.A has values that are not finite" in line and not (dense.parent / "new").exists()


@pytest.mark.parametrize("part", ["config", "tokenizer"])
def test_a_checkpoint_that_lacks_something_is_one_sentence(dense, capsys, part):
    torch.save(load(dense / "ckpt.pt") | {part: None}, dense / "ckpt.pt")
    with pytest.raises(SystemExit):
        project.main([str(dense), f"--out_dir={dense.parent / 'new'}", "--struct=btt", "--eval_tokens=0"])
    [line] = capsys.readouterr().err.splitlines()
    assert line.endswith(f"cannot be projected: it lacks a valid {part}")


def test_of_two_at_once_the_first_to_end_is_kept(dense, capsys, monkeypatch):
    """The other has computed its own by then."""
    out, compute = dense.parent / "new", project.project
    def slow(*arguments):
        monkeypatch.setattr(project, "project", compute)
        project.main([str(dense), f"--out_dir={out}", "--struct=btt", "--rank=2", "--eval_tokens=0"])
        return compute(*arguments)
    monkeypatch.setattr(project, "project", slow)
    with pytest.raises(SystemExit):
        project.main([str(dense), f"--out_dir={out}", "--struct=btt", "--rank=1", "--eval_tokens=0"])
    assert "exists: give another --out_dir" in capsys.readouterr().err
    assert load(out / "ckpt.pt")["model_args"]["rank"] == 2


def test_no_checkpoint_and_another_vocabulary(dense, capsys, tmp_path):
    torch.save(load(dense / "ckpt.pt") | dict(tokenizer=dict(kind="other")), dense / "ckpt.pt")
    for place, options in ((tmp_path / "nowhere", []), (dense, ["--eval_tokens=9"]), ("", [])):
        with pytest.raises(SystemExit):
            project.main([*filter(None, [str(place)]), *options, "--device=cpu"])
    errors = capsys.readouterr().err.splitlines()
    assert all(map(str.count, errors, ("no checkpoint", "vocabulary", "one checkpoint"))) and len(errors) == 3


def test_the_gpu_is_free_for_the_run_that_fine_tunes(monkeypatch):
    """What its memory was used for stays with the process otherwise."""
    calls = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: calls.append("emptied"))
    monkeypatch.setattr(project.subprocess, "run", lambda *_, **__: (calls.append("run"), exit(9)))
    with pytest.raises(SystemExit):
        project.finetune([], "out")
    assert calls == ["emptied", "run"]


@torch.no_grad()
def test_second_moments_are_those_of_all_calibration_tokens(monkeypatch):
    """Of windows that differ, and with the damping."""
    for key, value in dict(calibration_tokens=80, damping=0.5, batch_size=2).items():
        monkeypatch.setattr(project, key, value)
    gpt = GPT(GPTConfig(block_size=16, vocab_size=96, n_layer=1, n_head=2, n_embd=24)).eval()
    ids, seen = np.random.default_rng(0).integers(96, size=5000).astype(np.uint8), []
    gpt.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    found = project.second_moments(gpt, ["blocks.0.attn.q", "blocks.0.attn.v"], Batches(
        dict(train=ids, val=ids[:99]), block_size=16, batch_size=2, seed=1, sequences=2, val_windows=1,
        device="cpu"))
    idx = torch.cat(seen)
    assert idx.shape == (5, 16) and len(idx.unique(dim=0)) == 5
    X = gpt.blocks[0].ln_1(gpt.wte(idx) + gpt.wpe.weight).flatten(0, 1).double()
    C = X.T @ X / 80
    torch.testing.assert_close(found, {"blocks.0.attn.q": C + 0.5 * C.diagonal().mean() * torch.eye(24)},
                               check_dtype=False, rtol=1e-5, atol=1e-5)


def test_cores_of_a_projection_have_the_same_size_relative_to_their_start():
    layer = linear("btt", 24, 36, rank=2, weight_norm=False)
    project.fill(layer, torch.randn(36, 24), None)
    first, second = (getattr(layer, name).square().mean().sqrt().item() / layer.init_std(name)
                     for name in layer.order)
    assert first == pytest.approx(second, rel=1e-4)


def test_fine_tuning_has_a_schedule_of_its_own():
    flags = project.finetune_flags(dict(learning_rate=3e-3, min_lr=3e-4, lr_decay_iters=20, warmup_iters=7,
                                        max_iters=20), "ckpt.pt", "out")
    assert {"--max_iters=1000", "--warmup_iters=100", "--learning_rate=0.001"} <= set(flags)
    assert not any(flag.startswith(("--min_lr", "--lr_decay_iters")) for flag in flags)
