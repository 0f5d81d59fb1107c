"""Mathematics on one device: no ray, no mlflow, no process groups.

Begin with `transformer.py`, the whole model; then `decoder.py` and `hyper.py`, its layers;
`attention.py`, `sparse.py` and `compressed.py`, what V3, V3.2 and V4 attend to; `moe.py`, their
experts; and the package `fp8`, their numbers.

A tensor's name ends in its axes: `x_BSD` is [rows, positions, width]. These letters mean the same
in every file:

    B, S, T     rows (sequences); positions in a row; tokens, which are rows by positions
    D, V        width of the model; vocabulary
    E, K        routed experts; choices of a token, or entries kept for a query
    L           entries that are looked at: tokens, blocks, slots of a cache
    1, 2, 3     axes of that size

Others belong to an area, and each file's first lines say which it uses:

    attention   H heads, Q width of a query and key (or queries worked on together), N its part
                without position, R its rotary part, V width of a value, A query latent, C latent
                of keys and values, W a whole entry, P positions with angles
    indexers    J heads, I or W width of a head
    V4          M tokens of a block, N blocks being finished, U tokens of a window, R slots of a
                ring, E projected width or entries of either kind, G groups of heads, O their
                output latent, Y = G O
    experts     N visits or copies, R rows received, I inner width, J = 2 I gate and up side by
                side, G groups of experts, C visits of a few of them, M room for an expert
    streams     N streams, M weights that mix them
    memory      M tokens of an n-gram, H tables, E width, K taps, P tokens looked back over
    loss        N rows, C a chunk of them
    anywhere    X a product of axes, said where it is used
"""
