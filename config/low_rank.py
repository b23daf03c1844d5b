# Low rank: W = B A through a bottleneck of rank √d.
struct = "low_rank"
