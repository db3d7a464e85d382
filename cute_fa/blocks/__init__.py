"""The kernels' shared vocabulary: copies, layouts, tensor-core views, softmax, masks, block ranges.

Each file holds one concept; the rungs (fa1, fa2, …) repeat their main loops and share only these.
"""
