"""Does a parallel layout give the single-process answer? `python -m nano3.parity` compares any of them on CPU ranks.

One small model of the architecture, one global batch of packed documents, random adapters with B not zero: on every
layout the first loss, the gradients, their norm and the adapters after three optimizer steps against one rank's.
"""
