"""tools/export.py: what transformers reads from the folder, against the model and the tokenizer."""
import ast
import dataclasses
import json
import os
import sys

import pytest
import torch

from data.tokenizer import CHARACTERS, CharTokenizer, FileTokenizer, TiktokenTokenizer
from lib.checkpoint import Progress
from model import GPT, GPTConfig
from tests.conftest import ROOT
from tests.structures import B_FIRST, THETAS
from tools import export

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported
transformers = pytest.importorskip("transformers")

SHAPE = dict(n_layer=2, n_head=2, n_embd=32, block_size=24, vocab_size=50)
CASES = {
    "dense": {},
    "dense, biases": dict(bias=True),
    "dense, weight_norm": dict(weight_norm=True, dropout=0.3),
    "dense, other scales": dict(gelu="tanh", norm_eps=0.1, branch_scale=0.7, attention_scale=0.3),
    "tied": dict(struct="btt", tie_embeddings=True, vocab_size=1030),
    "low_rank": dict(struct="low_rank"),
    "kronecker": dict(struct="kronecker", bias=True),
    "monarch": dict(struct="monarch"),
    "tt": dict(struct="tt", rank=3),
    "btt": dict(struct="btt", rank=2, bias=True, qk_norm=False),
    "btt without heads": dict(struct="btt", head_aligned=False, weight_norm=False),
    "einsum, B first": dict(struct="einsum", theta=B_FIRST, bias=True),
    "einsum, all seven": dict(struct="einsum", theta=THETAS[0]),
    "einsum, B alone": dict(struct="einsum", theta=(0, 1, 0, 0, 1, 0, 0), bias=True),
    "dyad it": dict(struct="dyad", dyad_variant="it", bias=True),
    "dyad ot": dict(struct="dyad", dyad_variant="ot"),
    "dyad dt": dict(struct="dyad", dyad_variant="dt"),
    "btt in attention": dict(struct="btt", layers="attn"),
    "btt in MLPs": dict(struct="btt", layers="mlp"),
    "btt_moe": dict(struct="btt", num_experts=4, bias=True),
    "btt_moe, one expert a token": dict(struct="btt", num_experts=4, top_k=1),
    "einsum_moe, B first": dict(struct="einsum", theta=B_FIRST, num_experts=4, top_k=3),
    "low_rank_moe": dict(struct="low_rank", num_experts=4, bias=True),
    "dense_moe": dict(num_experts=4, bias=True),
    "dyad_moe": dict(struct="dyad", num_experts=4, bias=True),
    "moe": dict(ffn_experts=4, bias=True),
    "moe, one expert a token": dict(ffn_experts=4, top_k=1),
    "moe of btt": dict(struct="btt", ffn_experts=4, bias=True),
}


