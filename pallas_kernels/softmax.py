"""Constants of the running softmax, and the one convention for what a row of it leaves behind.

A kernel that returns a row's log-sum-exp returns `lse = log(sum_j exp(s_j))`, natural, in float32,
sinks included where the op has them, and `EMPTY_LSE` for a row without a visible key. Two partial
results (out_a, lse_a) and (out_b, lse_b) over disjoint keys then merge by

    lse = logaddexp(lse_a, lse_b);   out = exp(lse_a - lse) out_a + exp(lse_b - lse) out_b

Inside kernels the running maximum, sum and weighted values are called m, l and acc.
"""

import math

LOG2E = math.log2(math.e)
LN2 = math.log(2.0)
EMPTY_LSE = -math.inf        # of a row that sees no key and has no sink
MASKED = -1e30               # a hidden key's score inside kernels: finite, so that m - m is 0
INITIAL_MAX = -1e20          # m before the first key: exp2(MASKED - INITIAL_MAX) is 0
