# Every projection an ordinary dense matrix: the baseline.
struct = "dense"
