"""model.py: what a GPT of structured projections must hold, whatever the structure."""
import itertools
import json
import math

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from lib import kernels
from lib.kernels import operators
from model import GPT, GPTConfig, KVCache, _kept_probabilities, _sample, fixed_cores
from structured import STRUCTURES, MoE, Structured
from tests.conftest import ROOT
from tests.structures import counted_flops, recomputed_flops

SMALL = dict(block_size=12, vocab_size=40, n_layer=2, n_head=2, n_embd=16)
KINDS = {name: dict(struct=name) for name in STRUCTURES if name != "einsum"}
KINDS |= {f"dyad_{v}": dict(struct="dyad", dyad_variant=v) for v in ("ot", "dt")}
KINDS |= {
    "einsum": dict(struct="einsum", theta=(0.75, 0, 0.25, 0, 0.25, 0.75, 0)),
    "btt_moe": dict(struct="btt", num_experts=4), "low_rank_moe": dict(struct="low_rank", num_experts=4),
    "dense_moe": dict(struct="dense", num_experts=4), "moe": dict(ffn_experts=4),
    "dyad_moe": dict(struct="dyad", num_experts=4),
    "moe of btt": dict(struct="btt", ffn_experts=4), "attn": dict(struct="btt", layers="attn", num_experts=4),
    "mlp": dict(struct="btt", layers="mlp", num_experts=4)}
all_kinds = pytest.mark.parametrize("kind", KINDS)
some_kinds = pytest.mark.parametrize("kind", ["dense", "btt", "btt_moe", "moe", "dyad"])


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def build(kind="dense", **options):
    return GPT(GPTConfig(**SMALL | KINDS[kind] | options))


def random_model(kind="dense", **options):
    """A model in float64 with random weights: at its init, an output of zeros would hide what it computes."""
    model = build(kind, **options).double()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.5)
    return model.eval()


def tokens(*shape, vocab_size=SMALL["vocab_size"]):
    return torch.randint(vocab_size, shape)


def projections(model):
    """{"0.q": layer, ...}: the projections of every block, but for the MLPs of a standard MoE."""
    parts = [(i, part, name) for i, block in enumerate(model.blocks)
             for part, names in ((block.attn, "qkvo"), (block.mlp, ("up", "down"))) for name in names]
    return {f"{i}.{name}": getattr(part, name) for i, part, name in parts if hasattr(part, name)}


# ---- Forward -----------------------------------------------------------------------------------------------

@all_kinds
@pytest.mark.parametrize("qk_norm, bias", [(True, False), (False, True)])
def test_first_loss_is_that_of_the_uniform_guess(kind, qk_norm, bias):
    model = build(kind, qk_norm=qk_norm, bias=bias)
    logits, loss = model(tokens(2, 12), tokens(2, 12))
    assert logits.shape == (2, 12, 40) and loss.item() == pytest.approx(math.log(40), rel=0.01)
    logits, loss = model(tokens(2, 5))
    assert logits.shape == (2, 1, 40) and loss is None


@some_kinds
def test_loss_is_the_mean_negative_log_likelihood(kind):
    model, idx, targets = random_model(kind), tokens(2, 12), tokens(2, 12)
    targets[0, :3] = -1  # ignored
    logits, loss = model(idx, targets)
    p = logits.double().exp() / logits.double().exp().sum(-1, keepdim=True)
    terms = [-p[b, t, targets[b, t]].log() for b in range(2) for t in range(12) if targets[b, t] >= 0]
    assert loss.item() == pytest.approx(sum(terms).item() / len(terms), rel=1e-4)
    torch.testing.assert_close(model(idx)[0], logits[:, -1:])


@all_kinds
def test_later_tokens_do_not_change_earlier_logits(kind):
    model, idx = random_model(kind), tokens(2, 12)
    before = model(idx, idx)[0]
    for t in (1, 7, 11):
        other = idx.clone()
        other[:, t:] = (other[:, t:] + 1 + tokens(2, 12 - t, vocab_size=39)) % 40
        after = model(other, idx)[0]
        torch.testing.assert_close(after[:, :t], before[:, :t], rtol=1e-5, atol=1e-5)
        assert (after[:, t] != before[:, t]).any(dim=-1).all()


def test_attention_sees_what_came_before():
    model, idx = random_model(), tokens(2, 12)
    other = idx.clone()
    other[:, 0] = (other[:, 0] + 1) % 40
    assert ((model(idx, idx)[0] - model(other, idx)[0]).abs().amax(-1) > 1e-4).all()


