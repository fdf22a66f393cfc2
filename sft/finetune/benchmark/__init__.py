"""A training step measured on this machine, and what a step needs on paper.

In: shapes of gpt-oss, random weights and random conversations. Out: seconds of a step and of its
parts, for the recipe, for stock TRL and for the recipe with one lever changed.

options.BenchArguments, variants.PATHS   the flags of bench.py, and the paths it can measure
measure.measure_in                       one path, in a process of its own (process.run_to_end)
trainers.make_trainer                    a path's model and trainer, of synthetic weights and data
timing.Windows, timing.PartTimer         the time of steps, and of attention, experts and loss alone
results.table, scale.scale               the results shown; scaled from few layers to all
money, prices                            what a run costs; prices runs in SkyPilot's environment
"""
