"""lib/checkpoint.py: checkpoints that are whole or absent, and that fit the run."""
import os

import pytest
import torch

from lib.checkpoint import CONTENTS, check_checkpoint, read_checkpoint, restore_checkpoint, save_checkpoint
from model import GPT, GPTConfig
from tests import kill_test
from tests.conftest import PROCESSES, TINY
from tests.runs import load


# Writing

def test_a_save_that_fails_between_the_two_files(tmp_path, monkeypatch):
    """Each file holds the old or the new checkpoint, never a part. What could be written is written."""
    path, best = str(tmp_path / "ckpt.pt"), str(tmp_path / "ckpt_best.pt")
    save_checkpoint(path, {"iteration": 1}, best)
    failure = save_checkpoint(path, {"iteration": 2}, str(tmp_path / "gone" / "ckpt_best.pt"))
    assert isinstance(failure, OSError)
    assert (load(path), load(best)) == ({"iteration": 2}, {"iteration": 1})

    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: replace(a, b if b == best else tmp_path / "gone" / "x"))
    with pytest.raises(OSError):
        save_checkpoint(path, {"iteration": 3}, best)
    assert (load(path), load(best)) == ({"iteration": 2}, {"iteration": 3})
    monkeypatch.setattr(torch, "save", lambda contents, f: f.write(b"half") and 1 // 0)
    with pytest.raises(ZeroDivisionError):
        save_checkpoint(path, {"iteration": 4}, None)
    assert (load(path), load(best)) == ({"iteration": 2}, {"iteration": 3})
    assert sorted(os.listdir(tmp_path)) == ["ckpt.pt", "ckpt_best.pt"]


def measure_memory(folder, results):
    """Saves and restores a layer of 64 MB.

    Puts the peaks of the process's own memory into results, in such sizes.
    """
    import threading

    def own():
        [line] = [line for line in open("/proc/self/status") if line.startswith("RssAnon")]
        return int(line.split()[1]) / 2 ** 16

    def peak_of(call):
        start, peak, done = own(), 0, threading.Event()

        def watch():
            nonlocal peak
            while not done.wait(0.001):
                peak = max(peak, own() - start)
        thread = threading.Thread(target=watch)
        thread.start()
        call()
        done.set()
        thread.join()
        return max(peak, own() - start)

    def make():
        layer = torch.nn.Linear(4096, 4096, bias=False)
        optimizer = torch.optim.AdamW(layer.parameters(), fused=True)
        return layer, optimizer, torch.amp.GradScaler("cpu", enabled=False)

    layer, optimizer, scaler = make()
    layer(torch.ones(1, 4096)).sum().backward()
    optimizer.step()
    path = os.path.join(folder, "ckpt.pt")
    contents = dict(model=layer.state_dict(), optimizer=optimizer.state_dict(), scaler=scaler.state_dict(),
                    model_args={}, config={}, tokenizer={}, iteration=0, tokens=0, flops=0.0,
                    best_val_loss=0.0)
    results.put(peak_of(lambda: save_checkpoint(path, contents, path + ".best")))
    layer, optimizer, scaler = make()
    results.put(peak_of(lambda: restore_checkpoint(path, read_checkpoint(path), layer, optimizer, scaler)))


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads Linux's account of memory")
def test_memory_of_saving_and_loading(tmp_path):
    """Saving copies no weights. Loading makes the two moments, which stay, and no second copy of anything."""
    results = PROCESSES.Queue()
    process = PROCESSES.Process(target=measure_memory, args=(str(tmp_path), results))
    process.start()
    saving, loading = results.get(timeout=600), results.get(timeout=600)
    process.join()
    assert saving < 0.5 and 1.5 < loading < 2.5


# Reading

@pytest.fixture
def whole(trained):
    """The contents of a checkpoint of a tiny run."""
    return load(trained(**TINY) / "ckpt.pt")


@pytest.mark.parametrize("share", [0, 1e-6, 1e-4, *(i / 16 for i in range(1, 16)), 0.9999999])
def test_a_truncated_checkpoint_is_refused(share, trained, tmp_path):
    contents = (trained(**TINY) / "ckpt.pt").read_bytes()
    (tmp_path / "ckpt.pt").write_bytes(contents[:int(len(contents) * share)])
    with pytest.raises(ValueError, match="is not a checkpoint that can be read .*: move it away, or put"):
        read_checkpoint(str(tmp_path / "ckpt.pt"))


def test_of_a_file_that_no_run_has_written_nothing_is_said_to_be_moved(tmp_path):
    (tmp_path / "dense.py").write_text('struct = "dense"\n')
    with pytest.raises(ValueError, match=r"dense.py is not a checkpoint that can be read \(\w+\)$"):
        read_checkpoint(str(tmp_path / "dense.py"))


@pytest.mark.parametrize("name", CONTENTS)
@pytest.mark.parametrize("kind", ["missing", "of another type"])
def test_a_checkpoint_without_a_part_is_refused(name, kind, whole, tmp_path):
    del whole[name]
    torch.save(whole if kind == "missing" else whole | {name: "x"}, tmp_path / "ckpt.pt")
    with pytest.raises(ValueError, match=f"lacks a valid {name}"):
        read_checkpoint(str(tmp_path / "ckpt.pt"))


def test_a_file_that_is_no_checkpoint_is_refused(tmp_path):
    torch.save([1, 2], tmp_path / "ckpt.pt")
    with pytest.raises(ValueError, match="holds a list"):
        read_checkpoint(str(tmp_path / "ckpt.pt"))


def check(there, whole, **here):
    """check_checkpoint of the checkpoint `there` against the run that made `whole`, changed by `here`."""
    run = dict(model_args=whole["model_args"], tokenizer=whole["tokenizer"], config=whole["config"],
               model=GPT(GPTConfig(**whole["model_args"])))
    check_checkpoint("ckpt.pt", there, **run | here)


def test_a_checkpoint_fits_its_own_run(whole):
    check(whole, whole)


def other_weights(whole):
    weights = dict(whole["model"])
    weights["extra"] = weights.pop("ln_f.weight")
    weights["wpe.weight"] = weights["wpe.weight"][:-1]
    return dict(model=weights)


@pytest.mark.parametrize("there, here, words", [
    (lambda whole: dict(model_args=whole["model_args"] | {"n_layer": 3, "younger": 5}), lambda whole: {},
     ["n_layer = 3 there and 1 here", "younger = 5 there and absent here"]),
    (lambda whole: {}, lambda whole: dict(model_args=whole["model_args"] | {"younger": 5}),
     ["younger = absent there and 5 here"]),
    (lambda whole: dict(tokenizer={"name": "gpt2"}), lambda whole: {},
     ["another vocabulary", "'gpt2' there and 'char' here"]),
    (other_weights, lambda whole: {},
     ["wpe.weight = '(15, 16) torch.float32' there and '(16, 16) torch.float32' here",
      "ln_f.weight = absent there", "extra = '(16,) torch.float32' there and absent"])],
    ids=["settings", "a new setting", "vocabulary", "weights"])
def test_what_differs_is_listed_with_both_values(there, here, words, whole):
    with pytest.raises(ValueError) as error:
        check(whole | there(whole), whole, **here(whole))
    assert all(word in str(error.value) for word in words), error.value


def test_a_vocabulary_of_megabytes_is_still_one_sentence(whole):
    with pytest.raises(ValueError, match="another vocabulary") as error:
        check(whole | dict(tokenizer={"name": "tokenizers", "json": "x" * 10 ** 6}), whole)
    assert "json = 'xxx" in str(error.value) and len(str(error.value)) < 1000


# Restoring

def restore(checkpoint):
    """The optimizer of a new model, after a checkpoint was restored into both."""
    gpt = GPT(GPTConfig(**checkpoint["model_args"]))
    optimizer = gpt.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cpu")
    restore_checkpoint("ckpt.pt", checkpoint, gpt, optimizer, torch.amp.GradScaler("cpu", enabled=False))
    return optimizer


def test_the_optimizer_is_restored(whole):
    assert kill_test.same(restore(whole).state_dict()["state"], whole["optimizer"]["state"])


def test_the_state_goes_where_this_optimizer_wants_it():
    """A fused AdamW counts its steps on the device of its weights; a checkpoint of MPS, where it is not
    fused, has them on the CPU."""
    layer = torch.nn.Linear(4, 4, device="meta")
    optimizer = torch.optim.AdamW(layer.parameters(), fused=True)
    own = torch.optim.AdamW(torch.nn.Linear(4, 4).parameters())
    state = own.state_dict() | dict(state={i: dict(step=torch.tensor(3.0), exp_avg=torch.zeros(shape),
                                                   exp_avg_sq=torch.zeros(shape))
                                           for i, shape in enumerate(((4, 4), (4,)))})
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    checkpoint = dict(model=layer.state_dict(), optimizer=state, scaler={})
    restore_checkpoint("ckpt.pt", checkpoint, layer, optimizer, scaler)
    assert all(value.device.type == "meta" for kept in optimizer.state.values() for value in kept.values())
    assert all(group["fused"] for group in optimizer.param_groups)


def test_the_state_of_another_optimizer_is_restored():
    """Adafactor's is not of its weights' shapes, and a state may hold what is no tensor."""
    def make():
        torch.manual_seed(0)
        layer = torch.nn.Linear(4, 6)
        return layer, torch.optim.Adafactor(layer.parameters())
    layer, optimizer = make()
    layer(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    optimizer.state[layer.weight]["note"] = 7
    checkpoint = dict(model=layer.state_dict(), optimizer=optimizer.state_dict(), scaler={})
    again, other = make()
    restore_checkpoint("ckpt.pt", checkpoint, again, other, torch.amp.GradScaler("cpu", enabled=False))
    assert kill_test.same(other.state_dict()["state"], checkpoint["optimizer"]["state"])


@pytest.mark.parametrize("change", [
    lambda optimizer: optimizer | dict(param_groups=optimizer["param_groups"][1:]),
    lambda optimizer: dict(state=optimizer["state"]),
    lambda optimizer: {},
    lambda optimizer: optimizer | dict(
        state=optimizer["state"] | {0: optimizer["state"][0] | {"exp_avg": torch.zeros(3)}})],
    ids=["fewer groups", "no groups", "nothing", "another shape"])
def test_an_optimizer_that_does_not_fit_is_refused(change, whole):
    with pytest.raises(ValueError, match="does not fit"):
        restore(whole | {"optimizer": change(whole["optimizer"])})
