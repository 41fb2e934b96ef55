"""Data sets: images and labels by name or from a file.

`sets` reads those there are, `events` recordings of event cameras and cochleas. The script prepares
sets and bins recordings.
"""
