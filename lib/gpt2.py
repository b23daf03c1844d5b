"""Hugging Face's GPT-2 and this model: their names, shapes and settings, in both directions.

There a Conv1D keeps its matrix as (d_in, d_out), and one Conv1D makes q, k and v; here every projection has a
matrix of its own, (1, d_out, d_in). Errors that a user can fix are ValueError, with one sentence.
"""
import contextlib
import json
import math
import os

import torch
import torch.nn.functional as F
from torch import Tensor

from lib import distributed
from lib.checkpoint import adopt_settings
from lib.commands import GPT2_NAMES, INIT_FROM
from lib.distributed import on_all_ranks
from lib.log import print0

INSTALL = "pip install -r requirements-transformers.txt"

# ---- The two tables ----------------------------------------------------------------------------------------

# a module of a block there: those of a block here, whose outputs it has side by side
MODULES = {"ln_1": ("ln_1",), "attn.c_attn": ("attn.q", "attn.k", "attn.v"), "attn.c_proj": ("attn.o",),
           "ln_2": ("ln_2",), "mlp.c_fc": ("mlp.up",), "mlp.c_proj": ("mlp.down",)}

# a key of config.json: the field of GPTConfig, and what a file without the key means
FIELDS = {"vocab_size": ("vocab_size", 50257), "n_positions": ("block_size", 1024),
          "n_layer": ("n_layer", 12), "n_head": ("n_head", 12), "n_embd": ("n_embd", 768),
          "layer_norm_epsilon": ("norm_eps", 1e-5), "tie_word_embeddings": ("tie_embeddings", True)}
# activation_function: the field gelu; of the names of one function, the last is written
GELUS = {"gelu_pytorch_tanh": "tanh", "gelu_fast": "tanh", "gelu_new": "tanh", "gelu": "exact"}
# some of the vocabulary that data calls gpt2
GPT2_TOKENS = {"!": 0, "Ġthe": 262, "<|endoftext|>": 50256}
# what else makes this model a GPT-2
FIXED = dict(struct="dense", bias=True, qk_norm=False, num_experts=0, ffn_experts=0, weight_norm=False,
             head_aligned=False, branch_scale=1.0)
# keys of config.json that have no field here, with the one value that this model has
ONLY = dict(model_type="gpt2", scale_attn_by_inverse_layer_idx=False, reorder_and_upcast_attn=False,
            add_cross_attention=False, pruned_heads={}, quantization_config=None)


def parameters(n_layer: int, tied: bool) -> dict[str, list[str]]:
    """{a parameter there: the parameters here that it has side by side}, of a whole model."""
    names = {name: [name] for name in ("wte.weight", "wpe.weight", "ln_f.weight", "ln_f.bias")}
    if not tied:
        names["lm_head.weight"] = ["lm_head.A"]
    for i in range(n_layer):
        for theirs, ours in MODULES.items():
            matrix = "weight" if theirs.startswith("ln") else "A"
            names[f"h.{i}.{theirs}.weight"] = [f"blocks.{i}.{module}.{matrix}" for module in ours]
            names[f"h.{i}.{theirs}.bias"] = [f"blocks.{i}.{module}.bias" for module in ours]
    return names


def is_transposed(name: str) -> bool:
    """Whether a parameter there is the matrix of a Conv1D, (d_in, d_out)."""
    return ".c_" in name and name.endswith(".weight")

# ---- GPT-2 in ----------------------------------------------------------------------------------------------

