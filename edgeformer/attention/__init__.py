"""
edgeformer block-DSA: attention over the key blocks that a small scorer keeps, which depend on the input.

    reference   the definition, in numpy          op        `edgeformer::dsa` in torch: the one copy of the schema
    kernel      the C core on numpy arrays        dsa       the same in plain torch, and the `Scorer` module
    scorer      trains and calibrates scorers     swap      puts them into transformers' models
    patterns    what it is compared with

Importing `op` registers the operators; `swap` also registers the attention with transformers.
"""
