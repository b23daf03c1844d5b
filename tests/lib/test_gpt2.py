"""lib/gpt2.py and init_from: GPT-2s that transformers has saved, in this model, trained, and back."""
import json
import math
import os
import shutil
import sys
import types

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from lib import gpt2
from model import GPT, GPTConfig
from tests.conftest import SMALL
from tests.runs import assert_one_sentence, assert_same_checkpoint, load, losses
from tests.structures import counted_flops

transformers = pytest.importorskip("transformers")
# not 3 layers, where µP's branch scale is GPT-2's, nor heads of 64, where that of attention is
SHAPE = dict(vocab_size=96, n_positions=48, n_embd=32, n_layer=2, n_head=2, bos_token_id=None,
             eos_token_id=None)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """saved(key=value ...) -> (the folder of a GPT2LMHeadModel of this config, the model itself).

    Every parameter is random, so that none is left out of a comparison for being 0, or 1.
    """
    models = {}

    def saved(shards=None, **options):
        key = str((shards, options))
        if key not in models:
            torch.manual_seed(0)
            model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**SHAPE | options)).eval()
            with torch.no_grad():
                for p in model.parameters():
                    p.normal_(std=0.3)
            folder = tmp_path_factory.mktemp("gpt2")
            model.save_pretrained(folder, max_shard_size=shards or "1GB")
            models[key] = folder, model
        return models[key]
    return saved


@pytest.fixture
def copied(saved, tmp_path):
    """copied(key=value ...) -> a folder of a GPT-2 that may be changed; in its config.json, these values."""
    def copied(**changes):
        folder = shutil.copytree(saved()[0], tmp_path / "copied")
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | changes))
        return folder
    return copied


def taken_in(folder, vocab_size=96, **config):
    """The model of a folder, as train.py makes it with these keys given."""
    settings = gpt2.start_settings(str(folder), config, set(config))
    settings = {key: value for key, value in settings.items() if key != "mup"}
    model = GPT(GPTConfig(**settings | config | dict(vocab_size=vocab_size))).eval()
    gpt2.load_weights(str(folder), model)
    return model


def tokens(*shape, vocab_size=96):
    return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def assert_same_logits(theirs, model, idx):
    expected = theirs(idx).logits
    assert expected.std() > 0.1
    torch.testing.assert_close(model(idx, idx)[0], expected, rtol=0, atol=1e-4)

# ---- GPT-2 in ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("options", [
    {}, dict(tie_word_embeddings=False), dict(vocab_size=1030),
    dict(vocab_size=1030, tie_word_embeddings=False),
    dict(activation_function="gelu", layer_norm_epsilon=0.1), dict(scale_attn_weights=False, n_inner=128),
    dict(shards="20KB")], ids=str)
def test_logits_are_those_of_transformers(saved, options):
    folder, theirs = saved(**options)
    assert (folder / "model.safetensors.index.json").exists() == ("shards" in options)
    vocab_size = options.get("vocab_size", 96)
    model = taken_in(folder, vocab_size)
    assert_same_logits(theirs, model, tokens(2, 48, vocab_size=vocab_size))
    assert model.num_params() - theirs.num_parameters() == 32 * (1088 - 1030 if vocab_size == 1030 else 0)


def test_weights_without_a_prefix_and_with_the_masks_of_old_files(saved, copied):
    """As the hub's gpt2 has them; of 16 bits, they are those numbers in float32."""
    from safetensors.torch import load_file, save_file
    folder = copied()
    weights = load_file(folder / "model.safetensors")
    assert all(name.startswith("transformer.") for name in weights)
    weights = {name.removeprefix("transformer."): w.half() for name, w in weights.items()}
    weights |= {"h.0.attn.bias": torch.ones(1, 1, 48, 48), "h.0.attn.masked_bias": torch.tensor(-1e4)}
    save_file(weights, folder / "model.safetensors")
    theirs = transformers.GPT2LMHeadModel(saved()[1].config).eval()
    theirs.load_state_dict({name: w.half().float() for name, w in saved()[1].state_dict().items()})
    assert_same_logits(theirs, taken_in(folder), tokens(2, 48))


def test_positions_are_cropped_and_rows_that_pad_the_vocabulary_left_out(saved):
    folder, theirs = saved()
    model = taken_in(folder, vocab_size=90, block_size=20)
    assert model.config.block_size == 20 and model.wpe.weight.shape == (20, 32)
    idx = tokens(2, 20, vocab_size=90)
    with torch.no_grad():
        torch.testing.assert_close(model(idx, idx)[0], theirs(idx).logits[..., :90], rtol=0, atol=1e-4)


