"""Triton kernels. Chunks here are C neighbouring tokens of the stream, whatever documents they
belong to: pairs of tokens of different documents are masked, so nothing is padded, and no table of
documents is needed, only where each token's document starts.
"""
