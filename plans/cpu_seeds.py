# The noise of plans/cpu.py: a second seed of its runs of width 64, for one structure of each kind.
import os
import runpy

_cpu = runpy.run_path(os.path.join(os.path.dirname(__file__), "cpu.py"))
globals().update({k: v for k, v in _cpu.items() if not k.startswith("_")})
structures = {label: _cpu["structures"][label] for label in ("dense", "monarch", "btt", "btt_moe")}
n_embd = 64
seed = 2
