"""What a run leaves on disk, and when it can be trusted.

In: state dicts of the trainer and the folder of the run, maybe a mounted bucket. Out: complete
checkpoints to resume from, the artifact in `final`, a record of each launch.

saver.Saver                     saves in the background, step by step agreed by all ranks
manifest.resume_from            the newest complete checkpoint, its files checked
fingerprint.RunRecord           what a run trains on what; a resume under anything else is refused
artifact.save_artifact          weights or adapter, tokenizer and summary
history, bucket                 what interruptions cost; whether a file has reached the bucket
"""
