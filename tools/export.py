"""A checkpoint as a folder for Hugging Face transformers.

    python -m tools.export --ckpt=out-btt_moe --out=btt-moe-hf

The folder holds model.safetensors, config.json, generation_config.json, the tokenizer's files, a model card
and, unless the model is a plain GPT-2, modeling_structured_gpt.py, the code of the model. docs/export.md says
how to load it. Config files and --key=value override the keys below; --help lists them.
"""
import itertools
import math
import os
import re
import shutil
from collections.abc import Iterator

from configurator import configure, fail
from lib.terminal import prepare_output

# what to export, and where to
ckpt: str = "out"                       # a run's out_dir (its ckpt.pt), or a checkpoint file
out: str | None = None                  # the folder to make: a new one, or an empty one

import torch
from torch import Tensor

import structured
from data import tokenizer
from lib import gpt2
from lib.files import fsync_folder
from model import GPT, GPTConfig, load_checkpoint

MODELING_FILE = "modeling_structured_gpt.py"


def main(argv: list[str] | None = None) -> None:
    prepare_output()
    config = configure(globals(), argv)
    try:
        path = export(config["ckpt"], config["out"])
    except (ValueError, OSError) as e:
        fail(str(e))
    print(f"wrote {config['out']}, from {path}; its README.md says how to load it")


def export(source: str, folder: str | None) -> str:
    """Writes the folder, whole or not at all, from a run's out_dir or a checkpoint, whose path it returns.

    Raises ValueError or OSError, in one sentence, where one of them is unusable or a package is missing.
    """
    check_folder(folder)
    path, checkpoint, model = load_checkpoint(source)
    tok = tokenizer.from_meta(checkpoint)
    folder = os.path.realpath(folder)
    work = f"{folder}.{os.getpid()}.tmp"
    os.makedirs(work)
    try:
        write_model(work, model)
        write_tokenizer(work, tok, model.config.block_size)
        card = model_card(os.path.basename(folder), model, tok, checkpoint)
        with open(os.path.join(work, "README.md"), "w", encoding="utf-8") as f:
            f.write(card)
        for name in os.listdir(work):
            with open(os.path.join(work, name), "rb+") as f:
                os.fsync(f.fileno())
        fsync_folder(work)
        if os.path.isdir(folder):
            os.rmdir(folder)  # it is empty: Windows renames onto no folder
        os.rename(work, folder)
        fsync_folder(os.path.dirname(folder))
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return path


def check_folder(folder: str | None) -> None:
    if not folder:
        raise ValueError("say which folder to make: --out=FOLDER")
    if os.path.exists(folder) and not os.path.isdir(folder):
        raise ValueError(f"--out={folder} is a file: name a folder that does not exist, or is empty")
    if os.path.isdir(folder) and os.listdir(folder):
        raise ValueError(f"the folder {folder} is not empty: remove it, or give another --out")


def import_transformers():
    """The package, without its progress bars. Raises ValueError if it is not installed."""
    try:
        import transformers
    except ImportError as e:
        raise ValueError(f"the export needs {e.name}: pip install -r requirements-transformers.txt") from None
    transformers.utils.logging.disable_progress_bar()
    return transformers


# ---- Model -------------------------------------------------------------------------------------------------


def write_model(folder: str, model: GPT) -> None:
    """Writes model.safetensors, config.json and, unless the model is a GPT-2, its code."""
    transformers = import_transformers()
    from safetensors import SafetensorError

    if not gpt2.differences(model.config):
        config, weights = gpt2.to_gpt2(model)
        weights.setdefault("lm_head.weight", weights["transformer.wte.weight"])  # tied
        config = transformers.GPT2Config(**config)
        make = transformers.GPT2LMHeadModel
    else:
        from tools.modeling_structured_gpt import StructuredGPTConfig, StructuredGPTForCausalLM
        config, weights = StructuredGPTConfig(**model_config(model)), exported_weights(model)
        config.auto_map = {"AutoConfig": f"{MODELING_FILE[:-3]}.StructuredGPTConfig",
                           "AutoModelForCausalLM": f"{MODELING_FILE[:-3]}.StructuredGPTForCausalLM"}
        make = StructuredGPTForCausalLM
        code = os.path.join(os.path.dirname(__file__), MODELING_FILE)
        shutil.copyfile(code, os.path.join(folder, MODELING_FILE))
    with torch.device("meta"):
        exported = make(config)
    exported.load_state_dict(weights, assign=True)
    exported.tie_weights()
    try:
        exported.save_pretrained(folder)
    except SafetensorError as e:
        raise OSError(f"the weights could not be written: {e}") from None


