# Monarch: two block-diagonal matrices with a permutation between them.
struct = "monarch"
