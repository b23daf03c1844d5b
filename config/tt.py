# Tensor-Train: a sum of ρ Kronecker products, ρ = d^(1/4) unless rank is set.
struct = "tt"
