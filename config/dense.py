# Every projection an ordinary dense matrix: the baseline. GPT-2 small on OpenWebText.
struct = "dense"
