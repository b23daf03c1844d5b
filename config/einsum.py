# A point of the continuous space without a name, between Monarch (θα = 1/2) and dense (θα = 1): ψ = 1, ν =
# 3/4, ω = 0.
struct = "einsum"
theta = (0.75, 0, 0.25, 0, 0.25, 0.75, 0)  # alpha, beta, gamma, delta, epsilon, phi, rho
