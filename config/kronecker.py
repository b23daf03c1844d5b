# Kronecker product of two √d x √d matrices: ω = 1/2, each parameter is used √d times per token.
struct = "kronecker"
