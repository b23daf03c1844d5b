"""GPT-2 whose projections are structured matrices, for Hugging Face transformers.

`python -m tools.export` of structured-gpt copies this file beside the weights. It needs only torch and
transformers. Weight normalization is folded into the cores. Attention is PyTorch's
scaled_dot_product_attention.

Shapes: B batch, T new tokens, S tokens in sight, d n_embd, nh heads, hs = d / nh head size, E experts,
k experts of a token, n rows: tokens. The letters of the einsums, g b a and f e d r, are at the class Einsum.
"""
import contextlib

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import (DynamicCache, GenerationMixin, PretrainedConfig, PreTrainedModel, StoppingCriteria,
                          StoppingCriteriaList)
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import CausalLMOutputWithPast

# the name that this version of transformers has for the cache of keys and values
CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"
# for generation: cuDNN, PyTorch's first choice on H100 and later, makes a plan for every new length of keys
NOT_CUDNN = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


class StructuredGPTConfig(PretrainedConfig):
    """
    projections      {"q", "k", "v", "o", "up", "down": a description}: see make_projection
    ffn_experts      experts that are whole MLPs, ffn_top_k of which a token uses; 0: one MLP
    gelu             "exact", or its "tanh" approximation
    attention_scale  factor on the products of queries and keys
    branch_scale     factor on what each attention and MLP adds to the residual stream
    """
    model_type = "structured_gpt"
    attribute_map = {"hidden_size": "n_embd", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head",
                     "max_position_embeddings": "block_size"}
    keys_to_ignore_at_inference = ["cache", "past_key_values"]

    def __init__(self, vocab_size=50257, block_size=1024, n_layer=12, n_head=12, n_embd=768, projections=None,
                 ffn_experts=0, ffn_top_k=0, qk_norm=True, norm_bias=False, norm_eps=1e-5, gelu="exact",
                 attention_scale=0.125, branch_scale=1.0, dropout=0.0, use_cache=True,
                 tie_word_embeddings=False, **kwargs):
        self.vocab_size, self.block_size, self.use_cache = vocab_size, block_size, use_cache
        self.n_layer, self.n_head, self.n_embd, self.dropout = n_layer, n_head, n_embd, dropout
        self.projections, self.ffn_experts, self.ffn_top_k = projections, ffn_experts, ffn_top_k
        self.qk_norm, self.norm_bias, self.norm_eps, self.gelu = qk_norm, norm_bias, norm_eps, gelu
        self.attention_scale, self.branch_scale = attention_scale, branch_scale
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)


def core(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape) * shape[-1] ** -0.5)


class Einsum(nn.Module):
    """y[φ, ε, δ] = Σ A[γ, α, δ, φ, ρ] · B[γ, β, ε, φ, ρ] · x[γ, β, α]: first index slowest, two products.

    sizes are those of α β γ δ ε φ ρ, in letters a b g d e f r; where the core B goes first, A and B exchange
    their letters. cores are their names in this order; one that is left out is 1. With E experts, cores and
    bias have a leading E, and forward(x, expert) takes the rows of one of them.
    """

    def __init__(self, sizes, cores, bias, experts=()):
        super().__init__()
        a, b, g, d, e, f, r = sizes
        if cores[0] == "B":
            a, b, d, e = b, a, e, d
        self.sizes, self.names = (a, b, g, d, e, f, r), cores
        self.d_in, self.d_out = a * b * g, d * e * f
        for name, shape in zip(cores, [(g, r * f * d, a), (f, e, g * r * b)]):
            self.register_parameter(name, core(*experts, *shape))
        self.bias = nn.Parameter(torch.zeros(*experts, self.d_out)) if bias else None

    def forward(self, x: Tensor, *expert: int) -> Tensor:  # (..., d_in) -> (..., d_out)
        a, b, g, d, e, f, r = self.sizes
        first, *second = [getattr(self, name)[expert] for name in self.names]
        rows = x.reshape(-1, g, b, a) if self.names[0] == "A" else x.reshape(-1, g, a, b).mT
        y = torch.einsum("ngba,grfda->ngbrfd", rows, first.view(g, r, f, d, a))
        if second:
            out = "nfed" if self.names[0] == "A" else "nfde"
            y = torch.einsum(f"ngbrfd,fegrb->{out}", y, second[0].view(f, e, g, r, b))
        y = y.reshape(*x.shape[:-1], self.d_out)
        return y if self.bias is None else y + self.bias[expert]