@pytest.mark.parametrize("kind", ["dense", "btt"])
@pytest.mark.parametrize("qk_norm", [True, False])
def test_forward_is_gpt2(kind, qk_norm):
    """The whole model written out with matrices: pre-norm blocks, µP's 8/hs logits, branches times
    √(3/n_layer)."""
    def norm(x, layer):
        x = x - x.mean(-1, keepdim=True)
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * layer.weight + layer.bias

    def linear(x, layer):
        return x @ layer.to_dense().T + layer.bias
    model, idx = random_model(kind, n_layer=4, bias=True, qk_norm=qk_norm), tokens(12)
    x = model.wte.weight[idx] + model.wpe.weight[:12]
    scale = math.sqrt(3 / 4)
    for block in model.blocks:
        h, heads = norm(x, block.ln_1), []
        q, k, v = (linear(h, layer) for layer in (block.attn.q, block.attn.k, block.attn.v))
        for head in range(2):
            qh, kh, vh = (z[:, 8 * head:8 * head + 8] for z in (q, k, v))
            if qk_norm:
                qh, kh = norm(qh, block.attn.q_norm), norm(kh, block.attn.k_norm)
            scores = (qh @ kh.T) * 8 / 8
            scores = scores.masked_fill(torch.arange(12)[:, None] < torch.arange(12), -math.inf)
            heads.append(scores.softmax(-1) @ vh)
        x = x + scale * linear(torch.cat(heads, dim=-1), block.attn.o)
        h = linear(norm(x, block.ln_2), block.mlp.up)
        h = h * 0.5 * (1 + torch.erf(h / math.sqrt(2)))
        x = x + scale * linear(h, block.mlp.down)
    logits = norm(x, model.ln_f) @ model.lm_head.to_dense().T
    torch.testing.assert_close(model(idx[None], idx[None])[0][0].double(), logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("n_embd, n_head", [(16, 4), (32, 1)])
def test_attention_logits_scale_with_8_over_head_size(n_embd, n_head):
    """Unlike 1 / √hs: seen in the weights on the first of two tokens."""
    model = random_model(n_layer=1, n_embd=n_embd, n_head=n_head, qk_norm=False)
    attn, x, seen = model.blocks[0].attn, torch.randn(1, 2, n_embd, dtype=torch.float64), []
    attn.o.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    attn(x, [])
    hs = n_embd // n_head
    q, k, v = ((x[0] @ layer.to_dense().T).view(2, n_head, hs) for layer in (attn.q, attn.k, attn.v))
    weights = ((q[1][:, None] * k.transpose(0, 1)).sum(-1) * 8 / hs).softmax(-1)  # (nh, 2)
    expected = (weights[..., None] * v.transpose(0, 1)).sum(1).flatten()
    torch.testing.assert_close(seen[0][0, 1], expected)


@pytest.mark.parametrize("kind", ["btt", "btt_moe", "moe", "dyad"])
def test_cores_are_cast_once_for_generation(kind):
    """Under autocast, which would cast them for every token; to the same logits."""
    model, idx = random_model(kind).float(), tokens(2, 12)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = model(idx)[0]
        with fixed_cores(model):
            layers = [m for m in model.modules() if isinstance(m, Structured)]
            assert {core.dtype for layer in layers for core in layer.fixed.values()} == {torch.bfloat16}
            assert torch.equal(model(idx)[0], expected)


@pytest.mark.parametrize("kind", ["btt", "btt_moe", "moe", "dyad"])
def test_weights_that_change_after_generation_count(kind):
    """Cores are kept normalized while tokens are generated, and no longer."""
    model, idx = random_model(kind), tokens(2, 5)
    with torch.no_grad():
        before = model(idx)[0]
        model.generate(idx, 2)
        assert torch.equal(model(idx)[0], before)
        for layer in model.modules():
            if isinstance(layer, Structured):
                for name in layer.fans():
                    getattr(layer, name).mul_(-0.5)
        assert not torch.allclose(model(idx)[0], before)
    fresh = build(kind).double().eval()
    fresh.load_state_dict(model.state_dict())
    torch.testing.assert_close(fresh(idx)[0], model(idx)[0])


@pytest.mark.parametrize("top_k", [1, 2, 3, 4])
@pytest.mark.parametrize("kind", ["btt_moe", "low_rank_moe", "dense_moe", "moe", "moe of btt", "dyad_moe"])
def test_every_router_learns_from_the_loss_alone(kind, top_k):
    """The loss alone has a gradient in each router, for one expert per token too.

    A softmax over one chosen logit has none, exactly.
    """
    model = random_model(kind, top_k=top_k)
    routers = {name: m.router for name, m in model.named_modules() if isinstance(m, MoE)}
    assert routers
    grads = torch.autograd.grad(model(tokens(3, 12), tokens(3, 12))[1], list(routers.values()))
    for name, grad in zip(routers, grads):
        assert grad.isfinite().all() and grad.abs().max() > 1e-12, name


@pytest.mark.parametrize("kind, routers", [("dense", 0), ("btt_moe", 12), ("moe", 2), ("attn", 8),
                                           ("mlp", 4)])
def test_aux_is_the_mean_of_what_the_routers_report(kind, routers):
    model = random_model(kind)
    reports = []
    for module in model.modules():
        if isinstance(module, MoE):
            module.register_forward_hook(lambda module, args, out: reports.append(out[1]))
    _, loss, aux = model(tokens(3, 12), tokens(3, 12), return_aux=True)
    assert len(reports) == routers and aux.load.shape == (routers, 4 if routers else 0)
    torch.testing.assert_close(aux.load.sum(1), torch.ones(routers, dtype=torch.float64))
    zero = torch.zeros((), dtype=torch.float64)
    losses = [r.load_balance + 0.1 * r.z_loss for r in reports]
    torch.testing.assert_close(aux.loss, sum(losses, zero) / max(1, routers))
    if routers:  # cross-entropy alone is the loss; the routers' own gradient comes from aux.loss
        assert set(torch.autograd.grad(aux.loss, [m.router for m in model.modules() if isinstance(m, MoE)]))


@pytest.mark.parametrize("kind", ["dense", "moe", "btt_moe"])
def test_dropout(kind):
    model, idx = random_model(kind, dropout=0.5), tokens(2, 12)
    torch.testing.assert_close(model(idx, idx)[0], model(idx, idx)[0], rtol=0, atol=0)
    model.train()
    assert not torch.allclose(model(idx, idx)[0], model(idx, idx)[0])
    plain = random_model(kind).train()
    torch.testing.assert_close(plain(idx, idx)[0], plain(idx, idx)[0], rtol=0, atol=0)


@pytest.mark.parametrize("place", ["embeddings", "attention", "attention branch", "mlp branch"])
def test_every_place_of_dropout(place):
    """Each place drops by itself, when the others let everything through."""
    model, idx = random_model(dropout=0.5, n_layer=1), tokens(2, 12)
    block = model.blocks[0]
    model.train()
    modules = {"embeddings": model.dropout, "attention branch": block.attn.resid_dropout,
               "mlp branch": block.dropout}
    for name, module in modules.items():
        if name != place:
            module.p = 0.0
    if place != "attention":
        block.attn.dropout = 0.0
    assert not torch.allclose(model(idx, idx)[0], model(idx, idx)[0])


@all_kinds
def test_bias(kind):
    model, idx = random_model(kind, bias=True), tokens(2, 12)
    names = {name for name, _ in model.named_parameters() if name.endswith("bias")}
    for layer in projections(model):
        assert sum(name.startswith(f"blocks.{layer[0]}.") and f".{layer[2:]}." in name for name in names) == 1
    assert sum("ln_" in name for name in names) == 5 and sum("_norm" in name for name in names) == 4
    assert not any(name.endswith("bias") for name, _ in build(kind).named_parameters())
    logits = model(idx, idx)[0]
    for name, p in model.named_parameters():
        if name in names and "k_norm" not in name:  # a vector added to every key moves a query's logits alike
            with torch.no_grad():
                p += torch.randn_like(p)
                assert not torch.equal(logits, changed := model(idx, idx)[0]), name
            logits = changed


# ---- Initialization and parameters -------------------------------------------------------------------------

@all_kinds
def test_branches_and_head_start_at_zero(kind):
    """At init every block is the identity, and only what ends a branch is zero."""
    model, x = build(kind), torch.randn(2, 12, 16)
    for block in model.blocks:
        assert torch.equal(block(x, []), x)
    assert (model.lm_head.to_dense() == 0).all()
    zero = [name for name, p in model.named_parameters() if (p == 0).all()]
    assert all(any(last in name for last in (".o.", ".down.", "lm_head.")) for name in zero), zero
    for embedding in (model.wte, model.wpe):
        assert embedding.weight.std().item() == pytest.approx(0.02, rel=0.25)


@all_kinds
def test_every_parameter_gets_a_gradient(kind):
    """Also those of the experts that no token chose: DDP and the optimizer count on it."""
    model = build(kind, bias=True, top_k=1)
    model(tokens(1, 1), tokens(1, 1))[1].backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None]
    model = random_model(kind, bias=True).train()
    model(tokens(4, 12), tokens(4, 12))[1].backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    assert all(p.grad.abs().max() > 0 for name, p in model.named_parameters() if "k_norm.bias" not in name)


