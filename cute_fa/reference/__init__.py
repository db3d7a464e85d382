"""The specification in plain PyTorch: ``dense`` is the mathematics, ``fa1`` … ``fa4`` are the
papers' algorithms under the kernels' names, ``fp8`` is what FP8 adds; ``schedule`` and ``traffic``
count what they cost. Written to be read; they hold all scores at once.
"""
