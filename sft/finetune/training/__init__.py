"""TRL's SFTTrainer as the recipes use it.

In: a model, a tokenised dataset, a Saver. Out: a trained model, and log entries with rates.

trainer.ResumableSFTTrainer     saves and resumes through torch DCP, on any number of ranks
callbacks.Throughput            tokens per second per GPU, MFU, peak memory in each log entry
callbacks.EvaluateAtEnd         evaluates the model that is saved at the end
watchdog.Watchdog               ends a run that hangs, and names the rank that caused it
log_line.LogLine                the line that is printed for each logged step and evaluation
num_steps.few_steps             a warning where a run has few optimizer steps
tracking.configure_wandb        one W&B run for all launches of a run
"""
