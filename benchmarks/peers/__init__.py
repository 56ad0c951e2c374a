"""One file per party of the recipe (``benchmarks/recipe.py``), run in an environment of its own.

These files import nothing of this library: what they share is the job (tokens, settings) and :mod:`.protocol`.
"""