@pytest.mark.parametrize("rows", [95, 96, 97, 1000])
def test_a_vocabulary_must_be_the_datas(saved, rows):
    folder, _ = saved(vocab_size=rows)
    if rows in (96, 97):
        assert taken_in(folder).wte.weight.shape == (96, 32)
    else:
        with pytest.raises(ValueError, match=f"vocabulary of {rows} tokens, and the data has one of 96"):
            taken_in(folder)


def test_greedy_tokens_with_the_cache_are_those_of_transformers(saved):
    folder, theirs = saved()
    idx = tokens(2, 5)
    expected = theirs.generate(idx, max_new_tokens=40, do_sample=False, pad_token_id=0,
                               attention_mask=torch.ones_like(idx))
    assert len(expected[0].unique()) > 3
    assert torch.equal(taken_in(folder).generate(idx, 40, temperature=0), expected)


def test_learning_rates_decay_and_flops(saved):
    """At such a start every weight learns at learning_rate, matrices and embeddings alone decay, and biases
    cost no FLOPs that are counted."""
    settings = gpt2.start_settings(str(saved()[0]), dict(block_size=48), set())
    assert settings["mup"] is False and "mup" not in gpt2.start_settings(
        str(saved()[0]), dict(mup=True), {"mup"})
    model = taken_in(saved()[0])
    optimizer = model.configure_optimizers(0.1, 3e-5, (0.9, 0.95), "cpu", None)
    decayed = {p: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert {group["lr"] for group in optimizer.param_groups} == {3e-5}
    for name, p in model.named_parameters():
        assert decayed[p] == (0.1 if name.endswith((".A", "wte.weight", "wpe.weight")) else 0), name
    idx = tokens(2, 48)
    with sdpa_kernel(SDPBackend.MATH):
        assert counted_flops(lambda: model(idx, idx)) == 2 * 48 * model.flops_per_token()


def test_compiled_it_computes_the_same(saved):
    model, idx = taken_in(saved()[0]), tokens(2, 48)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    loss = model(idx, idx)[1]
    expected = torch.autograd.grad(loss, list(model.parameters()))
    again = compiled(idx, idx)[1]
    torch.testing.assert_close(again, loss)
    for a, b in zip(torch.autograd.grad(again, list(model.parameters())), expected):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)

WORDS = {"name": "tokenizers", "json": json.dumps({"model": {"vocab": {"a": 0, "b": 1}}}), "end_of_text": 0}
CHARS = {"name": "char", "characters": "ab"}


@pytest.mark.parametrize("file, contents, tokenizer, remark", [
    ("vocab.json", {"b": 0, "model": 1}, CHARS, "'b' is 0 in "),
    ("vocab.json", {"a": 0, "c": 1}, CHARS, None),
    ("tokenizer.json", {"model": {"vocab": {"a": 1, "b": 0}}}, WORDS, "'a' is 1 in "),
    ("tokenizer.json", {"model": {"vocab": {"a": 0, "b": 1}}}, WORDS, None),
    ("tokenizer.json", {"model": {"vocab": [["a", -1.0]]}}, WORDS, None), ("vocab.json", [], CHARS, None),
    ("other.json", {"b": 0}, CHARS, None), ("vocab.json", {"!": 3, "b": 1}, {"name": "gpt2"}, "'!' is 3 in "),
    ("vocab.json", {"!": 0, "\u0120the": 262, "<|endoftext|>": 50256}, {"name": "gpt2"}, None),
    ("vocab.json", {"!": 3}, {"name": "cl100k_base"}, None)])
def test_weights_of_another_vocabulary_are_remarked_on(copied, capsys, file, contents, tokenizer, remark):
    """Which may have as many tokens."""
    folder = copied()
    (folder / file).write_text(json.dumps(contents))
    gpt2.load_weights(str(folder), GPT(GPTConfig(**gpt2.read_settings(str(folder)))), tokenizer)
    first, *lines = capsys.readouterr().out.splitlines()
    assert first.startswith("starting from the weights of ") and len(lines) == (remark is not None)
    assert all(remark in line and "another vocabulary than the data" in line for line in lines)