def model_config(model: GPT) -> dict:
    """The arguments of StructuredGPTConfig."""
    config, block = model.config, model.blocks[0]
    mlp = block.mlp.experts if config.ffn_experts else block.mlp
    layers = dict(q=block.attn.q, k=block.attn.k, v=block.attn.v, o=block.attn.o, up=mlp.up, down=mlp.down)
    return dict(
        vocab_size=config.vocab_size, block_size=config.block_size, n_layer=config.n_layer,
        n_head=config.n_head, n_embd=config.n_embd, dropout=config.dropout, qk_norm=config.qk_norm,
        norm_bias=config.bias, norm_eps=config.norm_eps, gelu=config.gelu,
        attention_scale=config.attention_scale, branch_scale=config.branch_scale,
        tie_word_embeddings=config.tie_embeddings, ffn_experts=config.ffn_experts,
        ffn_top_k=config.top_k if config.ffn_experts else 0,
        projections={name: describe(layer) for name, layer in layers.items()})


def describe(layer: torch.nn.Module) -> dict:
    """A projection as config.json has it. Raises ValueError for a class that the modeling file lacks."""
    if isinstance(layer, structured.MoE):
        return describe(layer.experts) | dict(num_experts=layer.num_experts, top_k=layer.top_k)
    bias = layer.bias is not None
    if is_dense(layer):
        return dict(struct="dense", d_in=layer.d_in, d_out=layer.d_out, bias=bias)
    if isinstance(layer, structured.Einsum):
        return dict(struct="einsum", sizes=list(layer.sizes), cores=list(layer.order), bias=bias)
    if isinstance(layer, structured.Dyad):
        return dict(struct="dyad", d_in=layer.d_in, d_out=layer.d_out, blocks=layer.blocks,
                    variant=layer.variant, bias=bias)
    raise ValueError(f"tools/{MODELING_FILE} has no {type(layer).__name__}: add it there, and to describe() "
                     "of tools/export.py")


def is_dense(layer: torch.nn.Module) -> bool:
    """Whether a layer is one whole matrix, an nn.Linear of the modeling file."""
    return isinstance(layer, structured.Einsum) and len(layer.order) == 1 and not layer.num_experts


@torch.no_grad()
def exported_weights(model: GPT) -> dict[str, Tensor]:
    """{name in the modeling file: tensor}: cores as they act, weight normalization and gains folded in."""
    weights = {name: w for name, w in model.state_dict().items() if ".gain_" not in name}
    for prefix, layer in model.named_modules():
        if isinstance(layer, structured.Structured):
            for name in layer.fans():
                weights[f"{prefix}.{name}"] = layer.core(name)
            if is_dense(layer):
                weights[f"{prefix}.weight"] = weights.pop(f"{prefix}.{layer.order[0]}")[0]
    if model.config.tie_embeddings:
        weights["lm_head.weight"] = weights["wte.weight"]
    for name in ("wte.weight", "lm_head.weight"):
        weights[name] = weights[name][:model.config.vocab_size]  # without padding
    return {name: w.contiguous().clone() for name, w in weights.items()}


# ---- Tokenizer ---------------------------------------------------------------------------------------------


def write_tokenizer(folder: str, tok: tokenizer.Tokenizer, block_size: int) -> None:
    """Writes tokenizer.json, tokenizer_config.json and generation_config.json, with the ids of `tok`."""
    transformers = import_transformers()
    fast = convert_tokenizer(tok)
    special = fast.get_added_tokens_decoder()
    names = {}
    if tok.end_of_text in special:  # else a name would become a special token, and change the ids of texts
        names = dict.fromkeys(("bos_token", "eos_token", "pad_token"), special[tok.end_of_text].content)
    whole = transformers.PreTrainedTokenizerFast(
        tokenizer_object=fast, model_max_length=block_size, padding_side="left",
        clean_up_tokenization_spaces=False, **names)
    try:
        whole.save_pretrained(folder)
    except Exception as e:  # the library tokenizers has no class of its own for a full disk
        if type(e) is not Exception:
            raise
        raise OSError(f"the tokenizer could not be written: {e}") from None
    transformers.GenerationConfig(bos_token_id=tok.start, eos_token_id=tok.end_of_text,
                                  pad_token_id=tok.end_of_text).save_pretrained(folder)


def convert_tokenizer(tok: tokenizer.Tokenizer):
    """The tokenizers.Tokenizer that gives tok.encode's ids."""
    import tokenizers

    if isinstance(tok, tokenizer.CharTokenizer):
        return character_tokenizer(tok)
    if isinstance(tok, tokenizer.TiktokenTokenizer):
        return byte_pair_tokenizer(tok.bpe)
    fast = tokenizers.Tokenizer.from_str(tok.text)
    fast.no_truncation()
    fast.no_padding()
    if fast.num_special_tokens_to_add(is_pair=False):  # the model has not seen them
        fast.post_processor = None
    return fast


