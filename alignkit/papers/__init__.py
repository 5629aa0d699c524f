"""Claims of papers with their evidence: `papers/<short>-<arxiv>/` holds claims, runs, results and a figure.

`claims.toml` says what is claimed and what would refute it, `run.py` has one function for each of its `[runs]`
(`name(seed) -> {metric: number or list}`), `results.jsonl` what came out, and `plot.py` draws it. Nothing here is
typed by hand but the claims: *holds*, *fails*, *differs* (the claim does not, the deviation that is described instead
does) and *not run* are computed.
"""