@pytest.mark.parametrize("kind", ["dense", "btt", "btt_moe"])
def test_training_overfits_a_batch(kind):
    model = build(kind)
    optimizer = model.configure_optimizers(0.1, 0.02, (0.9, 0.95), "cpu", base_width=16)
    idx, targets = tokens(2, 12), tokens(2, 12)
    for _ in range(60):
        loss = model(idx, targets)[1]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.2 * math.log(40)


def test_num_params():
    """Counted by hand, d = 16, hs = 8, one layer: embeddings, norms, projections, routers, head."""
    rest = 40 * 16 + 12 * 16 + 3 * 16 + 2 * 8 + 16 * 40  # wte, wpe, three norms, q and k norms, lm_head
    attn, mlp, router = 4 * 16 * 16, 2 * 16 * 64, 4 * 16
    model = build(n_layer=1)
    assert model.num_params() == model.num_params(active=True) == rest + attn + mlp
    model = build("moe", n_layer=1)
    assert model.num_params() == rest + attn + 4 * mlp + router
    assert model.num_params(active=True) == rest + attn + 2 * mlp + router
    # rank 1: 16 -> 16 as 4·4 -> 4·4 (64 + 64), 16 -> 64 as 4·4 -> 8·8 (128 + 256), 64 -> 16 (256 + 128)
    expert = 4 * 128 + 2 * 384 + 4 * 2  # gains of both cores of v, o, up and down
    for top_k in (1, 2, 4):
        model = build("btt_moe", n_layer=1, top_k=top_k)
        assert model.num_params() == rest + 4 * expert + 5 * router + 4 * 64
        assert model.num_params(active=True) == rest + top_k * expert + 5 * router + 4 * 64
    biases = 4 * 16 + 64 + 16 + 3 * 16 + 2 * 8
    assert build(n_layer=1, bias=True).num_params() == rest + attn + mlp + biases
    assert build(n_layer=1, qk_norm=False).num_params() == rest + attn + mlp - 2 * 8


