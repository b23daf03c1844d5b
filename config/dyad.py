# DYAD: a block-diagonal matrix plus a permuted one, 4 blocks each. Variants: it, ot, dt.
struct = "dyad"
dyad_blocks = 4
dyad_variant = "it"
