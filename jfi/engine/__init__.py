"""Verdicts: what each fault does on each image, exactly, by the fastest way known.

In: a `Network`, images, labels, sites, and faults in them. Out: `outcomes.Outcomes`. Two judges:
one runs pairs to the logits (`to_logits`: `split`, `patch`, `step`, `whole`, `loop`), one from cut
to cut with proofs (`cut_to_cut`: `certify`, `curves`, `radii`, `prune`); `routes` chooses,
`verify` runs pairs again naively.
"""
