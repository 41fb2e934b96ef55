"""Verdicts: what each fault does on each image, exactly, by the fastest way known.

In: a `Network`, images, labels, sites, and faults in them. Out: `outcomes.Outcomes`. To the logits
(`split`, `patch`, `step`, `whole`, `loop`) or from cut to cut with proofs (`certify`, `curves`,
`radii`, `prune`); `routes` chooses, `verify` runs pairs again naively.
"""
