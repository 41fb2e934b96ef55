"""SpikingJET reproduced: `reproduction` makes tables, beside the published figures."""