class Dyad(nn.Module):
    """A block-diagonal and a permuted block-diagonal matrix, `blocks` blocks each (arXiv 2312.06881)."""

    TERMS = {"it": "nib,boi->nbo", "ot": "nbi,boi->nob", "dt": "nib,boi->nob"}

    def __init__(self, d_in, d_out, blocks, variant, bias, experts=()):
        super().__init__()
        self.d_in, self.d_out, self.blocks, self.variant = d_in, d_out, blocks, variant
        self.wl = core(*experts, blocks, d_out // blocks, d_in // blocks)
        self.wu = core(*experts, blocks, d_out // blocks, d_in // blocks)
        self.bias = nn.Parameter(torch.zeros(*experts, d_out)) if bias else None

    def forward(self, x: Tensor, *expert: int) -> Tensor:  # (..., d_in) -> (..., d_out)
        term = self.TERMS[self.variant]
        i = self.d_in // self.blocks
        blocked = x.reshape(-1, self.blocks, i)
        rows = x.reshape(-1, i, self.blocks) if term.startswith("nib") else blocked
        y = torch.einsum("nbi,boi->nbo", blocked, self.wl[expert]).flatten(1)
        y = (y + torch.einsum(term, rows, self.wu[expert]).flatten(1)).view(*x.shape[:-1], self.d_out)
        return y if self.bias is None else y + self.bias[expert]


class Mixture(nn.Module):
    """y = Σ gate · expert(x) over the k experts with the largest of logits + balance. The gates are the
    softmax of their logits, or for k = 1 the expert's probability among all. The router works in float32."""

    def __init__(self, experts: nn.Module, d_in: int, d_out: int, num_experts: int, top_k: int):
        super().__init__()
        self.experts, self.d_out, self.top_k = experts, d_out, top_k
        self.router = core(num_experts, d_in)
        self.register_buffer("balance", torch.zeros(num_experts))

    def forward(self, x: Tensor) -> Tensor:  # (..., d_in) -> (..., d_out)
        rows = x.reshape(-1, x.shape[-1])
        router = self.router.to(torch.promote_types(self.router.dtype, torch.float32))
        with torch.autocast(x.device.type, enabled=False):
            logits = F.linear(rows.to(router.dtype), router)  # (n, E)
        chosen = (logits + self.balance).topk(self.top_k).indices  # (n, k)
        if self.top_k == 1:
            gates = logits.softmax(-1).gather(1, chosen)
        else:
            gates = logits.gather(1, chosen).softmax(-1)
        y = rows.new_zeros(len(rows), self.d_out)
        for expert in range(len(router)):
            row, choice = (chosen == expert).nonzero(as_tuple=True)
            part = gates[row, choice, None].to(x.dtype) * self.experts(rows[row], expert)
            y = y.index_add(0, row, part.to(y.dtype))
        return y.view(*x.shape[:-1], self.d_out)


def make_projection(spec: dict, experts: tuple = ()) -> nn.Module:
    """A projection from its description in config.json: {"struct": "dense", "einsum" or "dyad", "bias", and
    d_in, d_out or sizes ...}, and num_experts and top_k of a mixture. experts: (E,) of the MLPs around it."""
    spec = dict(spec)
    struct, num_experts, top_k = spec.pop("struct"), spec.pop("num_experts", 0), spec.pop("top_k", 0)
    if struct == "dense":
        return nn.Linear(spec["d_in"], spec["d_out"], bias=spec["bias"])
    if num_experts:
        experts = (num_experts,)
    layer = {"einsum": Einsum, "dyad": Dyad}[struct](**spec, experts=experts)
    return Mixture(layer, layer.d_in, layer.d_out, num_experts, top_k) if num_experts else layer


def layer_norm(config: StructuredGPTConfig, width: int) -> nn.LayerNorm:
    return nn.LayerNorm(width, eps=config.norm_eps, bias=config.norm_bias)


class Attention(nn.Module):
    def __init__(self, config: StructuredGPTConfig, layer: int):
        super().__init__()
        self.n_head, self.head_size, self.layer = config.n_head, config.n_embd // config.n_head, layer
        self.scale, self.dropout = config.attention_scale, config.dropout
        self.q, self.k, self.v, self.o = (make_projection(config.projections[name]) for name in "qkvo")
        if config.qk_norm:
            self.q_norm = layer_norm(config, self.head_size)
            self.k_norm = layer_norm(config, self.head_size)
        else:
            self.q_norm, self.k_norm = nn.Identity(), nn.Identity()

    def forward(self, x: Tensor, mask: Tensor | None, seen: int, cache) -> Tensor:
        heads = (*x.shape[:2], self.n_head, self.head_size)
        q = self.q_norm(self.q(x).view(heads)).transpose(1, 2)  # (B, nh, T, hs)
        k = self.k_norm(self.k(x).view(heads)).transpose(1, 2)
        v = self.v(x).view(heads).transpose(1, 2)
        if cache is not None:
            k, v = (t[:, :, :seen] for t in cache.update(k, v, self.layer))  # (B, nh, S, hs)
        with contextlib.nullcontext() if cache is None else sdpa_kernel(NOT_CUDNN):
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=self.scale,
                                               is_causal=mask is None and q.shape[2] > 1,
                                               dropout_p=self.dropout if self.training else 0.0)
        return self.o(y.transpose(1, 2).reshape(x.shape))


class MLP(nn.Module):
    def __init__(self, config: StructuredGPTConfig, experts: tuple = ()):
        super().__init__()
        self.up, self.down = (make_projection(config.projections[name], experts) for name in ("up", "down"))
        self.gelu = nn.GELU("tanh" if config.gelu == "tanh" else "none")

    def forward(self, x: Tensor, *expert: int) -> Tensor:
        return self.down(self.gelu(self.up(x, *expert)), *expert)


class Block(GradientCheckpointingLayer):
    def __init__(self, config: StructuredGPTConfig, layer: int):
        super().__init__()
        d, E = config.n_embd, config.ffn_experts
        self.ln_1 = layer_norm(config, d)
        self.attn = Attention(config, layer)
        self.ln_2 = layer_norm(config, d)
        self.mlp = Mixture(MLP(config, (E,)), d, d, E, config.ffn_top_k) if E else MLP(config)
        self.dropout, self.branch_scale = nn.Dropout(config.dropout), config.branch_scale

    def forward(self, x: Tensor, mask: Tensor | None, seen: int, cache=None) -> Tensor:
        x = x + self.branch_scale * self.dropout(self.attn(self.ln_1(x), mask, seen, cache))
        return x + self.branch_scale * self.dropout(self.mlp(self.ln_2(x)))


class EndOfPositions(StoppingCriteria):
    """Ends texts of `most` tokens."""

    def __init__(self, most: int):
        self.most = most

    def __call__(self, input_ids: Tensor, scores, **kwargs) -> Tensor:
        return torch.full(input_ids.shape[:1], input_ids.shape[1] >= self.most, device=input_ids.device)


class StructuredGPTForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = StructuredGPTConfig
    _no_split_modules = ["Block"]
    _input_embed_layer = "wte"
    _keep_in_fp32_modules_strict = ["router", "balance"]  # in a model loaded in bfloat16, too
    _tied_weights_keys = {"lm_head.weight": "wte.weight"}  # where the config ties them
    _supports_sdpa = _supports_cache_class = supports_gradient_checkpointing = True

    def __init__(self, config: StructuredGPTConfig):
        super().__init__(config)
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.ln_f = layer_norm(config, config.n_embd)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.post_init()

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, cache=None, inputs_embeds=None,
                labels=None, use_cache=None, logits_to_keep=0, past_key_values=None, return_dict=None,
                output_hidden_states=None, output_attentions=None, **kwargs):
        """input_ids (B, T), attention_mask (B, S) of the tokens in the cache and the new ones, labels (B, T),
        which are shifted here (-100 is ignored) -> logits (B, T, V), or those of the last logits_to_keep.

        Raises ValueError where more than block_size tokens are in sight, for which there are no positions,
        and for an attention_mask of another number of tokens.
        """
        if output_attentions:
            raise ValueError("this model does not give its attention weights: leave out output_attentions")
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if return_dict is None:
            return_dict = self.config.return_dict
        x = self.wte(input_ids) if inputs_embeds is None else inputs_embeds  # (B, T, d)
        cache = past_key_values if cache is None else cache
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if cache is None and use_cache:
            cache = DynamicCache()
        T, past = x.shape[1], 0 if cache is None else int(cache.get_seq_length())
        if past + T > self.config.block_size:
            raise ValueError(f"{past + T} tokens, padding included, do not fit this model, which has "
                             f"{self.config.block_size} positions: shorten the prompt, or generate fewer")
        if attention_mask is not None and attention_mask.dim() == 2 and attention_mask.shape[1] != past + T:
            raise ValueError(f"attention_mask is of {attention_mask.shape[1]} tokens, and there are "
                             f"{past + T}: {past} in the cache, and {T} new ones")
        if position_ids is None:
            position_ids = find_positions(attention_mask, past, T, x.device)
        mask = find_mask(attention_mask, past, T, x.device)
        seen = past + T if mask is None else mask.shape[-1]
        x = self.dropout(x + self.wpe(position_ids))
        states = [x]
        for block in self.blocks:
            x = block(x, mask, seen, cache=cache)  # by name: gradient checkpointing leaves it out
            if output_hidden_states:
                states.append(x)
        x = states[-1] = self.ln_f(x)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep  # 0: all
        logits = self.lm_head(x[:, kept]).float()
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size, **kwargs)
        output = CausalLMOutputWithPast(loss=loss, logits=logits, **{CACHE: cache},
                                        hidden_states=tuple(states) if output_hidden_states else None)
        return output if return_dict else output.to_tuple()

    def generate(self, inputs=None, generation_config=None, logits_processor=None, stopping_criteria=None,
                 **kwargs):
        """GenerationMixin.generate, but texts also end when they have block_size tokens, prompts and padding
        included."""
        ends = StoppingCriteriaList([*(stopping_criteria or ()), EndOfPositions(self.config.block_size)])
        return super().generate(inputs, generation_config, logits_processor, ends, **kwargs)


def find_positions(attention_mask: Tensor | None, past: int, T: int, device) -> Tensor:
    """Positions of the T new tokens, (B or 1, T): padding in front of a text does not count."""
    if attention_mask is None or attention_mask.dim() != 2:
        return torch.arange(past, past + T, device=device)[None]
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -T:]


def find_mask(attention_mask: Tensor | None, past: int, T: int, device) -> Tensor | None:
    """Which of S tokens each of the T new ones sees, (B or 1, 1, T, S); None: what causal attention says."""
    if attention_mask is not None and attention_mask.dim() == 4:
        return attention_mask
    padded = attention_mask is not None and not attention_mask.all()
    if not padded and (T == 1 or past == 0):
        return None
    mask = torch.ones(T, past + T, dtype=torch.bool, device=device).tril(past)
    own = torch.eye(T, past + T, dtype=torch.bool, device=device).roll(past, 1)  # padding sees itself
    return (mask & attention_mask[:, None, None].bool() | own) if padded else mask[None, None]
