"""Align language models from human feedback without online RL, on megatron-core.

The four losses of arXiv 2308.12050 are one: SFT, FA, RWR and CA all minimise a weighted sum of
`-log p(token | prefix)` over response tokens and differ only in which rows are kept, what weight a
row has and what prefix it gets. Hence one trainer, two objectives and three small row functions.
"""

__version__ = "0.2.0"