def test_a_folder_comes_before_the_hubs_gpt2_of_its_name(copied, monkeypatch, tmp_path):
    copied().rename(tmp_path / "gpt2")
    monkeypatch.chdir(tmp_path)
    asked = []
    monkeypatch.setitem(sys.modules, "huggingface_hub", types.SimpleNamespace(
        snapshot_download=lambda name, **_: asked.append(name) or "downloaded"))
    assert gpt2.find("gpt2") == "gpt2" and not asked
    (tmp_path / "gpt2-xl").mkdir()  # without a config.json, such as a run's folder
    assert gpt2.find("gpt2-xl") == "downloaded" and asked == ["openai-community/gpt2-xl"]


# ---- What cannot be taken in -------------------------------------------------------------------------------

@pytest.mark.parametrize("key, value", [
    ("activation_function", "relu"), ("scale_attn_by_inverse_layer_idx", True),
    ("reorder_and_upcast_attn", True), ("add_cross_attention", True), ("n_inner", 100),
    ("model_type", "llama"), ("pruned_heads", {"0": [1]}), ("quantization_config", {"bits": 4}),
    ("n_layer", "three"), ("n_head", 5), ("n_embd", 0), ("layer_norm_epsilon", None),
    ("layer_norm_epsilon", math.nan), ("activation_function", ["gelu"]),
    ("tie_word_embeddings", 1)])
def test_a_config_that_this_model_cannot_express(copied, key, value):
    folder = copied(**{key: value})
    with pytest.raises(ValueError, match=f"config.json has {key} = "):
        taken_in(folder)


@pytest.mark.parametrize("config, words", [
    (dict(struct="btt"), "python -m tools.project"), (dict(block_size=49), "block_size = 49 .* 48 positions"),
    (dict(n_layer=3), "n_layer = 2 there and 3 here"), (dict(bias=False), "bias = True there and False"),
    (dict(qk_norm=True), "qk_norm"), (dict(num_experts=4), "num_experts"), (dict(weight_norm=True), "weight"),
    (dict(n_embd=64, n_head=4), "n_embd = 32 there and 64 here, n_head = 2 there and 4 here")], ids=str)
def test_a_given_key_that_contradicts_the_weights(saved, config, words):
    with pytest.raises(ValueError, match=words):
        taken_in(saved()[0], **config)
    taken_in(saved()[0], n_layer=2, struct="dense", weight_norm=None, bias=True)  # as they are


def test_broken_weights_are_one_sentence(copied):
    from safetensors.torch import load_file, save_file
    folder = copied()
    path = folder / "model.safetensors"
    weights = load_file(path)
    name = "transformer.h.1.mlp.c_fc.weight"
    for changed, words in (
            ({k: w for k, w in weights.items() if k != name}, "lack h.1.mlp.c_fc.weight"),
            (weights | {"score.weight": torch.ones(2)}, "hold score.weight"),
            (weights | {name: weights[name].T.contiguous()}, "blocks.1.mlp.up.A does not have the shape"),
            (weights | {name: weights[name][0].clone()}, "h.1.mlp.c_fc.weight is a tensor"),
            (weights | {"transformer.wte.weight": torch.tensor(1.0)}, "wte.weight is a tensor of"),
            (weights | {name: weights[name].to(torch.int8)}, "int8")):
        save_file(changed, path)
        with pytest.raises(ValueError, match=words) as error:
            taken_in(folder)
        assert "\n" not in str(error.value)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="cannot be read"):
        taken_in(folder)
    path.unlink()
    with pytest.raises(ValueError, match="model.safetensors cannot be read"):
        taken_in(folder)
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match="there is no .*config.json"):
        taken_in(folder)

# ---- GPT-2 out ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("options", [{}, dict(tie_word_embeddings=False, vocab_size=1030),
                                     dict(activation_function="gelu", layer_norm_epsilon=0.1)], ids=str)
def test_in_and_out_is_the_same_model(saved, options):
    folder, theirs = saved(**options)
    config, state = gpt2.to_gpt2(taken_in(folder, options.get("vocab_size", 96)))
    assert state.keys() == theirs.state_dict().keys() - ({"lm_head.weight"} if "vocab_size" not in options
                                                         else set())
    assert all(torch.equal(w, theirs.state_dict()[name]) for name, w in state.items())
    for key, value in transformers.GPT2Config(**config).to_dict().items():
        if not key.endswith("_pdrop") and key not in ("dtype", "architectures"):
            assert value == theirs.config.to_dict()[key], key


@pytest.mark.parametrize("options", [{}, dict(bias=True, tie_embeddings=True, weight_norm=True, dropout=0.1)],
                         ids=str)
