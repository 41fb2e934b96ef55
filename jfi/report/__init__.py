"""What a person reads: tables and figures of a campaign on record.

In: a summary and its manifest. Out: Markdown and PNG (`tables`).
"""