def find(init_from: str) -> str | None:
    """The folder of the GPT-2 that init_from names, downloaded if necessary; None if it names none. A folder
    with a config.json takes precedence over the hub's GPT-2 of its name.

    Raises ValueError where it cannot be downloaded.
    """
    if init_from not in GPT2_NAMES or os.path.isfile(os.path.join(init_from, "config.json")):
        return init_from if init_from not in INIT_FROM and os.path.isdir(init_from) else None
    try:
        import huggingface_hub
        return huggingface_hub.snapshot_download(f"openai-community/{init_from}", allow_patterns=[
            "config.json", "model.safetensors", "model.safetensors.index.json", "model-*.safetensors"])
    except ImportError:
        raise ValueError(f"{init_from} is downloaded by huggingface_hub: {INSTALL}") from None
    except Exception as e:  # the hub's errors share no base class
        raise ValueError(f"{init_from} cannot be downloaded from Hugging Face ({type(e).__name__}): go "
                         "online once, or give --init_from a folder with its config.json and "
                         "model.safetensors") from None


def start_settings(folder: str, config: dict, given: set[str]) -> dict:
    """The settings of a run that starts from the GPT-2 in `folder`: fields of GPTConfig, and mup. Those that
    the user has given are left out; they must not contradict it.

    config: the run's keys; given: the names of those that the user has set. A block_size that is less than
    the number of positions crops them. mup is off: these weights were not trained with its scales, and
    learning_rate is what AdamW takes for each of them. Raises ValueError for a contradiction, and for a
    config.json that is invalid or asks for what this model does not have.
    """
    there = read_settings(folder)
    if "struct" in given and config["struct"] != "dense":
        raise ValueError(f"GPT-2's projections are dense, and struct is {config['struct']!r}: start with "
                         "--struct=dense, and take the checkpoint to a structure by python -m tools.project")
    if "block_size" in given:
        if config["block_size"] > there["block_size"]:
            raise ValueError(f"block_size = {config['block_size']} is more than the {there['block_size']} "
                             f"positions of {folder}")
        there["block_size"] = config["block_size"]
    del there["vocab_size"]  # the data's
    settings = adopt_settings(folder, there, config, given)
    return settings if "mup" in given else settings | dict(mup=False)


def read_settings(folder: str) -> dict:
    """The fields of GPTConfig that the config.json of a GPT-2 stands for."""
    path = os.path.join(folder, "config.json")
    there = _read_json(path)
    fields = {}
    for key, (field, default) in FIELDS.items():
        value = there.get(key, default)
        if type(value) is not type(default) or value is not False and not 0 < value < math.inf:
            raise ValueError(f"{path} has {key} = {value!r}, which is not a valid value")
        fields[field] = value
    if fields["n_embd"] % fields["n_head"]:
        raise ValueError(f"{path} has n_head = {fields['n_head']}, which does not divide n_embd = "
                         f"{fields['n_embd']}")
    only = ONLY | dict(n_inner=4 * fields["n_embd"])
    for key, value in only.items():
        if there.get(key) not in (None, value):
            raise ValueError(f"{path} has {key} = {there[key]!r}, which this model cannot express: it has "
                             f"{value!r}")
    activation = there.get("activation_function", "gelu_new")
    if not isinstance(activation, str) or activation not in GELUS:
        raise ValueError(f"{path} has activation_function = {activation!r}, which this model cannot express: "
                         f"it has {', '.join(GELUS)}")
    scaled = there.get("scale_attn_weights", True)
    head_size = fields["n_embd"] // fields["n_head"]
    return FIXED | fields | dict(gelu=GELUS[activation], attention_scale=head_size ** -0.5 if scaled else 1.0)


