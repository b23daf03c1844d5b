"""GPT-2 in which every attention and MLP projection is a structured matrix made by structured.py.

Shapes: B batch, T tokens, d n_embd, nh heads, hs = d / nh head size, V vocabulary, R routers, E experts.
Scales follow a structure-aware µP: see configure_optimizers here, and docs/mup.md.
"""
import contextlib
import dataclasses
import math
import os
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import structured
from lib import kernels
from lib.checkpoint import read_checkpoint
from structured import LayerConfig

# For generation: cuDNN, PyTorch's first choice on H100 and later, makes a plan for every new length of keys
NOT_CUDNN = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


@dataclasses.dataclass
class GPTConfig(LayerConfig):
    """LayerConfig says which structure the projections have; the fields below are the transformer's.

    Checkpoints hold all fields, and a run that resumes may change none of them. Raises ValueError for sizes
    that do not fit each other.
    """
    block_size: int = 1024
    vocab_size: int = 50257
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    layers: str = "all"             # which projections are structured: 'all', 'attn', 'mlp'; others are dense
    ffn_experts: int = 0            # standard MoE: experts that are whole MLPs
    qk_norm: bool = True            # layer norm of queries and keys, per head
    # φ of q, k, v and γ of o are the heads; None: for btt and monarch without experts, if of full rank then
    head_aligned: bool | None = None
    gelu: str = "exact"             # or its 'tanh' approximation
    norm_eps: float = 1e-5          # of every layer norm
    tie_embeddings: bool = False    # the output layer is the token embedding
    branch_scale: float | None = None     # factor on every residual branch; None: √(3 / n_layer), docs/mup.md
    attention_scale: float | None = None  # factor on attention logits; None: µP's 8 / head size

    def __post_init__(self):
        super().__post_init__()
        for name in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_head = {self.n_head} must divide n_embd = {self.n_embd}")
        if self.layers not in ("all", "attn", "mlp"):
            raise ValueError(f"layers must be 'all', 'attn' or 'mlp'; got {self.layers!r}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1); got {self.dropout}")
        if self.gelu not in ("exact", "tanh"):
            raise ValueError(f"gelu must be 'exact' or 'tanh'; got {self.gelu!r}")
        if self.branch_scale is None:  # keeps the residual stream's size the same at any depth; 1 at 3 layers
            self.branch_scale = math.sqrt(3 / self.n_layer)
        if self.attention_scale is None:  # the usual 1 / √hs at hs = 64
            self.attention_scale = 8 / (self.n_embd // self.n_head)
        self._resolve_head_aligned()
        self.check_experts("ffn_experts")
        if self.num_experts and self.ffn_experts:
            raise ValueError("num_experts (experts in every projection) and ffn_experts (experts that are "
                             "MLPs) exclude each other: set one to 0")

    def _resolve_head_aligned(self) -> None:
        if self.head_aligned is None:
            self.head_aligned = self._suits_heads()
        if self.head_aligned and self.layers == "mlp":
            raise ValueError("head_aligned needs structured attention: layers must be 'all' or 'attn'")
        theta = structured.STRUCTURES.get(self.struct)
        has_both = theta is not None and 0 < theta.gamma < 1 and 0 < theta.phi < 1
        if self.head_aligned and not has_both and self.struct != "einsum":
            raise ValueError("head_aligned needs a structure with γ and φ: monarch, btt, or an einsum that "
                             f"has both; struct is {self.struct!r}")


    def _suits_heads(self) -> bool:
        """Whether q, k, v and o are of BTT or Monarch, without experts, and keep full rank when they follow
        the heads: BTT mostly does, by its ρ; Monarch needs √n_embd heads."""
        if self.struct not in ("monarch", "btt") or self.num_experts or self.layers == "mlp":
            return False
        if self.cheapest_sizes:  # an old checkpoint, which may lack the answer
            return True
        d, fixed = self.n_embd, (dict(phi=self.n_head), dict(gamma=self.n_head))
        return all(structured.layer_sizes(self, 0, d, d, **index).rank() == d for index in fixed)


def projection(config: GPTConfig, part: str, d_in: int, d_out: int, **role) -> nn.Module:
    """One projection of the transformer; part is 'attn' or 'mlp', role is for structured.make_layer."""
    return structured.make_layer(layer_config(config, part), d_in, d_out, **role)


def layer_config(config: GPTConfig, part: str) -> LayerConfig:
    """The config of a part's projections: the structure if `layers` includes the part, else dense."""
    return config if config.layers in ("all", part) else LayerConfig("dense", bias=config.bias)


def layer_norm(config: GPTConfig, width: int) -> nn.LayerNorm:
    return nn.LayerNorm(width, eps=config.norm_eps, bias=config.bias)


def gelu(config: GPTConfig) -> nn.GELU:
    return nn.GELU(approximate="tanh" if config.gelu == "tanh" else "none")


def apply_layer(layer: nn.Module, x: Tensor, aux: list | None, logits: Tensor | None = None) -> Tensor:
    """layer(x). If the layer is a MoE, its Aux is appended to the list aux, if given, and logits may be its
    router's, if they are already known."""
    if not isinstance(layer, structured.MoE):
        return layer(x)
    if aux is None:
        return layer(x, logits=logits)
    y, layer_aux = layer(x, return_aux=True, logits=logits)
    aux.append(layer_aux)
    return y


def shared_logits(layers: list[nn.Module], x: Tensor) -> list[Tensor | None]:
    """The logits (T, E) of each router, by one product, as all read the same x (..., d) of T rows. None for
    each if the layers have no routers, or a kernel computes the logits itself."""
    if not all(isinstance(layer, structured.MoE) for layer in layers) or kernels.computes_logits(x):
        return [None] * len(layers)
    routers = torch.cat([layer.router for layer in layers])  # (layers · E, d)
    routers = routers.to(torch.promote_types(routers.dtype, torch.float32))
    return list(kernels.router_logits(x.flatten(0, -2), routers).chunk(len(layers), dim=1))


@contextlib.contextmanager
def fixed_cores(model: nn.Module):
    """A context in which cores are normalized and cast to the surrounding autocast type only once, not at
    every call: for generation, while no weight changes."""
    layers = [m for m in model.modules() if isinstance(m, structured.Structured)]
    dtype = kernels.autocast_dtype(next(model.parameters()))
    try:
        for layer in layers:
            layer.fixed = {name: layer.core(name).detach().to(dtype) for name in layer.fans()}
        yield
    finally:
        for layer in layers:
            layer.fixed = {}


class KVCache:
    """Keys and values of the tokens read so far, for every layer: (n_layer, B, nh, block_size, hs)."""

    def __init__(self, config: GPTConfig, batch: int, device, dtype):
        shape = (config.n_layer, batch, config.n_head, config.block_size, config.n_embd // config.n_head)
        self.k = torch.zeros(shape, device=device, dtype=dtype)
        self.v = torch.zeros(shape, device=device, dtype=dtype)
        self.length = 0  # tokens read; GPT.forward advances it, after all layers

    def extend(self, block_index: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Stores the keys and values (B, nh, T, hs) of new tokens in one block; returns those of all tokens
        so far."""
        stop = self.length + k.shape[2]
        for kept, new in ((self.k[block_index], k), (self.v[block_index], v)):
            kept[:, :, self.length:stop] = new
        return self.k[block_index, :, :, :stop], self.v[block_index, :, :, :stop]


class CausalSelfAttention(nn.Module):
    def __init__(self, config: GPTConfig, block_index: int):
        super().__init__()
        d = config.n_embd
        self.n_head, self.block_index, self.dropout = config.n_head, block_index, config.dropout
        self.head_size, self.scale = d // config.n_head, config.attention_scale
        to_heads = dict(phi=config.n_head) if config.head_aligned else {}
        from_heads = dict(gamma=config.n_head) if config.head_aligned else {}
        self.q = projection(config, "attn", d, d, norm_follows=config.qk_norm, **to_heads)
        self.k = projection(config, "attn", d, d, norm_follows=config.qk_norm, **to_heads)
        self.v = projection(config, "attn", d, d, **to_heads)
        self.o = projection(config, "attn", d, d, zero_init=True, **from_heads)
        self.q_norm = layer_norm(config, self.head_size) if config.qk_norm else nn.Identity()
        self.k_norm = layer_norm(config, self.head_size) if config.qk_norm else nn.Identity()
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, aux: list | None, cache: KVCache | None = None) -> Tensor:
        B, T, d = x.shape
        heads = (B, T, self.n_head, self.head_size)
        logits = shared_logits([self.q, self.k, self.v], x)
        q = self.q_norm(apply_layer(self.q, x, aux, logits[0]).view(heads)).transpose(1, 2)  # (B, nh, T, hs)
        k = self.k_norm(apply_layer(self.k, x, aux, logits[1]).view(heads)).transpose(1, 2)
        v = apply_layer(self.v, x, aux, logits[2]).view(heads).transpose(1, 2)
        mask = None
        if cache is not None:
            k, v = cache.extend(self.block_index, k, v)
            q, mask = q.to(k.dtype), _cache_mask(T, k.shape[2], x.device)  # q: layer norms give float32
        is_causal = cache is None or (mask is None and T > 1)
        with contextlib.nullcontext() if cache is None else sdpa_kernel(NOT_CUDNN):
            y = F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=is_causal, scale=self.scale,
                dropout_p=self.dropout if self.training else 0.0)  # (B, nh, T, hs)
        y = y.transpose(1, 2).reshape(B, T, d)
        return self.resid_dropout(apply_layer(self.o, y, aux))


def _cache_mask(T: int, S: int, device) -> Tensor | None:
    """Which of S tokens the last T may see, (T, S). None where no mask is needed: one token sees all, and
    where T is S, attention is plainly causal."""
    if T == 1 or T == S:
        return None
    return torch.ones(T, S, dtype=torch.bool, device=device).tril(S - T)


class MLP(nn.Module):
    """up, GELU, down; each projection may have a router of its own."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.gelu = gelu(config)
        self.up = projection(config, "mlp", config.n_embd, 4 * config.n_embd)
        self.down = projection(config, "mlp", 4 * config.n_embd, config.n_embd, zero_init=True)

    def forward(self, x: Tensor, aux: list | None) -> Tensor:
        return apply_layer(self.down, self.gelu(apply_layer(self.up, x, aux)), aux)

    def flops_per_token(self) -> int:
        return self.up.flops_per_token() + self.down.flops_per_token()


class MLPExperts(nn.Module):
    """The experts of a standard MoE, ffn_experts MLPs: forward(rows, ends) takes rows grouped by expert, as
    structured.Structured says."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        d, E, layer = config.n_embd, config.ffn_experts, layer_config(config, "mlp")
        self.gelu = gelu(config)
        self.up = structured.make_experts(layer, E, d, 4 * d)
        self.down = structured.make_experts(layer, E, 4 * d, d, zero_init=True)

    def forward(self, rows: Tensor, ends: Tensor) -> Tensor:
        return self.down(self.gelu(self.up(rows, ends)), ends)

    def flops_per_token(self) -> int:
        """Forward FLOPs of one expert."""
        return self.up.flops_per_token() + self.down.flops_per_token()


class Block(nn.Module):
    def __init__(self, config: GPTConfig, block_index: int):
        super().__init__()
        self.ln_1 = layer_norm(config, config.n_embd)
        self.attn = CausalSelfAttention(config, block_index)
        self.ln_2 = layer_norm(config, config.n_embd)
        if config.ffn_experts:
            self.mlp = structured.MoE(config.n_embd, MLPExperts(config), config.ffn_experts, config.top_k)
        else:
            self.mlp = MLP(config)
        self.dropout = nn.Dropout(config.dropout)
        self.branch_scale = config.branch_scale

    def forward(self, x: Tensor, aux: list | None, cache: KVCache | None = None) -> Tensor:
        x = x + self.branch_scale * self.attn(self.ln_1(x), aux, cache)
        h = self.ln_2(x)
        h = apply_layer(self.mlp, h, aux) if isinstance(self.mlp, structured.MoE) else self.mlp(h, aux)
        return x + self.branch_scale * self.dropout(h)


class ModelAux(NamedTuple):
    """What the routers of a model report about one batch."""
    loss: Tensor  # () mean over routers of load-balance loss + 0.1 · z-loss, unweighted; 0 without routers
    load: Tensor  # (R, E) share of assignments to each expert at each router
    variance: Tensor  # (R,) mean over tokens of the variance of a token's logits at each router


class GPT(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        # a large output layer is padded to a multiple of 64 rows; forward slices the logits back to V
        padded = config.vocab_size if config.vocab_size < 1024 else math.ceil(config.vocab_size / 64) * 64
        self.wte = nn.Embedding(padded if config.tie_embeddings else config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config, i) for i in range(config.n_layer))
        self.ln_f = layer_norm(config, config.n_embd)
        # lm_head starts at zero: the first loss is ln(vocab_size). None: forward uses the weights of wte
        self.lm_head = (None if config.tie_embeddings else
                        structured.linear("dense", config.n_embd, padded, zero_init=True))
        nn.init.normal_(self.wte.weight, std=0.02)
        nn.init.normal_(self.wpe.weight, std=0.02)

    def forward(self, idx: Tensor, targets: Tensor | None = None, cache: KVCache | None = None,
                return_aux: bool = False, return_logits: bool = True):
        """idx (B, T) -> (logits, loss), or (logits, loss, ModelAux) with return_aux.

        With targets (B, T; -1 is ignored) logits are (B, T, V) and loss is the cross-entropy alone, in nats
        per token; without, logits are those of the last position, (B, 1, V), and loss is None. With a cache,
        idx are the tokens that follow those already read. Without return_logits the logits are returned as
        None, which saves their memory in training. Raises ValueError if the tokens in the cache and these are
        more than block_size.
        """
        start = cache.length if cache is not None else 0
        T = idx.shape[1]
        if start + T > self.config.block_size:
            raise ValueError(f"{start + T} tokens do not fit block_size = {self.config.block_size}")
        positions = torch.arange(start, start + T, device=idx.device)
        x = self.dropout(self.wte(idx) + self.wpe(positions))  # (B, T, d)
        aux: list[structured.Aux] | None = [] if return_aux else None
        for block in self.blocks:
            x = block(x, aux, cache)
        if cache is not None:
            cache.length += T
        x = self.ln_f(x if targets is not None else x[:, -1:])
        logits = F.linear(x, self.wte.weight) if self.lm_head is None else self.lm_head(x)
        logits = logits[..., :self.config.vocab_size].float()
        loss = None
        if targets is not None:
            loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)
        logits = logits if return_logits else None
        return (logits, loss, _summarize(aux, x)) if return_aux else (logits, loss)

    # -- cost ------------------------------------------------------------------------------------------------

    def flops_per_token(self, output_layer: bool = True) -> int:
        """Forward FLOPs per token at full block_size, 2 per multiply-add; the backward is twice it.

        Every product that is executed counts: routers and attention too (QKᵀ and AV over block_size keys,
        causal or not); of the experts, the active ones. What a backward recomputes does not count.
        """
        layers = [m for b in self.blocks for m in (b.attn.q, b.attn.k, b.attn.v, b.attn.o, b.mlp)]
        flops = sum(m.flops_per_token() for m in layers)
        flops += self.config.n_layer * 4 * self.config.block_size * self.config.n_embd
        last = 2 * self.wte.weight.numel() if self.lm_head is None else self.lm_head.flops_per_token()
        return flops + last if output_layer else flops

    def num_params(self, active: bool = False) -> int:
        """Number of parameters; `active`: see num_params below."""
        return num_params(self, active)

    @classmethod
    def count_params(cls, config: GPTConfig) -> int:
        """The number of parameters of a model of this config, without making it. Raises ValueError for sizes
        that do not fit each other."""
        with torch.device("meta"):  # shapes without memory
            small = cls(dataclasses.replace(config, n_layer=1))
        block = sum(p.numel() for p in small.blocks[0].parameters())
        return small.num_params() + (config.n_layer - 1) * block

    @classmethod
    def count_flops(cls, config: GPTConfig) -> int:
        """flops_per_token of a model of this config, without making it. Raises ValueError as count_params."""
        with torch.device("meta"):
            return cls(config).flops_per_token()

    def flops_ratio_to_dense(self) -> float:
        """FLOPs per token ÷ those of the dense model of the same width and depth."""
        dense = dataclasses.replace(self.config, struct="dense", rank=None, theta=None, num_experts=0,
                                    ffn_experts=0, head_aligned=None, weight_norm=None)
        return self.flops_per_token() / self.count_flops(dense)

    def routers(self) -> dict[str, structured.MoE]:
        """{name: MoE} in the order of ModelAux, so modules must be registered in the order in which forward
        calls them."""
        return {name: m for name, m in self.named_modules() if isinstance(m, structured.MoE)}

    def rebalance(self, load: Tensor, variance: Tensor, rate: float | Tensor) -> None:
        """Moves the biases of each router against its load: load (R, E) and variance (R,) as in ModelAux."""
        for moe, shares, var in zip(self.routers().values(), load, variance, strict=True):
            moe.rebalance(shares, var, rate)

    @torch.no_grad()
    def balance_routers(self, steps: Iterable[Iterable]) -> None:
        """Rebalances once per item of `steps`, by the mean load and variance over its batches (X, Y), of any
        sizes. The rate of step i is 1 / (1 + i / 5), so that the biases settle."""
        self.eval()
        for i, batches in enumerate(steps):
            load, variance, count = 0, 0, 0
            for X, Y in batches:
                *_, aux = self(X, Y, return_aux=True, return_logits=False)
                load, variance = load + aux.load * len(X), variance + aux.variance * len(X)
                count += len(X)
            self.rebalance(load / count, variance / count, rate=1 / (1 + i / 5))
        self.train()

    def describe(self) -> list[str]:
        """One line for each projection of a block: its structure and sizes."""
        lines = []
        for name, module in self.blocks[0].named_modules():
            if isinstance(module, structured.Structured):
                kind = type(module).__name__.lower()
                lines.append(f"{name.removesuffix('.experts'):16s} {kind} {module.extra_repr()}")
        return lines

    def describe_load(self, load: Tensor, entropy: Tensor) -> list[str]:
        """One line for each block that has routers, from the shares of assignments load (R, E) and their
        entropy (R,) in nats: least and largest load ÷ mean, and the entropy as a share of its maximum."""
        blocks: dict[str, list] = {}
        for name, shares, nats in zip(self.routers(), load * load.shape[1], entropy):
            _, block, *_, part = name.split(".")  # blocks.3.attn.q
            blocks.setdefault(block, []).append(f"{part} {shares.min():.2f} to {shares.max():.2f}, "
                                                f"{nats / math.log(len(shares)):.1%}")
        return [f"block {i}: load ÷ mean, entropy: " + "; ".join(parts) for i, parts in blocks.items()]

    # -- training --------------------------------------------------------------------------------------------

    def configure_optimizers(self, weight_decay: float, learning_rate: float, betas: tuple[float, float],
                             device_type: str, base_width: int | None = 128) -> torch.optim.AdamW:
        """AdamW with a group for each (multiplier, decayed or not); a group keeps its 'lr_multiplier' for the
        schedule.

        Cores, routers and embeddings are decayed; gains, biases and norms are not. The decay is divided by
        the multiplier: every matrix shrinks by learning_rate · weight_decay a step, whatever its structure
        and width.
        """
        multipliers = lr_multipliers(self, base_width)
        groups: dict[tuple[float, bool], list] = {}
        for name, p in self.named_parameters():
            decays = p.dim() >= 2 and not name.endswith("bias")
            groups.setdefault((multipliers[name], decays), []).append(p)
        return torch.optim.AdamW(
            [dict(params=params, lr=learning_rate * multiplier, lr_multiplier=multiplier,
                  weight_decay=weight_decay / multiplier if decays else 0.0)
             for (multiplier, decays), params in groups.items()],
            lr=learning_rate, betas=betas, fused=device_type in ("cuda", "cpu") or None)

    # -- generation ------------------------------------------------------------------------------------------

    @torch.no_grad()
    def stream(self, idx: Tensor, max_new_tokens: int, temperature: float = 1.0, top_k: int | None = None,
               top_p: float = 1.0, use_cache: bool = True, generator: torch.Generator | None = None,
               known: Tensor | None = None) -> Iterator[Tensor]:
        """Yields max_new_tokens next tokens, (B, 1) each, after the prompt idx (B, T), T >= 1.

        temperature 0 takes the likeliest token; top_k keeps the k likeliest, and then top_p the smallest set
        of likeliest tokens whose probabilities sum to top_p. known (B, N) gives the first N of the next
        tokens, -1 where one is to be sampled: the rest of prompts that are longer than T. Beyond block_size
        the window slides: when it is full, its oldest quarter is dropped and the rest read again (positions
        are learned, so keys of shifted tokens cannot be kept). The cache changes the tokens only by rounding.
        Dropout is active unless eval() was called.
        """
        if idx.shape[1] < 1:
            raise ValueError("generation needs a prompt of at least one token")
        known = idx[:, :0] if known is None else known
        block_size = self.config.block_size
        window, cache = idx[:, -block_size:], None
        with fixed_cores(self):
            for i in range(max_new_tokens):
                if window.shape[1] > block_size:
                    window, cache = window[:, -max(1, block_size - block_size // 4):], None
                if not use_cache:
                    logits, _ = self(window)
                elif cache is None:
                    cache = KVCache(self.config, idx.shape[0], idx.device, self._cache_dtype(idx.device))
                    logits, _ = self(window, cache=cache)
                else:
                    logits, _ = self(window[:, -1:], cache=cache)
                token = _sample(logits[:, -1], temperature, top_k, top_p, generator)  # (B, 1)
                if i < known.shape[1]:
                    token = torch.where(known[:, i:i + 1] < 0, token, known[:, i:i + 1])
                window = torch.cat([window, token], dim=1)
                yield token

    def generate(self, idx: Tensor, max_new_tokens: int, *args, **options) -> Tensor:
        """The prompt idx (B, T) and max_new_tokens more, (B, T + max_new_tokens): options as of stream."""
        return torch.cat([idx, *self.stream(idx, max_new_tokens, *args, **options)], dim=1)

    def _cache_dtype(self, device) -> torch.dtype:
        if torch.is_autocast_enabled(device.type):
            return torch.get_autocast_dtype(device.type)
        return self.wte.weight.dtype


def num_params(module: nn.Module, active: bool = False) -> int:
    """Parameters of any module; `active`: without those of the experts that a token does not use."""
    total = sum(p.numel() for p in module.parameters())
    for moe in (m for m in module.modules() if isinstance(m, structured.MoE)):
        experts = sum(p.numel() for p in moe.experts.parameters())
        total -= experts * (moe.num_experts - moe.top_k) // moe.num_experts if active else 0
    return total


def lr_multipliers(module: nn.Module, base_width: int | None) -> dict[str, float]:
    """{parameter name: factor on the learning rate} of any module with structured layers, under µP for Adam:
    1 for parameters outside of them, and for all if base_width is None."""
    multipliers = dict.fromkeys((name for name, _ in module.named_parameters()), 1.0)
    if base_width is None:
        return multipliers
    for prefix, layer in module.named_modules():
        if isinstance(layer, (structured.Structured, structured.MoE)):
            own = layer.lr_multipliers(base_width)
            multipliers |= {f"{prefix}.{name}".removeprefix("."): factor for name, factor in own.items()}
    return multipliers


def load_checkpoint(place: str) -> tuple[str, dict, GPT]:
    """(path, contents, model in evaluation mode) of a checkpoint, or of an out_dir's ckpt.pt.

    No code in it is executed; its tensors are mapped, not read. Raises ValueError if there is no checkpoint,
    or it contains no such model.
    """
    path = os.path.join(place, "ckpt.pt") if os.path.isdir(place) else place
    checkpoint = read_checkpoint(path, dict(model=dict, model_args=dict))
    try:
        with torch.device("meta"):  # the weights are those of the file
            model = GPT(GPTConfig(**checkpoint["model_args"]))
        model.load_state_dict(checkpoint["model"], assign=True)
    except Exception as e:
        raise ValueError(f"{path} is not a checkpoint that can be read ({type(e).__name__})") from None
    return path, checkpoint, model.eval()


def _summarize(aux: list[structured.Aux], x: Tensor) -> ModelAux:
    if not aux:
        return ModelAux(x.new_zeros(()), x.new_zeros(0, 0), x.new_zeros(0))
    return ModelAux(torch.stack([a.loss for a in aux]).mean(), torch.stack([a.load for a in aux]),
                    torch.stack([a.variance for a in aux]))


def _sample(logits: Tensor, temperature: float, top_k: int | None, top_p: float, generator) -> Tensor:
    """One token for each row of logits (B, V) -> (B, 1)."""
    if temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    p = _kept_probabilities((logits - logits.amax(dim=-1, keepdim=True)) / temperature, top_k, top_p)
    # torch.multinomial's way to draw, without its check of p, for which it waits for the GPU
    return p.div_(torch.empty_like(p).exponential_(generator=generator)).argmax(dim=-1, keepdim=True)


def _kept_probabilities(logits: Tensor, top_k: int | None, top_p: float) -> Tensor:
    """Unnormalized probabilities to draw from, (B, V): 0 where top_k or top_p leaves a token out."""
    if top_k is not None:
        least = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < least, -math.inf)
    p = logits.softmax(dim=-1)
    if top_p == 1:
        return p
    ranked, order = p.sort(dim=-1, descending=True, stable=True)
    beyond = ranked.cumsum(dim=-1) - ranked >= max(top_p, 1e-9)  # the likelier ones alone reach top_p
    return p.masked_fill(beyond.scatter(-1, order, beyond), 0.0)
