"""What reproductions of papers share: figures, and tables as Markdown."""
