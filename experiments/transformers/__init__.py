"""Transformers by component and bit: what is critical, and how many injections it takes to say."""