@pytest.fixture(autouse=True, scope="module")
def modules(tmp_path_factory):
    """transformers keeps the code that it has loaded here, and not in the user's cache."""
    folder = str(tmp_path_factory.mktemp("modules"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", folder)
        patch.setattr(sys, "path", list(sys.path))
        yield


def make_model(seed=0, **settings):
    """A model none of whose parameters and buffers is what it is at the start."""
    torch.manual_seed(seed)
    gpt = GPT(GPTConfig(**SHAPE | settings)).eval()
    with torch.no_grad():
        for name, p in gpt.state_dict().items():
            if "gain" in name or "norm.weight" in name or "ln_" in name and name.endswith("weight"):
                p.uniform_(0.5, 1.5)
            else:
                p.normal_(std=0.2)
    return gpt


def save_checkpoint(path, gpt, tok=None, **more):
    """A checkpoint as train.py writes it."""
    described = {"name": "char", "characters": CHARACTERS[:gpt.config.vocab_size]}
    contents = dict(model=gpt.state_dict(), model_args=dataclasses.asdict(gpt.config), optimizer={},
                    scaler={}, config={}, tokenizer=tok.to_meta() if tok else described)
    contents |= dataclasses.asdict(Progress())
    torch.save(contents | more, path)
    return path


@pytest.fixture
def exported(tmp_path):
    """exported(gpt, ...) -> the transformers model of the folder tmp_path / "hf"."""
    def exported(gpt, tok=None, **more):
        export.export(str(save_checkpoint(tmp_path / "ckpt.pt", gpt, tok, **more)), str(tmp_path / "hf"))
        return transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", trust_remote_code=True)
    return exported


def random_ids(*shape):
    return torch.randint(SHAPE["vocab_size"], shape, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def all_logits(gpt, ids):
    return gpt(ids, ids)[0]


def greedy(model, ids, **options):
    return model.generate(ids, **dict(do_sample=False, max_new_tokens=12) | options)


@pytest.mark.parametrize("case", CASES)
def test_logits_and_greedy_texts_are_those_of_the_model(case, exported):
    gpt = make_model(**CASES[case])
    there = exported(gpt)
    assert type(there).__name__ == "StructuredGPTForCausalLM" and not there.training
    ids = random_ids(3, 24)
    with torch.no_grad():
        logits = there(ids).logits
    expected = all_logits(gpt, ids)
    assert logits.dtype == torch.float32 and logits.shape == expected.shape and expected.std() > 0.5
    assert (logits - expected).abs().max() <= 1e-5
    prompt = ids[:1, :8]
    text = greedy(there, prompt, max_new_tokens=6)
    assert torch.equal(text, gpt.generate(prompt, 6, temperature=0))
    assert torch.equal(text, greedy(there, prompt, max_new_tokens=6, use_cache=False))


@pytest.mark.parametrize("options", [{}, dict(num_beams=2), dict(use_cache=False)], ids=str)
def test_a_text_ends_where_the_positions_do(options, exported):
    """The defaults of a pipeline ask for more."""
    there, prompt, most = exported(make_model()), random_ids(2, 8), SHAPE["block_size"]
    text = greedy(there, prompt, max_new_tokens=1000, **options)
    assert torch.equal(text, greedy(there, prompt, max_new_tokens=most - 8, **options))
    assert text.shape == (2, most)


def test_routers_stay_in_float32_in_a_model_of_bfloat16(tmp_path):
    gpt = make_model(struct="btt", num_experts=4)
    export.export(str(save_checkpoint(tmp_path / "ckpt.pt", gpt)), str(tmp_path / "hf"))
    there = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", trust_remote_code=True,
                                                              dtype=torch.bfloat16)
    routers = {name: p for name, p in there.state_dict().items() if name.endswith((".router", ".balance"))}
    assert routers and {p.dtype for p in routers.values()} == {torch.float32}
    assert there.wte.weight.dtype == torch.bfloat16 and there(random_ids(1, 8)).logits.isfinite().all()


@pytest.mark.parametrize("settings", [dict(bias=True, weight_norm=True),
                                      dict(tie_embeddings=True, vocab_size=1030),
                                      dict(gelu="tanh", norm_eps=0.1, attention_scale=0.3, bias=True)])
def test_a_dense_model_without_qk_norm_is_a_plain_gpt2(settings, tmp_path):
    gpt = make_model(qk_norm=False, **settings)
    tok = CharTokenizer("".join(map(chr, range(32, 32 + gpt.config.vocab_size))))
    export.export(str(save_checkpoint(tmp_path / "ckpt.pt", gpt, tok)), str(tmp_path / "hf"))
    there = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert type(there) is transformers.GPT2LMHeadModel and not list((tmp_path / "hf").glob("*.py"))
    ids = random_ids(3, 24)
    with torch.no_grad():
        assert (there(ids).logits - all_logits(gpt, ids)).abs().max() <= 1e-5
    assert torch.equal(greedy(there, ids[:1, :8]), gpt.generate(ids[:1, :8], 12, temperature=0))
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert_same_ids(again, tok, ["A B  C", " @ABC! D?'A "])
    assert "trust_remote_code" not in (tmp_path / "hf" / "README.md").read_text()


def test_a_tied_output_layer_is_in_the_file_once(tmp_path, exported):
    from safetensors import safe_open
    there = exported(make_model(tie_embeddings=True))
    assert there.lm_head.weight is there.wte.weight
    with safe_open(tmp_path / "hf" / "model.safetensors", framework="pt") as file:
        assert len({"wte.weight", "lm_head.weight"} & set(file.keys())) == 1


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A small BTT-MoE, and what transformers reads of it. Read them, and do not change them."""
    folder = tmp_path_factory.mktemp("pair")
    gpt = make_model(**CASES["btt_moe"])
    export.export(str(save_checkpoint(folder / "ckpt.pt", gpt)), str(folder / "hf"))
    return gpt, transformers.AutoModelForCausalLM.from_pretrained(folder / "hf", trust_remote_code=True)


def padded(texts, length=8):
    """Texts of ids, (1, T) each, with padding in front, and their attention mask: (B, length) both."""
    ids, mask = torch.full((len(texts), length), 7), torch.zeros(len(texts), length, dtype=torch.long)
    for row, text in enumerate(texts):
        ids[row, length - text.shape[1]:], mask[row, length - text.shape[1]:] = text[0], 1
    return ids, mask


def test_padding_in_front_changes_nothing(pair):
    gpt, there = pair
    texts = [random_ids(1, n) for n in (3, 8, 5)]
    ids, mask = padded(texts)
    with torch.no_grad():
        logits = there(ids, attention_mask=mask).logits
    together = greedy(there, ids, attention_mask=mask, pad_token_id=7)
    for row, text in enumerate(texts):
        assert (logits[row, -text.shape[1]:] - all_logits(gpt, text)[0]).abs().max() <= 1e-5
        assert torch.equal(together[row, 8:], gpt.generate(text, 12, temperature=0)[0, text.shape[1]:])
    assert torch.equal(together, greedy(there, ids, attention_mask=mask, pad_token_id=7, use_cache=False))


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_beams_with_and_without_a_cache(pair, cache):
    _, there = pair
    ids, mask = padded([random_ids(1, n) for n in (4, 8)])
    options = dict(attention_mask=mask, num_beams=3, pad_token_id=7)
    with_cache = greedy(there, ids, cache_implementation=cache, **options)
    assert torch.equal(with_cache, greedy(there, ids, use_cache=False, **options))
    assert not torch.equal(with_cache, greedy(there, ids, attention_mask=mask, pad_token_id=7))


def test_generation_does_without_cudnns_attention(pair, monkeypatch):
    attention, allowed = torch.nn.functional.scaled_dot_product_attention, []

    def noted(*args, **options):
        allowed.append(torch.backends.cuda.cudnn_sdp_enabled())
        return attention(*args, **options)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", noted)
    greedy(pair[1], random_ids(1, 4))
    assert len(allowed) >= 8 and not any(allowed) and torch.backends.cuda.cudnn_sdp_enabled()


@pytest.mark.parametrize("static", [False, True])
def test_a_text_that_is_read_in_pieces(static, pair):
    """Several tokens after those in a cache, which may have room for more."""
    gpt, there = pair
    ids = random_ids(2, 20)
    cache = transformers.StaticCache(there.config, max_cache_len=24) if static else None
    with torch.no_grad():
        first = there(ids[:, :9], use_cache=True, cache=cache)
        rest = there(ids[:, 9:], cache=first.cache).logits
    assert (rest - all_logits(gpt, ids)[:, 9:]).abs().max() <= 1e-5


def test_more_than_block_size_tokens_are_refused(pair):
    _, there = pair
    with pytest.raises(ValueError, match="25 tokens.* 24"):
        there(random_ids(1, 25))
    with pytest.raises(ValueError, match="25 tokens.* 24"):
        greedy(there, random_ids(1, 25))


def test_hidden_states_are_given_and_attention_weights_refused(pair):
    gpt, there = pair
    ids = random_ids(1, 8)
    seen = []
    hook = gpt.blocks[0].register_forward_hook(lambda _, inputs, output: seen.extend([inputs[0], output]))
    all_logits(gpt, ids)
    hook.remove()
    with torch.no_grad():
        output = there(ids, output_hidden_states=True)
    states = output.hidden_states
    assert len(states) == 3 and all(torch.allclose(a, b, atol=1e-5) for a, b in zip(states, seen))
    assert torch.allclose(there.lm_head(states[-1]), output.logits, atol=1e-5)
    with pytest.raises(ValueError, match="output_attentions"):
        there(ids, output_attentions=True)
    with torch.no_grad():
        assert there(ids).hidden_states is None
        for key, value in (("output_hidden_states", True), ("return_dict", False)):
            before = getattr(there.config, key)
            setattr(there.config, key, value)   # what a call does not say, the config says
            output = there(ids)
            setattr(there.config, key, before)
            assert isinstance(output, tuple) if key == "return_dict" else len(output.hidden_states) == 3


def test_a_mask_of_the_new_tokens_alone_is_refused(pair):
    """Their positions would begin at 0 again."""
    _, there = pair
    with torch.no_grad():
        cache = there(random_ids(1, 10), use_cache=True).cache
        with pytest.raises(ValueError, match="attention_mask is of 1 tokens, and there are 11"):
            there(random_ids(1, 1), cache=cache, attention_mask=torch.ones(1, 1, dtype=torch.long))


def test_gradient_checkpointing_leaves_the_cache_out(exported):
    """With it, the second forward of each block would read keys that have no gradient."""
    gpt = make_model(**CASES["btt"] | dict(weight_norm=False))
    there, ids, gradients = exported(gpt).train(), random_ids(2, 12), []
    for checkpointing in (False, True):
        if checkpointing:
            there.gradient_checkpointing_enable(dict(use_reentrant=True))
            there.enable_input_require_grads()
        there.zero_grad()
        there(ids, labels=ids, use_cache=True).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in there.named_parameters()})
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("case, checkpointing", [("dense", False), ("btt", True), ("btt_moe", False)])
def test_loss_and_gradients(case, checkpointing, exported):
    """Those of the model, where no weight normalization is folded in; then a step lowers the loss."""
    gpt = make_model(**CASES[case] | dict(weight_norm=False))
    there = exported(gpt).train()
    if checkpointing:
        there.gradient_checkpointing_enable()
    runs = []
    there.blocks[0].ln_1.register_forward_hook(lambda *args: runs.append(args))
    ids = random_ids(2, 20)
    labels = ids.clone()
    labels[0, :5] = -100
    loss = there(ids, labels=labels).loss
    loss.backward()
    assert len(runs) == 1 + checkpointing
    targets = labels[:, 1:].masked_fill(labels[:, 1:] == -100, -1)
    expected = gpt(ids[:, :-1], targets)[1]
    expected.backward()
    assert abs(loss - expected) <= 1e-5
    gradients = {name: p.grad for name, p in gpt.named_parameters()}
    q = gradients["blocks.0.attn.q.A"][0] if case == "dense" else None
    for name, p in there.named_parameters():
        ours = q if name == "blocks.0.attn.q.weight" else gradients.get(name)
        if ours is not None and name != "lm_head.weight":
            assert torch.allclose(p.grad, ours, atol=1e-5), name
    torch.optim.SGD(there.parameters(), lr=0.01).step()
    assert there(ids, labels=labels).loss < loss


def test_the_folder(tmp_path, exported, capsys):
    """Its files; what the card says; and it lies where --out says, from the ckpt.pt of an out_dir."""
    gpt = make_model(**CASES["btt_moe"])
    more = dict(iteration=324, tokens=1234567, flops=8.9e12, val_loss=1.4321, best_val_loss=1.25,
                config={"dataset": "my-books"})
    exported(gpt, **more)
    export.main([f"--ckpt={tmp_path}", f"--out={tmp_path / 'deep' / 'again'}"])
    assert "ckpt.pt" in capsys.readouterr().out
    names = {"config.json", "generation_config.json", "model.safetensors", "modeling_structured_gpt.py",
             "README.md", "tokenizer.json", "tokenizer_config.json"}
    for folder in (tmp_path / "hf", tmp_path / "deep" / "again"):
        assert {path.name for path in folder.iterdir()} == names
        assert folder.stat().st_mode == tmp_path.joinpath("deep").stat().st_mode
    assert {path.name for path in tmp_path.iterdir()} == {"ckpt.pt", "hf", "deep"}
    card = (tmp_path / "hf" / "README.md").read_text()
    count = sum(p.numel() for p in gpt.parameters())
    for words in ("my-books", "324 iterations", "1,234,567 tokens", "8.9e+12 FLOPs", "1.4321", "1.2500",
                  f"{count:,}", "btt, 4 experts",
                  'AutoTokenizer.from_pretrained("hf", trust_remote_code=True)',
                  'AutoModelForCausalLM.from_pretrained("hf", trust_remote_code=True)', "24 tokens"):
        assert words in card, words
    assert "\nlicense:" not in card
    # its own lines run, within the 24 tokens
    snippet = card.split("```python\n")[1].split("```")[0].replace('"hf"', repr(str(tmp_path / "hf")))
    exec(snippet, {})
    assert capsys.readouterr().out.strip()


def test_a_card_of_a_checkpoint_that_knows_nothing(tmp_path, exported):
    gpt = make_model()
    exported(gpt, iteration=None, tokens=None, flops=None)
    card = (tmp_path / "hf" / "README.md").read_text()
    assert "None" not in card and "inf" not in card and "validation loss" not in card


def test_the_modeling_file_stands_alone(tmp_path, exported):
    exported(make_model())
    text = (tmp_path / "hf" / "modeling_structured_gpt.py").read_text()
    assert text == (ROOT / "tools" / "modeling_structured_gpt.py").read_text()
    imported = {name.name for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Import)
                for name in node.names}
    imported |= {node.module for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ImportFrom)}
    assert {name.split(".")[0] for name in imported} == {"contextlib", "torch", "transformers"}


def test_a_tuned_model_is_saved_and_read_again(tmp_path, exported):
    there = exported(make_model(**CASES["btt"]))
    there.save_pretrained(tmp_path / "tuned")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "tuned", trust_remote_code=True)
    ids = random_ids(1, 8)
    assert torch.equal(there(ids).logits, again(ids).logits)


# ---- Tokenizers --------------------------------------------------------------------------------------------

TEXTS = ["", " ", "\n", "  two  spaces \n\n\n and\n  lines \t\n", "It's 12345678901, WE'LL see: 3.14159",
         "naïve café 漢字かな 🙂🏴‍☠️ Ελλάς", "x=[1,2];\r\n\r\nif(a&&b)  {return;}   ", "<|endoftext|>a <|end",
         "\n \n a\n"]


@pytest.fixture
def read_tokenizer(tmp_path):
    def read_tokenizer(tok):
        export.write_tokenizer(str(tmp_path), tok, 24)
        return transformers.AutoTokenizer.from_pretrained(tmp_path)
    return read_tokenizer


def assert_same_ids(there, tok, texts):
    for text in texts:
        ids = list(tok.encode(text))
        assert there(text).input_ids == ids, text
        assert there.decode(ids) == tok.decode(ids), text


@pytest.mark.parametrize("options", [{}, dict(unknown="?"), dict(normalization="NFC")])
def test_characters(options, read_tokenizer):
    tok = CharTokenizer(CHARACTERS + "é漢\t\r", **options)
    there = read_tokenizer(tok)
    assert_same_ids(there, tok, ["", " ", "  a b \n\n c\n", CHARACTERS, "A\tcafé  .\r\n", " ,.!?'s n't ##a"])
    assert there(" ,.!?'s n't").input_ids == [CHARACTERS.index(c) for c in " ,.!?'s n't"]
    assert there.model_max_length == 24 and there.padding_side == "left"
    if options.get("unknown"):
        assert_same_ids(there, tok, ["a字b\U0001f642"])
    elif options:
        assert_same_ids(there, tok, ["cafe\u0301"])
    else:
        with pytest.raises(Exception, match="(?i)unk|vocabulary"):
            there("字")


@pytest.mark.parametrize("model_type", ["structured_gpt", "gpt2"])
def test_gpt2s_vocabulary(model_type, tiktoken_cache, read_tokenizer, tmp_path):
    tok = TiktokenTokenizer()
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    there = read_tokenizer(tok)
    assert there("Hello world<|endoftext|>").input_ids == [15496, 995, 50256]
    assert there.eos_token_id == there.pad_token_id == 50256 and len(there) == 50257
    source = (ROOT / "structured.py").read_text(encoding="utf-8")
    assert_same_ids(there, tok, [*TEXTS, source])
    generation = json.loads((tmp_path / "generation_config.json").read_text())
    assert generation["eos_token_id"] == generation["pad_token_id"] == 50256


@pytest.mark.parametrize("name", ["cl100k_base", "o200k_base"])
def test_other_encodings_of_tiktoken(name, tiktoken_cache, monkeypatch):
    """Their patterns and special tokens, with few byte pairs: 256 bytes, and the first 3,000 of GPT-2's."""
    import tiktoken
    from tiktoken_ext import openai_public
    ranks = dict(list(tiktoken.get_encoding("gpt2")._mergeable_ranks.items())[:3256])
    ranks[b" zqxj"] = 3256  # no two tokens make it: the text alone is this token
    monkeypatch.setattr(openai_public, "load_tiktoken_bpe", lambda *args, **kwargs: ranks)
    settings = openai_public.ENCODING_CONSTRUCTORS[name]()
    settings.pop("explicit_n_vocab", None)
    bpe = tiktoken.Encoding(**settings)
    fast = export.byte_pair_tokenizer(bpe)
    for text in [*TEXTS, "a zqxj zqxjz"]:
        ids = bpe.encode(text, allowed_special={"<|endoftext|>"}, disallowed_special=())
        assert fast.encode(text).ids == ids, text
        assert fast.decode(ids, skip_special_tokens=False) == text
    assert fast.token_to_id("<|endofprompt|>") == settings["special_tokens"]["<|endofprompt|>"]


def test_a_file_of_the_library_tokenizers(read_tokenizer, tmp_path):
    """Without what the file says of truncation, padding and tokens around a text: the model saw none."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    library = Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    library.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=400, special_tokens=["<s>", "</s>"],
                                                           initial_alphabet=alphabet, show_progress=False))
    library.post_processor = processors.TemplateProcessing(
        "<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)])
    library.enable_truncation(3)
    library.enable_padding(length=9)
    tok = FileTokenizer(library.to_str())
    there = read_tokenizer(tok)
    written = json.loads((tmp_path / "tokenizer.json").read_text())
    assert written["truncation"] is written["padding"] is None
    assert there.eos_token == "</s>" and there.eos_token_id == tok.end_of_text == 1
    assert_same_ids(there, tok, [*TEXTS, "a</s>b"])
    by_name = FileTokenizer(library.to_str(), "e")  # a token that is not special must not become so
    assert_same_ids(read_tokenizer(by_name), by_name, ["e the free tree"])


# ---- Mistakes ----------------------------------------------------------------------------------------------

@pytest.fixture
def refused(tmp_path, capsys):
    """refused("--out=...") -> the one sentence on stderr."""
    def refused(*arguments):
        with pytest.raises(SystemExit) as ended:
            export.main([f"--ckpt={tmp_path / 'ckpt.pt'}", *arguments])
        assert ended.value.code == 1
        out, err = capsys.readouterr()
        assert out == "" and err.startswith("error: ") and err.count("\n") == 1
        return err
    return refused


def test_folders_that_are_refused(tmp_path, refused):
    save_checkpoint(tmp_path / "ckpt.pt", make_model())
    assert "--out=FOLDER" in refused()
    full = tmp_path / "full"
    full.mkdir()
    (full / "notes.txt").write_text("mine")
    assert "is not empty" in refused(f"--out={full}")
    assert [path.name for path in full.iterdir()] == ["notes.txt"]
    assert "is a file" in refused(f"--out={full / 'notes.txt'}")
    assert (full / "notes.txt").read_text() == "mine"


def test_an_empty_folder_is_taken(tmp_path):
    save_checkpoint(tmp_path / "ckpt.pt", make_model())
    (tmp_path / "empty").mkdir()
    export.main([f"--ckpt={tmp_path}", f"--out={tmp_path / 'empty'}"])
    assert (tmp_path / "empty" / "model.safetensors").exists()


def test_checkpoints_that_are_refused(tmp_path, refused):
    out = f"--out={tmp_path / 'hf'}"
    assert "there is no checkpoint" in refused(out)
    (tmp_path / "ckpt.pt").write_bytes(b"no checkpoint")
    assert "is not a checkpoint" in refused(out)
    save_checkpoint(tmp_path / "ckpt.pt", make_model(), tokenizer={"name": "klingon"})
    assert "klingon" in refused(out)
    assert not (tmp_path / "hf").exists()


def test_a_failure_leaves_nothing(tmp_path, refused, monkeypatch):
    save_checkpoint(tmp_path / "ckpt.pt", make_model())

    def fail(*args):
        raise OSError("no space left on device")
    monkeypatch.setattr(export, "model_card", fail)
    assert "no space left" in refused(f"--out={tmp_path / 'hf'}")
    assert [path.name for path in tmp_path.iterdir()] == ["ckpt.pt"]


def test_without_transformers(tmp_path, refused, monkeypatch):
    save_checkpoint(tmp_path / "ckpt.pt", make_model())
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert "requirements-transformers.txt" in refused(f"--out={tmp_path / 'hf'}")
    assert not (tmp_path / "hf").exists()


@pytest.mark.parametrize("characters, unknown, prompt", [
    ("\n Thes", None, "The"), ("\n αβ", None, "α"), ("\n αβ\ufffd", "\ufffd", "α")])
def test_the_model_card_has_a_prompt_of_the_alphabet(characters, unknown, prompt):
    assert export.example_prompt(CharTokenizer(characters, unknown)) == prompt


@pytest.mark.parametrize("model, tokens, prompt", [
    ("WordLevel", ["</s>", "1", "κόσμε"], "κόσμε"), ("WordLevel", ["</s>", "1", "-"], "</s>"),
    ("BPE", ["</s>", "1", "α"], "α"), ("WordPiece", ["[UNK]", "</s>", "##a", "no"], "no"),
    ("BPE", ["</s>", "T", "h", "e"], "The")])
def test_the_model_card_has_a_prompt_that_the_file_has_ids_for(model, tokens, prompt):
    from tokenizers import Tokenizer, models, pre_tokenizers
    options = dict(merges=[]) if model == "BPE" else dict(unk_token="[UNK]")
    made = Tokenizer(getattr(models, model)({token: i for i, token in enumerate(tokens)}, **options))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.add_special_tokens(["</s>"])
    assert export.example_prompt(FileTokenizer(made.to_str())) == prompt


def test_dropout_is_exported():
    assert export.model_config(make_model(struct="btt", dropout=0.3))["dropout"] == 0.3
