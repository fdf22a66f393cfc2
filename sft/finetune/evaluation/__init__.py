"""Did it help? Scores and generated turns of a model.

In: a model, tokenised conversations, prompts. Out: loss, perplexity and token accuracy by channel;
generated turns and whether they are valid harmony, in the language asked for.

held_out.held_out_conversations   what a finished run is evaluated on
comparison.evaluate_model         one model on a TestSet; compare_evaluations puts two side by side
scoring.score, generation.generate, language.language_of, report.print_report
"""
