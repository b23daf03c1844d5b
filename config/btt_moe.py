# BTT-MoE: inside every projection 8 Block Tensor-Train experts of rank 1, of which each token uses 2.
struct = "btt"
num_experts = 8
top_k = 2