@all_kinds
def test_parameters_are_counted_without_making_the_model(kind):
    config = GPTConfig(**SMALL | KINDS[kind] | dict(n_layer=3))
    assert GPT.count_params(config) == sum(p.numel() for p in GPT(config).parameters())


def test_layers_choose_what_is_structured():
    def cores(model):
        layers = projections(model)
        return {name: sum(p.numel() for p in layer.parameters()) for name, layer in layers.items()}
    dense, every = cores(build("dense")), cores(build("btt_moe"))
    for part, kind in (("qkvo", "attn"), (("up", "down"), "mlp")):
        expected = {name: (every if name[2:] in part else dense)[name] for name in dense}
        assert cores(build(kind)) == expected and expected not in (dense, every)


def test_options_reach_the_projections():
    model = build("btt", rank=3)
    assert all(layer.sizes.rho == 3 for layer in projections(model).values())
    assert all(layer.blocks == 2 and layer.variant == "dt" for layer in
               projections(build("dyad", dyad_blocks=2, dyad_variant="dt")).values())
    mixtures = projections(build("btt_moe", top_k=3)).values()
    assert all(layer.top_k == 3 and layer.num_experts == 4 for layer in mixtures)
    assert not any("gain" in name for name, _ in build("btt", weight_norm=False).named_parameters())
    gains = [name for name, _ in build("btt").named_parameters() if "gain" in name]
    assert gains and not any(".q." in name or ".k." in name for name in gains)  # a norm would undo them
    assert any(".q." in name for name, _ in build("btt", qk_norm=False).named_parameters() if "gain" in name)


# ---- Cost --------------------------------------------------------------------------------------------------

@all_kinds
def test_flops_are_those_executed(kind):
    model, idx = random_model(kind), tokens(3, 12)
    with sdpa_kernel(SDPBackend.MATH):
        forward = counted_flops(lambda: model(idx, idx))
        both = counted_flops(lambda: model(idx, idx)[1].backward())
    assert forward == 3 * 12 * model.flops_per_token()
    # recomputed or not, attention's backward is twice its forward; embeddings have no products
    assert both - forward == pytest.approx(2 * forward + recomputed_flops(model, 3 * 12), rel=0.01)
    assert model.flops_per_token() - model.flops_per_token(output_layer=False) == 2 * 16 * 40


@pytest.mark.parametrize("vocab_size, rows", [(40, 40), (1030, 1088)])
def test_a_tied_output_layer_is_the_embedding(vocab_size, rows):
    """One matrix for both, padded as an output layer is: counted once, multiplied by in every forward, and
    learning from both of its places."""
    model, untied = (random_model(vocab_size=vocab_size, tie_embeddings=tied) for tied in (True, False))
    assert model.wte.weight.shape == (rows, 16)
    assert untied.num_params() - model.num_params() == vocab_size * 16
    idx, targets = tokens(2, 12), tokens(2, 12)
    assert counted_flops(lambda: model(idx)) == counted_flops(lambda: untied(idx))
    assert model.flops_per_token() == untied.flops_per_token()
    assert model.flops_per_token() - model.flops_per_token(output_layer=False) == 2 * 16 * rows
    weights = {name: w for name, w in model.state_dict().items() if name != "wte.weight"}
    embedding = model.wte.weight.detach()
    untied.load_state_dict(weights | {"wte.weight": embedding[:vocab_size], "lm_head.A": embedding[None]})
    (logits, loss), (expected, _) = model(idx, targets), untied(idx, targets)
    torch.testing.assert_close(logits, expected)
    loss.backward()
    untied(idx, targets)[1].backward()
    expected = untied.lm_head.A.grad[0]
    expected[:vocab_size] += untied.wte.weight.grad
    torch.testing.assert_close(model.wte.weight.grad, expected)
    assert (model.wte.weight.grad[vocab_size:] == 0).all()


# ---- Heads -------------------------------------------------------------------------------------------------

