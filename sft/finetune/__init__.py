"""What the scripts in sft/ are made of.

Imports point one way, from the scripts down (tests/test_imports.py checks it):

    scripts -> benchmark -> training, evaluation, export -> checkpoint -> arguments -> data, model
            -> task_file, node, launcher, preemption, spot_notice, rendezvous, summary, plot,
               command_line
            -> errors -> credentials
"""