def test_a_dense_model_of_this_repository_is_a_gpt2(options):
    """With µP's scales in its weights, and zeros for the biases that it does not have."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=16, vocab_size=1030, n_layer=2, n_head=4, n_embd=32, qk_norm=False,
                          **options)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.3)
    config, state = gpt2.to_gpt2(model)
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(**config)).eval()
    missing = theirs.load_state_dict(state, strict=False)
    assert not missing.unexpected_keys
    assert missing.missing_keys == (["lm_head.weight"] if model.config.tie_embeddings else [])
    theirs.tie_weights()
    assert_same_logits(theirs, model, tokens(2, 16, vocab_size=1030))
    assert {config[f"{place}_pdrop"] for place in ("attn", "embd", "resid")} == {model.config.dropout}


@pytest.mark.parametrize("options", [dict(struct="btt"), dict(), dict(qk_norm=False, num_experts=4),
                                     dict(qk_norm=False, ffn_experts=4)], ids=str)
def test_what_is_no_gpt2_is_one_sentence(options):
    with pytest.raises(ValueError, match="this model has (struct|qk_norm|num_experts|ffn_experts) = "):
        gpt2.to_gpt2(GPT(GPTConfig(block_size=16, vocab_size=40, n_layer=1, n_head=4, n_embd=16, **options)))

# ---- Training ----------------------------------------------------------------------------------------------

@pytest.fixture
def finetune(run, python_text, tmp_path):
    """finetune(key=value ...) -> the finished process of a small run from config/finetune_gpt2.py."""
    def finetune(processes=1, environment=None, **settings):
        size = {key: SMALL[key] for key in ("batch_size", "gradient_accumulation_steps", "eval_iters", "seed",
                                            "eval_interval", "device", "sample_tokens")}
        settings = size | dict(dataset=python_text, out_dir=tmp_path / "out", learning_rate=1e-2) | settings
        return run("train.py", "config/finetune_gpt2.py", *(f"--{k}={v}" for k, v in settings.items()),
                   processes=processes, **environment or {})
    return finetune


def test_finetuning_learns_and_resumes(saved, finetune, run, tmp_path):
    """Without a size on the command line; a resumed run is bitwise the one that never stopped, and a run from
    its weights, or a sample, needs no size either."""
    out, halves = tmp_path / "whole", tmp_path / "halves"
    done = finetune(init_from=saved()[0], out_dir=out, dropout=0.1)
    assert done.returncode == 0, done.stderr
    train, val = losses(out)
    assert val[20] < val[0] - 1 and train[19] < train[0] - 1
    checkpoint = load(out / "ckpt.pt")
    assert checkpoint["config"]["mup"] is False and checkpoint["config"]["block_size"] == 48
    assert checkpoint["model_args"]["tie_embeddings"]

    assert finetune(init_from=saved()[0], out_dir=halves, dropout=0.1, max_iters=10).returncode == 0
    done = finetune(init_from="resume", out_dir=halves, dropout=0.1)
    assert done.returncode == 0, done.stderr
    assert_same_checkpoint(out, halves)
    done = finetune(init_from=out / "ckpt.pt", max_iters=0)
    assert done.returncode == 0 and losses(tmp_path / "out")[1][0] == pytest.approx(val[20], abs=1e-5)
    assert load(tmp_path / "out" / "ckpt.pt")["config"]["mup"] is False
    assert_one_sentence(finetune(init_from="resume", out_dir=halves, n_layer=12),
                        "n_layer = 2 there and 12 here")
    done = run("sample.py", f"--out_dir={out}", "--start=def ", "--max_new_tokens=9", "--device=cpu")
    assert done.returncode == 0 and len(done.stdout) == 4 + 9 + 1


def test_two_processes_start_from_the_same_weights(saved, copied, finetune, tmp_path):
    """And one of them says that the weights belong to other characters, though to as many."""
    (copied() / "vocab.json").write_text(json.dumps({"a": 0}))
    done = finetune(processes=2, init_from=tmp_path / "copied", max_iters=0)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("another vocabulary than the data: 'a' is 0 in ") == 1
    weights = load(tmp_path / "out" / "ckpt.pt")["model"]
    assert torch.equal(weights["wte.weight"], saved()[1].transformer.wte.weight)


def test_no_network_is_one_sentence(finetune, tmp_path):
    """And what is in out_dir stays as it was."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "ckpt.pt").write_text("precious")
    done = finetune(environment=dict(HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path / "hub")))
    assert_one_sentence(done, "gpt2 cannot be downloaded", "folder")
    assert os.listdir(tmp_path / "out") == ["ckpt.pt"]
    assert (tmp_path / "out" / "ckpt.pt").read_text() == "precious"
