"""CuTe DSL programs with the mistakes that people make, each beside its sound twin."""
