"""A training step measured on this machine.

In: shapes of gpt-oss, random weights and random conversations. Out: seconds of a step and of its
parts, for the recipe, for stock TRL and for the recipe but for one lever.

variants.PATHS, timing.time_parts, synthetic.make_model
"""