def load_weights(folder: str, model, tokenizer: dict | None = None) -> None:
    """Puts the weights of the GPT-2 in `folder` into a model of its settings. A collective: all ranks end
    with rank 0's. Rows beyond the model's vocabulary and positions are left out. tokenizer: the data's, as
    meta.json describes it; a remark is printed if its ids are those of other tokens.

    Raises ValueError for weights that cannot be read or do not fit, and for a vocabulary that is not the
    model's; up to 127 rows more than that are padding.
    """
    def load():
        config = model.config
        tensors = read_tensors(folder)
        wte = tensors.get("wte.weight")
        rows = config.vocab_size if wte is None or wte.dim() != 2 else len(wte)
        if not config.vocab_size <= rows < config.vocab_size + 128:
            raise ValueError(f"{folder} has a vocabulary of {rows} tokens, and the data has one of "
                             f"{config.vocab_size}: prepare the data with the tokenizer of these weights")
        state = from_gpt2(tensors, config.n_layer, config.tie_embeddings)
        own = model.state_dict()
        for name in ("wte.weight", "wpe.weight", "lm_head.A"):
            if name in state and state[name].dim() == own[name].dim():
                # to the rows that count, and zeros for those that only pad
                count = config.block_size if name == "wpe.weight" else config.vocab_size
                kept = state[name][..., :count, :]
                state[name] = F.pad(kept, (0, 0, 0, max(0, own[name].shape[-2] - kept.shape[-2])))
        for name, w in own.items():
            if name not in state or state[name].shape != w.shape:
                raise ValueError(f"the weights in {folder} are not those of its config.json: {name} does not "
                                 f"have the shape {tuple(w.shape)}")
        model.load_state_dict(state)

    on_all_ranks(load)
    print0(f"starting from the weights of {folder}")
    if tokenizer and (remark := other_tokens(folder, tokenizer)):
        print0(remark)
    weights = list(model.state_dict().values())
    distributed.broadcast_tensors(weights, 0, weights[0].device)


def other_tokens(folder: str, tokenizer: dict) -> str | None:
    """A remark if a tokenizer.json or vocab.json in `folder` gives a token another id than the data's
    tokenizer; None if it does not, or there is none that can be read."""
    match tokenizer:
        case {"name": "char", "characters": characters}:
            ours = {character: i for i, character in enumerate(characters)}
        case {"name": "tokenizers", "json": text}:
            ours = _token_ids(json.loads(text))
        case _:
            ours = GPT2_TOKENS if tokenizer["name"] == "gpt2" else {}
    for name in ("tokenizer.json", "vocab.json"):
        with contextlib.suppress(ValueError):
            theirs = _token_ids(_read_json(os.path.join(folder, name)))
            if others := [token for token in ours if theirs.get(token, ours[token]) != ours[token]]:
                return (f"the weights belong to another vocabulary than the data: {others[0]!r} is "
                        f"{theirs[others[0]]} in {folder}/{name}, and {ours[others[0]]} in the data")
    return None


def _token_ids(file: dict) -> dict[str, int]:
    """{token: id} of a tokenizer.json, or of a vocab.json, which may have a token "model"."""
    model = file.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else file
    return vocabulary if isinstance(vocabulary, dict) else {}


def read_tensors(folder: str) -> dict[str, Tensor]:
    """The tensors of a folder's model.safetensors, or of the files that its index names, without the prefix
    'transformer.'."""
    path = os.path.join(folder, "model.safetensors")
    files = ["model.safetensors"]
    if not os.path.exists(path) and os.path.exists(path + ".index.json"):
        path += ".index.json"
        weight_map = _read_json(path).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(f, str) for f in weight_map.values()):
            raise ValueError(f"{path} has no weight_map")
        files = sorted(set(weight_map.values()))
    try:
        from safetensors import safe_open
        tensors = {}
        for file in files:
            path = os.path.join(folder, file)
            with safe_open(path, framework="pt") as f:
                tensors |= {name.removeprefix("transformer."): f.get_tensor(name) for name in f.keys()}
        return tensors
    except ImportError:
        raise ValueError(f"{path} is read by the package safetensors: {INSTALL}") from None
    except Exception as e:  # SafetensorError is an Exception and nothing else
        raise ValueError(f"{path} cannot be read ({type(e).__name__}: {e})") from None


