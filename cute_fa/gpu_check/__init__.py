"""Are the kernels of a bundle right, repeatable and fast on the GPU at hand?"""
