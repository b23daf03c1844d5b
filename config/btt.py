# Block Tensor-Train: a sum of ρ Monarch matrices, ρ = d^(1/4) unless rank is set.
struct = "btt"
