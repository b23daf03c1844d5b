# Standard MoE, the baseline: 8 experts that are whole dense MLPs, 2 per token; dense attention.
struct = "dense"
ffn_experts = 8
top_k = 2
