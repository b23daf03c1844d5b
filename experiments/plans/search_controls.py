# Controls for results/search/follow.py, with its budget and seeds.
#
# - Its θ's are plain einsums with weight norm, and dense is neither: is it that which they are ahead of dense by?
# - Do the named structures keep up as train.py makes them, aligned with heads, and at the rate that plans/cpu_rates.py found?
# - Dense is best at width 64 for this budget (results/scaling): is the best θ still ahead there, at its FLOPs per token?
import os
import runpy

_follow = runpy.run_path(os.path.join(os.path.dirname(__file__), "..", "..", "results", "search", "follow.py"))
globals().update({k: v for k, v in _follow.items() if not k.startswith("_")})
_best = "θ 3/4 0 1/4 9/16 3/16 1/4 0"
structures = {
    "dense, an einsum": dict(struct="einsum", theta=(1, 0, 0, 1, 0, 0, 0), n_embd=96, learning_rate=3e-3),
    "btt, aligned": dict(struct="btt", n_embd=152, learning_rate=1.5e-3),
    "monarch, aligned": dict(struct="monarch", n_embd=240, learning_rate=1.5e-3),
    "dense": _follow["structures"]["dense"] | dict(n_embd=64),
    _best: _follow["structures"][_best] | dict(n_embd=88),
}
