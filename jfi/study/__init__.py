"""The front door: a study of a network in three lines, and its result for later.

For: whoever wants an answer and no engine room. In: a model, images and perhaps labels
(`study.study`), then the name of a sampler (`Study.run`). Out: a `result.Result`, made of the work
directory alone, that says it in a sentence, a table and data frames.
"""
