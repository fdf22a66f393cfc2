"""What a run writes to its folder, and when that is complete.

In: state dicts of the trainer and the run's folder, which may be a mounted bucket. Out: complete
checkpoints to resume from, the artifact in `final`, a record of each launch.

saver.Saver                     saves in the background; all ranks decide together
manifest.complete_checkpoints   the checkpoints that can be used, the newest first
resume.resume_from              the newest complete checkpoint whose hashes are right
fence.Fence                     the newest launch's claim to the run; older launches stop
ownership.prune                 deletes old checkpoints, of what this run has written
contents.load_tensors           a checkpoint's tensors; its files are read as data, never executed
fingerprint.RunRecord           what a run trains on what; a checkpoint of another is refused
artifact.save_artifact          writes weights or adapter, tokenizer and summary
history.interruption_cost       what the launches' records say about interruptions
bucket.await_upload             returns when files have reached the bucket
"""
