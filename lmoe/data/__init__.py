"""Text to batches: tokenizers, sources, packing, the loader and the preparation of large corpora.

Nothing is imported here: reading or preparing text needs neither torch nor torchdata.
"""