def from_gpt2(tensors: dict[str, Tensor], n_layer: int, tied: bool) -> dict[str, Tensor]:
    """The parameters of this model from those of a GPT-2, as views. Raises ValueError if one is missing, is
    not floating-point, or has no place here."""
    names = parameters(n_layer, tied)
    # masks that old files hold beside the weights, and the embedding once more
    kept = {name: t for name, t in tensors.items() if not name.endswith((".attn.bias", ".attn.masked_bias"))
            and not (tied and name == "lm_head.weight")}
    for what, found in (("lack", names.keys() - kept.keys()), ("hold", kept.keys() - names.keys())):
        if found:
            raise ValueError(f"these weights are no GPT-2 of {n_layer} blocks: they {what} {min(found)}"
                             + (f" and {len(found) - 1} more" if len(found) > 1 else ""))
    state = {}
    for theirs, ours in names.items():
        tensor = kept[theirs]
        dims = 2 if theirs.endswith("weight") and "ln_" not in theirs else 1
        if tensor.dim() != dims or not tensor.is_floating_point():
            raise ValueError(f"{theirs} is a tensor of {tuple(tensor.shape)}, {tensor.dtype}")
        if is_transposed(theirs):
            tensor = tensor.T  # (d_out, d_in)
        for name, part in zip(ours, tensor.chunk(len(ours))):
            state[name] = part[None] if name.endswith(".A") else part
    return state


def _read_json(path: str) -> dict:
    try:
        with open(path, encoding="utf-8") as f:
            contents = json.load(f)
    except FileNotFoundError:
        raise ValueError(f"there is no {path}: a GPT-2's folder holds config.json and model.safetensors; a "
                         "checkpoint of train.py is given as its file, *.pt") from None
    except (OSError, ValueError, RecursionError) as e:
        raise ValueError(f"{path} cannot be read ({type(e).__name__}: {e})") from None
    if not isinstance(contents, dict):
        raise ValueError(f"{path} holds no JSON object")
    return contents

# ---- GPT-2 out ---------------------------------------------------------------------------------------------

def differences(config) -> list[str]:
    """What keeps a model of this GPTConfig from being a GPT-2, as 'key = value'; [] where it is one."""
    keys = ("struct", "qk_norm", "num_experts", "ffn_experts")
    return [f"{key} = {getattr(config, key)!r}" for key in keys if getattr(config, key) != FIXED[key]]


@torch.no_grad()
def to_gpt2(model) -> tuple[dict, dict[str, Tensor]]:
    """(config, state): what GPT2LMHeadModel's config.json says, and its parameters, of a model.GPT.

    µP's scales go into the weights: that of attention into q, that of branches into o and down. Biases that
    the model does not have are zeros. Raises ValueError, with what differs, for a model that is no GPT-2.
    """
    config = model.config
    if wrong := differences(config):
        raise ValueError(f"a GPT-2 has dense projections, no QK norm and no experts; this model has "
                         f"{', '.join(wrong)}")
    theirs = {key: getattr(config, field) for key, (field, _) in FIELDS.items()}
    theirs |= dict(model_type="gpt2", architectures=["GPT2LMHeadModel"], scale_attn_weights=True,
                   n_inner=None, bos_token_id=None, eos_token_id=None,
                   activation_function={ours: name for name, ours in GELUS.items()}[config.gelu],
                   **dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), config.dropout))
    usual = (config.n_embd // config.n_head) ** -0.5
    scales = dict(q=config.attention_scale / usual, o=config.branch_scale, down=config.branch_scale)
    state = {}
    for name, ours in parameters(config.n_layer, config.tie_embeddings).items():
        parts = []
        for parameter in ours:
            module_name, _, kind = parameter.rpartition(".")
            module = model.get_submodule(module_name)
            part = module.to_dense() if kind == "A" else getattr(module, kind)
            if part is None:  # a bias
                part = torch.zeros_like(module.weight) if hasattr(module, "weight") else \
                    module.to_dense().new_zeros(module.d_out)
            parts.append(part * scales.get(module_name.rpartition(".")[2], 1.0))
        tensor = torch.cat(parts)
        if name in ("wte.weight", "lm_head.weight"):
            tensor = tensor[:config.vocab_size]
        tensor = tensor.T if is_transposed(name) else tensor
        prefix = "" if name.startswith("lm_head") else "transformer."
        state[prefix + name] = tensor.contiguous()
    return theirs, state
