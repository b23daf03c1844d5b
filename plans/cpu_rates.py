# Learning rates for plans/cpu.py: three for each structure at width 128, for a quarter of its budget there.
import os
import runpy

_cpu = runpy.run_path(os.path.join(os.path.dirname(__file__), "cpu.py"))
globals().update({k: v for k, v in _cpu.items() if not k.startswith("_")})
n_embd = 128
structures = {label: dict(flops=own["flops"][128] / 4, learning_rate=[1.5e-3, 3e-3, 6e-3])
              for label, own in _cpu["structures"].items()}
evals = 8
