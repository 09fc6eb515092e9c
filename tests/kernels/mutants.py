"""Wrong kernels: each change is one a test under the interpreter must notice.

`python -m pytest tests/kernels/test_triton.py -k mutant` copies the kernels, makes one change, and
expects interpreted_products.py, or interpreted_rows.py for rows.py, to fail.
"""

# name: (file, old text, new text, the tests that must fail)
MUTANTS = {
    "nibbles swapped": (
        "codes.py", "tl.join(high, low)", "tl.join(low, high)", "test_product[0]"),
    "scales of the next block": (
        "product.py", "code = tl.load(absmax + of_row + tl.minimum(k_w, K - 1) // BLOCK)",
        "code = tl.load(absmax + of_row + tl.minimum(k_w + BK, K - 1) // BLOCK)",
        "test_product"),
    "no mask beyond the last column": (
        "product.py", "((m < M) & (k_x + at < K))[:, None]", "(m < M)[:, None]", "test_product"),
    "bias left out": (
        "product.py", "acc += tl.load(bias", "acc += 0 * tl.load(bias", "test_product"),
    "bias added by every part": (
        "product.py", '"HAS_BIAS": bias is not None and not split',
        '"HAS_BIAS": bias is not None', "test_product"),
    "parts overlap": (
        "product.py", "first_k = part * steps * STEP", "first_k = part * (steps - 1) * STEP",
        "test_product"),
    "one part is not added": (
        "product.py", "tl.static_range(SPLIT)", "tl.static_range(SPLIT - 1)", "test_product"),
    "rows beyond the last are stored": (
        "product.py", "mask=(n < N)[:, None] & (m < M)[None, :])", "mask=(n < N)[:, None])",
        "test_product"),
    "gradient scaled by the wrong row": (
        "gradient.py", "later = tl.minimum(n_w + at + STEP, N - 1)",
        "later = tl.minimum(n_w + at, N - 1)", "test_gradient"),
    "a tie goes to the higher code": (
        "quantize.py", "scaled > MIDS[i]", "scaled >= MIDS[i]", "test_midpoints"),
    "a group of scales too far": (
        "codes.py", "block // GROUP", "(block + 1) // GROUP", "test_product"),
    "factors of the first slot for all rows": (
        "rows.py", "at = (slot * rank + r)[:, None]", "at = (0 * rank + r)[:, None]", "test_rows"),
    "the last used slot is left out": (
        "rows.py", "(slots > slot), slots, SLOTS)", "(slots > slot + 1), slots, SLOTS)",
        "test_rows"),
    "one part of h is not added": (
        "rows.py", "tl.static_range(PARTS)", "tl.static_range((PARTS + 1) // 2)", "test_rows"),
}  # fmt: skip
