"""DATE'23 reproduced: `reproduction` makes tables and figures, `sizes` the sample sizes."""