def character_tokenizer(tok: tokenizer.CharTokenizer):
    """One token per character. A character that has none is an error, or the unknown mark."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    # the library wants a name for unknown tokens: one longer than a character is none of the vocabulary
    fast = Tokenizer(models.WordLevel(tok.ids, unk_token=tok.unknown or "unknown"))
    if tok.normalization:
        fast.normalizer = getattr(normalizers, tok.normalization)()
    fast.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    fast.decoder = decoders.Fuse()
    return fast


def byte_pair_tokenizer(bpe):
    """A tiktoken.Encoding: it joins the two neighbours whose bytes together have the lowest rank."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    ranks, letters = bpe._mergeable_ranks, bytes_to_unicode()

    def spell(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    merges = [(spell(token[:i]), spell(token[i:])) for token in sorted(ranks, key=ranks.get)
              for i in range(1, len(token)) if token[:i] in ranks and token[i:] in ranks]
    vocabulary = {spell(token): rank for token, rank in ranks.items()} | bpe._special_tokens
    fast = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=True))
    # {1,3}+ is possessive for tiktoken, and a repetition of a repetition in this library
    pattern = re.sub(r"(\{\d*,?\d*\})\+", r"\1", bpe._pat_str)
    fast.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(pattern), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    fast.decoder = decoders.ByteLevel()
    fast.add_special_tokens([AddedToken("<|endoftext|>", normalized=False)])  # as in prompts of sample.py
    return fast


# ---- Model card --------------------------------------------------------------------------------------------

CARD = """\
---
library_name: transformers
pipeline_tag: text-generation
tags: [structured-matrices, {struct}]
---
# {name}

A language model: a transformer in the manner of GPT-2 whose projections are structured matrices, trained with
structured-gpt. No license is stated here: whoever publishes this folder chooses it.

| | |
|---|---|
{rows}

The projections of a block:

```
{projections}
```

## How to load it

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}"{trust})
model = AutoModelForCausalLM.from_pretrained("{name}"{trust})
prompt = tokenizer({prompt!r}, return_tensors="pt")
print(tokenizer.decode(model.generate(**prompt, max_new_tokens={new}, do_sample=True)[0]))
```

A prompt and what follows it may have {block_size} tokens together.{more}
"""
REMOTE_CODE = f"""The code of the model is {MODELING_FILE}, which
`trust_remote_code=True` allows to run: read it first."""


def model_card(name: str, model: GPT, tok: tokenizer.Tokenizer, checkpoint: dict) -> str:
    """README.md: what the checkpoint knows of the model and its training, and how to load the folder."""
    config, settings = model.config, checkpoint.get("config", {})
    known = {key: checkpoint[key] for key in ("iteration", "tokens", "flops", "val_loss", "best_val_loss")
             if isinstance(checkpoint.get(key), (int, float)) and math.isfinite(checkpoint[key])}
    experts = config.num_experts or config.ffn_experts
    rows = {
        "structure": describe_structure(config),
        "parameters": f"{model.num_params():,}"
                      + (f", of which a token uses {model.num_params(active=True):,}" if experts else ""),
        "shape": f"{config.n_layer} layers, {config.n_head} heads, width {config.n_embd}, "
                 f"{config.block_size} tokens of context",
        "vocabulary": f"{config.vocab_size:,}, {tok.to_meta()['name']}",
        "forward FLOPs per token": f"{model.flops_per_token():,}",
        "trained on": settings.get("dataset"),
        "training": ", ".join(
            [f"{known[key]:{form}} {unit}" for key, form, unit in (
                ("iteration", ",", "iterations"), ("tokens", ",", "tokens"), ("flops", ".3g", "FLOPs"))
             if key in known]),
        "validation loss": f"{known['val_loss']:.4f} nats per token" if "val_loss" in known else None,
        "best validation loss of the run":
            f"{known['best_val_loss']:.4f} nats per token" if "best_val_loss" in known else None,
    }
    prompt, own_code = example_prompt(tok), bool(gpt2.differences(config))
    return CARD.format(
        name=name, struct=config.struct, rows="\n".join(f"| {k} | {v} |" for k, v in rows.items() if v),
        projections="\n".join(model.describe()), prompt=prompt, block_size=config.block_size,
        new=max(1, min(100, config.block_size - len(tok.encode(prompt)))),
        trust=", trust_remote_code=True" if own_code else "", more=" " + REMOTE_CODE if own_code else "")


def example_prompt(tok: tokenizer.Tokenizer) -> str:
    """'The', or the text of a token where the vocabulary lacks this word: the first that is of letters, or
    the first of all."""
    def is_known(text: str) -> bool:
        try:
            return bool(ids := tok.encode(text)) and tok.unknown_id not in ids
        except ValueError:
            return False

    def tokens() -> Iterator[str]:
        return (tok.decode([i]) for i in range(tok.vocab_size))
    return next(filter(is_known, itertools.chain(["The"], filter(str.isalpha, tokens()), tokens())), "The")


def describe_structure(config: GPTConfig) -> str:
    """Such as: btt, 8 experts in every such projection, 2 per token."""
    text = config.struct if config.theta is None else f"{config.struct} of θ = {config.theta}"
    if config.layers != "all":
        text += f" in {config.layers}, dense elsewhere"
    if config.num_experts:
        text += f", {config.num_experts} experts in every such projection, {config.top_k} per token"
    if config.ffn_experts:
        text += f", {config.ffn_experts} experts that are MLPs, {config.top_k} per token"
    return text


if __name__ == "__main__":
    main()