def test_head_aligned_projections_see_heads():
    """A head is one φ of q, k, v and one γ of the output projection: between it and a block of the other
    side, γ or φ, there is a product of ρ columns. Blocks of a projection that is not aligned have a greater
    rank."""
    def ranks(layer, rows, columns):
        blocks = layer.to_dense().detach().reshape(rows, 64 // rows, columns, 64 // columns).transpose(1, 2)
        return set(torch.linalg.matrix_rank(blocks).flatten().tolist())
    for aligned, options in ((True, {}), (True, dict(head_aligned=True)), (False, dict(head_aligned=False))):
        attn = random_model("btt", n_embd=64, n_head=4, rank=2, **options).blocks[0].attn
        for layer in (attn.q, attn.k, attn.v):
            assert layer.sizes.phi == (4 if aligned else 8)
            assert ranks(layer, 4, layer.sizes.gamma) == ({2} if aligned else {4})
        assert attn.o.sizes.gamma == (4 if aligned else 8)
        assert ranks(attn.o, attn.o.sizes.phi, 4) == ({2} if aligned else {4})


@pytest.mark.parametrize("options, aligned", [
    *((KINDS[kind], kind in ("btt", "moe of btt")) for kind in KINDS),
    (dict(struct="btt", layers="attn"), True), (dict(struct="btt", layers="mlp"), False),
    (dict(struct="btt", rank=1), False), (dict(struct="btt", rank=2), True)], ids=str)
def test_btt_without_experts_is_head_aligned_by_default_where_it_has_full_rank_then(options, aligned):
    """φ or γ is then the number of heads, 4, instead of 8: with rank 1, as Monarch has, products of 32
    columns."""
    attn, free = (GPT(GPTConfig(**SMALL | dict(n_head=4, n_embd=64) | options | dict(head_aligned=follow)))
                  .blocks[0].attn for follow in (None, False))
    for name, index in (("q", "phi"), ("k", "phi"), ("v", "phi"), ("o", "gamma")):
        sizes, of_free = (getattr(getattr(getattr(a, name), "experts", getattr(a, name)), "sizes", None)
                          for a in (attn, free))
        assert (sizes != of_free) == aligned
        assert not aligned or (getattr(sizes, index), getattr(of_free, index)) == (4, 8)


@pytest.mark.parametrize("struct, n_embd, n_head", [
    ("monarch", 64, 4), ("monarch", 64, 8), ("monarch", 96, 6), ("btt", 64, 2), ("btt", 64, 4),
    ("btt", 128, 4)])
def test_heads_take_no_rank_away_by_default(struct, n_embd, n_head):
    """q, k, v and o have the rank that they have where nothing follows the heads."""
    def ranks(**options):
        attn = GPT(GPTConfig(struct=struct, n_embd=n_embd, n_head=n_head, n_layer=1, vocab_size=32,
                             block_size=16, weight_norm=False, **options)).double().blocks[0].attn
        torch.nn.init.normal_(getattr(attn.o, attn.o.order[-1]))    # it starts at zero
        return [int(torch.linalg.matrix_rank(layer.to_dense())) for layer in (attn.q, attn.k, attn.v, attn.o)]
    assert ranks() == ranks(head_aligned=False)


@pytest.mark.parametrize("options, word", [(dict(struct="dense"), "'dense'"), (dict(struct="tt"), "'tt'"),
                                           (dict(struct="dyad"), "'dyad'"),
                                           (dict(struct="btt", layers="mlp"), "layers"),
                                           (dict(struct="einsum", theta=(.5, .5, 0, .5, .5, 0, 0)), "phi")])
def test_head_aligned_needs_heads(options, word):
    with pytest.raises(ValueError, match=word):
        GPT(GPTConfig(**SMALL | options, head_aligned=True))


# ---- Optimizer ---------------------------------------------------------------------------------------------

def groups_of(model, decay=0.1, lr=0.01, base_width=128):
    """{parameter name: its group of the optimizer}."""
    optimizer = model.configure_optimizers(decay, lr, (0.9, 0.95), "cpu", base_width=base_width)
    groups = {p: group for group in optimizer.param_groups for p in group["params"]}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(groups)
    return {name: groups[p] for name, p in model.named_parameters()}


def test_without_mup_every_learning_rate_is_the_same():
    groups = groups_of(build("btt_moe"), base_width=None).values()
    assert {(g["lr"], g["weight_decay"]) for g in groups} == {(0.01, 0.1), (0.01, 0.0)}


def is_no_matrix(name):
    """Whether a parameter is a gain, a bias, or a norm's."""
    return name.endswith("bias") or any(part in name for part in ("gain", "ln_", "_norm"))


@all_kinds
@pytest.mark.parametrize("base_width", [16, 128])
def test_learning_rates_are_those_of_the_layers(kind, base_width):
    """Each layer answers for its cores and its router (see test_structured.py); all else has the plain
    rate."""
    model = build(kind, bias=True)
    groups = groups_of(model, base_width=base_width)
    for prefix, module in model.named_modules():
        if isinstance(module, (Structured, MoE)):
            for name, multiplier in module.lr_multipliers(base_width).items():
                assert groups[f"{prefix}.{name}"]["lr"] == pytest.approx(0.01 * multiplier)
    plain = [name for name in groups if is_no_matrix(name) or name in ("wte.weight", "wpe.weight")]
    assert len(plain) > 20 and all(groups[name]["lr"] == 0.01 for name in plain)
    assert all(group["lr"] == pytest.approx(0.01 * group["lr_multiplier"]) for group in groups.values())


@pytest.mark.parametrize("base_width", [16, 128])
def test_learning_rates_of_a_dense_model(base_width):
    """DESIGN 4: base width / fan_in for every matrix, the output layer included, and the embeddings' as
    given."""
    groups = groups_of(build("dense", n_embd=32, qk_norm=False), base_width=base_width)
    for name in ("blocks.1.attn.q.A", "blocks.1.attn.k.A", "blocks.1.attn.v.A", "blocks.1.attn.o.A",
                 "blocks.1.mlp.up.A", "lm_head.A"):
        assert groups[name]["lr"] == pytest.approx(0.01 * base_width / 32)
    assert groups["blocks.1.mlp.down.A"]["lr"] == pytest.approx(0.01 * base_width / 128)
    assert groups["wte.weight"]["lr"] == groups["wpe.weight"]["lr"] == groups["ln_f.weight"]["lr"] == 0.01


@all_kinds
def test_a_step_shrinks_every_matrix_alike(kind):
    """Cores, routers and embeddings decay by learning rate · weight decay; gains, biases and norms do not.

    There is one group for each learning rate and decay.
    """
    groups = groups_of(build(kind, bias=True))
    for name, group in groups.items():
        shrinks = 0 if is_no_matrix(name) else 0.01 * 0.1
        assert group["lr"] * group["weight_decay"] == pytest.approx(shrinks), name
        assert group["betas"] == (0.9, 0.95)
    distinct = {id(group): (group["lr"], group["weight_decay"]) for group in groups.values()}
    assert len(set(distinct.values())) == len(distinct)


# ---- Old checkpoints ---------------------------------------------------------------------------------------

MODELS_V1 = json.loads((ROOT / "tests" / "fixtures" / "models_v1.json").read_text())


@pytest.mark.parametrize("kind", MODELS_V1)
def test_weights_of_the_first_version_mean_what_they_meant(kind):
    """Their names, their shapes, and the loss of a model with weights sin(0.7 i^1.1 + n), for the n-th by
    name."""
    options, loss, shapes = (MODELS_V1[kind][key] for key in ("options", "loss", "shapes"))
    config = GPTConfig(block_size=8, vocab_size=12, n_layer=1, n_head=2, n_embd=16, cheapest_sizes=True,
                       **options)
    model = GPT(config).double().eval()
    weights = dict(sorted(model.state_dict().items()))
    assert {name: list(w.shape) for name, w in weights.items()} == shapes
    for n, w in enumerate(weights.values()):
        w.copy_(torch.sin(0.7 * torch.arange(w.numel(), dtype=torch.float64) ** 1.1 + n).view_as(w))
    idx = torch.arange(16).view(2, 8) * 5 % 12
    with torch.no_grad():
        assert model(idx, (idx + 1) % 12)[1].item() == pytest.approx(loss, abs=1e-5)


# ---- Generation --------------------------------------------------------------------------------------------

@pytest.mark.parametrize("vocab_size", [1030, 1088, 500])
def test_no_token_outside_the_vocabulary(vocab_size):
    """A large vocabulary's output layer is padded to a multiple of 64; what lies beyond is never seen."""
    model = build(vocab_size=vocab_size)
    rows = model.lm_head.to_dense().shape[0]
    assert rows == (1088 if vocab_size > 1024 else vocab_size)
    with torch.no_grad():
        (weight,) = model.lm_head.parameters()
        weight.view(rows, -1)[vocab_size:] = torch.randn(rows - vocab_size, 16) * 1e4
    idx = tokens(4, 6, vocab_size=vocab_size)
    logits, loss = model(idx, idx)
    assert logits.shape == (4, 6, vocab_size) and loss.item() == pytest.approx(math.log(vocab_size), rel=0.01)
    for options in (dict(temperature=0), dict(temperature=1.0), dict(temperature=0.1, top_k=2000)):
        assert model.generate(idx, 20, **options).max() < vocab_size


@all_kinds
def test_cache_changes_no_token(kind):
    """Within the window and past block_size, where it slides more than once; also from a prompt that is too
    long."""
    model = random_model(kind)
    for prompt, new in ((3, 22), (12, 5), (20, 5)):
        idx = tokens(2, prompt)
        with_cache, without = (model.generate(idx, new, use_cache=use_cache,
                                              generator=torch.Generator().manual_seed(1), temperature=1.3,
                                              top_k=20)
                               for use_cache in (True, False))
        assert torch.equal(with_cache, without)
        assert with_cache.shape == (2, prompt + new) and torch.equal(with_cache[:, :prompt], idx)
        assert len(set(with_cache[0].tolist())) > 3  # not one token over and over


@pytest.mark.parametrize("kind", ["dense", "btt_moe", "moe"])
def test_cache_reads_each_token_once(kind):
    """Positions run through the model for each new token: the prompt, then one at a time while the window has
    room."""
    model, read = random_model(kind), []
    model.wte.register_forward_hook(lambda module, args, out: read.append(args[0].shape[1]))
    model.generate(tokens(2, 4), 9)
    assert read == [4] + [1] * 8
    read.clear()
    model.generate(tokens(2, 4), 100)
    assert len(read) == 100 and max(read) <= 12 and sum(read) < 100 * 12 / 2
    read.clear()
    model.generate(tokens(2, 4), 9, use_cache=False)
    assert read == list(range(4, 13))


def test_generation_does_without_cudnns_attention(monkeypatch):
    """Whose plan is for one length of the keys, where every token has another. Training may take it."""
    attention, allowed = torch.nn.functional.scaled_dot_product_attention, []

    def noted(*args, **options):
        allowed.append(torch.backends.cuda.cudnn_sdp_enabled())
        return attention(*args, **options)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", noted)
    model = random_model()
    model.generate(tokens(2, 3), 5)
    assert allowed == [False] * 10  # two layers
    model(tokens(2, 3))
    assert allowed[10:] == [True] * 2


def test_greedy_tokens_are_the_likeliest():
    model, idx = random_model(), tokens(2, 3)
    for token in model.stream(idx, 9, temperature=0):
        torch.testing.assert_close(token, model(idx)[0][:, -1].argmax(-1, keepdim=True))
        idx = torch.cat([idx, token], dim=1)


def test_sampling_follows_temperature_and_top_k():
    """Frequencies over many draws of one token, against the softmax by hand."""
    model, idx = random_model(), tokens(1, 3)
    with torch.no_grad():
        model.lm_head.A *= 1.5 / model(idx)[0].std()  # neither flat nor certain
    logits = model(idx)[0][0, -1]
    for temperature, top_k in ((1.0, None), (0.5, None), (1.0, 3), (2.0, 1), (1.0, 99)):
        p = logits.div(temperature).exp()
        if top_k and top_k < 40:
            p[logits.argsort(descending=True)[top_k:]] = 0
        drawn = model.generate(idx.expand(5000, 3), 1, temperature=temperature, top_k=top_k)[:, -1]
        frequencies = torch.bincount(drawn, minlength=40) / 5000
        assert (frequencies - p / p.sum()).abs().max() < 0.03
        assert not top_k or len(drawn.unique()) <= top_k


def test_tokens_are_drawn_as_by_multinomial():
    """Bitwise, but without its check of the probabilities, for which it waits for the GPU."""
    logits = torch.randn(50, 300)
    for top_k in (None, 20):
        least = logits.topk(top_k or 300).values[:, -1:]
        p = logits.masked_fill(logits < least, -math.inf).softmax(dim=-1)
        drawn, expected = (draw(generator=torch.Generator().manual_seed(3)) for draw in (
            lambda generator: _sample(logits, 1.0, top_k, 1.0, generator),
            lambda generator: p.multinomial(1, generator=generator)))
        assert torch.equal(drawn, expected)


def nucleus(p, top_p):
    """The smallest set of tokens whose probabilities sum to top_p or more, of equally small ones the
    likeliest: by trying all of them."""
    sets = itertools.chain.from_iterable(itertools.combinations(range(len(p)), n) for n in range(len(p) + 1))
    reached = [(len(kept), -p[list(kept)].sum(), kept) for kept in sets if p[list(kept)].sum() >= top_p]
    return list(min(reached)[2])


@pytest.mark.parametrize("temperature, top_k, top_p", [
    (1.0, None, 0.9), (1.0, None, 0.5), (1.0, None, 1e-6), (0.5, None, 0.8), (2.0, 4, 0.8), (1.0, 3, 1.0),
    (1.0, 99, 0.999), (1.0, 1, 0.3)])
def test_odds_of_temperature_then_top_k_then_top_p(temperature, top_k, top_p):
    """Against every set of tokens, in numpy: no sampling, so that no luck is needed."""
    logits = torch.randn(20, 7, dtype=torch.float64) * 2
    odds = _kept_probabilities(logits / temperature, top_k, top_p).numpy()
    for row, found in zip(logits.numpy(), odds):
        p = np.exp(row / temperature)
        p[np.argsort(-row)[top_k or 7:]] = 0
        p /= p.sum()
        expected = np.zeros(7)
        kept = nucleus(p, min(top_p, 1 - 1e-12))
        expected[kept] = p[kept]
        np.testing.assert_allclose(found / found.sum(), expected / expected.sum(), rtol=1e-9)


def test_equally_likely_tokens_do_not_all_pass_top_p():
    """A quarter is reached by three of ten: of equally likely ones, those of the lowest ids."""
    odds = _kept_probabilities(torch.zeros(1, 10, dtype=torch.float64), None, 0.25)
    assert odds[0].nonzero().flatten().tolist() == [0, 1, 2]


def test_only_what_top_p_keeps_is_drawn():
    """By stream and generate, which hand it on."""
    model, idx = random_model(), tokens(1, 3)
    likeliest = model(idx)[0][0, -1].argmax().item()
    drawn = model.generate(idx.expand(300, 3), 1, temperature=5.0, top_p=1e-6)[:, -1]
    assert drawn.unique().tolist() == [likeliest]
    assert len(model.generate(idx.expand(300, 3), 1, temperature=5.0)[:, -1].unique()) > 5


@pytest.mark.parametrize("options", [dict(temperature=1e-38), dict(top_p=0.0)])
def test_the_least_temperature_and_top_p_leave_the_likeliest_token(options):
    model, idx = random_model().float(), tokens(50, 3)
    likeliest = model(idx)[0][:, -1].argmax(-1)
    assert torch.equal(model.generate(idx, 1, **options)[:, -1], likeliest) and likeliest.any()


@pytest.mark.parametrize("kind", ["dense", "btt_moe", "moe"])
@pytest.mark.parametrize("use_cache", [True, False])
def test_prompts_of_different_lengths_together(kind, use_cache):
    """Each row goes on as it does alone, from its own prompt, past block_size too."""
    model = random_model(kind)
    rows, lengths, new = tokens(4, 9), (3, 9, 5, 3), 8
    alone = [model.generate(row[None, :length], new, temperature=0)[0] for row, length in zip(rows, lengths)]
    known = torch.full((4, 6), -1)
    for row, length, rest in zip(rows, lengths, known):
        rest[:length - 3] = row[3:length]
    found = model.generate(rows[:, :3], 6 + new, temperature=0, use_cache=use_cache, known=known)
    for row, length, expected in zip(found, lengths, alone):
        assert torch.equal(row[:length + new], expected)


def test_generation_needs_a_prompt():
    with pytest.raises(ValueError, match="at least one token"):
        build().generate(tokens(1, 0), 3)


def test_more_tokens_than_block_size():
    with pytest.raises(ValueError, match="13 tokens.*block_size = 12"):
        build()(tokens(1, 13))


# ---- Configuration -----------------------------------------------------------------------------------------

@pytest.mark.parametrize("options, message", [
    (dict(n_head=5), "n_head = 5 must divide n_embd = 16"), (dict(layers="ffn"), "'ffn'"),
    (dict(dropout=1.0), "dropout.*1.0"),
    (dict(dropout=-0.1), "dropout.*-0.1"), (dict(gelu="relu"), "gelu.*'relu'"),
    (dict(num_experts=4, ffn_experts=4), "num_experts.*ffn_experts"),
    (dict(num_experts=1), "num_experts.*1"), (dict(ffn_experts=-2), "ffn_experts.*-2"),
    (dict(num_experts=4, top_k=5), "top_k.*5"),
    (dict(ffn_experts=4, top_k=0), "top_k.*0"), *((dict([(name, 0)]), f"{name}.*0") for name in SMALL)])
def test_config_errors(options, message):
    with pytest.raises(ValueError, match=message) as caught:
        GPTConfig(**SMALL | options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("options, message", [
    (dict(struct="lowrank"), "'lowrank'"), (dict(struct="einsum"), "theta"),
    (dict(struct="btt", n_embd=17, n_head=1), "17"),
    (dict(struct="btt", theta=(1, 0, 0, 1, 0, 0, 0)), "theta"), (dict(struct="dyad", dyad_blocks=3), "3")])
def test_structure_errors(options, message):
    with pytest.raises(ValueError, match=message):
        GPT(GPTConfig(**SMALL | options))


@pytest.mark.parametrize("experts", [dict(struct="btt", num_experts=4), dict(struct="dense", num_experts=4),
                                     dict(struct="btt", num_experts=4, top_k=1)])
def test_routers_of_q_k_and_v_share_a_product(experts, monkeypatch):
    """Where the kernel does not compute logits itself: the same loss and gradients as by three products."""
    config = GPTConfig(n_layer=2, n_head=2, n_embd=24, block_size=16, vocab_size=50, **experts)
    gpt = GPT(config).double()
    with torch.no_grad():
        for p in gpt.parameters():
            p.add_(0.05 * torch.randn_like(p))
    idx = torch.randint(50, (3, 16))
    products, router_logits = [], kernels.router_logits

    def counted(x, router):
        products.append(len(router))
        return router_logits(x, router)

    monkeypatch.setattr(operators, "_kernel", "torch")
    monkeypatch.setattr(kernels, "router_logits", counted)
    results = []
    for own in (True, False):
        if own:
            monkeypatch.setattr(kernels, "computes_logits", lambda x: True)
        else:
            monkeypatch.setattr(kernels, "computes_logits", operators.computes_logits)
        gpt.zero_grad()
        products.clear()
        _, loss, aux = gpt(idx, idx, return_aux=True)
        (loss + aux.loss).backward()
        results.append([loss.detach(), *(p.grad for p in gpt.parameters())])
        assert (12 in products) == (not own)
    for shared, alone in zip(*results):
        torch.testing.assert_close(shared, alone, rtol=1e-9, atol=1e-12)
    if experts.get("top_k"):
        compiled = torch.compile(gpt, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(idx, idx)[1], results[0][0])


@torch.no_grad()
def test_text_read_in_pieces_has_the_logits_of_the_whole():
    model, idx = random_model("btt"), tokens(2, 12)
    cache = KVCache(model.config, 2, "cpu", torch.float64)
    found = [model(part, part, cache=cache)[0] for part in idx.split([5, 4, 1, 2], dim=1)]
    torch.testing.assert_close(torch.cat(found, dim=1), model(idx, idx)[0], rtol=1e-5, atol=1e-5)


def test_dropout_of_all_leaves_the_residual_stream_as_it_was():
    block, x = random_model(dropout=0.5).blocks[0].train(), torch.randn(2, 5, 16, dtype=torch.float64)
    block.attn.resid_dropout.p = block.dropout.p = 1.0
    assert torch.equal(block(x, []), x)


def test_new_routers_are_balanced_by_the_mean_over_a_steps_sequences():
    model, calls = random_model("btt_moe", n_layer=1), []
    model.rebalance = lambda load, variance, rate: calls.append((load, variance, rate))
    parts = [(tokens(n, 12), tokens(n, 12)) for n in (1, 3)]
    model.balance_routers([parts] * 3)
    with torch.no_grad():
        *_, aux = model.eval()(*map(torch.cat, zip(*parts)), return_aux=True)
    for i, (load, variance, rate) in enumerate(calls):
        torch.testing.assert_close((load, variance), (aux.load, aux.variance))
        assert rate == pytest.approx(1 / (1 + i / 5))
    assert len(calls) == 3
