"""The specification in plain PyTorch: ``dense`` is the mathematics, ``fa1`` and ``fa2`` are the
papers' algorithms under the kernels' names. Written to be read; they hold all scores at once.
"""
